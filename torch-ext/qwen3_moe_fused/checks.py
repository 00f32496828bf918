"""Checks of the public functions' arguments. Every error names the argument, what it was and what it must be."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .ops._torch_compat import intercepted

# Checks that must look at values wait for the GPU, so they run only on request.
CHECK_VALUES = os.environ.get("MOE_FUSED_CHECK", "0") not in ("", "0")

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def tensor(name: str, value: object, shape: tuple[int | str, ...]) -> Tensor:
    """``value`` if it is a tensor of ``shape``, in which a string names a size that may be anything.

    Raises:
        TypeError: not a tensor.
        ValueError: another number of dimensions, or another size where ``shape`` has a number.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    sizes(name, value.shape, shape)
    return value


def sizes(name: str, have: tuple[int, ...], want: tuple[int | str, ...]) -> None:
    """Raises ValueError unless ``have`` is the shape ``want``, in which a string names a size that may be anything."""
    if len(have) == len(want):
        for h, w in zip(have, want, strict=True):
            if isinstance(w, int) and h != w:
                break
        else:
            return
    raise ValueError(f"{name} must have shape ({', '.join(map(str, want))}), got {tuple(have)}")


def dtype(name: str, value: Any, allowed: tuple[torch.dtype, ...], why: str = "") -> None:
    """Raises TypeError unless ``value`` has one of the ``allowed`` dtypes."""
    if value.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name} must be {names}{why}, got {str(value.dtype).removeprefix('torch.')}")


def device(name: str, value: Any, other_name: str, other: Tensor) -> None:
    """Raises ValueError unless ``value`` is on the device of ``other``."""
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {value.device}")


def sizes_sum(m_sizes: Tensor, num_rows: int) -> None:
    """Raises ValueError unless the sizes are not negative and sum to ``num_rows``.

    On CPU always; on an accelerator, where it waits for the device, only with ``MOE_FUSED_CHECK=1``.
    """
    if intercepted((m_sizes,)) or not (CHECK_VALUES or m_sizes.device.type == "cpu"):
        return
    if m_sizes.numel() and int(m_sizes.min()) < 0:
        raise ValueError(f"m_sizes must not be negative, got {int(m_sizes.min())}")
    total = int(m_sizes.sum(dtype=torch.int64))
    if total != num_rows:
        raise ValueError(f"m_sizes must sum to the {num_rows} rows of input, got a sum of {total}")


def expert_ids(top_k_index: Tensor, num_experts: int) -> None:
    """Raises ValueError, with ``MOE_FUSED_CHECK=1``, unless all ids are in [0, num_experts]; the last means "not mine"."""
    if not CHECK_VALUES or intercepted((top_k_index,)) or top_k_index.numel() == 0:
        return
    low, high = int(top_k_index.min()), int(top_k_index.max())
    if low < 0 or high > num_experts:
        bad = low if low < 0 else high
        raise ValueError(f"top_k_index must hold expert ids from 0 to {num_experts} (= not mine), got {bad}")


def number(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is an int or float."""
    if not isinstance(value, (int, float)):  # torch 2.9 does not trace a union
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
