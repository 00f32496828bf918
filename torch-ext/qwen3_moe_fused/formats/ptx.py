"""PTX that dequantizes a 32-bit word of eight 4-bit weights, for formats whose weights are one of 16 values times a scale.

A thread keeps the 16 weights that a scale allows in eight registers: the lower bytes in four, the upper bytes in four. Byte
permutations look the weights up. A permutation takes three bits of a nibble to choose from half a table; the fourth bit then
chooses the half.

Where the fourth bit is a sign (``mirrored``), the lower bytes of both halves are the same, and the upper bytes differ in the
sign alone. That saves four of 21 instructions a word, and of a scale's table 14 of 32.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch

# Instructions that round two fp32 to one register of two 16-bit numbers.
CONVERT = {torch.bfloat16: "cvt.rn.bf16x2.f32", torch.float16: "cvt.rn.f16x2.f32"}


class WordPtx(NamedTuple):
    """PTX of a format, with the operands that ``kernels.dequantize`` gives it.

    Attributes:
        table: from a scale to eight registers, which the other two read.
        even_odd, in_order: from a word and these registers to eight weights, as the functions of these names say.
    """

    table: str
    even_odd: str
    in_order: str


def by_table(codes: tuple[float, ...], high_first: bool, dtype: torch.dtype) -> WordPtx:
    """A scale's table holds its 16 weights."""
    half = mirrored(codes)
    return WordPtx(table(codes, dtype), even_odd(high_first, half), in_order(high_first, half))


def _bits(value: float) -> int:
    """``value`` in fp32."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


def mirrored(codes: tuple[float, ...]) -> bool:
    """Whether the upper half of ``codes`` is the lower half with the other sign, that of zero included."""
    return all(
        _bits(negative) == _bits(positive) ^ 1 << 31 for positive, negative in zip(codes[:8], codes[8:], strict=True)
    )


@functools.cache
def table(codes: tuple[float, ...], dtype: torch.dtype) -> str:
    """PTX from a scale to its 16 weights, rounded to ``dtype``."""
    half = mirrored(codes)
    number = 8 if half else 16
    products = "".join(f"mul.rn.f32 p{i}, $8, 0f{_bits(value):08X};\n" for i, value in enumerate(codes[:number]))
    pairs = "".join(f"{CONVERT[dtype]} q{i}, p{2 * i + 1}, p{2 * i};\n" for i in range(number // 2))
    lower = "".join(f"prmt.b32 ${i}, q{2 * i}, q{2 * i + 1}, 0x6420;\n" for i in range(number // 4))
    upper = "".join(f"prmt.b32 ${4 + i}, q{2 * i}, q{2 * i + 1}, 0x7531;\n" for i in range(number // 4))
    if half:
        lower += "mov.b32 $2, $0;\nmov.b32 $3, $1;\n"  # which no look-up reads
        upper += "xor.b32 $6, $4, 0x80808080;\nxor.b32 $7, $5, 0x80808080;\n"
    return f"{{\n.reg .f32 p<{number}>;\n.reg .b32 q<{number // 2}>;\n{products}{pairs}{lower}{upper}}}"


def _look_up(registers: tuple[tuple[int, str], ...], half: bool) -> str:
    """PTX from a word and a table to eight weights, two to a register.

    Args:
        registers: for each two bytes of the word in turn, two registers, and the permutations that make them of the four
            weights' lower and upper bytes.
        half: the table is ``mirrored``.
    """
    lower = (
        "prmt.b32 l, $5, $6, low;"
        if half
        else """prmt.b32 a, $5, $6, low;
        prmt.b32 b, $7, $8, low;
        prmt.b32 l, a, b, top;"""
    )
    halves = "".join(
        f"""
        {lower}
        prmt.b32 a, $9, $10, low;
        prmt.b32 b, $11, $12, low;
        prmt.b32 u, a, b, top;
        prmt.b32 ${first}, l, u, {order};
        prmt.b32 ${second}, l, u, {next_order};
        shr.u32 low, low, 16;
        shr.u32 top, top, 16;"""
        for (first, order), (second, next_order) in zip(registers[::2], registers[1::2], strict=True)
    )
    return f"""
    {{
        .reg .b32 low, top, a, b, l, u;
        and.b32 low, $4, 0x77777777;
        shr.u32 top, $4, 1;
        lop3.b32 top, top, 0x44444444, 0x32103210, 0xEA;{halves}
    }}
    """


@functools.cache
def in_order(high_first: bool, half: bool = False) -> str:
    """PTX to weights in order; ``half`` where the codes are ``mirrored``.

    For four nibbles n0 to n3, lowest first, the two of a byte are n1 and n0 where its high nibble comes first.
    """
    first, second = ("0x4051", "0x6273") if high_first else ("0x5140", "0x7362")
    return _look_up(((0, first), (1, second), (2, first), (3, second)), half)


@functools.cache
def even_odd(high_first: bool, half: bool = False) -> str:
    """PTX to two registers of the weights at even places, and two of those at odd places; ``half`` as in ``in_order``."""
    high, low = "0x7351", "0x6240"  # n1 and n3; n0 and n2
    even, odd = (high, low) if high_first else (low, high)
    return _look_up(((0, even), (2, odd), (1, even), (3, odd)), half)
