"""The layer shapes that the benchmarks time, and the least work that each of them needs.

The counts are those of the mathematics, the same for every implementation: an implementation that recomputes or moves
more gets no credit for it. ``floor_ms`` turns them into the time that no implementation can beat on the ceilings given.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD = "forward"
FORWARD_BACKWARD = "forward_backward"
FORWARD_CUDA_GRAPH = "forward_cuda_graph"
RECOMPUTE = "recompute"  # forward and backward that keeps as little as activation checkpointing does
PHASES = (FORWARD, FORWARD_BACKWARD, FORWARD_CUDA_GRAPH, RECOMPUTE)

INDEX_BYTES = 8  # routers hand out int64 expert ids


@dataclass(frozen=True)
class Layer:
    """The experts of one SwiGLU mixture-of-experts layer.

    With a ``lora_rank`` both projections have an adapter of that rank, and only adapters are trained.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    lora_rank: int = 0

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert: gate and up (2·I, H), down (H, I)."""
        return 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        return self.experts * self.expert_parameters

    @property
    def adapter_parameters(self) -> int:
        """Parameters of one expert's adapters: A (r, H) and B (2·I, r) of gate and up, A (r, I) and B (H, r) of down."""
        return self.lora_rank * (2 * self.hidden + 3 * self.intermediate)


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches where nothing is in the way."""

    bytes_per_second: float
    flops_per_second: float


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("qwen3-30b-a3b", hidden=2048, intermediate=768, experts=128, top_k=8),
        Layer("deepseek-v2-lite", hidden=2048, intermediate=1408, experts=64, top_k=6),
        # The shape of gpt-oss-20b with the plain SwiGLU of the others in the place of its own gate and biases.
        Layer("gpt-oss-20b-like", hidden=2880, intermediate=2880, experts=32, top_k=4),
        Layer("tiny", hidden=64, intermediate=32, experts=8, top_k=2),
    )
}
DEFAULT_LAYERS = ("qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b-like")


def _check_phase(phase: str) -> None:
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")


def flops(layer: Layer, tokens: int, phase: str) -> int:
    """Floating point operations of the grouped products; a multiply-add is two.

    Forward: two per weight and routed row. Backward: the same again for the gradient of the input, and again for that
    of what is trained, all weights or the adapters. Gate, combine and routing are left out: they are below a thousandth.
    """
    _check_phase(phase)
    weights, adapters = layer.expert_parameters, layer.adapter_parameters
    products = weights + adapters
    if phase in (FORWARD_BACKWARD, RECOMPUTE):
        products = 2 * products + (adapters or weights)
    return 2 * tokens * layer.top_k * products


def compulsory_bytes(
    layer: Layer,
    tokens: int,
    active_experts: float,
    phase: str,
    itemsize: int = 2,
    weight_bytes: float | None = None,
) -> float:
    """Bytes that must cross the memory bus, for activations and routing weights of ``itemsize`` bytes.

    A weight takes ``weight_bytes`` to read, ``itemsize`` unless given; adapters take ``itemsize``.

    Forward reads the weights of the experts that were chosen (``active_experts``, a mean over the inputs timed), the
    tokens and the routing, and writes a row per token. Backward reads the same weights and tokens again (they outlast
    the cache), the routing weights and the output's gradient, and writes the gradients of tokens, routing weights and
    of *all* experts' weights, or adapters, as a parameter's gradient is dense. What an implementation keeps between its
    own stages is not compulsory, nor is recomputing it: neither is counted.
    """
    _check_phase(phase)
    rows = tokens * layer.hidden * itemsize
    slots = tokens * layer.top_k
    expert_bytes = layer.expert_parameters * (itemsize if weight_bytes is None else weight_bytes)
    chosen_weights = active_experts * (expert_bytes + layer.adapter_parameters * itemsize)
    forward = chosen_weights + 2 * rows + slots * (INDEX_BYTES + itemsize)
    if phase not in (FORWARD_BACKWARD, RECOMPUTE):
        return forward
    backward_reads = chosen_weights + 2 * rows + slots * (INDEX_BYTES + itemsize)
    trained = layer.experts * (layer.adapter_parameters or layer.expert_parameters)
    backward_writes = trained * itemsize + rows + slots * itemsize
    return forward + backward_reads + backward_writes


def floor_ms(
    layer: Layer,
    tokens: int,
    active_experts: float,
    phase: str,
    ceilings: Ceilings,
    itemsize: int = 2,
    weight_bytes: float | None = None,
) -> float:
    """Milliseconds of the slower: the compulsory bytes at the copy ceiling, the operations at the matmul ceiling."""
    num_bytes = compulsory_bytes(layer, tokens, active_experts, phase, itemsize, weight_bytes)
    memory = num_bytes / ceilings.bytes_per_second
    compute = flops(layer, tokens, phase) / ceilings.flops_per_second
    return 1e3 * max(memory, compute)
