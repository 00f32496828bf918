"""The layer shapes that the benchmarks time, and their roofline.

Operations and bytes are counted from the mathematics and are the same for every implementation. An implementation that
recomputes or moves more gets no credit for it. ``roofline_ms`` turns the counts into the time that no implementation can
beat on a GPU with given ceilings.
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
        """Counts the parameters of one expert: gate and up (2·I, H), down (H, I)."""
        return 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        return self.experts * self.expert_parameters

    @property
    def adapter_parameters(self) -> int:
        """Counts the parameters of one expert's adapters.

        Gate and up have A (r, H) and B (2·I, r), and down has A (r, I) and B (H, r).
        """
        return self.lora_rank * (2 * self.hidden + 3 * self.intermediate)


@dataclass(frozen=True)
class Ceilings:
    """The bandwidth and the throughput that a GPU reaches in a plain copy and in a plain product of matrices."""

    bytes_per_second: float
    flops_per_second: float


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("qwen3-30b-a3b", hidden=2048, intermediate=768, experts=128, top_k=8),
        Layer("deepseek-v2-lite", hidden=2048, intermediate=1408, experts=64, top_k=6),
        # The shape of gpt-oss-20b, with the plain SwiGLU of the other layers instead of its activation and biases.
        Layer("gpt-oss-20b-like", hidden=2880, intermediate=2880, experts=32, top_k=4),
        Layer("tiny", hidden=64, intermediate=32, experts=8, top_k=2),
    )
}
DEFAULT_LAYERS = ("qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b-like")


def _check_phase(phase: str) -> None:
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")


def flops(layer: Layer, tokens: int, phase: str) -> int:
    """Counts the floating point operations of the grouped GEMMs; a multiply-add counts as two.

    The forward takes two operations for each weight and routed row. The backward takes the same again for the gradient of
    the input, and again for the gradient of what is trained, which is all weights or the adapters. Activation, combine and
    routing are left out, because they are less than a thousandth.
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
    """Counts the bytes that must cross the memory bus, for activations and routing weights of ``itemsize`` bytes.

    A weight takes ``weight_bytes`` to read, by default ``itemsize``. Adapters take ``itemsize``.

    The forward reads the weights of the experts that were chosen (``active_experts``, a mean over the inputs timed), the
    tokens and the routing, and writes a row per token. The backward reads the same weights and tokens again, because they do
    not fit into the cache, and the routing weights and the output's gradient. It writes the gradients of tokens and routing
    weights, and of the weights or adapters of *all* experts, because a parameter's gradient is dense. What an
    implementation keeps between its own stages is not compulsory and is not counted, and neither is what it recomputes.
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


def roofline_ms(
    layer: Layer,
    tokens: int,
    active_experts: float,
    phase: str,
    ceilings: Ceilings,
    itemsize: int = 2,
    weight_bytes: float | None = None,
) -> float:
    """Returns the least time in milliseconds: that of the bytes or that of the operations, whichever takes longer."""
    num_bytes = compulsory_bytes(layer, tokens, active_experts, phase, itemsize, weight_bytes)
    memory = num_bytes / ceilings.bytes_per_second
    compute = flops(layer, tokens, phase) / ceilings.flops_per_second
    return 1e3 * max(memory, compute)
