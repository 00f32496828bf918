"""``moe_fused_linear`` over 4-bit weights: accuracy, and bit for bit each weight by rows that are one-hot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel import test_linear
from tests.kernel.accuracy import assert_accurate
from tests.kernel.cases import seeded
from tests.kernel.machine import DEVICE, HAS_TRITON, INTERPRETED, kernel, module, name_of
from tests.kernel.packed_cases import ALL, DTYPES, ONE, Packed4bitWeights, decoding, dequantized
from tests.kernel.test_linear import LinearCase, plain_linear

tuning = module("tuning")


@dataclass(frozen=True)
class PackedLinearCase(LinearCase):
    """As ``LinearCase``; ``format`` are keyword arguments of ``Packed4bitWeights.quantize``.

    Attributes:
        in_gemm: where its weights are decoded; ``workspace``: bytes for them, where not.
        takes: the launches that decode them.
    """

    sizes: tuple[int, ...] = (3, 0, 7, 2)
    in_features: int = 64
    out_features: int = 20
    format: tuple[tuple[str, Any], ...] = ()
    in_gemm: bool = True
    workspace: int = ALL
    takes: tuple[str, ...] = ("gemm", "transposed")


def elsewhere(case: PackedLinearCase, parts: bool = False) -> PackedLinearCase:
    """In a workspace, whole or for 16 features at a time: the output's, then the input's."""
    count = sum(-(-features // 16) for features in (case.out_features, case.in_features)) if parts else 2
    return replace(
        case, in_gemm=False, workspace=ONE if parts else ALL, takes=("part",) * count if sum(case.sizes) else ()
    )


CASES = [
    PackedLinearCase("plain", "nothing special", half=True),
    PackedLinearCase("128-in", "two tiles of in features, one wide tile of the gradient", in_features=128, half=True),
    PackedLinearCase("192-in", "three, which no wide tile divides", in_features=192, half=True),
    PackedLinearCase("out-37", "columns past the last, of several tiles", out_features=37, bias=True),
    PackedLinearCase("out-1", "one out feature", out_features=1, bias=True),
    PackedLinearCase("out-64", "whole tiles", out_features=64),
    PackedLinearCase("out-65", "the sum of the gradient over one more than a tile", out_features=65),
    PackedLinearCase("no-rows", "S=0", sizes=(0, 0, 0), bias=True, takes=()),
    PackedLinearCase("last-takes-all", "empty experts first", sizes=(0, 0, 0, 19)),
    PackedLinearCase("full-tiles", "sizes that are whole tiles", sizes=(16, 32, 16)),
    PackedLinearCase("one-over", "one row more than a tile", sizes=(17, 1, 33)),
    PackedLinearCase("rows-of-128", "the tallest tiles, more than one an expert", sizes=(200, 0, 190), half=True),
    elsewhere(PackedLinearCase("workspace", "all experts at once", bias=True, half=True)),
    elsewhere(
        PackedLinearCase("parts", "some features at a time, one expert without rows", bias=True, half=True), parts=True
    ),
    elsewhere(PackedLinearCase("parts-no-rows", "S=0", sizes=(0, 0, 0)), parts=True),
    elsewhere(PackedLinearCase("parts-one-over", "tiles of each part", sizes=(17, 1, 33)), parts=True),
    replace(
        elsewhere(PackedLinearCase("in-40", "rows that are not whole 64s", in_features=40, out_features=24)),
        in_gemm=True,
    ),
]


def make_inputs(case: PackedLinearCase, dtype: torch.dtype) -> tuple[test_linear.Inputs, Any]:
    """The tensors with the weight as it dequantizes, and the packed weight."""
    inputs = test_linear.make_inputs(case, dtype)
    weight = Packed4bitWeights.quantize(inputs.weight, **dict(case.format))
    inputs.weight = dequantized(weight)
    return inputs, weight


def results(y: Tensor, inputs: test_linear.Inputs) -> dict[str, Tensor]:
    y.backward(inputs.grad)
    leaves = {"input": inputs.input, "bias": inputs.bias}
    return {"y": y.detach()} | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}


@pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(case, dtype, id=f"{case.id}-{name_of(dtype)}")
        for case in CASES
        for dtype in DTYPES
        if case.half or not (INTERPRETED and dtype == torch.float16)
    ],
)
def test_forward_and_gradients(case: PackedLinearCase, dtype: torch.dtype) -> None:
    inputs, weight = make_inputs(case, dtype)
    exact, plain = inputs.to(torch.float64), inputs.to(dtype)
    with decoding(case.in_gemm, case.workspace) as taken:
        y = kernel.moe_fused_linear_4bit(inputs.input, weight, inputs.m_sizes, inputs.bias)
        ours = results(y, inputs)
    truth, torchs = results(plain_linear(exact), exact), results(plain_linear(plain), plain)
    for name, value in ours.items():
        assert_accurate(name, value, truth[name], torchs[name])
    if module("stages").uses_triton(inputs.input, dtype):
        assert tuple(taken) == case.takes


# ----------------------------------------------------------------------------------------------------- one-hot probes

FORMATS = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "plain-scales": {"double_quant": False},
    "blocks-of-32": {"blocksize": 32, "projections": 2},
    "blocks-of-128": {"blocksize": 128, "projections": 2},
    "one-block": {"blocksize": 4096},
    "one-block-plain-scales": {"blocksize": 4096, "double_quant": False, "quant_type": "fp4"},
}
# In and out features of 2¹² weights, as one block wants them.
SHAPES = {"64-in": (64, 64), "128-in": (128, 32), "512-in": (512, 8)}
TALL, FLAT = (2, 520, 64), (2, 8, 4160)
PLACES = {"decoded": (True, ALL), "workspace": (False, ALL), "parts": (False, ONE)}


@pytest.fixture(params=["usual-tiles", "wide-tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Wide ones hold two absmaxes of 64 weights to a row."""
    usual = tuning.launch_config

    def launch_config(family: str, *args: Any) -> Any:
        config = usual(family, *args)
        if family in ("gemm_4bit", "up_4bit"):
            return replace(config, block_k=128)
        return replace(config, block_n=128) if family == "transposed_4bit" else config

    if request.param == "wide-tiles":
        monkeypatch.setattr(tuning, "launch_config", launch_config)
    return request.param


def assert_every_weight_arrives(weight: Any) -> None:
    """Rows that are one-hot give back each weight in forward, gradients that are in backward; both bit for bit."""
    num_experts, out_features, in_features = weight.shape
    dense = dequantized(weight)

    def eyes(size: int) -> tuple[Tensor, Tensor]:
        sizes = torch.full((num_experts,), size, device=DEVICE)
        return torch.eye(size, dtype=weight.dtype, device=DEVICE).repeat(num_experts, 1), sizes

    rows, sizes = eyes(in_features)
    y = kernel.moe_fused_linear(rows, weight, sizes)
    assert torch.equal(y.view(num_experts, in_features, out_features), dense.mT)
    grad, sizes = eyes(out_features)
    x = torch.zeros((len(grad), in_features), dtype=weight.dtype, device=DEVICE, requires_grad=True)
    kernel.moe_fused_linear(x, weight, sizes).backward(grad)
    assert torch.equal(x.grad.view_as(dense), dense)


def random_weight(name: str, shape: tuple[int, int, int], dtype: torch.dtype, **options: Any) -> Any:
    """Rows of very different sizes, so that each block has an absmax of its own."""
    rng = seeded(name)
    scale = torch.logspace(-2, 1, shape[0] * shape[1])[torch.randperm(shape[0] * shape[1], generator=rng)]
    values = torch.randn(shape, generator=rng) * scale.view(*shape[:2], 1)
    return Packed4bitWeights.quantize(values.to(DEVICE, dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("storage", FORMATS.values(), ids=FORMATS)
def test_every_weight_arrives(storage: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> None:
    in_features, out_features = shape
    if INTERPRETED and (dtype == torch.float16) == (in_features < 512):
        pytest.skip("the interpreter, which is slow, has each shape in one dtype")
    with decoding(in_gemm=True) as taken:
        assert_every_weight_arrives(random_weight("arrives", (2, out_features, in_features), dtype, **storage))
    if module("stages").uses_triton(torch.empty(0, device=DEVICE), dtype):
        assert taken == ["gemm", "gemm", "transposed"]


@pytest.mark.skipif(not HAS_TRITON, reason="there are no tiles without triton")
def test_every_weight_arrives_in_tiles_of_several_scales(tiles: str) -> None:
    for blocksize in (32, 64, 128):
        with decoding(in_gemm=True):
            weight = random_weight("tiles", (1, 24, 256), torch.float32, blocksize=blocksize)
            assert_every_weight_arrives(weight)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("projections", [1, 2])
@pytest.mark.parametrize("shape", [TALL, FLAT], ids=["tall", "flat"])
def test_every_group_of_absmaxes(shape: tuple[int, int, int], projections: int, place: tuple[bool, int]) -> None:
    """More than 256 absmaxes in a projection, the last group of which is not full."""
    if INTERPRETED and ((shape == FLAT) + projections + list(PLACES.values()).index(place)) % 2:
        pytest.skip("the interpreter, which is slow, has each pair of these three")
    weight = random_weight("groups", shape, torch.float32, projections=projections)
    assert module("formats.absmax").groups(weight.format) > 1
    assert weight.format.blocks % 256 != 0
    with decoding(*place):
        rows = torch.zeros((3, shape[2]), device=DEVICE)
        rows[0, 0] = rows[1, 63] = rows[2, -1] = 1.0
        rows = rows.repeat(shape[0], 1)
        sizes = torch.full((shape[0],), 3, device=DEVICE)
        y = kernel.moe_fused_linear(rows, weight, sizes)
    assert torch.equal(y.view(shape[0], 3, -1), dequantized(weight)[..., [0, 63, -1]].mT)


@pytest.mark.parametrize("columns", [16384, 28672], ids=["a-group", "in-three"])
def test_rows_of_a_group_of_absmaxes_and_more(columns: int) -> None:
    weight = random_weight("wide", (1, 4, columns), torch.float32, projections=2)
    places = [0, 63, columns // 2, 16383, columns - 64, columns - 1]
    rows = torch.zeros((len(places), columns), device=DEVICE)
    rows[range(len(places)), places] = 1.0
    with decoding(in_gemm=True):
        y = kernel.moe_fused_linear(rows, weight, torch.tensor([len(places)], device=DEVICE))
    assert torch.equal(y, dequantized(weight)[0, :, places].mT)


# --------------------------------------------------------------------------------------------------- what else it does


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("sizes, good_rows", [((3, 2), 5), ((0, 0), 0), ((7, 4), 0), ((-1, 10), 0)], ids=str)
def test_rows_of_no_expert_are_nan(sizes: tuple[int, int], good_rows: int, place: tuple[bool, int]) -> None:
    permute, ops, arguments = (module(f"ops.{name}") for name in ("permute", "linear", "arguments"))
    inputs, weight = make_inputs(PackedLinearCase("misfit", "", sizes=(6, 4), bias=True), torch.float32)
    m_sizes = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    stack = arguments.StackArguments(*module("weights").operands(weight), transposed=False)
    with torch.no_grad(), decoding(*place):
        # Below the check of the public function, which a CPU always makes.
        buffer = permute.sorted_routing_buffer(permute.RouteSortedArguments(m_sizes, 10, torch.float32, packed=True))
        rows = ops.Rows(buffer, sorted_rows=True, packed=True, top_k=1, fill=float("nan"))
        layer = ops.Linear(stack, arguments.NO_LORA, rows)
        y = ops.grouped_linear(ops.LinearForward(inputs.input, layer, inputs.bias))
        assert y[good_rows:].isnan().all()
        rows = inputs.input[:good_rows]
        if good_rows:
            assert torch.equal(y[:good_rows], kernel.moe_fused_linear(rows, weight, m_sizes, inputs.bias))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(low: torch.dtype) -> None:
    """The weight is dequantized to autocast's dtype; gradients stay fp32."""
    inputs, weight = make_inputs(PackedLinearCase("autocast", "", bias=True), torch.float32)
    with torch.autocast(DEVICE.type, dtype=low):
        y = kernel.moe_fused_linear(inputs.input, weight, inputs.m_sizes, inputs.bias)
    assert y.dtype == low
    exact = inputs.to(low)
    expected = kernel.moe_fused_linear(exact.input, weight.to(dtype=low), inputs.m_sizes, exact.bias)
    assert torch.equal(y, expected)
    y.backward(inputs.grad.to(low))
    for leaf in (inputs.input, inputs.bias):
        assert leaf.grad.dtype == torch.float32
        assert leaf.grad.isfinite().all()


def test_a_frozen_weight_keeps_no_activations() -> None:
    inputs, weight = make_inputs(PackedLinearCase("saved", ""), torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernel.moe_fused_linear(inputs.input, weight, inputs.m_sizes)
    assert saved != []
    assert {value.dtype for value in saved} == {torch.uint8, torch.int32}


def test_the_long_name_is_the_same_function() -> None:
    function: Callable[..., Tensor] = kernel.moe_fused_linear_4bit
    assert function is kernel.moe_fused_linear
