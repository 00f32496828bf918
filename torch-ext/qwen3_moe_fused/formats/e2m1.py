"""E2M1, the 4-bit float of the OCP Microscaling Formats specification (version 1.0): what mxfp4 and nvfp4 have in common.

A nibble is a sign, two bits of exponent with a bias of 1, and one bit of mantissa. Its magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4
and 6; there is a negative zero, and neither Inf nor NaN. The first of two neighbours is in the low nibble of their byte.
Blocks lie along the in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import WeightFormat
from .tables import Table

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = MAGNITUDES[-1]


class E2m1Format(WeightFormat):
    """The part of mxfp4 and nvfp4 that does not depend on their scales."""

    codes = (*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES))
    high_nibble_first = False
    blocks_in_rows = True


def computed_in(matrix: Tensor) -> Tensor:
    """``matrix`` in the dtype in which scales are computed: its own, but fp32 for fp16, which their quotients overflow."""
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
