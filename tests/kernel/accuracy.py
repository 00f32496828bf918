"""When a result counts as right.

The truth is computed in float64. Plain torch, in the dtype of the kernels, misses it by its own rounding; ours may miss
it by at most twice as much. Where torch happens to be exact, half a unit in the last place of the largest is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the largest value of the truth. fp32 sums in another order than torch's differ by a few ulp.
FLOOR = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def error(value: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; NaN if either holds one."""
    if truth.numel() == 0:
        return 0.0
    return float((value.detach().double() - truth).abs().max())


def assert_accurate(name: str, ours: Tensor, truth: Tensor, torchs: Tensor, slack: float = 1.0) -> None:
    """Fails unless ``ours`` misses ``truth`` (float64) by at most twice what ``torchs``, in the same dtype, does.

    ``slack`` multiplies the floor, for tensors of so few elements that torch's error says little.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == torchs.dtype, f"{name}: {ours.dtype}, expected {torchs.dtype}"
    assert ours.device == torchs.device, f"{name}: on {ours.device}, expected {torchs.device}"
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    limit = 2 * error(torchs, truth) + slack * FLOOR[ours.dtype] * scale
    got = error(ours, truth)
    assert got <= limit, f"{name}: error {got:.3e}, allowed {limit:.3e} (largest value {scale:.3e})"
