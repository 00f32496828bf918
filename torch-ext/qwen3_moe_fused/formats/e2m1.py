"""E2M1, the 4-bit float of the OCP Microscaling Formats specification (version 1.0): what mxfp4 and nvfp4 have in common.

A nibble is a sign, two bits of exponent with a bias of 1, and one bit of mantissa. Its magnitudes are 0, 0.5, 1, 1.5, 2, 3,
4 and 6. There is a negative zero, and neither Inf nor NaN. The first of two neighbours is in the low nibble of their byte.
Blocks lie along the in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ptx
from .base import WeightFormat
from .tables import Table

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = MAGNITUDES[-1]

# As ``ptx.table`` in bfloat16, in 11 instructions instead of 18: the weights of a scale s are s and 1.5 s, rounded, times
# powers of two. If s is a power of two, nothing is rounded. Else the weights are the same but for those below 2^-126, which
# may be off by 2^-132. Where a product alone is wanted, -0 is added, because bfloat16 has no multiplication before Hopper.
#
# A table of the codes themselves, whose weights are then multiplied with a power of two, lost: on sm_90 the loops of large
# tiles took 583 instructions instead of 473, as the constants are moved into registers again and again.
TABLE_PTX = """
{
    .reg .f32 more;
    .reg .b32 zero_half, one, two, four, by_half, by_two, by_four, minus_zeros;
    mul.rn.f32 more, $8, 0f3FC00000;
    mov.b32 by_half, 0x00003f00;
    mov.b32 by_two, 0x40004000;
    mov.b32 by_four, 0x40804080;
    mov.b32 minus_zeros, 0x80008000;
    cvt.rn.bf16x2.f32 one, more, $8;
    fma.rn.bf16x2 zero_half, one, by_half, minus_zeros;
    fma.rn.bf16x2 two, one, by_two, minus_zeros;
    fma.rn.bf16x2 four, one, by_four, minus_zeros;
    prmt.b32 $0, zero_half, one, 0x6402;
    prmt.b32 $1, two, four, 0x6420;
    prmt.b32 $4, zero_half, one, 0x7513;
    prmt.b32 $5, two, four, 0x7531;
    mov.b32 $2, $0;
    mov.b32 $3, $1;
    xor.b32 $6, $4, 0x80808080;
    xor.b32 $7, $5, 0x80808080;
}
"""


class E2m1Format(WeightFormat):
    """The part of mxfp4 and nvfp4 that does not depend on their scales."""

    codes = (*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES))
    high_nibble_first = False
    blocks_in_rows = True

    def word_ptx(self, dtype: torch.dtype) -> ptx.WordPtx:
        words = super().word_ptx(dtype)
        return words._replace(table=TABLE_PTX) if dtype == torch.bfloat16 else words


def computed_in(matrix: Tensor) -> Tensor:
    """``matrix`` in the dtype in which scales are computed: its own, but fp32 for fp16, whose range is too small."""
    return matrix.float() if matrix.dtype == torch.float16 else matrix


def packed(quotients: Tensor) -> Tensor:
    """Weights divided by their scales as flat bytes, rounded to the nearest value, of two as near to the even nibble.

    What is beyond the largest value becomes that. Zero keeps its sign, so what was dequantized has its nibbles again.

    Args:
        quotients: of any shape, an even number, contiguous.
    """
    quotients = quotients.float().view(-1)
    nibbles = torch.bucketize(quotients.abs(), _borders(quotients.device), out_int32=True).to(torch.uint8)
    nibbles |= torch.signbit(quotients).to(torch.uint8) << 3
    return nibbles[::2] | nibbles[1::2] << 4


@Table
def _borders(device: torch.device) -> Tensor:
    """(7,) fp32: a magnitude belongs above a border that is less than it, not equal.

    The middle of two neighbours belongs to the one with the even nibble. If that is the upper one, the border is the number
    below the middle.
    """
    values = torch.tensor(MAGNITUDES, dtype=torch.float32, device="cpu")
    middles = (values[1:] + values[:-1]) / 2.0
    middles[1::2] = torch.nextafter(middles[1::2], torch.tensor(0.0, device="cpu"))
    return middles.to(device)
