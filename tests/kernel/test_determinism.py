"""Two runs agree bit for bit, forward and every gradient: no atomics, no order that depends on timing."""

from __future__ import annotations

import pytest
import torch

from tests.kernel.cases import ExpertsCase, gradients, in_every_dtype, make_inputs, plain_gate, run_experts, seeded
from tests.kernel.machine import DEVICE, DTYPES, INTERPRETED, kernel, name_of
from tests.kernel.packed_cases import (
    ALL,
    ONE,
    PackedCase,
    decoding,
    make_packed_inputs,
    packed_gradients,
    run_packed,
)
from tests.kernel.packed_cases import DTYPES as PACKED_DTYPES

CASES = [
    ExpertsCase("many-rows", "several tiles an expert, sums over many rows", tokens=70, experts=2, top_k=1),
    ExpertsCase("many-experts", "tokens that many rows are summed into", tokens=12, experts=11, top_k=6, bias=True),
    ExpertsCase("partly-mine", "memory nobody initialised must not show", index="partly mine", bias=True),
]
if INTERPRETED:  # it runs one program after the other, so only such memory can differ from run to run
    CASES = CASES[-1:]


@pytest.mark.parametrize("gate_function", [False, True], ids=["named", "gate-function"])
@in_every_dtype(CASES)
def test_experts(case: ExpertsCase, dtype: torch.dtype, gate_function: bool) -> None:
    options = {"activation": lambda gate_up: plain_gate(gate_up, case)} if gate_function else {}
    runs = []
    for _ in range(2):
        inputs = make_inputs(case, dtype)
        runs.append(gradients(run_experts(case, inputs, **options), inputs))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.parametrize("in_gemm, workspace", [(True, ALL), (False, ONE)], ids=["decoded", "parts"])
@pytest.mark.parametrize("dtype", (torch.float32,) if INTERPRETED else PACKED_DTYPES, ids=name_of)
def test_packed_experts(dtype: torch.dtype, in_gemm: bool, workspace: int) -> None:
    case = PackedCase("packed", "", index="partly mine", bias=True)
    runs = []
    for _ in range(2):
        inputs = make_packed_inputs(case, dtype)
        with decoding(in_gemm, workspace):
            runs.append(packed_gradients(case, inputs))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_decode() -> None:
    case = ExpertsCase("decode", "", tokens=2, top_k=4)
    inputs = make_inputs(case, torch.float32)
    with torch.no_grad():
        assert torch.equal(run_experts(case, inputs), run_experts(case, inputs))


def test_packed_decode() -> None:
    case = PackedCase("packed-decode", "", tokens=1, top_k=2)
    inputs = make_packed_inputs(case, torch.float32)
    with torch.no_grad():
        assert torch.equal(run_packed(case, inputs), run_packed(case, inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_linear(dtype: torch.dtype) -> None:
    runs = []
    for _ in range(2):
        rng = seeded("determinism")
        rows, weight, bias = (
            torch.randn(shape, generator=rng).to(DEVICE, dtype).requires_grad_()
            for shape in ((60, 19), (3, 21, 19), (3, 21))
        )
        y = kernel.moe_fused_linear(rows, weight, torch.tensor([40, 0, 20], device=DEVICE), bias)
        y.backward(torch.randn(60, 21, generator=rng).to(DEVICE, dtype))
        runs.append((y, rows.grad, weight.grad, bias.grad))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_a_token_does_not_depend_on_its_batch() -> None:
    """The same token alone and among others, in the same tile height: batching must not change what is generated."""
    case = ExpertsCase("batch", "", tokens=9, experts=4)
    inputs = make_inputs(case, torch.float32)
    t = inputs.tensors
    y = run_experts(case, inputs)
    swapped = torch.tensor([4, 1, 2, 3, 0, *range(5, 9)], device=DEVICE)
    x, weights = t["hidden_states"][swapped], t["top_k_weights"][swapped]
    again = kernel.moe_experts(x, inputs.index[swapped], weights, t["gate_up_proj"], t["down_proj"])
    assert torch.equal(again, y[swapped])
