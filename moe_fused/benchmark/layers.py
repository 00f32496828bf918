"""The layer shapes that the benchmarks time, and the least work that each of them needs.

The counts are those of the mathematics, the same for every implementation: an implementation that recomputes or moves
more gets no credit for it. ``floor_ms`` turns them into the time that no implementation can beat on the ceilings given.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD = "forward"
FORWARD_BACKWARD = "forward_backward"
FORWARD_CUDA_GRAPH = "forward_cuda_graph"
PHASES = (FORWARD, FORWARD_BACKWARD, FORWARD_CUDA_GRAPH)

INDEX_BYTES = 8  # routers hand out int64 expert ids


@dataclass(frozen=True)
class Layer:
    """The experts of one SwiGLU mixture-of-experts layer."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert: gate and up (2·I, H), down (H, I)."""
        return 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        return self.experts * self.expert_parameters


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
    of the weights. Gate, combine and routing are left out: they are below a thousandth.
    """
    _check_phase(phase)
    forward = 2 * tokens * layer.top_k * layer.expert_parameters
    return 3 * forward if phase == FORWARD_BACKWARD else forward


def compulsory_bytes(
    layer: Layer,
    tokens: int,
    active_experts: float,
    phase: str,
    itemsize: int = 2,
    weight_bytes: float | None = None,
) -> float:
    """Bytes that must cross the memory bus, for activations and routing weights of ``itemsize`` bytes.

    A parameter takes ``weight_bytes`` to read, ``itemsize`` unless given.

    Forward reads the weights of the experts that were chosen (``active_experts``, a mean over the inputs timed), the
    tokens and the routing, and writes a row per token. Backward reads the same weights and tokens again (they outlast
    the cache), the routing weights and the output's gradient, and writes the gradients of tokens, routing weights and
    of *all* weights, as a parameter's gradient is dense. What an implementation keeps between its own stages is not
    compulsory: it is not counted.
    """
    _check_phase(phase)
    rows = tokens * layer.hidden * itemsize
    slots = tokens * layer.top_k
    chosen_weights = active_experts * layer.expert_parameters * (itemsize if weight_bytes is None else weight_bytes)
    forward = chosen_weights + 2 * rows + slots * (INDEX_BYTES + itemsize)
    if phase != FORWARD_BACKWARD:
        return forward
    backward_reads = chosen_weights + 2 * rows + slots * (INDEX_BYTES + itemsize)
    backward_writes = layer.parameters * itemsize + rows + slots * itemsize
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
