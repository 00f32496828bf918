"""Times the forward of 4-bit experts: decoded inside our kernels, against dequantizing first and against dense weights.

    python -m benchmarks.experts_4bit            one layer, within 2 minutes on an H100 (`make bench`)
    python -m benchmarks.experts_4bit --quick    three sizes of it, writes nothing

All over one NF4 layer with double quantization, without gradients:

- ``moe_fused``: the kernel's ``moe_experts`` on ``Packed4bitWeights``, as users call it.
- ``composed``: bitsandbytes dequantizes both stacks, plain torch around ``torch._grouped_mm`` does the rest.
- ``dequantize_first``: the same with decoding inside the products switched off, so that a part of the experts at a time is
  decoded into the bounded workspace: what decoding inside must beat where it is chosen.
- ``dequantize_whole``: ``Packed4bitWeights.dequantize`` of both stacks, then ``moe_experts`` on the dense weights: the plain
  way, in four times the memory of the packed weights.
- ``moe_fused_bf16``: ``moe_experts`` on the same weights, dequantized once and kept; what four times the memory buys.
- ``triton_kernels``, where it is installed: Triton's own kernels over the same weights in MXFP4, which is the 4-bit format
  that they have. Its results must be those of ``composed`` over these MXFP4 weights.

bitsandbytes quantizes a stack as a whole and we an expert at a time, so the two have other second-level scales, and
results that differ by less than the rounding of bf16 products does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import Tensor

from moe_fused.benchmark.harness import Call
from moe_fused.benchmark.inputs import Inputs, random_weights
from moe_fused.benchmark.layers import DEFAULT_LAYERS, FORWARD, FORWARD_CUDA_GRAPH, Layer

from . import runner, triton_experts
from .rows import OURS
from .runner import Benchmark, Contenders, Forward, Implementation, MakeCall, forward_call
from .triton_experts import Mxfp4Stack

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

QUANT_TYPE = "nf4"
BLOCKSIZE = 64


@dataclass(frozen=True)
class BitsandbytesStack:
    """A stack of expert matrices as bitsandbytes packs it: one flat tensor, one state."""

    packed: Tensor
    state: QuantState
    shape: torch.Size

    @classmethod
    def quantize(cls, weight: Tensor) -> BitsandbytesStack:
        """Quantizes ``weight`` (E, out, in) as one matrix."""
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(
            weight.flatten(0, 1), blocksize=BLOCKSIZE, compress_statistics=True, quant_type=QUANT_TYPE
        )
        return cls(packed, state, weight.shape)

    def dequantize(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(self.packed, self.state)
        return weight.view(self.shape)


def sort_slots(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The slot of each row (T·K,), rows sorted by expert, and where the rows of each expert end (E,) int32."""
    expert_of_row, slot_of_row = top_k_index.flatten().sort()
    # One launch, where counting and summing up would be four.
    next_expert = torch.arange(1, num_experts + 1, device=expert_of_row.device)
    return slot_of_row, torch.searchsorted(expert_of_row, next_expert, out_int32=True)


def sum_by_token(rows: Tensor, slot_of_row: Tensor, top_k: int) -> Tensor:
    """The sum (T, H) of each token's ``top_k`` rows of ``rows`` (T·K, H)."""
    return torch.empty_like(rows).index_copy_(0, slot_of_row, rows).view(-1, top_k, rows.shape[1]).sum(1)


def composed(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: BitsandbytesStack | Mxfp4Stack,
    down_proj: BitsandbytesStack | Mxfp4Stack,
) -> Tensor:
    """The experts as plain torch around ``torch._grouped_mm``; never waits for the GPU, one dense stack at a time."""
    top_k = top_k_index.shape[1]
    slot_of_row, ends = sort_slots(top_k_index, gate_up_proj.shape[0])
    rows = hidden_states[slot_of_row // top_k]
    gate, up = torch._grouped_mm(rows, gate_up_proj.dequantize().mT, offs=ends).chunk(2, dim=-1)
    h = torch.nn.functional.silu(gate) * up
    z = torch._grouped_mm(h, down_proj.dequantize().mT, offs=ends)
    z = z * top_k_weights.flatten()[slot_of_row, None]
    return sum_by_token(z, slot_of_row, top_k)


def make_forwards(
    kernel: ModuleType, names: Sequence[str], gate_up: Tensor, down: Tensor
) -> tuple[dict[str, Forward], int]:
    """Forwards by implementation name over ``gate_up`` and ``down`` in 4 bits, and the bytes that ours are stored in."""

    def quantized(weight: Tensor, projections: int) -> Any:
        return kernel.Packed4bitWeights.quantize(
            weight, quant_type=QUANT_TYPE, blocksize=BLOCKSIZE, double_quant=True, projections=projections
        )

    packed = (quantized(gate_up, 2), quantized(down, 1))

    def fused(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = kernel.moe_experts(x, index, weights, *packed)
        return y

    tuning: Any = importlib.import_module(f"{kernel.__name__}.tuning")

    def dequantize_first(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        chosen, tuning.dequantizes_in_product = tuning.dequantizes_in_product, lambda *_: False
        try:
            return fused(x, index, weights)
        finally:
            tuning.dequantizes_in_product = chosen

    def dequantize_whole(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = kernel.moe_experts(x, index, weights, *(stack.dequantize() for stack in packed))
        return y

    forwards = {OURS: fused, "dequantize_first": dequantize_first, "dequantize_whole": dequantize_whole}
    if "composed" in names:
        stacks = [BitsandbytesStack.quantize(weight) for weight in (gate_up, down)]
        forwards["composed"] = lambda *inputs: composed(*inputs, *stacks)
    if "moe_fused_bf16" in names:
        dense = [stack.dequantize() for stack in packed]
        forwards["moe_fused_bf16"] = lambda *inputs: kernel.moe_experts(*inputs, *dense)
    made: dict[str, Forward] = {name: forwards[name] for name in names if name != triton_experts.NAME}
    return made, sum(stack.nbytes for stack in packed)


def setup(names: Sequence[str]) -> runner.Prepare:
    """Loads the kernel, and bitsandbytes if it is among the competitors.

    Raises:
        typer.Exit: with code 2 and one line on stderr, if bitsandbytes is missing.
    """
    if "composed" in names and importlib.util.find_spec("bitsandbytes") is None:
        typer.echo("composed needs bitsandbytes, which is not installed; `--implementation` chooses others", err=True)
        raise typer.Exit(2)
    kernel = runner.load_kernel()

    def prepare(layer: Layer, generator: torch.Generator) -> Contenders:
        gate_up, down = random_weights(layer, generator)
        forwards, stored = make_forwards(kernel, names, gate_up, down)
        expected: dict[str, MakeCall] = {}
        if triton_experts.NAME in names:
            stacks = (Mxfp4Stack.quantize(gate_up), Mxfp4Stack.quantize(down))
            forwards[triton_experts.NAME] = triton_experts.mxfp4_forward(*stacks)
            # Weights in another format give other results than the baseline's.
            reference = functools.partial(composed, gate_up_proj=stacks[0], down_proj=stacks[1])
            expected[triton_experts.NAME] = functools.partial(_make_call, reference)
        calls = {name: functools.partial(_make_call, forward) for name, forward in forwards.items()}
        weight_bytes = stored / layer.parameters
        return Contenders(calls, weight_bytes, f"{OURS} stores {weight_bytes:.4f} bytes per parameter", expected)

    return prepare


def _make_call(forward: Forward, inputs: Sequence[Inputs], _phase: str) -> Call:
    return forward_call(forward, inputs)


BENCHMARK = Benchmark(
    name="experts_4bit",
    about="Times the forward of 4-bit MoE experts and writes rows and a plot under benchmarks/results.",
    implementations=(
        Implementation(OURS, QUANT_TYPE),
        Implementation("composed", QUANT_TYPE),
        Implementation("dequantize_first", QUANT_TYPE),
        Implementation("dequantize_whole", QUANT_TYPE),
        Implementation("moe_fused_bf16", "bf16"),
        Implementation(triton_experts.NAME, "mxfp4", forward_only=True, unavailable=triton_experts.unavailable),
    ),
    setup=setup,
    layers=DEFAULT_LAYERS[:1],
    tokens=(1, 8, 32, 128, 512, 1024, 2048, 4096, 16384),
    quick_tokens=(1, 512, 4096),
    phases=(FORWARD, FORWARD_CUDA_GRAPH),
    weights=QUANT_TYPE,
)
main = runner.command(BENCHMARK)


if __name__ == "__main__":
    typer.run(main)
