"""Checks on random values that two functions agree up to rounding, and has other code that the kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# The dtypes that the kernels compute in.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# How far results may be apart, relative to the largest: some roundings of the dtype. Those of fp32 are small beside any
# other difference, and sums in another order have many.
ROUNDINGS = 4
ROUNDINGS_OF_FP32 = 64


def kind_of(module: nn.Module) -> tuple[object, ...]:
    """Returns what two modules have in common that compute the same but for the numbers in their tensors."""
    plain = {
        name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str, type(None)))
    }
    tensors = [*module.named_parameters(), *module.named_buffers()]
    shapes = tuple((name, each.shape, each.dtype, each.device) for name, each in tensors)
    return type(module), shapes, tuple(sorted(plain.items()))


def is_recording(like: Tensor) -> bool:
    """Whether a recording is under way on the GPU of a tensor. Nothing can be compared then."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def random_values(shape: tuple[int, ...], like: Tensor, seed: int = 0) -> Tensor:
    """Returns random values of a tensor's dtype and device, and leaves torch's random state as it is."""
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


def alike(one: Callable[..., Any], other: Callable[..., Any], *values: Tensor) -> bool:
    """Whether two functions give the same up to rounding: a tensor, or a tuple of them. One that fails does not."""
    with torch.no_grad():
        try:
            pair = one(*values), other(*values)
        except Exception:  # noqa: BLE001  another function than it looked like
            return False
    a, b = (found if isinstance(found, tuple) else (found,) for found in pair)
    return len(a) == len(b) and all(map(_close, a, b))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    apart = (a.float() - b.float()).abs().max()
    roundings = ROUNDINGS_OF_FP32 if a.dtype is torch.float32 else ROUNDINGS
    return bool(apart <= roundings * torch.finfo(a.dtype).eps * a.float().abs().max())
