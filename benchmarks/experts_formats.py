"""Times experts in each 4-bit format: nf4, and mxfp4 and nvfp4 as checkpoints are published.

    python -m benchmarks.experts_formats            two layers, rank 16, within 3 minutes on an H200
    python -m benchmarks.experts_formats --quick    three sizes of them, writes nothing

``forward`` is a forward without gradients and without adapters' gradients, and ``recompute`` a step under activation
checkpointing, with the gradients of the tokens, the routing weights and the adapters of both projections, as in
``experts_lora``. All over one layer of random weights, quantized to each format:

- ``moe_fused``: the kernel's ``moe_experts`` over nf4 with double quantization, which the others are compared with.
- ``moe_fused_mxfp4``, ``moe_fused_nvfp4``: the same over these formats.
- ``composed_mxfp4``, ``composed_nvfp4``: ``experts_lora.composed`` over the same bytes. A stack is dequantized for each
  product and again for its gradient by ``Packed4bitWeights.dequantize``, which is our own kernel: neither Transformers nor
  compressed-tensors has one that is as fast. ``torch._grouped_mm`` multiplies.

Each format has other rounded weights, so what ours compute is compared with ``composed`` over the same bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import typer
from torch import Tensor

from moe_fused.benchmark import harness
from moe_fused.benchmark.harness import Call
from moe_fused.benchmark.inputs import Inputs, random_weights
from moe_fused.benchmark.layers import FORWARD, RECOMPUTE, Layer

from . import runner
from .experts_lora import Adapters, Trained, composed, fused
from .rows import OURS
from .runner import Benchmark, Contenders, Implementation

BASE = "nf4"
PUBLISHED = ("mxfp4", "nvfp4")
LAYERS = ("qwen3-30b-a3b", "gpt-oss-20b-like")


def ours(quant_type: str) -> str:
    """The name of our implementation over a format."""
    return OURS if quant_type == BASE else f"{OURS}_{quant_type}"


def plain(quant_type: str) -> str:
    """The name of the implementation in plain torch over a format."""
    return f"composed_{quant_type}"


def make_contenders(kernel: ModuleType, names: Sequence[str], layer: Layer, generator: torch.Generator) -> Contenders:
    """Implementations by name over one random layer and its adapters."""
    gate_up, down = random_weights(layer, generator)
    adapters = Adapters.random(layer, generator)
    calls: dict[str, runner.MakeCall] = {}
    expected: dict[str, runner.MakeCall] = {}
    stored: dict[str, float] = {}
    for quant_type in (BASE, *PUBLISHED):
        if not {ours(quant_type), plain(quant_type)} & set(names):
            continue
        up_stack, down_stack = (
            kernel.Packed4bitWeights.quantize(weight, quant_type=quant_type, projections=projections)
            for weight, projections in ((gate_up, 2), (down, 1))
        )
        stored[quant_type] = (up_stack.nbytes + down_stack.nbytes) / layer.parameters
        reference = _call(_composed(up_stack, down_stack, adapters, layer), adapters)
        calls[ours(quant_type)] = _call(fused(kernel, up_stack, down_stack, adapters).forward, adapters)
        expected[ours(quant_type)] = reference
        calls[plain(quant_type)] = reference
        expected[plain(quant_type)] = reference
    remark = ", ".join(f"{quant_type} {size:.4f}" for quant_type, size in stored.items())
    chosen = {name: calls[name] for name in names}
    return Contenders(chosen, stored.get(BASE, min(stored.values())), f"bytes per parameter: {remark}", expected)


def _composed(gate_up: Any, down: Any, adapters: Adapters, layer: Layer) -> Any:
    def forward(x: Tensor, index: Tensor, weights: Tensor, recompute: bool) -> Tensor:
        return composed(x, index, weights, recompute, gate_up, down, adapters, layer.experts)

    return forward


def _call(forward: Any, adapters: Adapters) -> runner.MakeCall:
    """A step of training in one phase, and the forward alone in the other."""
    trained = Trained(forward, adapters.tensors)

    def make_call(inputs: Sequence[Inputs], phase: str) -> Call:
        if phase == RECOMPUTE:
            return trained.make_call(inputs, phase)

        def call(i: int) -> dict[str, Tensor]:
            chosen = inputs[i % len(inputs)]
            with torch.no_grad():
                return {"output": forward(chosen.hidden_states, chosen.top_k_index, chosen.top_k_weights, False)}

        return call

    return make_call


def setup(names: Sequence[str]) -> runner.Prepare:
    """Loads the kernel."""
    return functools.partial(make_contenders, runner.load_kernel(), names)


BENCHMARK = Benchmark(
    name="experts_formats",
    about="Times MoE experts in nf4, mxfp4 and nvfp4 and writes rows and a plot under benchmarks/results.",
    implementations=(
        Implementation(OURS, BASE),
        *(Implementation(ours(quant_type), quant_type) for quant_type in PUBLISHED),
        *(Implementation(plain(quant_type), quant_type) for quant_type in PUBLISHED),
    ),
    setup=setup,
    layers=LAYERS,
    tokens=(8, 512, 4096, 16384),
    quick_tokens=(8, 512, 4096),
    phases=(FORWARD, RECOMPUTE),
    lora_ranks=(16,),
    weights=BASE,
    # A merged adapter, one added to a rounded product and one in the product's own sum differ by 0.01 of the whole.
    tolerance=2 * harness.TOLERANCE,
)
main = runner.command(BENCHMARK)


if __name__ == "__main__":
    typer.run(main)
