"""The PTX of formats, run by an emulation of its instructions: Triton's interpreter runs no PTX."""

from __future__ import annotations

import copy
import random
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernel.machine import module

ptx, formats = module("formats.ptx"), module("formats")
FORMATS = [formats.named(name) for name in formats.names()]

DTYPES = {"BF16": torch.bfloat16, "FP16": torch.float16}
SCALES = (1.0, 0.0, -0.25, 3.1e-3, 1e-40, 2.0**-24, 1.3e5, 7.7e-8)
# What a power of two can be, at its ends; NaN is looked at apart.
POWERS = (2.0**-127, 2.0**-126, 2.0**-125, 2.0**-17, 1.0, 2.0**14, 2.0**125, 2.0**127)


def permuted(a: int, b: int, selector: int) -> int:
    """``prmt.b32``: four of eight bytes, or their signs."""
    both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    chosen = [(both[selector >> 4 * i & 7], selector >> 4 * i & 8) for i in range(4)]
    return int.from_bytes(bytes((255 if byte & 128 else 0) if sign else byte for byte, sign in chosen), "little")


def logic(a: int, b: int, c: int, table: int) -> int:
    """``lop3.b32``."""
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32))
    return sum((table >> index & 1) << i for i, index in enumerate(bits))


def half(value: np.float32, dtype: torch.dtype) -> int:
    return int(torch.tensor(float(value)).to(dtype).view(torch.int16)) & 0xFFFF


def rounded(value: Fraction) -> np.float32:
    """The nearest fp32, of two as near the even one."""
    near = np.float32(float(value))
    if np.isinf(near):
        return near
    candidates = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    finite = [candidate for candidate in candidates if np.isfinite(candidate)]
    return min(
        finite, key=lambda candidate: (abs(Fraction(float(candidate)) - value), int(candidate.view(np.int32)) & 1)
    )


def fused(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """``fma.rn.f32``."""
    if not np.isfinite([a, b, c]).all():
        return a * b + c
    product = Fraction(float(a)) * Fraction(float(b))
    exact = product + Fraction(float(c))
    if exact == 0:
        return np.float32(0) if product != 0 else a * b + c
    return rounded(exact)


def halves_fused(a: int, b: int, c: int) -> int:
    """``fma.rn.bf16x2``."""
    values = [torch.tensor([v & 0xFFFF, v >> 16]).to(torch.uint16).view(torch.bfloat16).double() for v in (a, b, c)]
    lower, upper = (values[0] * values[1] + values[2]).to(torch.bfloat16).view(torch.uint16).tolist()
    return upper << 16 | lower


def of_bits(value: int) -> np.float32:
    return np.float32(struct.unpack("<f", struct.pack("<I", value & 0xFFFFFFFF))[0])


def run(code: str, dtype: torch.dtype, outputs: int, *inputs: object) -> list[Any]:
    """The output registers, which come before the inputs in the numbering of operands."""
    registers: dict[str, object] = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def operand(name: str) -> object:
        if name.startswith("0f"):
            return np.float32(struct.unpack(">f", bytes.fromhex(name[2:]))[0])
        return registers[name] if name in registers else int(name, 0)

    for statement in code.replace("{", "").replace("}", "").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if not name or name == ".reg":
            continue
        if (
            name == "mov.b32" and rest.split(",")[0].strip() == "value"
        ):  # of the two that move bits, the one into an fp32
            registers["value"] = of_bits(operand(rest.split(",")[1].strip()))  # type: ignore[arg-type]
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        values = [operand(source) for source in sources]
        registers[target] = {
            "mul": lambda a, b: a * b,
            "fma": halves_fused if name.endswith("bf16x2") else fused,
            "neg": lambda a: -a,
            "abs": abs,
            "setp": lambda a, b: a == b,
            "selp": lambda a, b, choose: a if choose else b,
            "shl": lambda a, b: a << b & 0xFFFFFFFF,
            "cvt": lambda upper, lower: half(upper, dtype) << 16 | half(lower, dtype),
            "prmt": lambda a, b, selector: permuted(a, b, selector & 0xFFFF),
            "and": lambda a, b: a & b,
            "xor": lambda a, b: a ^ b,
            "mov": lambda a: a,
            "shr": lambda a, b: a >> b,
            "lop3": logic,
        }[name.split(".")[0]](*values)
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("high_first", [True, False], ids=["high-first", "low-first"])
@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda weight_format: weight_format.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_words_are_looked_up(weight_format: Any, high_first: bool, dtype: str) -> None:
    weight_format = copy.copy(weight_format)
    weight_format.high_nibble_first = high_first
    word_ptx = weight_format.word_ptx(DTYPES[dtype])
    assert ptx.mirrored(weight_format.codes) == (weight_format.name != "nf4"), "the other formats' fourth bit is a sign"
    words = random.Random(0)
    for scale in POWERS if weight_format.name == "mxfp4" else SCALES:
        if weight_format.name == "nvfp4" and dtype == "BF16" and abs(scale) < 2.0**-126:
            continue  # test_weights_of_nvfp4_that_are_subnormal
        table = run(word_ptx.table, DTYPES[dtype], 8, np.float32(scale))
        exact = torch.tensor(weight_format.codes) * torch.tensor(scale)
        weights = [int(value) & 0xFFFF for value in exact.to(DTYPES[dtype]).view(torch.int16)]
        for word in (0x76543210, 0xFEDCBA98, *(words.getrandbits(32) for _ in range(5))):
            shifts = (4, 0) if high_first else (0, 4)
            inside = [weights[byte >> shift & 15] for byte in word.to_bytes(4, "little") for shift in shifts]
            pairs = [inside[i] | inside[i + 1] << 16 for i in range(0, 8, 2)]
            assert run(word_ptx.in_order, DTYPES[dtype], 4, word, *table) == pairs
            even, odd = inside[::2], inside[1::2]
            apart = [values[i] | values[i + 1] << 16 for values in (even, odd) for i in (0, 2)]
            assert run(word_ptx.even_odd, DTYPES[dtype], 4, word, *table) == apart


def test_weights_of_nvfp4_that_are_subnormal() -> None:
    """They may be off by 2^-132, which is two in the last place."""
    weight_format = formats.named("nvfp4")
    word_ptx = weight_format.word_ptx(torch.bfloat16)
    scales = [2.0**-133 * step for step in (1.0, 1.09, 1.5, 2.3, 7.49)]
    for scale in scales:
        table = run(word_ptx.table, torch.bfloat16, 8, np.float32(scale))
        words = run(word_ptx.in_order, torch.bfloat16, 4, 0x76543210, *table)
        exact = (
            (torch.tensor(weight_format.codes[:8]) * torch.tensor(scale)).to(torch.bfloat16).view(torch.int16).tolist()
        )
        got = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        assert max(abs(a - b) for a, b in zip(got, exact, strict=True)) <= 2


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_a_scale_of_nan_makes_all_weights_nan(name: str) -> None:
    word_ptx = formats.named(name).word_ptx(torch.bfloat16)
    table = run(word_ptx.table, torch.bfloat16, 8, np.float32("nan"))
    for word in run(word_ptx.in_order, torch.bfloat16, 4, 0xFEDC3210, *table):
        assert word & 0x7FFF > 0x7F80
        assert word >> 16 & 0x7FFF > 0x7F80


# Ordinary ones; those at which a product with the reciprocal is hardest to correct; the smallest for which the PTX is exact,
# and the largest numbers; and what is no number to divide by.
GLOBAL_SCALES = (
    1.0, 2688.0 / 0.37, 12345.678, 1.9702824, 1.9844359, 1.9999999, 2.0**-117, 2.0**117, 3.4e38, 0.0, float("inf"),
    float("nan"),
)  # fmt: skip


@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scales_of_nvfp4(global_scale: float) -> None:
    """The divisor and the factor are what ``nvfp4_device`` makes of the global scale."""
    code = module("formats.nvfp4").SCALE_PTX
    divisor = np.float32(global_scale) * np.float32(0.25)
    factor = np.float32(1) / divisor
    if factor == 0 or np.isinf(factor):
        divisor = np.float32(-1)
    everything = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    exact = (everything / torch.tensor(global_scale)).numpy()
    for byte in range(256):
        (scale,) = run(code, torch.float32, 1, byte - 256 * (byte > 127), divisor, factor)
        same = np.isnan(scale) if np.isnan(exact[byte]) else scale.view(np.int32) == exact[byte].view(np.int32)
        assert same, f"byte {byte}: {scale} instead of {exact[byte]}"
