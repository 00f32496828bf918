"""4-bit products of a few rows on tensor cores: experts of a few slots, and ``linear_4bit``, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel.accuracy import assert_accurate
from tests.kernel.bad_calls import BadCall
from tests.kernel.cases import seeded
from tests.kernel.int4 import Int4
from tests.kernel.machine import DEVICE, HAS_TRITON, INTERPRETED, ON_GPU, kernel, module, name_of
from tests.kernel.packed_cases import Packed4bitWeights, as_stack, dequantized

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="the kernels need triton")

formats, tuning, Gate = module("formats"), module("tuning"), module("activations").Gate
SILU, OF_GPT_OSS = Gate(), Gate("swiglu_oai", True, True, 1.702, 7.0)
reference, Routing = module("stages.reference"), kernel.Routing
if HAS_TRITON:
    launch, few_rows, paths = (
        module("stages.triton"), module("stages.triton.few_rows"), module("stages.triton.paths"),
    )  # fmt: skip

ON_KERNELS = ON_GPU or INTERPRETED
# The interpreter multiplies bf16 wrongly.
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float16, torch.float32)
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4-plain": {"double_quant": False},
    "nf4-128": {"blocksize": 128},
    "nf4-32": {"blocksize": 32},
    "nf4-4096": {"blocksize": 4096},
    "fp4": {"quant_type": "fp4"},
    "mxfp4": {"quant_type": "mxfp4"},
    "nvfp4": {"quant_type": "nvfp4"},
    "int4": {"quant_type": "int4"},
}


@pytest.fixture(autouse=True)
def int4() -> Iterator[None]:
    formats.register(Int4())
    yield
    formats.unregister("int4")


@dataclass(frozen=True)
class SlotsCase:
    """Experts of a few slots.

    Attributes:
        id: readable name. why: what it would catch.
        ids: expert ids (T, K), whole numbers of any size; a number T stands for random ones.
        up, down: fields of a launch configuration that replace those of the default.
    """

    id: str
    why: str
    ids: int | tuple[tuple[int, ...], ...] = 3
    top_k: int = 2
    experts: int = 4
    hidden: int = 64
    intermediate: int = 64
    format: str = "nf4"
    gate: Any = SILU
    bias: bool = False
    projections: int = 1
    up: tuple[tuple[str, int], ...] = ()
    down: tuple[tuple[str, int], ...] = ()


SLOTS = [
    *(SlotsCase(f"tokens-{tokens}", "numbers of tokens", ids=tokens, experts=5) for tokens in (1, 2, 5, 16)),
    *(
        SlotsCase(name, "each format", format=name, hidden=192, intermediate=128, ids=2, bias=True)
        for name in FORMATS
        if name != "nf4-4096"
    ),
    SlotsCase("long-blocks", "blocks that run over the ends of rows", format="nf4-4096", ids=2),
    SlotsCase("foreign", "ids that belong to no expert here", ids=((1, -1), (4, 2), (2**31, -(2**40)), (9, 7)), bias=True),
    SlotsCase("all-foreign", "nothing to do: zeros", ids=((-1, 4), (7, -3))),
    SlotsCase("one-expert", "more rows of an expert than a tile has", ids=((2, 0),) * 19, bias=True),
    SlotsCase("twice", "a token chooses an expert twice", ids=((1, 1), (3, 1))),
    SlotsCase("wide", "two steps of in features, the second not whole", hidden=320, intermediate=576, ids=1),
    SlotsCase(
        "split", "parts of in features, one of them empty", hidden=320, intermediate=192, ids=2, bias=True,
        up=(("split_k", 4), ("block_n", 16), ("block_k", 128)), down=(("split_k", 2), ("block_n", 32), ("block_k", 64)),
    ),
    SlotsCase("two-warps", "other parts of columns", up=(("num_warps", 2), ("block_n", 64)), down=(("num_warps", 1),)),
    SlotsCase("tall", "a tile of 16 rows", ids=7, up=(("block_m", 16),), down=(("block_m", 16),)),
    SlotsCase("projections", "gate and up are quantized apart", projections=2, hidden=192),
    SlotsCase("ungated", "an activation without a gate", gate=Gate("relu2", False), bias=True, intermediate=192),
    SlotsCase("gpt-oss", "gates and ups alternate", gate=OF_GPT_OSS, format="mxfp4", bias=True),
]  # fmt: skip


@dataclass
class Inputs:
    """The arguments of the stage, and the weights as they dequantize."""

    ids: Tensor
    x: Tensor
    weights: Tensor
    up: Any
    down: Any
    biases: tuple[Tensor | None, Tensor | None]
    dense: tuple[Tensor, Tensor]

    def call(self, gate: Any, tokens: slice = slice(None)) -> Tensor:
        arguments = (self.x[tokens], self.ids[tokens], self.weights[tokens])
        y: Tensor = few_rows.few_slots_experts(*arguments, self.up, self.down, *self.biases, gate)
        return y


def make_slots(case: SlotsCase, dtype: torch.dtype) -> Inputs:
    seeded(case.id)
    if isinstance(case.ids, int):
        ids = torch.stack([torch.randperm(case.experts)[: case.top_k] for _ in range(case.ids)])
    else:
        ids = torch.tensor(case.ids)
    tokens, top_k = ids.shape

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(DEVICE, dtype)

    columns = case.gate.columns(case.intermediate)
    dense = random(case.experts, columns, case.hidden) / 8, random(case.experts, case.hidden, case.intermediate) / 8
    packed = [
        Packed4bitWeights.quantize(stack, projections=projections, **FORMATS[case.format])
        for stack, projections in zip(dense, (case.projections, 1), strict=True)
    ]
    biases = (random(case.experts, columns), random(case.experts, case.hidden)) if case.bias else (None, None)
    up, down = (as_stack(weights) for weights in packed)
    whole = tuple(dequantized(weights) for weights in packed)
    weights = torch.rand(tokens, top_k).to(DEVICE, torch.float32)
    return Inputs(ids.to(DEVICE), random(tokens, case.hidden), weights, up, down, biases, whole)  # type: ignore[arg-type]


def routed(case: SlotsCase, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """The stages of ``reference`` with sorted rows, over dense weights in ``dtype``."""
    ids, (up, down) = inputs.ids, inputs.dense
    tokens, top_k = ids.shape
    buffer = Routing.new_buffer(ids, ids.numel(), case.experts, zeroed=True)
    routing = Routing.from_buffer(buffer, ids.numel(), case.experts, top_k)
    reference.route(ids, routing, dtype)
    up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in inputs.biases)
    h, _ = reference.grouped_up(
        inputs.x.to(dtype), up.to(dtype), routing, ids.numel(), up_bias, case.gate, False
    )  # fmt: skip
    z = reference.grouped_gemm(h, down.to(dtype), routing, ids.numel(), down_bias, False, 0.0)
    y: Tensor = reference.combine(z, routing, tokens, inputs.weights.to(dtype))
    return y


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that lets a family of kernels have other fields of its configuration."""
    usual = tuning.few_config

    def configure(**changes: tuple[tuple[str, int], ...]) -> None:
        def few_config(name: str, *arguments: Any) -> Any:
            config = replace(usual(name, *arguments), **dict(changes.get(name, ())))
            tuning.check(name, config, tuning.TARGETS[80], 2)
            return config

        monkeypatch.setattr(tuning, "few_config", few_config)

    return configure


@pytest.mark.skipif(not ON_KERNELS, reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", SLOTS, ids=lambda case: case.id)
def test_experts_of_few_slots(case: SlotsCase, dtype: torch.dtype, configured: Any) -> None:
    configured(few_up_4bit=case.up, few_down_4bit=case.down)
    inputs = make_slots(case, dtype)
    ours = inputs.call(case.gate)
    assert ours.dtype == dtype
    assert_accurate("y", ours, routed(case, inputs, torch.float64), routed(case, inputs, dtype))


@pytest.mark.skipif(not ON_KERNELS, reason="needs a GPU or Triton's interpreter")
def test_a_token_has_the_same_bits_beside_others() -> None:
    """Tiles have whole rows, so a slot's result does not depend on which others share its expert."""
    case = SlotsCase("alone", "", ids=5, experts=2, hidden=320, bias=True)
    inputs = make_slots(case, torch.float16)
    together = inputs.call(case.gate)
    assert torch.equal(together, inputs.call(case.gate))
    alone = torch.cat([inputs.call(case.gate, slice(token, token + 1)) for token in range(5)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("family", ["few_up_4bit", "few_down_4bit"])
def test_buckets_sum_in_the_same_order(family: str, arch: int) -> None:
    """By default, so that bits do not depend on the number of slots either."""
    target = tuning.TARGETS[arch]
    found = [tuning.default_config(family, bucket, target, 2) for bucket in tuning.BUCKETS]
    assert len({(config.block_k, config.split_k) for config in found}) == 1


@pytest.mark.skipif(not ON_KERNELS, reason="needs a GPU or Triton's interpreter")
def test_which_calls_take_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SlotsCase("limit", "", experts=20)
    inputs = make_slots(case, torch.float16)
    up, down = inputs.up, inputs.down
    target = tuning.TARGETS[80]
    monkeypatch.setattr(tuning, "target_of", lambda _: target)
    assert not paths.multiplies_few_slots(1, up, down), "nobody has measured it"
    most = 2 * tuning.gemv_slots(target)
    with tuning.trying_thresholds(replace(tuning.thresholds_of(target), few_slots=most)):
        assert paths.multiplies_few_slots(most, up, down)
        assert launch.use_gemv(most, 1, up, down)
        assert not paths.multiplies_few_slots(most + 1, up, down)
        assert not launch.use_gemv(most + 1, 1, up, down)
        few = make_slots(replace(case, experts=4), torch.float16)
        assert paths.multiplies_few_slots(32, few.up, few.down)
        assert not paths.multiplies_few_slots(33, few.up, few.down), "each expert has more rows than a tile"
        exact = make_slots(case, torch.float32)
        assert not paths.multiplies_few_slots(1, exact.up, exact.down), "tensor cores would round fp32"
        assert launch.use_gemv(1, 1, exact.up, exact.down)
        assert not paths.multiplies_few_slots(1, up.mT, down.mT)
        assert not paths.multiplies_few_slots(1, *inputs.dense)
        monkeypatch.setattr(tuning, "target_of", lambda _: tuning.TARGETS["gfx942"])
        assert not paths.multiplies_few_slots(1, up, down)


if HAS_TRITON:
    import triton
    import triton.language as tl

    look_up = module("kernels.dequantize")._look_up

    @triton.jit
    def words_in_order(code, packed, scale, dtype: tl.constexpr, FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr):
        """What the PTX of nf4 makes of words, without PTX."""
        ROWS: tl.constexpr = packed.shape[0]
        COLUMNS: tl.constexpr = packed.shape[1]
        place = tl.arange(0, 8)
        shift = 8 * (place // 2) + 4 * (1 - place % 2)  # the high nibble of a byte first
        nibbles = (packed[:, :, None] >> shift[None, None, :].to(tl.uint32)) & 15
        wide = tl.reshape(tl.broadcast_to(scale[:, :, None], (ROWS, COLUMNS, 8)), (ROWS, 8 * COLUMNS))
        values = look_up(code, tl.reshape(nibbles, (ROWS, 8 * COLUMNS)))
        return (values * wide).to(dtype)


@pytest.fixture
def in_words(monkeypatch: pytest.MonkeyPatch, configured: Any) -> Iterator[Any]:
    """Weights are read in words of eight, as on NVIDIA GPUs."""
    usual = few_rows.format_code
    cached = [value for value in vars(few_rows).values() if hasattr(value, "cache_clear")]

    def format_code(*arguments: Any) -> Any:
        return usual(*arguments)._replace(PER_ELEMENT=8, in_order=words_in_order)

    monkeypatch.setattr(few_rows, "format_code", format_code)
    for function in cached:
        function.cache_clear()
    without = (("prefetch", False),)  # which is PTX, too
    yield lambda *changes: configured(
        few_up_4bit=without + changes, few_down_4bit=without + changes, few_linear_4bit=without + changes
    )
    for function in cached:
        function.cache_clear()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU reads words anyway")
@pytest.mark.parametrize("step", [64, 128, 256])
@pytest.mark.parametrize("name", ["nf4", "nf4-32", "nf4-128"])
def test_words_are_in_the_order_of_rows(name: str, step: int, in_words: Any) -> None:
    in_words(("block_k", step))
    case = SlotsCase("words", "", hidden=320, intermediate=192, ids=2, format=name, bias=True)
    inputs = make_slots(case, torch.float16)
    truth, torchs = (routed(case, inputs, dtype) for dtype in (torch.float64, torch.float16))
    assert_accurate("y", inputs.call(case.gate), truth, torchs)
    _, weights, _ = make_linear(LinearCase("words", "", in_features=320, out=(64,), formats=(name,)), torch.float16)
    rows = torch.eye(320, dtype=torch.float16, device=DEVICE).split(16)
    columns = torch.cat([kernel.linear_4bit(part, weights)[0] for part in rows])
    assert torch.equal(columns.T, dequantized(weights[0])[0])


# ---------------------------------------------------------------------------------------------------------- linear layers


@dataclass(frozen=True)
class LinearCase:
    """One call of ``linear_4bit``.

    Attributes:
        id: readable name. why: what it would catch.
        out: out features of each matrix. formats: of each, or one for all.
        config: fields of the launch configuration that replace those of the default.
    """

    id: str
    why: str
    rows: int = 3
    in_features: int = 128
    out: tuple[int, ...] = (40, 16, 24)
    formats: tuple[str, ...] = ("nf4",)
    bias: tuple[bool, ...] = (False,)
    config: tuple[tuple[str, int], ...] = ()


LINEAR = [
    *(LinearCase(f"rows-{rows}", "numbers of rows", rows=rows) for rows in (0, 1, 2, 8, 9, 16, 17, 40, 70)),
    *(LinearCase(f"format-{name}", "each format", formats=(name,), out=(32, 64)) for name in FORMATS if "4096" not in name),
    LinearCase("long-blocks", "blocks of more than a row", formats=("nf4-4096",), out=(64, 128), in_features=192),
    LinearCase("formats", "a format of its own for each", formats=("nf4", "fp4", "mxfp4"), bias=(True, False, True)),
    LinearCase("odd-out", "out features that fill no tile", out=(37, 1, 70), bias=(True,), formats=("nf4-32",)),
    LinearCase("one", "a matrix alone", out=(48,), bias=(True,)),
    LinearCase("two", "two, one of them without a bias", out=(16, 80), bias=(False, True)),
    LinearCase("four", "more matrices than a launch takes", out=(16, 20, 24, 28), bias=(True,)),
    LinearCase("thin", "in features that fill no step", in_features=64),
    LinearCase("ragged", "steps that end beyond the in features", in_features=832),
    LinearCase("unreadable", "rows that are no whole 64s", in_features=40, formats=("nf4-32",), out=(32, 64), bias=(True,)),
    LinearCase("unsplit", "in features undivided", in_features=576, config=(("split_k", 1), ("block_n", 64))),
    LinearCase("wide", "32 columns a warp", config=(("block_n", 32), ("block_k", 64), ("split_k", 4))),
    LinearCase("both", "parts of in and of out features", in_features=320, config=(("split_k", 2), ("block_n", 32))),
]  # fmt: skip


def repeated(values: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    return values * count if len(values) == 1 else values


def make_linear(case: LinearCase, dtype: torch.dtype) -> tuple[Tensor, list[Any], list[Tensor | None]]:
    seeded(case.id)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(DEVICE, dtype)

    count = len(case.out)
    weights = [
        Packed4bitWeights.quantize(random(1, out, case.in_features) / 8, **FORMATS[name])
        for out, name in zip(case.out, repeated(case.formats, count), strict=True)
    ]
    biases = [random(out) if wanted else None for out, wanted in zip(case.out, repeated(case.bias, count), strict=True)]
    return random(case.rows, case.in_features), weights, biases


def plain_linear(x: Tensor, weights: list[Any], biases: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.nn.functional.linear(x.to(dtype), dequantized(weight)[0].to(dtype), None if bias is None else bias.to(dtype))
        for weight, bias in zip(weights, biases, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.id)
def test_linear(case: LinearCase, dtype: torch.dtype, configured: Any) -> None:
    configured(few_linear_4bit=case.config)
    x, weights, biases = make_linear(case, dtype)
    ours = kernel.linear_4bit(x, weights, biases)
    truth, torchs = (plain_linear(x, weights, biases, each) for each in (torch.float64, dtype))
    assert len(ours) == len(weights)
    for index, y in enumerate(ours):
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert_accurate(f"y[{index}]", y, truth[index], torchs[index])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_one_hot_rows_are_columns_of_weights(name: str, dtype: torch.dtype) -> None:
    """Each weight comes through bit for bit as it dequantizes: in order, and rounded once."""
    features = 192
    case = LinearCase("one-hot", "", in_features=features, out=(64,), formats=(name,), rows=1)
    _, weights, _ = make_linear(case, dtype)
    eye = torch.eye(features, dtype=dtype, device=DEVICE)
    rows = torch.cat([kernel.linear_4bit(part, weights)[0] for part in eye.split(64)])
    assert torch.equal(rows.T, dequantized(weights[0])[0])


def test_strided_input_and_autocast() -> None:
    x, weights, biases = make_linear(LinearCase("strided", "", bias=(True,)), torch.float32)
    wide = torch.stack([x, x], dim=-1)[..., 1]
    same = kernel.linear_4bit(x, weights, biases)
    assert all(map(torch.equal, kernel.linear_4bit(wide, weights, biases), same))
    with torch.autocast(x.device.type, torch.bfloat16):
        ours = kernel.linear_4bit(x, weights, biases)
    half = [weight.to(dtype=torch.bfloat16) for weight in weights]
    expected = kernel.linear_4bit(x.bfloat16(), half, [bias.bfloat16() for bias in biases if bias is not None])
    assert all(map(torch.equal, ours, expected))


def test_linear_compiles_whole() -> None:
    x, weights, _ = make_linear(LinearCase("compiled", ""), torch.float32)
    compiled = torch.compile(lambda x: kernel.linear_4bit(x, weights), fullgraph=True, backend="eager")
    assert all(map(torch.equal, compiled(x), kernel.linear_4bit(x, weights)))


def test_linear_is_an_operator() -> None:
    x, weights, _ = make_linear(LinearCase("operator", "", out=(16, 24)), torch.float32)
    ops = module("ops.few_rows")
    operands = [module("weights").operands(weight) for weight in weights]
    arguments = ops.FewRowsArguments(
        x,
        [packed for packed, _, _ in operands],
        [scale for _, scales, _ in operands for scale in scales],
        ops.SEPARATOR.join(spec for _, _, spec in operands),
        [x.new_empty(0)] * 2,
    )
    torch.library.opcheck(ops.few_rows_operator.op, tuple(module("ops.schema").flatten(arguments)))


def bad_calls() -> list[BadCall]:
    x = torch.ones((2, 64), device=DEVICE)
    stack = torch.ones((2, 16, 64), device=DEVICE)
    two = Packed4bitWeights.quantize(stack)
    one, half = two.narrow(0, 1), two.narrow(0, 1).to(dtype=torch.bfloat16)
    call = kernel.linear_4bit
    return [
        BadCall("none", lambda: call(x, []), ValueError, "weights must be at least one matrix, got none"),
        BadCall("dense", lambda: call(x, [one, stack[:1]]), TypeError, "weights[1] must be Packed4bitWeights, got Tensor"),
        BadCall("experts", lambda: call(x, [two]), ValueError, "weights[0] must have shape (1, out, 64), got (2, 16, 64)"),
        BadCall("in", lambda: call(x[:, 1:], [one]), ValueError, "weights[0] must have shape (1, out, 63), got (1, 16, 64)"),
        BadCall("dtype", lambda: call(x, [one, half]), TypeError, "weights[1] must be float32 like input, got bfloat16"),
        BadCall("rank", lambda: call(x[0], [one]), ValueError, "input must have shape (T, in), got (64,)"),
        BadCall("number", lambda: call(x, [one], [None, None]), ValueError, "biases must be 1, as many as weights, got 2"),
        BadCall("bias", lambda: call(x, [one], [x[0]]), ValueError, "biases[0] must have shape (16), got (64,)"),
        BadCall(
            "bias-dtype", lambda: call(x, [one], [x[0, :16].half()]), TypeError,
            "biases[0] must be float32 like input, got float16",
        ),
        BadCall(
            "gradient", lambda: call(x.clone().requires_grad_(), [one]), NotImplementedError,
            "input and biases must not require a gradient: linear_4bit has none, moe_fused_linear has",
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("case", bad_calls(), ids=lambda case: case.id)
def test_bad_calls(case: BadCall) -> None:
    case.check()


# ----------------------------------------------------------------------------------------------- matrices of bitsandbytes


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_matrix_shares_the_memory_of_its_piece(double_quant: bool) -> None:
    weights = Packed4bitWeights.quantize(torch.randn(1, 40, 64, device=DEVICE), double_quant=double_quant)
    piece = kernel.interchange.piece_of(weights, 0)
    matrix = kernel.interchange.matrix_of_piece(piece, weights.format)
    assert torch.equal(matrix.dequantize(), weights.dequantize())
    assert [value.data_ptr() for value in matrix.tensors().values()] == [
        value.data_ptr() for value in weights.tensors().values()
    ]


def test_a_matrix_is_of_one_piece() -> None:
    weights = Packed4bitWeights.quantize(torch.randn(2, 16, 64, device=DEVICE))
    piece = kernel.interchange.piece_of(weights, 0)
    for bad in (
        BadCall(
            "experts",
            lambda: kernel.interchange.matrix_of_piece(piece, weights.format),
            ValueError,
            "format must be of one matrix, got 2 experts of 1 projections",
        ),
        BadCall(
            "size",
            lambda: kernel.interchange.matrix_of_piece(piece, replace(weights.format, shape=(1, 32, 64))),
            ValueError,
            "piece.packed must have 1024 bytes for 2048 weights, got 512",
        ),
    ):
        bad.check()
