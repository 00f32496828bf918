"""``kernels/reciprocal.py`` launched: an operation of quantization, not of the pipeline."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..kernels.reciprocal import reciprocal_kernel

BLOCK = 1024


def approximate_reciprocal(values: Tensor) -> Tensor:
    """1 / values with ``rcp.approx.ftz.f32``, for contiguous fp32 ``values`` on an NVIDIA GPU."""
    out = torch.empty_like(values)
    with torch.cuda.device_of(values):
        reciprocal_kernel[(triton.cdiv(values.numel(), BLOCK),)](values, out, values.numel(), BLOCK=BLOCK)
    return out
