"""4-bit storage: values against tables worked out here, all bits against bitsandbytes where that is installed.

bitsandbytes is asked on the device of the tests. What its GPU kernels do differently is also checked without a GPU, against
a transcription of their decisions for one number at a time.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.bits import dequantize_4bit
from tests.kernel.machine import DEVICE, ON_GPU, kernel, module, name_of

Format4bit, Packed4bitWeights, Piece = kernel.Format4bit, kernel.Packed4bitWeights, kernel.Piece
formats, bnb_scales, fp4, interchange = (
    module(name) for name in ("formats", "formats.absmax", "formats.fp4", "interchange")
)
NF4, FP4 = formats.named("nf4"), formats.named("fp4")

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def nf4_values() -> list[float]:
    """Quantiles of the normal distribution, seven below zero and eight above, scaled to [-1, 1] (QLoRA, appendix E)."""
    outermost = 0.9677083

    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(outermost + (0.5 - outermost) * i / count) for i in range(count)]

    values = sorted([*quantiles(8), 0.0, *(-value for value in quantiles(7))])
    return [value / values[-1] for value in values]


def fp4_values() -> list[float]:
    """A sign, two bits of a falling exponent and one of the mantissa; 12 is the largest."""
    values = []
    for nibble in range(16):
        sign, exponent, mantissa = -1.0 if nibble & 8 else 1.0, nibble >> 1 & 3, nibble & 1
        magnitude = 2.0 ** (4 - exponent) * (1 + mantissa / 2) if exponent else mantissa / 16
        values.append(sign * magnitude / 12)
    return values


VALUES = {"nf4": nf4_values(), "fp4": fp4_values()}


def single(value: float) -> float:
    """``value`` rounded to fp32."""
    return torch.tensor(value, dtype=torch.float64).float().item()


def pack(nibbles: Tensor) -> Tensor:
    """(n,) to (n/2,) bytes."""
    return (nibbles[0::2] * 16 + nibbles[1::2]).to(torch.uint8)


def assert_same_bits(name: str, ours: Tensor, theirs: Tensor, signed_zeros: bool = True) -> None:
    """Fails unless all bits are equal.

    Any NaN equals any other, and zeros of either sign are equal unless ``signed_zeros``.
    """
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    same = ours == theirs
    if ours.is_floating_point():
        if signed_zeros:
            same &= ours.signbit() == theirs.signbit()
        same |= ours.isnan() & theirs.isnan()
    differing = (~same).nonzero()
    assert len(differing) == 0, f"{name}: {len(differing)} of {same.numel()} differ, first at {differing[0].tolist()}"


# What the numbers are.


def test_nf4_is_made_of_normal_quantiles() -> None:
    assert NF4.codes == pytest.approx(VALUES["nf4"], abs=2e-7)


def test_fp4_is_a_four_bit_float() -> None:
    assert [single(value) for value in FP4.codes] == [single(value) for value in VALUES["fp4"]]


def test_absmax_bytes_are_the_signed_dynamic_map() -> None:
    middles = [10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / 2**i) for i in range(7) for k in range(2**i)]
    expected = sorted([0.0, 1.0, *middles, *(-value for value in middles)])
    assert bnb_scales.nested_code(CPU).tolist() == pytest.approx(expected, rel=1e-6)


def stack_of(packed: Tensor, quant_type: str, shape: tuple[int, int, int], projections: int = 1) -> Any:
    """Packed weights over these bytes, with every absmax one."""
    weight_format = Format4bit(shape, quant_type, 64, double_quant=False, projections=projections, dtype=torch.float32)
    absmax = torch.ones((shape[0], projections * weight_format.blocks), device=DEVICE)
    return Packed4bitWeights(weight_format, packed.to(DEVICE), bnb_scales.as_bytes(absmax))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_position_takes_its_own_nibble(quant_type: str) -> None:
    """Each position of a matrix reads its nibble.

    The matrix has two blocks, and each expert has one nibble that is not zero.
    """
    zero = VALUES[quant_type].index(0.0)
    nibbles = torch.full((128, 128), zero).fill_diagonal_(3)  # an expert for each position
    weights = stack_of(torch.stack([pack(row) for row in nibbles]), quant_type, (128, 8, 16)).dequantize()
    expected = torch.diag(torch.full((128,), formats.named(quant_type).codes[3])).view(128, 8, 16)
    assert torch.equal(weights.cpu(), expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_byte_has_its_two_values(quant_type: str) -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(1, 256)
    weights = stack_of(packed, quant_type, (1, 16, 32)).dequantize().flatten().tolist()
    expected = [VALUES[quant_type][nibble] for byte in range(256) for nibble in (byte >> 4, byte & 15)]
    assert weights == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_sign_of_zero(dtype: torch.dtype) -> None:
    """fp4's nibble 8 is -0 in bitsandbytes' kernels for GPUs and 0 in its table in torch, and so it is here."""
    packed = torch.full((1, 32), 0x08, dtype=torch.uint8)
    for quant_type, signs in (("fp4", [False, ON_GPU]), ("nf4", [True, False])):
        weights = stack_of(packed, quant_type, (1, 1, 64)).dequantize(dtype).flatten()
        assert weights[:2].signbit().tolist() == signs
        assert (weights[:2] == 0).all() or quant_type == "nf4"
    if not ON_GPU:
        table = pytest.importorskip("bitsandbytes", minversion="0.50").functional.get_4bit_type("fp4", device="cpu")
        assert_same_bits("fp4", FP4.code(CPU), table)


def test_every_absmax_byte_has_its_value() -> None:
    """Every byte of an absmax gives its value.

    Two projections have separate scales and offsets, with several second-level groups each.
    """
    scales, offsets = [[0.3, 0.07], [1.7, 1e-3]], [0.011, -2.0]
    weight_format = Format4bit((1, 2 * 320, 64), projections=2, dtype=torch.float32)
    absmax = torch.stack([torch.arange(320) % 256, 255 - torch.arange(320) % 256]).to(torch.uint8)
    weights = Packed4bitWeights(
        weight_format,
        torch.full((1, 640 * 32), 0xFF, dtype=torch.uint8),  # nf4's 1.0 everywhere
        absmax.view(1, -1),
        bnb_scales.as_bytes(torch.tensor(scales).view(1, -1)),
        bnb_scales.as_bytes(torch.tensor(offsets).view(1, -1)),
    ).to(DEVICE)
    code = bnb_scales.nested_code(CPU).tolist()
    expected = [
        single(single(code[byte] * single(scales[p][i // 256])) + single(offsets[p]))
        for p in range(2)
        for i, byte in enumerate(absmax[p].tolist())
    ]
    assert weights.scales().flatten().tolist() == expected
    assert torch.equal(weights.dequantize().cpu(), torch.tensor(expected)[:, None].expand(640, 64)[None])


def test_quantizing_takes_the_nearest_value() -> None:
    """Quantizing takes the value that a search in float64 finds nearest."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn((3, 32, 64), generator=generator)
    for quant_type in ("nf4", "fp4"):
        weights = Packed4bitWeights.quantize(dense.to(DEVICE), quant_type=quant_type, double_quant=False)
        blocks = dense.double().view(-1, 64)
        absmax = blocks.abs().amax(1, keepdim=True)
        assert torch.equal(weights.scales().cpu().flatten(), absmax.flatten().float())
        values = torch.tensor(VALUES[quant_type], dtype=torch.float64) * absmax[..., None]
        nearest = (blocks[..., None] - values).abs().amin(-1)
        error = (weights.dequantize(torch.float32).cpu().double().view(-1, 64) - blocks).abs()
        assert (error <= nearest + 2e-6 * absmax).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_double_quantization_costs_little(quant_type: str) -> None:
    dense = torch.randn((2, 256, 128), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plain = Packed4bitWeights.quantize(dense, quant_type=quant_type, double_quant=False)
    double = Packed4bitWeights.quantize(dense, quant_type=quant_type)
    assert torch.equal(plain.packed, double.packed)
    errors = [float((weights.dequantize() - dense).norm() / dense.norm()) for weights in (plain, double)]
    assert errors[0] <= errors[1] + 1e-4 < errors[0] + 2e-3
    assert errors[1] < (0.11 if quant_type == "nf4" else 0.15)


def test_storage_is_small() -> None:
    """Half a byte, a byte in 64 for the absmax and four in 16384 for its scale, and an offset for each projection."""
    weights = Packed4bitWeights.quantize(torch.zeros((2, 256, 512), device=DEVICE), projections=2)
    assert weights.nbytes == 2 * (256 * 512 // 2 + 256 * 512 // 64 + 4 * 256 * 512 // 64 // 256 + 2 * 4)


# What bitsandbytes' GPU kernels decide, for one number at a time.


def gpu_fp4(x: float) -> int:
    """The nibble of a quotient."""
    magnitude = abs(x)
    steps = [(0.8333333, 3), (0.583333, 2), (0.4166667, 5), (0.29166667, 4), (0.20833333, 7), (0.0859375, 6)]
    for border, nibble in [*steps, (0.00260417, 1), (-1.0, 0)]:
        if magnitude > single(border):
            return nibble + 8 * (x < 0)
    return 0  # NaN


def gpu_byte(x: float, code: list[float]) -> int:
    """The byte of an absmax's quotient, by halving steps from the middle of the code."""
    pivot, lower, upper, step = 127, 0, 255, 64
    while step:
        if x > code[pivot]:
            lower, pivot = pivot, pivot + step
        else:
            upper, pivot = pivot, pivot - step
        step //= 2
    if x > code[pivot]:
        return upper if x > single((code[upper] + code[pivot]) / 2) else pivot
    return lower if x < single((code[lower] + code[pivot]) / 2) else pivot


def around(values: Tensor) -> Tensor:
    """``values`` and their neighbours in fp32."""
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    return torch.cat((values, torch.nextafter(values, up), torch.nextafter(values, down)))


@pytest.fixture
def exact_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of an NVIDIA GPU, were its division exact, on the CPU."""
    monkeypatch.setattr(bnb_scales, "_fast_math", lambda: True)
    monkeypatch.setattr(bnb_scales, "_reciprocal", torch.reciprocal)


def test_borders_of_fp4_on_a_gpu() -> None:
    borders = torch.tensor(fp4.BORDERS_CUDA)
    quotients = around(torch.cat((borders, -borders, torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, -0.1]))))
    bounds, nibbles = FP4.borders(True, CPU)
    ours = nibbles[torch.bucketize(quotients, bounds)].tolist()
    assert ours == [gpu_fp4(quotient) for quotient in quotients.tolist()]


def test_bytes_of_absmaxes_on_a_gpu(exact_gpu: None) -> None:
    """All values, the middles between them, and their neighbours, in groups whose absmax is one; and zeros, as NaN is."""
    code = bnb_scales.nested_code(CPU)
    quotients = around(torch.cat((code, (code[:-1] + code[1:]) * 0.5))).clamp(-1.0, 1.0)
    groups = torch.nn.functional.pad(quotients, (0, -len(quotients) % 255)).view(-1, 255)
    groups = torch.cat((torch.ones(len(groups), 1), groups), dim=1)
    groups = torch.cat((groups, torch.zeros(1, 256)))
    expected = [[gpu_byte(x, code.tolist()) for x in group] for group in groups[:-1].tolist()]
    ours, absmax = bnb_scales._quantize_absmax_on_gpu(groups.clone())
    assert ours.view(groups.shape).tolist() == [*expected, [0] * 256]
    assert absmax.tolist() == [1.0] * len(expected) + [0.0]


def test_blocks_on_a_gpu(exact_gpu: None) -> None:
    """A subnormal absmax is zero, and NaN is ignored in it.

    A weight without a quotient gets the value of the first nibble.
    """
    blocks = torch.zeros((5, 64))
    blocks[0, :2] = torch.tensor([1e-39, -1e-39])
    blocks[1, :3] = torch.tensor([math.nan, -4.0, 2.0])
    blocks[2, :3] = torch.tensor([math.inf, 1.0, -1.0])
    blocks[3, :3] = torch.tensor([2.0**-126, 2.0**-127, 0.0])
    blocks[4] = math.nan
    absmax = bnb_scales._normalize_on_gpu(blocks, -1.0)
    assert absmax.tolist() == [0.0, 4.0, math.inf, 2.0**-126, torch.finfo(torch.float32).min]
    assert (blocks[0] == -1.0).all()
    assert blocks[1, :4].tolist() == [-1.0, -1.0, 0.5, 0.0]
    assert blocks[2, :4].tolist() == [-1.0, 0.0, 0.0, 0.0]
    assert blocks[3, :3].tolist() == [1.0, 0.0, 0.0]
    assert (blocks[4] == -1.0).all()


@pytest.mark.skipif(not ON_GPU or torch.version.hip is not None, reason="an instruction of NVIDIA GPUs")
def test_approximate_reciprocal() -> None:
    values = torch.rand(5000, device=DEVICE) * 100 + 1e-3
    ours = bnb_scales._reciprocal(values)
    assert ((ours.double() * values.double() - 1).abs() < 2**-22).all()
    edges = torch.tensor([0.0, 1e-39, math.inf, 2.0**127], device=DEVICE)
    assert bnb_scales._reciprocal(edges).tolist() == [math.inf, math.inf, 0.0, 0.0]


# Bit for bit.


WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "random": lambda noise, _: noise * 0.02,
    "constant": lambda noise, _: torch.full_like(noise, 0.3),
    "negative": lambda noise, _: torch.full_like(noise, -0.3),
    "mixed signs": lambda noise, _: noise.sign() * 0.02,
    "tiny": lambda noise, _: noise * 1e-30,
    "subnormal": lambda noise, _: noise * 1e-38,
    "huge": lambda noise, largest: noise.clamp(-3.0, 3.0) / 3.0 * largest,
    "zero": lambda noise, _: torch.zeros_like(noise),
    "negative zero": lambda noise, _: torch.full_like(noise, -0.0),
    "sparse": lambda noise, _: torch.where(noise > 2.5, noise, 0.0),
    "rows of all scales": lambda noise, _: noise * torch.logspace(-6, 3, noise.shape[1])[:, None],
    "infinite": lambda noise, _: torch.where(noise > 3.5, math.inf, noise),
    "NaN": lambda noise, _: torch.where(noise > 3.5, math.nan, noise),
}


@dataclass(frozen=True)
class BitsCase:
    """Weights and how they are quantized.

    Attributes:
        weights: which of ``WEIGHTS``.
        shape: (E, out, in), or of (E, in, out) memory if ``transposed``.
    """

    weights: str = "random"
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    projections: int = 1
    shape: tuple[int, int, int] = (2, 64, 128)
    dtype: torch.dtype = torch.bfloat16
    transposed: bool = False

    @property
    def id(self) -> str:
        double = "double" if self.double_quant else "plain"
        size = "x".join(map(str, self.shape)) + (".T" if self.transposed else "")
        return f"{self.weights}-{self.quant_type}-{self.blocksize}-{double}-{self.projections}-{size}-{name_of(self.dtype)}"

    def make(self) -> Tensor:
        generator = torch.Generator().manual_seed(sum(self.shape))
        noise = torch.randn(self.shape, generator=generator)
        dense = WEIGHTS[self.weights](noise, torch.finfo(self.dtype).max).to(DEVICE, self.dtype)
        return dense.mT.contiguous().mT if self.transposed else dense


CASES = [
    # Every blocksize, in both codes, with and without double quantization, from every dtype.
    *(
        BitsCase("random", quant_type, blocksize, double_quant, 2, (2, 128, 96), dtype)
        for quant_type, blocksize, double_quant, dtype in itertools.product(
            ("nf4", "fp4"), BLOCKSIZES[:-1], (True, False), DTYPES
        )
    ),
    *(
        BitsCase("random", quant_type, 4096, double_quant, 2, (2, 128, 128), dtype)
        for quant_type, double_quant, dtype in itertools.product(("nf4", "fp4"), (True, False), DTYPES)
    ),
    # Weights on which the arithmetic is at its limits.
    *(
        BitsCase(weights, quant_type, 64, double_quant, dtype=dtype)
        for weights, quant_type, double_quant, dtype in itertools.product(
            [weights for weights in WEIGHTS if weights != "random"], ("nf4", "fp4"), (True, False), DTYPES
        )
    ),
    BitsCase(shape=(2, 64, 63)),  # odd in features: bytes that hold weights of two rows
    BitsCase(shape=(1, 192, 1), projections=3),
    BitsCase(shape=(3, 64, 1)),  # a single block
    BitsCase(shape=(1, 320, 128)),  # 640 absmaxes: the last group is not full
    BitsCase(shape=(1, 1024, 512), dtype=torch.float32),  # 8192 of them, near each other's borders
    BitsCase(shape=(1, 1024, 512), quant_type="fp4", dtype=torch.float32),
    BitsCase(transposed=True, projections=2),
]


@pytest.fixture(scope="module")
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes", minversion="0.50").functional


def piece_of(bnb: Any, dense: Tensor, case: BitsCase) -> tuple[Any, Tensor]:
    """What bitsandbytes makes of one matrix: its tensors, and the weights it gets back."""
    packed, state = bnb.quantize_4bit(
        dense, blocksize=case.blocksize, compress_statistics=case.double_quant, quant_type=case.quant_type
    )
    nested = (state.state2.absmax, state.offset) if case.double_quant else ()
    return Piece(packed, state.absmax, *nested), dequantize_4bit(packed, state)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bits_are_those_of_bitsandbytes(bnb: Any, case: BitsCase) -> None:
    dense = case.make()
    weights = Packed4bitWeights.quantize(
        dense,
        quant_type=case.quant_type,
        blocksize=case.blocksize,
        double_quant=case.double_quant,
        projections=case.projections,
    )
    assert weights.dtype == case.dtype
    ours = weights.dequantize()
    assert ours.dtype == case.dtype
    for expert, projection in itertools.product(range(case.shape[0]), range(case.projections)):
        rows = slice(*(case.shape[1] // case.projections * end for end in (projection, projection + 1)))
        theirs, dequantized = piece_of(bnb, dense[expert, rows].contiguous(), case)
        piece = interchange.piece_of(weights, expert, projection)
        for part in ("packed", "absmax", "nested_absmax", "nested_offset"):
            if getattr(theirs, part) is not None:
                assert_same_bits(part, getattr(piece, part), getattr(theirs, part))
        if ON_GPU and case.weights == "subnormal":
            continue  # products that are subnormal: flushed by bitsandbytes on NVIDIA GPUs
        assert_same_bits("weights", ours[expert, rows], dequantized)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_dequantizing_to_another_dtype_rounds_once(bnb: Any, dtype: torch.dtype) -> None:
    """Dequantizing to another dtype rounds once: it gives what bitsandbytes gives for a state of that dtype."""
    dense = BitsCase(dtype=torch.float16).make()
    weights = Packed4bitWeights.quantize(dense, dtype=torch.bfloat16)
    packed, state = bnb.quantize_4bit(dense[0], blocksize=64, compress_statistics=True, quant_type="nf4")
    state.dtype = dtype
    assert_same_bits("weights", weights.dequantize(dtype)[0], dequantize_4bit(packed, state))
    assert weights.to(dtype=dtype).dequantize().dtype == dtype
    if dtype == torch.float16:
        assert not torch.equal(weights.dequantize(dtype), weights.dequantize().to(dtype))


def test_tables_do_not_depend_on_who_asks_first() -> None:
    """Tables that are cached under the meta device, as while a model is loaded, must serve afterwards."""
    tables = (module("formats.base").code_of, bnb_scales.nested_code, bnb_scales._middles, bnb_scales._nested_borders)
    expected = example()
    for table in (*tables, bnb_scales._nested_table):
        table.cache_clear()
    dense = BitsCase(shape=SMALL).make()
    with torch.device("meta"), torch.inference_mode():
        inside = Packed4bitWeights.quantize(dense, projections=2)
        dequantized = inside.dequantize()
    assert_same(Packed4bitWeights.quantize(dense, projections=2), inside)
    assert torch.equal(inside.dequantize(), dequantized)
    assert_same(example(), expected)


def test_tables_of_a_tracer_are_not_kept() -> None:
    """Tables made under a tracer such as torch.export's are not cached, because its tensors have no values."""
    dense = BitsCase(shape=SMALL).make().to(CPU)
    weights = Packed4bitWeights.quantize(dense, double_quant=False)
    expected = weights.dequantize()
    for table in (module("formats.base").code_of, bnb_scales._middles):
        table.cache_clear()
    with FakeTensorMode():
        assert isinstance(NF4.code(CPU), FakeTensor)
        assert isinstance(NF4.borders(False, CPU)[0], FakeTensor)
    assert torch.equal(weights.dequantize(), expected)
    assert_same(Packed4bitWeights.quantize(dense, double_quant=False), weights)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="measures the memory of a GPU")
def test_temporaries_are_of_one_expert() -> None:
    dense = torch.randn((64, 256, 512), device=DEVICE, dtype=torch.bfloat16)
    weights = Packed4bitWeights.quantize(dense)  # and what is cached
    for call, result in (
        (lambda: Packed4bitWeights.quantize(dense), weights.nbytes),
        (weights.dequantize, dense.nbytes),
    ):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        assert torch.cuda.max_memory_allocated() - before < result + 8 * 4 * 256 * 512


# From and to pieces.

SMALL = (2, 8, 64)  # 4 blocks for each of two projections


def example(double_quant: bool = True, projections: int = 2, shape: tuple[int, int, int] = SMALL) -> Any:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, torch.bfloat16)
    return Packed4bitWeights.quantize(dense, double_quant=double_quant, projections=projections)


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours.format == theirs.format
    assert ours.tensors().keys() == theirs.tensors().keys()
    for name, value in ours.tensors().items():
        assert torch.equal(value, theirs.tensors()[name]), name


@pytest.mark.kernels_ci
@pytest.mark.parametrize("double_quant", [True, False])
def test_pieces_make_up_the_stack_they_came_from(double_quant: bool) -> None:
    weights = example(double_quant, shape=(2, 1024, 64))  # two groups each
    pieces = [interchange.piece_of(weights, expert, projection) for expert in range(2) for projection in range(2)]
    assert pieces[0].packed.shape == (512 * 64 // 2, 1)
    assert pieces[0].absmax.shape == (512,)
    assert pieces[0].absmax.dtype == (torch.uint8 if double_quant else torch.float32)
    if double_quant:
        assert pieces[3].nested_absmax.shape == (2,)
        assert pieces[3].nested_offset.shape == ()
    assert_same(interchange.stack_of_pieces(iter(pieces), weights.format), weights)


def test_pieces_come_in_any_storage_and_shape() -> None:
    """Pieces may have the shape of older bitsandbytes, and bytes that are stored as another dtype."""
    weights = example()
    pieces = [interchange.piece_of(weights, expert, projection) for expert in range(2) for projection in range(2)]
    stored = [
        replace(piece, packed=piece.packed.view(1, -1).clone().view(dtype), nested_offset=piece.nested_offset[None])
        for piece, dtype in zip(pieces, (torch.uint8, *DTYPES), strict=True)
    ]
    assert_same(interchange.stack_of_pieces(stored, weights.format), weights)


def test_pieces_can_go_to_another_device() -> None:
    weights = example()
    pieces = [
        interchange.piece_of(weights.to(CPU), expert, projection) for expert in range(2) for projection in range(2)
    ]
    assert_same(interchange.stack_of_pieces(pieces, weights.format, DEVICE), weights)
    assert interchange.stack_of_pieces(pieces, weights.format, "meta").device.type == "meta"


def test_bytes_that_do_not_begin_where_floats_may() -> None:
    """Bytes may begin at an odd address, as those of tensors that were cut out of a file do."""
    weights = example()
    shifted = {}
    for name, value in weights.tensors().items():
        buffer = torch.empty(value.numel() + 1, dtype=torch.uint8, device=DEVICE)
        shifted[name] = buffer[1:].view(value.shape).copy_(value)
    moved = Packed4bitWeights(weights.format, **shifted)
    assert torch.equal(moved.dequantize(), weights.dequantize())
    assert torch.equal(
        interchange.piece_of(moved, 1, 1).nested_offset, interchange.piece_of(weights, 1, 1).nested_offset
    )


FUSED = [
    ("whole-groups", (3, 256, 64), True),
    ("groups-over-borders", (3, 96, 64), False),
    ("fewer-than-a-group", (2, 8, 64), False),
]


@pytest.mark.parametrize("projections", [1, 2])
@pytest.mark.parametrize("shape, keeps", [pytest.param(*case[1:], id=case[0]) for case in FUSED])
def test_fused_stacks_lose_nothing(bnb: Any, shape: tuple[int, int, int], keeps: bool, projections: int) -> None:
    case = BitsCase(shape=shape)
    dense = [case.make() * (projection + 1) for projection in range(projections)]
    fused = [piece_of(bnb, stack, case) for stack in dense]
    fused_format = Format4bit((shape[0], shape[1] * projections, shape[2]), projections=projections)
    weights = interchange.stack_of_fused_pieces([piece for piece, _ in fused], fused_format)
    assert weights.format == replace(fused_format, double_quant=keeps)
    assert_same_bits("weights", weights.dequantize(), torch.cat([stack for _, stack in fused], dim=1))


@pytest.mark.kernels_ci
def test_fused_stacks_without_double_quantization() -> None:
    """Without double quantization, a fused stack has the same bytes as experts that were quantized one by one."""
    dense = BitsCase(shape=(3, 8, 64)).make()
    alone = Packed4bitWeights.quantize(dense, double_quant=False)
    fused = Packed4bitWeights.quantize(dense.view(1, 24, 64), double_quant=False)
    fused = interchange.piece_of(fused, 0)
    assert_same(interchange.stack_of_fused_pieces([fused], alone.format), alone)


# As a value, and in a module.


@pytest.mark.kernels_ci
def test_copies_and_pickles() -> None:
    weights = example()
    copied = copy.deepcopy(weights)
    assert_same(copied, weights)
    assert copied.packed.data_ptr() != weights.packed.data_ptr()
    assert_same(pickle.loads(pickle.dumps(weights)), weights)


@pytest.mark.kernels_ci
def test_is_like_a_tensor() -> None:
    weights = example()
    assert (weights.shape, weights.dtype, weights.device) == (SMALL, torch.bfloat16, weights.packed.device)
    moved = weights.to(CPU, torch.float32)
    assert (moved.dtype, moved.device) == (torch.float32, CPU)
    assert_same(moved.to(DEVICE, torch.bfloat16), weights)
    assert weights.to("meta").device.type == "meta"
    assert weights.to(torch.float16).dtype == torch.float16
    second = weights.narrow(1, 1)
    assert second.shape == (1, *SMALL[1:])
    assert torch.equal(second.dequantize(), weights.dequantize()[1:])
    assert second.packed.data_ptr() == weights.packed[1].data_ptr()


@pytest.mark.kernels_ci
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_module_owns_it(double_quant: bool) -> None:
    weights = example(double_quant)
    owner, other = nn.Module(), nn.Module()
    owner.register_parameter("gate_up_proj", nn.Parameter(torch.zeros(SMALL)))  # is replaced
    kernel.modules.attach(weights, owner, "gate_up_proj")
    parts = ["gate_up_proj", "gate_up_proj_absmax"]
    parts += ["gate_up_proj_nested_absmax", "gate_up_proj_nested_offset"] if double_quant else []
    assert [name for name, _ in owner.named_parameters()] == parts
    assert all(part.dtype == torch.uint8 and len(part) == SMALL[0] for part in owner.parameters())
    assert not any(part.requires_grad for part in owner.parameters())
    assert_same(kernel.modules.weights_of(owner, "gate_up_proj"), weights)
    taken = copy.deepcopy(owner)
    assert_same(kernel.modules.detach(taken, "gate_up_proj"), weights)
    assert not list(taken.parameters())

    kernel.modules.attach(example(double_quant).to("meta"), other, "gate_up_proj")
    other.load_state_dict(owner.state_dict(), assign=True)
    for module_ in (other, copy.deepcopy(owner), owner.to(torch.float16), owner.half().requires_grad_(False)):
        assert_same(kernel.modules.weights_of(module_, "gate_up_proj"), weights)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_module_holds_bytes_in_another_dtype(dtype: torch.dtype, double_quant: bool) -> None:
    # Some have 6 scales to an expert, which do not fill elements of four bytes, and bytes that are NaN in any dtype.
    weights = Packed4bitWeights.quantize(torch.randn(3, 6, 64), double_quant=double_quant)
    parts = {
        name: torch.full_like(value, 255) if name == "packed" else value for name, value in weights.tensors().items()
    }
    weights, owner = weights.replaced(**parts), nn.Module()
    made = kernel.modules.attach(weights, owner, "down_proj", dtype)
    assert {name: value.dtype for name, value in owner.named_parameters()} == dict.fromkeys(made, dtype)
    assert all(len(value) == 3 for value in made.values())
    assert_same(kernel.modules.weights_of(owner, "down_proj"), weights)
    assert_same(kernel.modules.weights_of(copy.deepcopy(owner), "down_proj"), weights)
    kernel.modules.attach(weights, owner, "down_proj")  # the dtype stays
    assert owner.down_proj.dtype == dtype
    assert_same(kernel.modules.detach(owner, "down_proj"), weights)
    assert not [name for name in vars(owner) if name.startswith("down_proj")]
    assert not list(owner.parameters())


def test_bytes_that_were_cast_are_refused() -> None:
    owner = nn.Module()
    kernel.modules.attach(example(True), owner, "up_proj", torch.bfloat16)
    owner.to(torch.float16)
    with pytest.raises(TypeError, match=r"^up_proj must be bfloat16, as which its bytes are held, got float16: "):
        kernel.modules.weights_of(owner, "up_proj")


@pytest.mark.kernels_ci
def test_a_module_may_have_dense_weights() -> None:
    owner = nn.Linear(4, 4)
    assert kernel.modules.weights_of(owner, "weight") is owner.weight


def test_formats_compare_and_take_any_sequence_for_a_shape() -> None:
    assert Format4bit(torch.Size(SMALL)) == Format4bit(SMALL) == Format4bit([*SMALL])
    assert len({Format4bit(SMALL), Format4bit([*SMALL]), Format4bit(SMALL, "fp4")}) == 2


def test_a_divided_stack_stays_divided() -> None:
    """A process holds some of the experts, and the parameters are DTensors of all."""
    from torch import distributed
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    weights = example(True).to(CPU)
    experts = 2 * weights.shape[0]
    owner = nn.Module()
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = distributed.init_device_mesh("cpu", (2,))
        whole = torch.empty((experts, *weights.shape[1:]), device="meta")
        owner.up_proj = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
        for _ in range(2):  # the second time, the parameters hold bytes
            made = kernel.modules.attach(weights, owner, "up_proj")
            assert made.keys() == {"up_proj", "up_proj_absmax", "up_proj_nested_absmax", "up_proj_nested_offset"}
            for (part, value), parameter in zip(weights.tensors().items(), made.values(), strict=True):
                assert isinstance(parameter, DTensor)
                assert parameter.shape == (experts, value.shape[1])
                assert torch.equal(parameter.to_local(), value), part
            read = kernel.modules.weights_of(owner, "up_proj")
            assert read.format == weights.format
            assert all(torch.equal(value, read.tensors()[part]) for part, value in weights.tensors().items())
        assert kernel.modules.detach(owner, "up_proj").shape == weights.shape
    finally:
        distributed.destroy_process_group()
