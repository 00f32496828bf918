"""fp4, the 4-bit float of bitsandbytes: a sign, two bits of exponent and one of mantissa, divided by its largest value.

Nibble 8 is a second zero. The kernels of bitsandbytes for CUDA and ROCm make -0 of it. Its table in torch, which other
devices get, has 0 there, and so have its kernels for CPUs with AVX-512; those for other CPUs make -0 of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .absmax import AbsmaxFormat
from .tables import Table

# The magnitudes between which the CUDA kernel changes from one value to the next: decimals, some rounded to six digits.
BORDERS_CUDA = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


class Fp4(AbsmaxFormat):
    """Sixteen floats with two zeros."""

    name = "fp4"
    codes = tuple(sign * value / 12.0 for sign in (1.0, -1.0) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))

    def code(self, device: torch.device) -> Tensor:
        """(16,) fp32 values of the nibbles, with the sign of zero that bitsandbytes' own table has on such a device."""
        values = super().code(device)
        return values if device.type == "cuda" else _without_negative_zero(device)

    def borders(self, on_gpu: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """As ``AbsmaxFormat.borders``; of two zeros, nibble 0 comes first."""
        return _borders_on_gpu(device) if on_gpu else super().borders(on_gpu, device)


@Table
def _without_negative_zero(device: torch.device) -> Tensor:
    return torch.tensor(Fp4.codes, dtype=torch.float32, device=device) + 0.0  # -0 + 0 is 0


@Table
def _borders_on_gpu(device: torch.device) -> tuple[Tensor, Tensor]:
    """The CUDA kernel chooses by magnitude, with the sign bit for all less than 0: below zero a border belongs to the value
    above it."""
    code = torch.tensor(Fp4.codes, dtype=torch.float32, device="cpu")
    positive = torch.tensor(BORDERS_CUDA, dtype=torch.float32, device="cpu")
    down = torch.tensor(-torch.inf, device="cpu")
    from_zero_down = torch.nextafter(-torch.cat((torch.zeros(1, device="cpu"), positive)), down)
    borders = torch.cat((from_zero_down.flip(0), positive))
    negative, zero_up = torch.sort(code[8:], stable=True).indices + 8, torch.sort(code[:8], stable=True).indices
    return borders.to(device), torch.cat((negative, zero_up)).to(device, torch.uint8)
