"""Times training LoRA on 4-bit experts: adapters inside our kernels, against plain torch and against PEFT.

    python -m benchmarks.experts_lora            one layer, ranks 16 and 64 (`make bench`)
    python -m benchmarks.experts_lora --quick    three sizes of it, writes nothing

A step is a forward and the gradients of the tokens, the routing weights and the adapters of both projections; the weights
are frozen. ``recompute`` is the step under activation checkpointing. All over one NF4 layer with double quantization, or
over what it dequantizes to, with the same adapters in bf16:

- ``moe_fused``: the kernel's ``moe_experts`` on ``Packed4bitWeights``, checkpointed by its own ``recompute=True``.
- ``composed``: bitsandbytes dequantizes a stack for each product and again for its gradient, so that no dense stack is
  kept; ``torch._grouped_mm`` multiplies with it and with the factors of the adapters, plain torch does the rest.
  Checkpointed by ``torch.utils.checkpoint``, all but the sorting.
- ``peft``: stock PEFT's ``target_parameters`` on Transformers' experts (``grouped_mm``) in bf16. It merges the adapters into
  all experts on every pass and computes the gradient of all weights to get those of the adapters.
- ``attention_only``: ``moe_fused`` without adapters, as where LoRA is on attention alone: what adapters cost.
- ``moe_fused_bf16``: ``moe_experts`` on the dense weights with the same adapters; what four times the memory buys.

bitsandbytes quantizes a stack as a whole and we an expert at a time, so the two have other second-level scales, and
results that differ by less than the rounding of bf16 products does.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch
import typer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_fused.benchmark import harness
from moe_fused.benchmark.harness import Call, UnavailableError
from moe_fused.benchmark.inputs import DTYPE, Inputs, random_weights
from moe_fused.benchmark.layers import DEFAULT_LAYERS, FORWARD_BACKWARD, RECOMPUTE, Layer

from . import runner
from .experts_4bit import BLOCKSIZE, QUANT_TYPE, BitsandbytesStack, sort_slots, sum_by_token
from .rows import OURS
from .runner import Benchmark, Contenders, Implementation, MakeCall

SCALING = 2.0  # alpha is twice the rank
# Outputs of an adapter over those of the weights: so much that an error in it cannot hide in the tolerance.
ADAPTER_SHARE = 0.5


class Stack(Protocol):
    """Expert matrices in 4 bits."""

    def dequantize(self) -> Tensor:
        """As a dense (E, out, in)."""


@dataclass(frozen=True)
class Factors:
    """One adapter of a stack: a (E, r, in) and b (E, out, r), trained."""

    a: Tensor
    b: Tensor

    @classmethod
    def random(
        cls, experts: int, out_features: int, in_features: int, rank: int, generator: torch.Generator
    ) -> Factors:
        """Normal, and unlike a new adapter's not zero in b, which would leave a without a gradient."""

        def normal(*shape: int, std: float) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=generator.device, dtype=DTYPE)
            return values.mul_(std).requires_grad_()

        return cls(
            normal(experts, rank, in_features, std=in_features**-0.5),
            normal(experts, out_features, rank, std=ADAPTER_SHARE / SCALING * rank**-0.5),
        )


@dataclass(frozen=True)
class Adapters:
    """Those of one layer."""

    gate_up: Factors
    down: Factors

    @classmethod
    def random(cls, layer: Layer, generator: torch.Generator) -> Adapters:
        experts, hidden, intermediate, rank = layer.experts, layer.hidden, layer.intermediate, layer.lora_rank
        return cls(
            Factors.random(experts, 2 * intermediate, hidden, rank, generator),
            Factors.random(experts, hidden, intermediate, rank, generator),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {
            "gate_up.a": self.gate_up.a,
            "gate_up.b": self.gate_up.b,
            "down.a": self.down.a,
            "down.b": self.down.b,
        }


class _Gather(torch.autograd.Function):
    """Each row's token. Autograd's own gradient of it would be atomic additions in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot_of_row: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slot_of_row)
        ctx.top_k = top_k
        return x[slot_of_row // top_k]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot_of_row,) = ctx.saved_tensors
        return sum_by_token(grad, slot_of_row, ctx.top_k), None, None


class _SumByToken(torch.autograd.Function):
    """The reverse. Autograd's own gradient would take a pass more over the rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slot_of_row: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slot_of_row)
        ctx.top_k = top_k
        return sum_by_token(rows, slot_of_row, top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slot_of_row,) = ctx.saved_tensors
        return grad[slot_of_row // ctx.top_k], None, None


class _FrozenProduct(torch.autograd.Function):
    """rows (S, in) times a 4-bit stack, which is dequantized for this and again for the gradient, never kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stack: Stack, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        ctx.stack = stack
        return torch._grouped_mm(rows, stack.dequantize().mT, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ends,) = ctx.saved_tensors
        return torch._grouped_mm(grad, ctx.stack.dequantize(), offs=ends), None, None


def _projection(rows: Tensor, stack: Stack, factors: Factors | None, ends: Tensor) -> Tensor:
    y: Tensor = _FrozenProduct.apply(rows, stack, ends)
    if factors is None:
        return y
    # Scaled where it is thin: forward and backward then have no pass more over wide rows.
    left = SCALING * torch._grouped_mm(rows, factors.a.mT, offs=ends)
    return y + torch._grouped_mm(left, factors.b.mT, offs=ends)


def composed(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    recompute: bool,
    gate_up_proj: Stack,
    down_proj: Stack,
    adapters: Adapters | None,
    num_experts: int,
) -> Tensor:
    """The experts as plain torch around ``torch._grouped_mm``; never waits for the GPU, one dense stack at a time."""
    top_k = top_k_index.shape[1]
    slot_of_row, ends = sort_slots(top_k_index, num_experts)

    def experts(x: Tensor, weights: Tensor) -> Tensor:
        rows = _Gather.apply(x, slot_of_row, top_k)
        gate_up = _projection(rows, gate_up_proj, adapters.gate_up if adapters else None, ends)
        gate, up = gate_up.chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        z = _projection(h, down_proj, adapters.down if adapters else None, ends)
        z = z * weights.flatten().index_select(0, slot_of_row)[:, None]
        y: Tensor = _SumByToken.apply(z, slot_of_row, top_k)
        return y

    return _maybe_checkpointed(experts, recompute, hidden_states, top_k_weights)


def _maybe_checkpointed(function: Callable[..., Tensor], recompute: bool, *inputs: Tensor) -> Tensor:
    if not recompute:
        return function(*inputs)
    # Nothing here is random, so nobody pays for the state of the generators.
    y: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return y


Forward = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""Maps hidden_states (T, H), top_k_index (T, K), top_k_weights (T, K) and whether to recompute to (T, H)."""


def _as_it_is(_: str, grad: Tensor) -> Tensor:
    return grad


@dataclass(frozen=True)
class Trained:
    """An implementation and what it trains.

    Attributes:
        factors: the tensors whose gradients it computes, by the names of ``Adapters.tensors``.
        neutral: brings a gradient into the layout of ``Factors``, given its name; without a copy, as it is timed.
    """

    forward: Forward
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    neutral: Callable[[str, Tensor], Tensor] = _as_it_is

    def make_call(self, inputs: Sequence[Inputs], phase: str) -> Call:
        """``call(i)``: one step on input set ``i`` modulo their number; returns the results by name."""

        def call(i: int) -> dict[str, Tensor]:
            input_set = inputs[i % len(inputs)]
            x, weights = input_set.hidden_states, input_set.top_k_weights
            y = self.forward(x, input_set.top_k_index, weights, phase == RECOMPUTE)
            x_grad, weights_grad, *grads = torch.autograd.grad(
                y, (x, weights, *self.factors.values()), input_set.grad_output
            )
            named = zip(self.factors, grads, strict=True)
            return {
                "output": y,
                "hidden_states.grad": x_grad,
                "top_k_weights.grad": weights_grad,
                **{f"{name}.grad": self.neutral(name, grad) for name, grad in named},
            }

        return call


def fused(kernel: ModuleType, gate_up: Any, down: Any, adapters: Adapters | None) -> Trained:
    """The kernel's experts over weights in any form that it takes."""
    loras: dict[str, Any] = {}
    if adapters is not None:
        loras = {
            "gate_up_lora": kernel.LoraWeights(adapters.gate_up.a, adapters.gate_up.b, SCALING),
            "down_lora": kernel.LoraWeights(adapters.down.a, adapters.down.b, SCALING),
        }

    def forward(x: Tensor, index: Tensor, weights: Tensor, recompute: bool) -> Tensor:
        y: Tensor = kernel.moe_experts(x, index, weights, gate_up, down, **loras, recompute=recompute)
        return y

    return Trained(forward, adapters.tensors if adapters else {})


def peft(layer: Layer, gate_up: Tensor, down: Tensor, adapters: Adapters) -> Trained:
    """Stock PEFT over Transformers' experts, with copies of ``adapters`` in its own layout."""
    from peft import LoraConfig, get_peft_model

    from .experts import experts_module

    class Block(nn.Module):
        """PEFT finds parameters by their module's name, so the experts must have one."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = experts_module(layer, "grouped_mm", nn.Parameter(gate_up), nn.Parameter(down))

        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            y: Tensor = self.experts(x, index, weights)
            return y

    config = LoraConfig(
        r=layer.lora_rank,
        lora_alpha=round(SCALING * layer.lora_rank),
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = get_peft_model(Block(), config, autocast_adapter_dtype=False)
    wrappers: dict[str, Any] = {
        str(module.parameter_name): module for module in model.modules() if hasattr(module, "parameter_name")
    }

    def neutral(name: str, value: Tensor) -> Tensor:
        # A (E·r, in) has the experts outside, B (out, r·E) inside.
        if name.endswith(".a"):
            return value.view(layer.experts, layer.lora_rank, -1)
        return value.view(-1, layer.lora_rank, layer.experts).permute(2, 0, 1)

    factors: dict[str, Tensor] = {}
    for projection in ("gate_up", "down"):
        wrapper = wrappers[f"{projection}_proj"]
        factors[f"{projection}.a"] = wrapper.lora_A["default"].weight
        factors[f"{projection}.b"] = wrapper.lora_B["default"].weight
    with torch.no_grad():
        for name, value in adapters.tensors.items():
            neutral(name, factors[name]).copy_(value)

    def forward(x: Tensor, index: Tensor, weights: Tensor, recompute: bool) -> Tensor:
        return _maybe_checkpointed(model, recompute, x, index, weights)

    return Trained(forward, factors, neutral)


def _missing(package: str) -> MakeCall:
    """In the place of an implementation that needs ``package``."""

    def call(_: int) -> Any:
        raise UnavailableError(f"{package} is not installed")

    return lambda _inputs, _phase: call


def make_contenders(kernel: ModuleType, names: Sequence[str], layer: Layer, generator: torch.Generator) -> Contenders:
    """Implementations by name over one random layer and its adapters."""
    gate_up, down = random_weights(layer, generator)
    adapters = Adapters.random(layer, generator)

    def quantized(weight: Tensor, projections: int) -> Any:
        return kernel.Packed4bitWeights.quantize(
            weight, quant_type=QUANT_TYPE, blocksize=BLOCKSIZE, double_quant=True, projections=projections
        )

    packed = (quantized(gate_up, 2), quantized(down, 1))
    trained = {
        OURS: fused(kernel, *packed, adapters),
        "attention_only": fused(kernel, *packed, None),
    }

    def plain(gate_up: Stack, down: Stack, adapters: Adapters | None) -> Trained:
        def forward(x: Tensor, index: Tensor, weights: Tensor, recompute: bool) -> Tensor:
            return composed(x, index, weights, recompute, gate_up, down, adapters, layer.experts)

        return Trained(forward, adapters.tensors if adapters else {})

    if "composed" in names:
        trained["composed"] = plain(BitsandbytesStack.quantize(gate_up), BitsandbytesStack.quantize(down), adapters)
    has_peft = importlib.util.find_spec("peft") is not None
    if {"peft", "moe_fused_bf16"} & set(names):
        dense = packed[0].dequantize(), packed[1].dequantize()
        trained["moe_fused_bf16"] = fused(kernel, *dense, adapters)
        if "peft" in names and has_peft:
            trained["peft"] = peft(layer, *dense, adapters)
    calls = {name: trained[name].make_call if name in trained else _missing(name) for name in names}
    # Without adapters there are other results than the baseline's.
    expected = {"attention_only": plain(*packed, None).make_call} if "attention_only" in names else {}
    weight_bytes = sum(stack.nbytes for stack in packed) / layer.parameters
    return Contenders(calls, weight_bytes, expected=expected)


def setup(names: Sequence[str]) -> runner.Prepare:
    """Loads the kernel.

    Raises:
        typer.Exit: with code 2 and one line on stderr, if bitsandbytes is needed and missing.
    """
    if "composed" in names and importlib.util.find_spec("bitsandbytes") is None:
        typer.echo("composed needs bitsandbytes, which is not installed; `--implementation` chooses others", err=True)
        raise typer.Exit(2)
    return functools.partial(make_contenders, runner.load_kernel(), names)


BENCHMARK = Benchmark(
    name="experts_lora",
    about="Times training LoRA on 4-bit MoE experts and writes rows and a plot under benchmarks/results.",
    implementations=(
        Implementation(OURS, QUANT_TYPE),
        Implementation("composed", QUANT_TYPE),
        Implementation("peft", "bf16"),
        Implementation("attention_only", QUANT_TYPE),
        Implementation("moe_fused_bf16", "bf16"),
    ),
    setup=setup,
    layers=DEFAULT_LAYERS[:1],
    tokens=(128, 512, 2048, 4096, 16384),
    quick_tokens=(512, 4096, 16384),
    phases=(FORWARD_BACKWARD, RECOMPUTE),
    lora_ranks=(16, 64),
    weights=QUANT_TYPE,
    # A merged adapter, one added to a rounded product and one in the product's own sum differ by 0.01 of the whole.
    tolerance=2 * harness.TOLERANCE,
)
main = runner.command(BENCHMARK)


if __name__ == "__main__":
    typer.run(main)
