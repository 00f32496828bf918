"""Adapters for the tests: cases of ``moe_experts`` with them, and the formulas they are held against.

The truth forms W + s·B·A in float64 and knows nothing of adapters from there on. What plain torch makes of the same in the
dtype of the kernels is x·Wᵀ + s·(x·Aᵀ)·Bᵀ, expert by expert: weights merged in low precision would excuse larger errors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel.accuracy import FLOOR, assert_accurate
from tests.kernel.cases import Inputs, gradients, plain_experts, plain_gate, seeded, with_gaps
from tests.kernel.machine import DEVICE, DTYPES, INTERPRETED, kernel, name_of
from tests.kernel.packed_cases import PackedCase, PackedInputs, make_packed_inputs, packed_gradients, run_packed

LoraWeights = kernel.LoraWeights

# An adapter's argument and the weights that it adapts.
ADAPTED = {"gate_up_lora": "gate_up_proj", "down_lora": "down_proj"}


@dataclass(frozen=True)
class Factors:
    """One adapter of one projection.

    Attributes:
        separate: gate and up have an A each.
        dtype: the factors' dtype; None takes that of the other tensors.
        layout: how they lie in memory. "peft": B as PEFT's parameter (out, r·E) shows it; "gaps": no dimension is
            contiguous.
    """

    rank: int = 5
    separate: bool = False
    scaling: float = 0.5
    dtype: torch.dtype | None = None
    layout: str = "contiguous"
    dropout: float = 0.0

    def make(self, rng: torch.Generator, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Random A and B for weights of ``shape`` (E, out, in)."""
        num_experts, out_features, in_features = shape
        rows = self.rank * (2 if self.separate else 1)

        def normal(*size: int, scale: float) -> Tensor:
            value = torch.randn(size, generator=rng, dtype=torch.float64) * scale
            return value.to(DEVICE, self.dtype or dtype)

        a = normal(num_experts, rows, in_features, scale=in_features**-0.5)
        b = normal(num_experts, out_features, self.rank, scale=self.rank**-0.5)
        if self.layout == "peft":
            b = b.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        elif self.layout == "gaps":
            a, b = with_gaps(a), with_gaps(b)
        return a, b


@dataclass(frozen=True)
class LoraCase(PackedCase):
    """One call of ``moe_experts`` with adapters: a ``PackedCase`` whose weights are dense by default.

    Attributes:
        up, down: adapters of the two projections.
        trained: dense weights and biases are trained, too; by default they are frozen.
        recompute: the argument of that name.
        function: the gate is a function that the caller gives.
        in_gemm: packed weights are dequantized inside the products.
    """

    tokens: int = 5
    experts: int = 3
    hidden: int = 32
    intermediate: int = 16
    dense: tuple[str, ...] = ("gate_up_proj", "down_proj")
    up: tuple[Factors, ...] = (Factors(),)
    down: tuple[Factors, ...] = (Factors(),)
    trained: bool = False
    recompute: bool = False
    function: bool = False
    in_gemm: bool = True

    def adapters(self, argument: str) -> tuple[Factors, ...]:
        return self.up if argument == "gate_up_lora" else self.down


def lora_cases(cases: list[LoraCase]) -> pytest.MarkDecorator:
    """Parametrizes a test by ``case`` and ``dtype``."""
    parameters = [
        pytest.param(case, dtype, id=f"{case.id}-{name_of(dtype)}")
        for case in cases
        for dtype in DTYPES
        if (case.half or not (INTERPRETED and dtype == torch.float16))
        and (len(case.dense) == 2 or dtype != torch.float64)
    ]
    return pytest.mark.parametrize("case, dtype", parameters)


def make_lora_inputs(case: LoraCase, dtype: torch.dtype) -> PackedInputs:
    """The tensors of ``make_packed_inputs``, and the factors as "gate_up_lora[0].a" among them."""
    inputs = make_packed_inputs(case, dtype)
    for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
        if not case.trained and name in inputs.inputs.tensors:
            inputs.inputs.tensors[name].requires_grad_(False)
    rng = seeded(f"{case.id} adapters")
    shapes = {
        "gate_up_lora": (case.experts, case.columns, case.hidden),
        "down_lora": (case.experts, case.hidden, case.intermediate),
    }
    for argument, shape in shapes.items():
        for number, factors in enumerate(case.adapters(argument)):
            for part, value in zip("ab", factors.make(rng, shape, dtype), strict=True):
                inputs.inputs.tensors[f"{argument}[{number}].{part}"] = value.requires_grad_()
    return inputs


def factors_of(case: LoraCase, argument: str, tensors: dict[str, Tensor]) -> list[tuple[Factors, Tensor, Tensor]]:
    return [
        (factors, tensors[f"{argument}[{number}].a"], tensors[f"{argument}[{number}].b"])
        for number, factors in enumerate(case.adapters(argument))
    ]


def without_factors(inputs: Inputs) -> Inputs:
    return replace(inputs, tensors={name: value for name, value in inputs.tensors.items() if "_lora[" not in name})


def run_lora(case: LoraCase, inputs: PackedInputs, **options: Any) -> Tensor:
    """``moe_experts`` with the case's adapters; ``options`` override the case's."""
    arguments: dict[str, Any] = {"recompute": case.recompute}
    for argument in ADAPTED:
        adapters = factors_of(case, argument, inputs.inputs.tensors)
        loras = [LoraWeights(a, b, factors.scaling, factors.dropout) for factors, a, b in adapters]
        # A single adapter is passed without a list, and no adapter as None.
        arguments[argument] = loras if len(loras) > 1 else next(iter(loras), None)
    if case.function:
        arguments["activation"] = lambda gate_up: plain_gate(gate_up, case)
    base = replace(inputs, inputs=without_factors(inputs.inputs))
    return run_packed(case, base, **{**arguments, **options})


def lora_gradients(case: LoraCase, inputs: PackedInputs, **options: Any) -> dict[str, Tensor]:
    """y and the gradients of all tensors that have one, by name."""
    results = packed_gradients(case, inputs, run_lora, **options)
    return {name: value for name, value in results.items() if value is not None}


def delta(factors: Factors, a: Tensor, b: Tensor) -> Tensor:
    """s·B·A (E, out, in)."""
    if factors.separate:
        halves = zip(b.chunk(2, dim=1), a.chunk(2, dim=1), strict=True)
        return factors.scaling * torch.cat([right @ left for right, left in halves], dim=1)
    return factors.scaling * (b @ a)


def merged(case: LoraCase, inputs: Inputs) -> Inputs:
    """The same inputs without adapters: what these add is merged into the weights."""
    tensors = without_factors(inputs).tensors
    for argument, name in ADAPTED.items():
        for factors in factors_of(case, argument, inputs.tensors):
            change = delta(*factors).to(tensors[name].dtype)
            tensors[name] = tensors[name] + (change.mT if case.transposed else change)
    return replace(inputs, tensors=tensors)


def low_rank(factors: Factors, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """s·(rows·Aᵀ)·Bᵀ of one expert's factors, in the dtype of the rows."""
    a, b = a.to(rows.dtype), b.to(rows.dtype)
    if factors.separate:
        halves = zip(a.chunk(2), b.chunk(2), strict=True)
        return factors.scaling * torch.cat([rows @ left.T @ right.T for left, right in halves], dim=1)
    return factors.scaling * (rows @ a.T @ b.T)


def plain_lora(case: LoraCase, inputs: Inputs) -> Tensor:
    """The adapted experts one after the other, in the dtype of the inputs."""
    t = inputs.tensors
    x = t["hidden_states"]

    def project(rows: Tensor, argument: str, bias: str, expert: int) -> Tensor:
        weight = t[ADAPTED[argument]][expert]
        out = rows @ (weight if case.transposed else weight.T)
        if case.bias:
            out = out + t[bias][expert]
        for factors, a, b in factors_of(case, argument, t):
            out = out + low_rank(factors, rows, a[expert], b[expert])
        return out

    y = torch.zeros_like(x)
    for expert in range(case.experts):
        token, slot = (inputs.index == expert).nonzero(as_tuple=True)
        h = plain_gate(project(x[token], "gate_up_lora", "gate_up_bias", expert), case)
        z = project(h, "down_lora", "down_bias", expert)
        y = y.index_add(0, token, (z * t["top_k_weights"][token, slot, None]).to(y.dtype))
    return y


# Every value is rounded twice more than without adapters.
SLACK = 3.0


def assert_equals_merged(case: LoraCase, inputs: PackedInputs, ours: dict[str, Tensor], slack: float = SLACK) -> None:
    """Fails unless y and gradients, by name, are as accurate as plain torch's."""
    exact, plain = inputs.inputs.to(torch.float64), inputs.inputs.copy()
    truth = gradients(plain_experts(case, merged(case, exact)), exact)
    torchs = gradients(plain_lora(case, plain), plain)
    for name, value in ours.items():
        # A gradient in fp32 is no more exact than the narrower dtype of the products that it comes from.
        wider = FLOOR[plain.grad.dtype] / FLOOR[value.dtype]
        assert_accurate(name, value, truth[name], torchs[name], slack * max(1.0, wider))
