"""Makes bitsandbytes' CPU kernels behave as on a processor with AVX-512, on every processor.

The library of bitsandbytes chooses its code by the processor, so most machines cannot show the faults of its code for
AVX-512. ``dequantize`` says in Python what that code computes, and ``test_bitsandbytes.py`` compares the two where the
processor has AVX-512. Pytest loads this module as a plugin; other Python calls ``imitate``.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

_PREFIX = "cdequantize_blockwise_cpu_"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LANES = 16


def dequantize(packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, rows: int, columns: int) -> Tensor:
    """What the kernel makes of (rows, columns) weights: fp32, before they are rounded to the dtype that was asked for.

    Args:
        packed: (rows · columns / 2,) uint8.
        absmax: (blocks,) fp32.
    """
    from bitsandbytes.functional import get_4bit_type

    nibbles = torch.stack([packed >> 4, packed & 0xF], dim=1).reshape(-1)[: rows * columns]
    values = get_4bit_type(quant_type, device="cpu")[nibbles.int()].reshape(rows, columns)
    if columns % _LANES or blocksize < _LANES:  # the plain loop over blocks, as on every processor
        return values * absmax.repeat_interleave(blocksize)[: rows * columns].reshape(rows, columns)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    return values * absmax[row * (columns // blocksize) + column // blocksize]


def _view(pointer: Any, count: int, dtype: torch.dtype) -> Tensor:
    """The memory behind a pointer of ctypes as a flat tensor."""
    size = count * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(pointer.value), dtype=dtype)


class _Library:
    """The library of bitsandbytes with other functions for 4 bits."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        quant_type, _, dtype = name.removeprefix(_PREFIX).partition("_")
        if not name.startswith(_PREFIX) or quant_type not in ("nf4", "fp4"):
            return getattr(self._library, name)

        def function(packed: Any, absmax: Any, out: Any, blocksize: Any, rows: Any, columns: Any) -> None:
            size, m, n = blocksize.value, rows.value, columns.value
            count = m * n
            scales = _view(absmax, -(-count // size), torch.float32)
            result = dequantize(_view(packed, (count + 1) // 2, torch.uint8), scales, size, quant_type, m, n)
            _view(out, count, _DTYPES[dtype]).copy_(result.reshape(-1))

        return function


def imitate() -> None:
    """Makes bitsandbytes take the processor for one with AVX-512."""
    from bitsandbytes.backends.cpu import ops as cpu_ops

    ops: Any = cpu_ops
    assert hasattr(ops, "_optimizer_update_32bit_cpu"), "not the CPU backend that is known"
    ops.lib = _Library(ops.lib)
    ops._has_avx512 = True


def pytest_configure() -> None:
    imitate()
