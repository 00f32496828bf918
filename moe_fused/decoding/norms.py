"""RMS norms in one launch, in the place of a model's own while a decoding step is recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn

from .alike import alike, kind_of, random_values

__all__ = ["Norm", "norms", "rms_norm"]

# The longest row that one program takes, and how many numbers of short rows.
LONGEST, TOGETHER = 16384, 1024


class Norm(NamedTuple):
    """What an RMS norm does beside dividing by the root mean square.

    Attributes:
        eps: Is added to the mean square.
        is_offset: Whether rows are multiplied with 1 + weight, in fp32. If not, they are rounded to their dtype and then
            multiplied with the weight.
    """

    eps: float
    is_offset: bool


def rms_norm(values: Tensor, weight: Tensor, norm: Norm) -> Tensor:
    """Returns the RMS norm over the last dimension, contiguous, in the dtype of the values.

    Args:
        values: (..., size), in fp32, fp16 or bf16.
        weight: (size,).
        norm: What the norm does.
    """
    from . import heads_device as device_code

    size = len(weight)
    rows = values.reshape(-1, size)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    block = triton.next_power_of_2(size)
    block_rows = max(1, min(TOGETHER // block, triton.next_power_of_2(len(rows))))
    warps = 8 if block > TOGETHER else 4 if block * block_rows >= TOGETHER else 1
    device_code.norm_kernel[(-(-len(rows) // block_rows),)](
        rows, weight, out, rows.stride(0), len(rows), norm.eps,
        SIZE=size, IS_OFFSET=norm.is_offset, BLOCK_ROWS=block_rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def norms(model: nn.Module) -> Iterator[tuple[nn.Module, Norm, Callable[[Tensor], Tensor]]]:
    """Yields the norms of a model that ``rms_norm`` computes: a module, what it does, and a function for its ``forward``."""
    same: dict[tuple[object, ...], Norm | None] = {}
    for module in model.modules():
        eps = _eps(module)
        if eps is None or "forward" in vars(module):
            continue
        kind = kind_of(module)
        if kind not in same:
            same[kind] = _found(module, module.get_parameter("weight"), eps)
        norm = same[kind]
        if norm is not None:
            yield module, norm, functools.partial(_forward, module, norm)


def _eps(module: nn.Module) -> float | None:
    """The term that keeps a norm finite, if a module looks like a norm over its last dimension with a weight alone."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if not type(module).__name__.endswith("RMSNorm") or names != ["weight"] or list(module.children()):
        return None
    weight = module.get_parameter("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(eps) if weight.dim() == 1 and len(weight) <= LONGEST and isinstance(eps, float) else None


def _found(module: nn.Module, weight: Tensor, eps: float) -> Norm | None:
    values = random_values((3, len(weight)), weight)
    for is_offset in (False, True):
        norm = Norm(eps, is_offset)
        if alike(type(module).forward.__get__(module), functools.partial(_forward, module, norm), values):
            return norm
    return None


def _forward(module: nn.Module, norm: Norm, values: Tensor) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    if values.dtype is not weight.dtype:  # with which it was not compared
        found: Tensor = type(module).forward(module, values)
        return found
    return rms_norm(values, weight, norm)
