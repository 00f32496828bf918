"""Every public function once, forward and backward: what kernel-builder's CI runs on a GPU for each variant.

One case stands for each way through the kernels; the other files of this folder have all the cases. Most of the time goes
into compiling kernels, so the mark ``kernels_ci`` is on a part of the cases: kernel-builder's CI gives them a minute.
``tests/packaging/test_kernels_ci.py`` fails if a public function is not among what they run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.kernel.accuracy import assert_accurate
from tests.kernel.cases import ExpertsCase, gradients, make_inputs, plain_experts, plain_gate, run_experts
from tests.kernel.lora_cases import Factors, LoraCase, assert_equals_merged, lora_gradients, make_lora_inputs
from tests.kernel.machine import DEVICE, INTERPRETED, ON_GPU, kernel, module
from tests.kernel.packed_cases import PackedCase, dequantized, make_packed_inputs, packed_gradients, run_packed

CI = pytest.mark.kernels_ci

# The interpreter, which multiplies bf16 wrongly, would leave it to plain torch.
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
TOKENS = 9 if INTERPRETED else 80  # the interpreter takes seconds for a few tiles
PACKED = [
    PackedCase("ci-nf4", "as bitsandbytes quantizes by default", tokens=TOKENS, projections=2),
    PackedCase("ci-fp4", "scales in fp32", tokens=TOKENS, quant_type="fp4", double_quant=False),
]
DENSE = [
    ExpertsCase("ci-routed", "gated experts with biases", tokens=TOKENS, hidden=64, intermediate=48, bias=True),
    ExpertsCase("ci-gpt-oss", "the layout of gpt-oss", activation="swiglu_oai", interleaved=True, transposed=True),
    ExpertsCase("ci-ungated", "the layout of Nemotron-H", activation="relu2", gated=False),
]


def first_in_ci(cases: Sequence[Any]) -> list[Any]:
    """The cases as parameters, of which the first has the mark."""
    return [pytest.param(case, marks=[] if number else CI) for number, case in enumerate(cases)]


@pytest.mark.parametrize("case", first_in_ci(DENSE), ids=lambda case: case.id)
def test_experts(case: ExpertsCase) -> None:
    inputs = make_inputs(case, DTYPE)
    exact, plain = inputs.to(torch.float64), inputs.copy()
    truth, torchs = (gradients(plain_experts(case, tensors), tensors) for tensors in (exact, plain))
    for name, value in gradients(run_experts(case, inputs), inputs).items():
        assert_accurate(name, value, truth[name], torchs[name])


@pytest.mark.parametrize("recompute", first_in_ci([False, True]), ids=["", "recompute"])
def test_a_gate_of_the_caller(recompute: bool) -> None:
    """The gate runs between two grouped linear layers: ``dispatch`` and ``combine`` have gradients of their own."""
    case = DENSE[0]
    inputs = make_inputs(case, DTYPE)
    exact, plain = inputs.to(torch.float64), inputs.copy()
    y = run_experts(case, inputs, activation=lambda gate_up: plain_gate(gate_up, case), recompute=recompute)
    truth, torchs = (gradients(plain_experts(case, tensors), tensors) for tensors in (exact, plain))
    for name, value in gradients(y, inputs).items():
        assert_accurate(name, value, truth[name], torchs[name])


@pytest.mark.parametrize("case", first_in_ci(PACKED), ids=lambda case: case.id)
def test_packed_experts(case: PackedCase) -> None:
    inputs = make_packed_inputs(case, DTYPE)
    exact, plain = inputs.inputs.to(torch.float64), inputs.inputs.copy()
    truth, torchs = (gradients(plain_experts(case, tensors), tensors) for tensors in (exact, plain))
    for name, value in packed_gradients(case, inputs).items():
        assert_accurate(name, value, truth[name], torchs[name])


@CI
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_few_slots(packed: bool) -> None:
    """As in generation: matrix-vector products, and no gradient to come."""
    case = dataclasses.replace(PACKED[0], id="ci-generation", tokens=2)
    inputs = make_packed_inputs(case, DTYPE)
    with torch.no_grad():
        truth, torchs = (plain_experts(case, tensors) for tensors in (inputs.inputs.to(torch.float64), inputs.inputs))
        y = run_packed(case, inputs) if packed else run_experts(case, inputs.inputs)
    assert_accurate("y", y, truth, torchs)


@pytest.mark.parametrize(
    ("dense", "recompute"),
    [
        pytest.param(("gate_up_proj", "down_proj"), False, id="dense"),
        pytest.param(("gate_up_proj", "down_proj"), True, id="dense, recompute"),
        pytest.param((), False, id="packed"),
        pytest.param((), True, id="packed, recompute", marks=CI),
    ],
)
def test_adapters(dense: tuple[str, ...], recompute: bool) -> None:
    """QLoRA: y, and the gradients of the input, of the routing weights and of all factors."""
    case = LoraCase(
        f"ci-lora-{len(dense)}",
        "several adapters, one of them with factors of gate and up apart",
        tokens=TOKENS,
        hidden=64,
        intermediate=64,
        dense=dense,
        up=(Factors(), Factors(separate=True)),
        recompute=recompute,
    )
    inputs = make_lora_inputs(case, DTYPE)
    assert_equals_merged(case, inputs, lora_gradients(case, inputs))


@CI
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_linear(packed: bool) -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 48, 64, device=DEVICE, dtype=DTYPE) / 8
    weight, function = stack, kernel.moe_fused_linear
    if packed:
        weight, function = kernel.Packed4bitWeights.quantize(stack), kernel.moe_fused_linear_4bit
        stack = dequantized(weight)
    sizes = torch.tensor([7, 0, 20], device=DEVICE)
    shapes = {"input": (27, 64), "bias": (3, 48), "a": (3, 4, 64), "b": (3, 48, 4)}
    leaves = {name: torch.randn(size, device=DEVICE, dtype=DTYPE) / 4 for name, size in shapes.items()}
    leaves |= {} if packed else {"weight": stack}
    grad = torch.randn(27, 48, device=DEVICE, dtype=DTYPE)

    def results(dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        """Ours for None, else a loop over the experts in ``dtype``."""
        t = {name: value.detach().to(dtype or DTYPE).requires_grad_() for name, value in leaves.items()}
        if dtype is None:
            lora = kernel.LoraWeights(t["a"], t["b"], scaling=0.5)
            y = function(t["input"], t.get("weight", weight), sizes, t["bias"], lora)
        else:
            matrices = t.get("weight", stack.to(dtype)) + 0.5 * t["b"] @ t["a"]
            parts = t["input"].split(sizes.tolist())
            y = torch.cat(
                [part @ matrix.T + bias for part, matrix, bias in zip(parts, matrices, t["bias"], strict=True)]
            )
        y.backward(grad.to(y.dtype))
        return {"y": y.detach()} | {f"gradient of {name}": value.grad for name, value in t.items()}

    truth, torchs = results(torch.float64), results(DTYPE)
    for name, value in results(None).items():
        assert_accurate(name, value, truth[name], torchs[name], slack=3.0)


@CI
def test_linear_of_a_few_rows() -> None:
    """A matrix in the memory that bitsandbytes would have it in, and one with a bias beside it."""
    torch.manual_seed(0)
    stacks = [torch.randn(1, features, 128, device=DEVICE, dtype=DTYPE) / 8 for features in (48, 20)]
    weights = [kernel.Packed4bitWeights.quantize(stacks[0]), kernel.Packed4bitWeights.quantize(stacks[1], blocksize=32)]
    piece = kernel.interchange.piece_of(weights[0], 0)
    weights[0] = kernel.interchange.matrix_of_piece(piece, weights[0].format)
    x = torch.randn(5, 128, device=DEVICE, dtype=DTYPE)
    biases = [None, torch.randn(20, device=DEVICE, dtype=DTYPE)]

    def plain(dtype: torch.dtype) -> list[torch.Tensor]:
        dense = [dequantized(weight)[0].to(dtype) for weight in weights]
        products = [x.to(dtype) @ matrix.T for matrix in dense]
        return [products[0], products[1] + biases[1].to(dtype)]

    ours, truth, torchs = kernel.linear_4bit(x, weights, biases), plain(torch.float64), plain(DTYPE)
    for index, y in enumerate(ours):
        assert_accurate(f"y[{index}]", y, truth[index], torchs[index])


@CI
def test_the_reference_of_few_slots() -> None:
    """Rows of slots of any order; those of no expert here stay as they are."""
    torch.manual_seed(0)
    weights = kernel.Packed4bitWeights.quantize(torch.randn(3, 16, 64, device=DEVICE), blocksize=32)
    stack = module("weights").stack_of(*module("weights").operands(weights))
    ids, a, bias = torch.tensor([2, 9, 0, 2], device=DEVICE), torch.randn(2, 64, device=DEVICE), torch.randn(3, 16)
    out = torch.full((4, 16), -1.0, device=DEVICE)
    kernel.reference.few_slots("few_up_4bit", a, ids, stack, bias.to(DEVICE), None, 2, out)
    dense = dequantized(weights)
    for slot, expert in enumerate(ids.tolist()):
        expected = (
            dense[expert] @ a[slot // 2] + bias[expert].to(DEVICE) if expert < 3 else torch.full_like(out[0], -1.0)
        )
        torch.testing.assert_close(out[slot], expected, rtol=1e-3, atol=1e-3)


@CI
def test_route() -> None:
    index = torch.tensor([[2, 0], [9, 2], [1, 2]], device=DEVICE)  # 9 is held elsewhere
    routing = kernel.route(index, 3)
    assert isinstance(routing, kernel.Routing)
    assert routing.offsets.tolist() == [0, 1, 2, 5]
    # Rows of an expert are in the order of their slots.
    assert routing.row_to_slot[:5].tolist() == [1, 4, 0, 3, 5]
    buffer = kernel.Routing.new_buffer(index, 6, 3, zeroed=True)
    assert buffer.numel() == kernel.Routing.buffer_size(6, 3)
    assert [view.shape for view in kernel.Routing.from_buffer(buffer, 6, 3, 2)[:5]] == [v.shape for v in routing[:5]]


@CI
def test_packed_weights_are_values() -> None:
    """Their sizes and scales, and what replaces a part of them."""
    torch.manual_seed(0)
    weights = kernel.Packed4bitWeights.quantize(torch.randn(2, 64, 64, device=DEVICE), double_quant=False)
    assert weights.numel() == 2 * 64 * 64
    assert weights.nbytes == 2 * 64 * 64 // 2 + 4 * weights.scales().numel()
    assert not weights.requires_grad_(False).requires_grad
    twice = weights.replaced(absmax=(2 * weights.scales()).view(torch.uint8))
    assert torch.equal(twice.dequantize(), 2 * weights.dequantize())


@CI
def test_factors_of_gate_and_up_may_be_apart() -> None:
    a, b = torch.zeros(2, 6, 8), torch.zeros(2, 4, 3)
    assert kernel.LoraWeights(a, b).separate
    assert not kernel.LoraWeights(a[:, :3], b).separate


@CI
def test_formats_say_which_scales_are_broken() -> None:
    weights = kernel.Packed4bitWeights.quantize(torch.randn((2, 32, 64), device=DEVICE), quant_type="nvfp4")
    form = weights.format
    scales = weights.tensors()["block_scale"].clone()
    for byte, expected in ((0x7E, []), (0x7F, [[1, 3]])):
        scales[1, 3] = byte
        found = form.weight_format.broken(form, {**weights.tensors(), "block_scale": scales})
        assert found["block_scale"].nonzero().tolist() == expected
        assert not found["global_scale"].any()


@CI
def test_formats_can_be_registered() -> None:
    class Renamed(type(kernel.formats.named("nf4"))):
        name = "ci-format"

    kernel.formats.register(Renamed())
    try:
        assert "ci-format" in kernel.formats.names()
    finally:
        kernel.formats.unregister("ci-format")
    assert "ci-format" not in kernel.formats.names()


@CI
def test_tensors_of_a_cpu_beside_a_gpu() -> None:
    """The variant of a GPU computes CPU tensors, too: with the functions of ``reference``."""
    case = dataclasses.replace(DENSE[0], id="ci-cpu")
    inputs = make_inputs(case, torch.float64 if not ON_GPU else torch.float32)
    inputs.index, inputs.grad = inputs.index.cpu(), inputs.grad.cpu()
    inputs.tensors = {name: value.detach().cpu().requires_grad_() for name, value in inputs.tensors.items()}
    plain, exact = inputs.copy(), inputs.to(torch.float64)
    truth, torchs = (gradients(plain_experts(case, tensors), tensors) for tensors in (exact, plain))
    for name, value in gradients(run_experts(case, inputs), inputs).items():
        assert_accurate(name, value, truth[name], torchs[name])
