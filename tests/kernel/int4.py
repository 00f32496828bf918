"""A weight format that the package does not have: symmetric int4, defined here alone.

Its 16 values are -8 to 7, 32 neighbours share a scale in fp16, and the first weight of a byte is in its low nibble. Nothing
in the package knows of it; ``test_weight_format.py`` runs it through every stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.kernel.machine import module

formats = module("formats")


class Scales(NamedTuple):
    """(E, blocks) fp16."""

    scales: Any


class Layout(NamedTuple):
    """BLOCKS: blocks of an expert, in all projections."""

    BLOCKS: int


with contextlib.suppress(ImportError):
    import triton
    import triton.language as tl

    @triton.jit
    def block_scale(scales, expert, block, prepared, FORMAT: tl.constexpr):
        return tl.load(scales.scales + expert * FORMAT.LAYOUT.BLOCKS + block).to(tl.float32)


class Int4(formats.WeightFormat):  # type: ignore[name-defined]
    """Symmetric int4."""

    name = "int4"
    codes = tuple(float(nibble if nibble < 8 else nibble - 16) for nibble in range(16))  # two's complement
    high_nibble_first = False
    blocksizes = (32,)
    double_quants = (False,)

    def scale_storage(self, stack: Any) -> dict[str, tuple[int, int]]:
        return {"scales_fp16": (stack.shape[0], 2 * stack.projections * stack.blocks)}

    def scales(self, stack: Any, storage: Mapping[str, Tensor]) -> Tensor:
        return storage["scales_fp16"].view(torch.float16).float()

    def is_broken(self, stack: Any, name: str, values: Tensor) -> Tensor | None:
        scales: Tensor = values.view(torch.float16)
        return ~scales.isfinite()

    def quantize(self, matrix: Tensor, stack: Any) -> dict[str, Tensor]:
        blocks = matrix.float().reshape(-1, stack.blocksize)
        scales = (blocks.abs().amax(1) / 7.0).clamp(min=1e-4).half()
        nibbles = (blocks / scales.float()[:, None]).round().clamp(-8, 7).to(torch.int32) & 15
        nibbles = nibbles.view(-1).to(torch.uint8)
        return {"packed": nibbles[::2] | nibbles[1::2] << 4, "scales_fp16": scales}

    def tensors(self, stack: Any, *scales: Tensor) -> Scales:
        return Scales(scales[0].view(torch.float16))

    def layout(self, stack: Any) -> Layout:
        return Layout(stack.projections * stack.blocks)

    def device_functions(self) -> Any:
        return formats.DeviceFunctions(block_scale)
