"""The autograd formulas with adapters: float64 gradcheck, torch.compile, and no second order. Operators: test_autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernel.cases import Inputs
from tests.kernel.lora_cases import Factors, LoraCase, make_lora_inputs, run_lora
from tests.kernel.machine import DEVICE, kernel
from tests.kernel.packed_cases import PackedInputs
from tests.kernel.test_autograd import linear_arguments, on_cpu, same_when_compiled

LoraWeights = kernel.LoraWeights

SMALL = LoraCase(
    "small",
    "",
    tokens=3,
    top_k=2,
    hidden=4,
    intermediate=3,
    up=(Factors(2),),
    down=(Factors(1),),
    trained=True,
)
FORMULAS = [
    SMALL,
    replace(SMALL, id="separate", up=(Factors(2, separate=True),), bias=True),
    replace(SMALL, id="recompute", recompute=True, activation="gelu", bias=True),
    replace(SMALL, id="several", up=(Factors(1), Factors(2, separate=True)), down=(Factors(1), Factors(2))),
    replace(SMALL, id="gpt-oss", activation="swiglu_oai", interleaved=True, transposed=True, bias=True),
    replace(SMALL, id="no-gate", activation="gelu_tanh", gated=False, recompute=True),
    replace(SMALL, id="not-mine", index="partly mine", up=(Factors(2, separate=True),)),
    replace(SMALL, id="function", function=True, up=(Factors(2, separate=True), Factors(1))),
]


def same_inputs(inputs: PackedInputs, tensors: dict[str, Tensor]) -> PackedInputs:
    changed: Inputs = replace(inputs.inputs, tensors=tensors)
    return replace(inputs, inputs=changed)


@on_cpu
@pytest.mark.parametrize("case", FORMULAS, ids=lambda case: case.id)
def test_experts_gradcheck(case: LoraCase) -> None:
    inputs = make_lora_inputs(case, torch.float64)
    names = list(inputs.inputs.tensors)

    def function(*tensors: Tensor) -> Tensor:
        return run_lora(case, same_inputs(inputs, dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(inputs.inputs.tensors.values()))


def linear_factors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    shapes = ((3, 2, 3), (3, 4, 2))
    a, b = (torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes)
    return a.requires_grad_(), b.requires_grad_()


@on_cpu
@pytest.mark.parametrize("sizes", [(2, 0, 3), (0, 0, 0)], ids=["plain", "no-rows"])
def test_linear_gradcheck(sizes: tuple[int, ...]) -> None:
    rows, weight, m_sizes, bias = linear_arguments(sizes, True, torch.float64)

    def function(x: Tensor, w: Tensor, b: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        lora = LoraWeights(lora_a, lora_b, 0.5)
        return kernel.moe_fused_linear(x, w, m_sizes, b, lora=[lora, lora])

    assert torch.autograd.gradcheck(function, (rows, weight, bias, *linear_factors(torch.float64)))


# ------------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


COMPILED = [
    replace(SMALL, id="separate", up=(Factors(2, separate=True),), index="partly mine"),
    replace(SMALL, id="recompute", recompute=True, interleaved=True, transposed=True, bias=True),
    replace(SMALL, id="several", up=(Factors(1), Factors(2, separate=True)), down=()),
    replace(SMALL, id="function", function=True, up=(Factors(2, separate=True),), trained=False),
]


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.id)
def test_compiled_experts(case: LoraCase) -> None:
    inputs = make_lora_inputs(case, torch.float32)
    names = list(inputs.inputs.tensors)

    def function(*tensors: Tensor) -> Tensor:
        return run_lora(case, same_inputs(inputs, dict(zip(names, tensors, strict=True))))

    same_when_compiled(function, list(inputs.inputs.tensors.values()), dynamic=case.recompute)


def test_compiled_linear() -> None:
    rows, weight, m_sizes, bias = linear_arguments((2, 0, 3), True, torch.float32)

    def function(rows: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, m_sizes: Tensor) -> Tensor:
        return kernel.moe_fused_linear(rows, weight, m_sizes, bias, lora=LoraWeights(a, b, 0.5))

    same_when_compiled(function, [rows, weight, bias, *linear_factors(torch.float32)], m_sizes)


# -------------------------------------------------------------------------------------------------------- second order


@pytest.mark.parametrize("name", ["hidden_states", "gate_up_lora[0].a", "down_lora[0].b"])
def test_second_order_gradients_are_refused(name: str) -> None:
    case = replace(SMALL, trained=False)
    inputs = make_lora_inputs(case, torch.float32)
    with pytest.raises(RuntimeError, match="experts has no second derivative"):
        torch.autograd.grad(run_lora(case, inputs).sum(), inputs.inputs.tensors[name], create_graph=True)
