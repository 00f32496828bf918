"""mxfp4 and nvfp4 as they are published: what they dequantize to, how weights are rounded, and the tensors of checkpoints.

Bits are compared, zeros' signs among them; a NaN equals a NaN. What is expected comes from the definitions, written here
once more: OCP Microscaling Formats 1.0 for values and the scales of mxfp4, and compressed-tensors 0.20 for nvfp4 and for
quantizing. ``tests/integration/test_published_weights.py`` compares with Transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel.bad_calls import BadCall
from tests.kernel.machine import DEVICE, kernel, module, name_of
from tests.kernel.packed_cases import DTYPES, decoding

Packed4bitWeights, Format4bit, interchange = kernel.Packed4bitWeights, kernel.Format4bit, kernel.interchange
E4M3 = torch.float8_e4m3fn

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)], device=DEVICE)
BLOCKSIZES = {"mxfp4": 32, "nvfp4": 16}
GLOBAL_SCALES = (1.0, 2688.0 / 0.37, 3.3e-5)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.itemsize]
    equal = (got.view(integer) == expected.view(integer)) | (got.isnan() & expected.isnan())
    assert equal.all(), f"{got[~equal][:5].tolist()} instead of {expected[~equal][:5].tolist()}"


def every_scale(name: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """Weights whose row r has all nibbles and the scale byte r, for each global scale an expert; and their fp32 scales."""
    blocksize, every = BLOCKSIZES[name], torch.arange(256, dtype=torch.uint8, device=DEVICE)
    nibbles = torch.arange(16, dtype=torch.uint8, device=DEVICE).repeat(blocksize // 16)
    experts = 1 if name == "mxfp4" else len(GLOBAL_SCALES)
    packed = (nibbles[::2] | nibbles[1::2] << 4).repeat(experts, 256)
    storage = [packed, every.repeat(experts, 1)]
    if name == "mxfp4":
        scales = torch.tensor([math.ldexp(1.0, byte - 127) for byte in range(255)] + [math.nan], device=DEVICE)[None]
    else:
        global_scales = torch.tensor(GLOBAL_SCALES, device=DEVICE)[:, None]
        storage.append(global_scales.view(torch.uint8))
        scales = every.view(E4M3).float() / global_scales
    return Packed4bitWeights(Format4bit((experts, 256, blocksize), name, dtype=dtype), *storage), scales


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", BLOCKSIZES)
def test_every_scale_and_nibble(name: str, dtype: torch.dtype) -> None:
    weights, scales = every_scale(name, dtype)
    assert_same_bits(weights.scales(), scales)
    expected = (VALUES * scales[..., None]).to(dtype).repeat(1, 1, BLOCKSIZES[name] // 16)
    assert_same_bits(weights.dequantize(), expected)
    assert weights.dequantize(torch.float32).isnan().any()
    subnormal = (expected != 0) & (expected.abs() < torch.finfo(dtype).tiny)
    assert subnormal.any() == (name == "mxfp4" or dtype == torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", BLOCKSIZES)
def test_products_have_the_same_bits(name: str, dtype: torch.dtype) -> None:
    """A product that dequantizes, with rows that are one-hot: every scale whose weights are normal numbers of the dtype."""
    everything, scales = every_scale(name, dtype)
    normal = (0.5 * scales.abs() >= torch.finfo(dtype).tiny) & (6.0 * scales.abs() <= torch.finfo(dtype).max)
    rows = normal[0].nonzero().flatten()
    rows = rows[: len(rows) // 16 * 16]
    assert len(rows) >= 16
    per_row = 64 // BLOCKSIZES[name]
    storage = {part: value[:1] for part, value in everything.tensors().items()}
    storage["packed"] = storage["packed"].view(256, -1)[rows].repeat(1, per_row).view(1, -1)
    storage["block_scale"] = storage["block_scale"][0, rows].repeat_interleave(per_row).view(1, -1)
    weights = Packed4bitWeights(Format4bit((1, len(rows), 64), name, dtype=dtype), **storage)
    eye, sizes = torch.eye(64, dtype=dtype, device=DEVICE), torch.tensor([64], device=DEVICE)
    with decoding(in_gemm=True), torch.no_grad():
        product = kernel.moe_fused_linear(eye, weights, sizes)
    # Adding zeros to -0 makes 0 of it.
    assert_same_bits(product.mT.contiguous(), weights.dequantize()[0] + 0.0)


def test_bytes_per_weight() -> None:
    weight = torch.randn((2, 64, 128), device=DEVICE)
    for name, bits in (("mxfp4", 4.25), ("nvfp4", 4.5)):
        weights = Packed4bitWeights.quantize(weight, quant_type=name)
        of_global = 4 * 2 if name == "nvfp4" else 0
        assert weights.nbytes - of_global == weight.numel() * bits / 8


# ---------------------------------------------------------------------------------------------------------- quantizing


def nearest(quotient: float) -> int:
    """The nibble by distance alone, of two as near the even one."""
    magnitude = min(abs(quotient), 6.0)
    place = min(range(8), key=lambda code: (abs(MAGNITUDES[code] - magnitude), code % 2))
    return place + 8 * (math.copysign(1.0, quotient) < 0)


def mx_exponent(largest: float) -> int:
    """The scale byte of a block's largest magnitude, which is not NaN or Inf, as compressed-tensors 0.20 computes it."""
    if largest == 0.0:
        return 0
    mantissa, exponent = math.frexp(largest)  # from 0.5 to 1
    return max(0, 127 + (exponent - 1) + (2 * mantissa >= 1.75) - 2)


def unpacked(weights: Any) -> list[list[int]]:
    """The nibbles of each block."""
    both = torch.stack((weights.packed & 15, weights.packed >> 4), dim=-1)
    return both.view(-1, weights.format.blocksize).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_mxfp4_rounds_as_compressed_tensors(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    largest = [0.0, 1.0, 1.49, 1.5, 1.74, 1.75, 1.76, 1.99, 6.0, 7.0, 0.013, 448.0, tiny, 2 * tiny, 16 * tiny]
    if dtype != torch.float16:
        largest += [1e-39, 2.0**-133, 3.2e38, 1.7e38]
    blocks = torch.rand((len(largest), 32), device=DEVICE) * 2 - 1
    blocks[:, 0] = torch.where(torch.arange(len(largest), device=DEVICE) % 2 == 0, 1.0, -1.0)
    blocks = (blocks * torch.tensor(largest, device=DEVICE)[:, None]).to(dtype)
    blocks[1, 1:16] = torch.tensor(
        [0.0, -0.0, *(m / 8 for m in (0.5, -0.5, 1.5, 2.5, -3.5, 5.0, 7.0, 10.0, -14.0, 1, 3, 6, 8))]
    )
    blocks[1, 0] = 1.0
    weights = Packed4bitWeights.quantize(blocks[None], quant_type="mxfp4")
    exponents = [mx_exponent(value) for value in blocks.double().abs().amax(1).tolist()]
    assert weights.block_scale.flatten().tolist() == exponents
    for block, exponent, nibbles in zip(blocks.double().tolist(), exponents, unpacked(weights), strict=True):
        assert nibbles == [nearest(math.ldexp(value, 127 - exponent)) for value in block]


def test_mxfp4_keeps_what_is_no_number() -> None:
    """compressed-tensors has no defined result there; the format has a scale for it."""
    weight = torch.ones((1, 3, 32), device=DEVICE)
    weight[0, 0, 5], weight[0, 1, 6] = math.nan, -math.inf
    weights = Packed4bitWeights.quantize(weight, quant_type="mxfp4")
    assert weights.block_scale.tolist() == [[255, 255, 125]]
    assert weights.dequantize().isnan().sum(-1).tolist() == [[32, 32, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("size", [1.0, 1e-4, 300.0, 0.0])
def test_nvfp4_rounds_as_compressed_tensors(size: float, dtype: torch.dtype) -> None:
    """Each step in the dtype of the weights, as torch does it."""
    spread = torch.exp(torch.linspace(-7, 0, 16, device=DEVICE)).repeat_interleave(4)[:, None]
    blocks = (torch.randn((64, 16), device=DEVICE) * spread * size).to(dtype)
    weights = Packed4bitWeights.quantize(blocks[None], quant_type="nvfp4")
    tiny = torch.finfo(dtype).tiny
    global_scale = torch.nan_to_num(2688.0 / blocks.abs().max().clamp(min=tiny), posinf=1.0).float().view(1)
    scales = (global_scale * (blocks.abs().amax(1) / 6.0)).clamp(max=448.0).to(E4M3)
    scales = torch.where(scales.float() == 0, torch.tensor(0.125, device=DEVICE), scales.float())
    assert weights.global_scale.view(torch.float32).item() == global_scale.item()
    assert torch.equal(weights.block_scale.view(E4M3).float().flatten(), scales)
    quotients = blocks.float() / (scales / global_scale)[:, None]
    assert unpacked(weights) == [[nearest(value) for value in block] for block in quotients.tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nvfp4_has_one_global_scale_for_the_projections_of_an_expert(dtype: torch.dtype) -> None:
    """It is that of the projection with the larger magnitude, whose bits are those of the projection alone."""
    weight = torch.randn(3, 8, 64, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    weight[0, 4:] *= 7
    weight[1, 4:] /= 7
    weight[2, :4] = 0
    ours = Packed4bitWeights.quantize(weight, quant_type="nvfp4", projections=2)
    scales = ours.global_scale.view(torch.float32)
    assert torch.equal(scales[:, 0], scales[:, 1])
    for expert, larger in enumerate((1, 0, 1)):
        half = weight[expert].view(2, 1, 4, 64)[larger]
        alone = Packed4bitWeights.quantize(half, quant_type="nvfp4")
        assert alone.global_scale.view(torch.float32).item() == scales[expert, 0].item()
        assert torch.equal(ours.packed[expert].view(2, -1)[larger], alone.packed[0])
        assert torch.equal(ours.block_scale[expert].view(2, -1)[larger], alone.block_scale[0])
    error = (ours.dequantize(torch.float32) - weight.float()).norm() / weight.float().norm()
    assert error < 0.12


def test_nvfp4_takes_fp16_for_fp32() -> None:
    """In fp16 itself 2688 over a small largest magnitude is Inf, and the blocks would lose their scales."""
    weight = (torch.randn((2, 8, 64), device=DEVICE) * 0.01).half()
    ours = Packed4bitWeights.quantize(weight, quant_type="nvfp4")
    wide = Packed4bitWeights.quantize(weight.float(), quant_type="nvfp4")
    assert all(torch.equal(value, wide.tensors()[part]) for part, value in ours.tensors().items())
    assert (ours.global_scale.view(torch.float32) > 2e4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", BLOCKSIZES)
def test_published_weights_come_back(name: str, dtype: torch.dtype) -> None:
    """Quantizing what was dequantized gives the codes again, -0 among them."""
    weight = torch.randn((2, 32, 64), device=DEVICE).to(dtype)
    once = Packed4bitWeights.quantize(weight, quant_type=name, projections=2)
    again = Packed4bitWeights.quantize(once.dequantize(), quant_type=name, projections=2)
    assert torch.equal(again.packed, once.packed)
    assert torch.equal(again.block_scale, once.block_scale)
    assert (once.packed & 15 == 8).any()
    assert (once.packed >> 4 == 8).any()


# ------------------------------------------------------------------------------------------------ tensors of checkpoints


def published(name: str, projections: int = 2) -> tuple[dict[str, Tensor], Any]:
    """The tensors of 3 experts with 8 out and 64 in features, and the format."""
    random = torch.Generator().manual_seed(0)

    def bytes_of(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).to(DEVICE)

    layout = Format4bit((3, 8, 64), name, projections=projections, dtype=torch.float32)
    if name == "mxfp4":
        return {"blocks": bytes_of(3, 8, 2, 16), "scales": bytes_of(3, 8, 2)}, layout
    global_scale = torch.rand((3, projections), generator=random).to(DEVICE) + 1.0
    tensors = {"weight_packed": bytes_of(3, 8, 32), "weight_scale": bytes_of(3, 8, 4).view(E4M3)}
    return {**tensors, "weight_global_scale": global_scale}, layout


@pytest.mark.kernels_ci
@pytest.mark.parametrize("projections", [1, 2])
@pytest.mark.parametrize("name", BLOCKSIZES)
def test_whole_stacks(name: str, projections: int) -> None:
    tensors, layout = published(name, projections)
    weights = interchange.stack_of_published(tensors, layout)
    assert weights.format == layout
    assert weights.packed.data_ptr() == next(iter(tensors.values())).data_ptr(), "nothing is copied"
    back = interchange.published_of(weights)
    assert list(back) == list(tensors)
    for label, value in tensors.items():
        assert_same_bits(back[label], value)
        assert back[label].data_ptr() == value.data_ptr()
    strided = {label: value.repeat_interleave(2, dim=1)[:, ::2] for label, value in tensors.items()}
    copied = interchange.stack_of_published(strided, layout)
    assert all(torch.equal(value, weights.tensors()[part]) for part, value in copied.tensors().items())


@pytest.mark.kernels_ci
@pytest.mark.parametrize("name", BLOCKSIZES)
def test_matrix_by_matrix(name: str) -> None:
    tensors, layout = published(name)
    matrices = [
        {label: value[expert].chunk(2)[projection] for label, value in tensors.items()}
        for expert in range(3)
        for projection in range(2)
    ]
    whole = interchange.stack_of_published(tensors, layout)
    weights = interchange.stack_of_published_matrices(iter(matrices), layout)
    assert all(torch.equal(value, whole.tensors()[part]) for part, value in weights.tensors().items())
    if name == "nvfp4":
        halves = torch.stack([matrix["weight_global_scale"] for matrix in matrices]).view(3, 2)
        assert torch.equal(weights.scales()[:, ::16], tensors["weight_scale"][:, ::4, 0].float() / halves)


@pytest.mark.kernels_ci
def test_a_format_that_nobody_publishes_so() -> None:
    """bitsandbytes' checkpoints hold other bytes than a stack. The PTX of such a format looks its 16 values up."""
    layout = Format4bit((1, 2, 64), "nf4")
    assert layout.weight_format.published(layout) == ()
    assert layout.weight_format.word_ptx(torch.bfloat16).table.count("mul.rn.f32") == 16


def test_mxfp4_of_compressed_tensors() -> None:
    tensors, layout = published("mxfp4")
    renamed = {"weight_packed": tensors["blocks"].flatten(2), "weight_scale": tensors["scales"]}
    ours, theirs = (interchange.stack_of_published(value, layout) for value in (renamed, tensors))
    assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(ours.block_scale, theirs.block_scale)


def changed(name: str, **parts: Any) -> Callable[[], object]:
    """A call with some of the tensors replaced, or left out where they are None."""
    tensors, layout = published(name)
    given = {label: value for label, value in {**tensors, **parts}.items() if value is not None}
    return lambda: interchange.stack_of_published(given, layout)


def matrices(name: str, count: int, **parts: Any) -> Callable[[], object]:
    tensors, layout = published(name, 1)
    of_experts = [{label: value[expert % 3] for label, value in tensors.items()} for expert in range(count)]
    if parts:
        of_experts[1].update(parts)
    return lambda: interchange.stack_of_published_matrices(of_experts, layout)


BAD = [
    BadCall(
        "shape",
        changed("mxfp4", blocks=torch.zeros((3, 8, 2, 32), dtype=torch.uint8)),
        ValueError,
        "blocks must have shape (3, 8, 2, 16), got (3, 8, 2, 32)",
    ),
    BadCall(
        "dtype",
        changed("mxfp4", scales=torch.zeros((3, 8, 2))),
        TypeError,
        "scales must be uint8, got float32",
    ),
    BadCall(
        "fp8",
        changed("nvfp4", weight_scale=torch.zeros((3, 8, 4), dtype=torch.uint8)),
        TypeError,
        "weight_scale must be float8_e4m3fn, got uint8",
    ),
    BadCall(
        "global",
        changed("nvfp4", weight_global_scale=torch.zeros(3, 1)),
        ValueError,
        "weight_global_scale must have shape (3, 2), got (3, 1)",
    ),
    BadCall("no-tensor", changed("mxfp4", scales=[1]), TypeError, "scales must be a tensor, got list"),
    BadCall(
        "names",
        changed("mxfp4", scales=None),
        ValueError,
        "tensors must be blocks and scales, or weight_packed and weight_scale for mxfp4, got blocks",
    ),
    BadCall(
        "no-names",
        lambda: interchange.stack_of_published({}, published("nvfp4")[1]),
        ValueError,
        "tensors must be weight_packed and weight_scale and weight_global_scale for nvfp4, got none",
    ),
    BadCall(
        "matrix",
        matrices("nvfp4", 3, weight_global_scale=torch.ones(())),
        ValueError,
        "weight_global_scale of expert 1, projection 0 must have shape (1), got ()",
    ),
    BadCall("too-few", matrices("mxfp4", 2), ValueError, "matrices must be 3, of each expert and projection, got 2"),
    BadCall(
        "too-many", matrices("mxfp4", 4), ValueError, "matrices must be 3, of each expert and projection, got more"
    ),
    BadCall(
        "nf4",
        lambda: interchange.published_of(Packed4bitWeights.quantize(torch.ones(1, 8, 64))),
        ValueError,
        "nf4 is not published as named tensors: its matrices are made of a Piece each",
    ),
    BadCall(
        "piece",
        lambda: interchange.piece_of(interchange.stack_of_published(*published("nvfp4")), 0),
        ValueError,
        "bitsandbytes has no pieces of nvfp4: use stack_of_published, stack_of_published_matrices and published_of",
    ),
    BadCall(
        "pieces",
        lambda: interchange.stack_of_pieces([], published("mxfp4")[1]),
        ValueError,
        "bitsandbytes has no pieces of mxfp4: use stack_of_published, stack_of_published_matrices and published_of",
    ),
    BadCall(
        "fused-pieces",
        lambda: interchange.stack_of_fused_pieces([], published("mxfp4")[1]),
        ValueError,
        "bitsandbytes has no pieces of mxfp4: use stack_of_published, stack_of_published_matrices and published_of",
    ),
    BadCall(
        "no-scales",
        lambda: Packed4bitWeights(published("mxfp4")[1], published("mxfp4")[0]["blocks"].flatten(1)),
        TypeError,
        "block_scale must be a tensor for mxfp4, got NoneType",
    ),
    BadCall(
        "part-of-a-block",
        lambda: Format4bit((3, 4, 48), "mxfp4"),
        ValueError,
        "the in features must be a multiple of the blocksize 32 for mxfp4, got 48",
    ),
    BadCall(
        "blocksize",
        lambda: replace(published("nvfp4")[1], blocksize=32),
        ValueError,
        "blocksize must be one of 16, got 32",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.id)
def test_bad_input(case: BadCall) -> None:
    case.check()


def test_storage_names_do_not_hide_what_a_stack_has() -> None:
    for name in BLOCKSIZES:
        parts = Format4bit((1, 8, 64), name).storage()
        assert not [part for part in parts if callable(getattr(Packed4bitWeights, part, None))]
        assert [module("modules").parameter_name("up", part) for part in parts][:2] == ["up", "up_block_scale"]
