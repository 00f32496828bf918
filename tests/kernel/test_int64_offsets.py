"""Offsets beyond 2³¹ elements: the experts of real models pass it together, and so do long batches.

A GPU with memory for it runs large tensors. Without one, views with large strides over memory that is never touched put
the last expert and the last token as far out; the interpreter computes offsets in the same integer widths as a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel.accuracy import assert_accurate
from tests.kernel.cases import ExpertsCase, Inputs, gradients, make_inputs, plain_experts, run_experts
from tests.kernel.machine import DEVICE, INTERPRETED, ON_GPU, kernel, module, stages
from tests.kernel.packed_cases import Packed4bitWeights, PackedCase, as_stack, decoding, dequantized, make_packed_inputs

LIMIT = 2**31
# Elements between the experts or tokens of a far view: the last of three starts beyond the limit.
STRIDE = LIMIT // 2 + 64
CASE = ExpertsCase("far", "", tokens=3, top_k=2, experts=3, hidden=24, intermediate=16)


def gpu_memory() -> int:
    return torch.cuda.mem_get_info()[0] if DEVICE.type == "cuda" else 0


large = pytest.mark.skipif(not ON_GPU or gpu_memory() < 40 * 10**9, reason="needs a GPU with 40 GB of free memory")
far_view = pytest.mark.skipif(ON_GPU or not INTERPRETED, reason="views over untouched memory are for the interpreter")


def far(value: Tensor) -> Tensor:
    """``value`` with its first dimension ``STRIDE`` elements apart, in memory of which nothing else is touched."""
    assert value.shape[0] == 3
    size = (value.shape[0] - 1) * STRIDE + value[0].numel()
    try:
        memory = torch.empty(size, dtype=value.dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for {size} elements: {error}")
    view = memory.as_strided(value.shape, (STRIDE, *value.stride()[1:]))
    assert (value.shape[0] - 1) * view.stride(0) >= LIMIT
    return view.copy_(value.detach())


def far_inputs(*names: str) -> Inputs:
    inputs = make_inputs(CASE, torch.float16)
    tensors = {name: far(value) if name in names else value.detach() for name, value in inputs.tensors.items()}
    return replace(inputs, tensors={name: value.requires_grad_() for name, value in tensors.items()})


@far_view
@pytest.mark.parametrize("name", ["hidden_states", "gate_up_proj", "down_proj"])
def test_far_experts(name: str) -> None:
    inputs, near = far_inputs(name), make_inputs(CASE, torch.float16)
    inputs.index[:] = near.index[:] = torch.tensor([[0, 2], [2, 1], [2, 0]])
    results = gradients(run_experts(CASE, inputs), inputs)
    for key, value in gradients(run_experts(CASE, near), near).items():
        assert torch.equal(results[key], value), key


@far_view
@pytest.mark.parametrize("name", ["hidden_states", "gate_up_proj", "down_proj"])
def test_far_decode(name: str) -> None:
    inputs, near = far_inputs(name), make_inputs(CASE, torch.float16)
    inputs.index[:] = near.index[:] = torch.tensor([[0, 2], [2, 1], [2, 0]])
    with torch.no_grad():
        assert torch.equal(run_experts(CASE, inputs), run_experts(CASE, near))


@far_view
@pytest.mark.parametrize("name", ["input", "weight", "transposed weight"])
def test_far_linear(name: str) -> None:
    rows, weight = torch.randn(3, 24).half(), torch.randn(3, 20, 24).half()
    if name == "transposed weight":
        weight = weight.mT.contiguous().mT
    sizes = torch.tensor([1, 0, 2])
    results = []
    for away in (True, False):
        x, w = rows, weight
        if away:
            x, w = (far(rows), weight) if name == "input" else (rows, far(weight))
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        y = kernel.moe_fused_linear(x, w, sizes)
        y.backward(torch.ones_like(y))
        results.append((y, x.grad, w.grad))
    for ours, near in zip(*results, strict=True):
        assert torch.equal(ours, near)


@far_view
def test_far_features() -> None:
    """An expert's matrix that spans 2³¹ elements itself is copied: offsets inside a matrix have 32 bits."""
    near = torch.randn(2, 3, 16, dtype=torch.float16)
    weight = torch.empty(2 * STRIDE + 32, dtype=torch.float16).as_strided(near.shape, (16, STRIDE, 1)).copy_(near)
    rows, m_sizes = torch.randn(5, 16, dtype=torch.float16), torch.tensor([2, 3])
    assert torch.equal(kernel.moe_fused_linear(rows, weight, m_sizes), kernel.moe_fused_linear(rows, near, m_sizes))


@far_view
def test_far_rows_of_combine() -> None:
    """``combine`` reads the last row of a z of more than 2³¹ elements.

    It is the only row of the only token, so it reads no other.
    """
    launch, routing = module("stages.triton"), module("routing")
    features, rows = 2**18, 2**13 + 2
    try:
        z = torch.empty((rows, features), dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no address space for {rows * features} elements: {error}")
    z[-1] = torch.arange(features) % 97
    buffer = torch.zeros(routing.Routing.buffer_size(1, 1), dtype=torch.int32)
    view = routing.Routing.from_buffer(buffer, 1, 1, 1)
    view.slot_to_row[0] = rows - 1
    assert torch.equal(launch.combine(z, view, 1, None)[0], z[-1])


@far_view
def test_far_tokens_of_dispatch() -> None:
    launch, permute = module("stages.triton"), module("permute")
    x = torch.randn(3, 40).half()
    view = permute.route(torch.tensor([[1], [0], [0]]), 2, torch.float16)
    assert torch.equal(launch.dispatch(far(x), view, 3), x[[1, 2, 0]])


# Sizes of experts whose packed bytes pass the limit together: in grouped products, and where single experts are
# dequantized.
PACKED_FEATURES, DECODED_FEATURES = 4096, 256
packed = pytest.mark.skipif(not ON_GPU or gpu_memory() < 12 * 10**9, reason="needs a GPU with 12 GB of free memory")


def packed_expert(features: int) -> Any:
    weight = torch.randn((1, features, features), generator=torch.Generator().manual_seed(0)) * features**-0.5
    return Packed4bitWeights.quantize(weight.half().to(DEVICE))


def as_last_expert(weights: Any, experts: int) -> Any:
    """``weights``, of one expert, behind others that are all zeros: without a GPU that is memory never touched."""
    assert weights.shape[0] == 1
    storage = {}
    for part, stored in weights.tensors().items():
        try:
            storage[part] = torch.zeros((experts, stored.shape[1]), dtype=torch.uint8, device=DEVICE)
        except RuntimeError as error:
            pytest.skip(f"no address space for {experts * stored.shape[1]} bytes: {error}")
        storage[part][-1] = stored[0]
    assert (experts - 1) * storage["packed"].shape[1] >= LIMIT
    return Packed4bitWeights(replace(weights.format, shape=(experts, *weights.shape[1:])), **storage)


@pytest.mark.skipif(
    not INTERPRETED and (not ON_GPU or gpu_memory() < 4 * 10**9), reason="needs 4 GB of free GPU memory"
)
def test_far_packed_expert_dequantizes() -> None:
    near = packed_expert(DECODED_FEATURES)
    experts = LIMIT // near.packed.shape[1] + 1
    out = torch.empty(near.shape, dtype=torch.float16, device=DEVICE)
    stages(torch.float16).dequantize(as_stack(as_last_expert(near, experts)), experts - 1, 1, out)
    assert torch.equal(out, dequantized(near))


@packed
@pytest.mark.parametrize("in_gemm", [True, False], ids=["decoded in the products", "decoded first"])
def test_large_packed_weights(in_gemm: bool) -> None:
    near = packed_expert(PACKED_FEATURES)
    weights = as_last_expert(near, experts := LIMIT // near.packed.shape[1] + 1)

    def normal(seed: int) -> Tensor:
        values = torch.randn((20, PACKED_FEATURES), generator=torch.Generator().manual_seed(seed))
        return values.half().to(DEVICE)

    rows, grad = normal(1).requires_grad_(), normal(2)
    m_sizes = torch.zeros(experts, dtype=torch.int64, device=DEVICE)
    m_sizes[-1] = len(rows)
    with decoding(in_gemm, workspace=2**28) as taken:
        y = kernel.moe_fused_linear(rows, weights, m_sizes)
        y.backward(grad)
    assert set(taken) == ({"gemm", "transposed"} if in_gemm else {"part"})
    (dense,) = dequantized(near)
    with torch.no_grad():
        assert_accurate("y", y, rows.double() @ dense.double().T, rows @ dense.T)
        assert_accurate("gradient of rows", rows.grad, grad.double() @ dense.double(), grad @ dense)


@packed
def test_large_packed_experts_of_few_slots() -> None:
    """The path of few slots, one matrix-vector product per slot, reaches experts beyond 2³¹ bytes."""
    sizes = {"hidden": PACKED_FEATURES, "intermediate": PACKED_FEATURES}
    case = PackedCase("few of many", "", tokens=2, top_k=1, experts=1, projections=2, **sizes)
    near = make_packed_inputs(case, torch.float16)
    experts = LIMIT // near.packed["down_proj"].packed.shape[1] + 1
    last = torch.full_like(near.inputs.index, experts - 1)
    assert not near.inputs.index.any()
    weights = {name: as_last_expert(stack, experts) for name, stack in near.packed.items()}
    inputs = replace(near.inputs, index=last, tensors={**near.inputs.tensors, **weights})
    with torch.no_grad(), decoding(in_gemm=True) as taken:
        y = run_experts(case, inputs)
    assert not taken
    with torch.no_grad():
        truth = plain_experts(case, near.inputs.to(torch.float64))
        assert_accurate("y", y, truth, plain_experts(case, near.inputs))


@large
@pytest.mark.parametrize("transposed", [False, True], ids=["in-contiguous", "out-contiguous"])
def test_large_weights(transposed: bool) -> None:
    """Three experts of 2³⁰ weights: forward, the gradient of the rows and that of the weights, at the last expert."""
    features, dtype = 2**15, torch.bfloat16
    weight = torch.empty((3, features, features), dtype=dtype, device=DEVICE)
    weight[:2] = float("nan")
    weight[2].normal_(std=features**-0.5)
    weight = (weight.mT if transposed else weight).requires_grad_()
    assert 2 * features**2 >= LIMIT
    rows = torch.randn((40, features), device=DEVICE, dtype=dtype).requires_grad_()
    grad = torch.randn((40, features), device=DEVICE, dtype=dtype)
    y = kernel.moe_fused_linear(rows, weight, torch.tensor([0, 0, 40], device=DEVICE))
    y.backward(grad)
    last = weight.detach()[2]
    exact = last.float()
    with torch.no_grad():
        assert_accurate("y", y, (rows.float() @ exact.T).double(), rows @ last.T)
        assert_accurate("gradient of rows", rows.grad, (grad.float() @ exact).double(), grad @ last)
        assert weight.grad[:2].count_nonzero() == 0
        part = slice(features - 512, features)
        truth = grad[:, part].double().T @ rows.double()
        assert_accurate("gradient of weight", weight.grad[2, part], truth, grad[:, part].T @ rows)


@large
def test_large_rows() -> None:
    """An output of more than 2³¹ elements, rows of the last expert at its end."""
    out_features, tail = 8192, 300
    num_rows = LIMIT // out_features + tail
    rows = torch.randn((num_rows, 16), device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn((2, out_features, 16), device=DEVICE, dtype=torch.bfloat16)
    sizes = torch.tensor([num_rows - tail, tail], device=DEVICE)
    y = kernel.moe_fused_linear(rows, weight, sizes)
    with torch.no_grad():
        plain = rows[-tail:] @ weight[1].T
        assert_accurate("y", y[-tail:], rows[-tail:].double() @ weight[1].double().T, plain)
    y.backward(y.detach())
    with torch.no_grad():
        truth = y[-tail:].double() @ weight[1].double()
        assert_accurate("gradient of rows", rows.grad[-tail:], truth, y[-tail:] @ weight[1])


@large
def test_large_experts() -> None:
    """gate_up has more than 2³¹ elements; each token's results are those of the same tokens alone."""
    case = ExpertsCase("large", "", tokens=2**16 + 64, top_k=4, experts=4, hidden=64, intermediate=4096)
    assert case.tokens * case.top_k * 2 * case.intermediate > LIMIT
    tail = replace(case, tokens=64)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=DEVICE) * scale).bfloat16()

    tensors = {
        "hidden_states": normal(case.tokens, 64),
        "top_k_weights": normal(case.tokens, 4),
        "gate_up_proj": normal(4, 8192, 64, scale=0.1),
        "down_proj": normal(4, 64, 4096, scale=0.02),
    }
    index = torch.randint(0, 4, (case.tokens, 4), generator=generator, device=DEVICE)
    all_of_it = Inputs(
        index, {name: value.requires_grad_() for name, value in tensors.items()}, normal(case.tokens, 64)
    )
    per_token = ("hidden_states", "top_k_weights")
    ends = {name: value[-64:] if name in per_token else value for name, value in tensors.items()}
    end = Inputs(index[-64:], ends, all_of_it.grad[-64:])
    ours = gradients(run_experts(case, all_of_it), all_of_it)
    truth = gradients(plain_experts(tail, exact := end.to(torch.float64)), exact)
    torchs = gradients(plain_experts(tail, plain := end.to(torch.bfloat16)), plain)
    for name in ("y", *(f"gradient of {name}" for name in per_token)):
        assert_accurate(name, ours[name][-64:], truth[name], torchs[name])
