"""mxfp4, a concrete format of the OCP Microscaling Formats specification (version 1.0): 32 E2M1 values share a scale.

A scale is a byte (E8M0): 0 to 254 mean 2^(byte - 127), and 255 means that the whole block is NaN. Dequantizing gives bit for
bit what Transformers' ``convert_moe_packed_tensors`` gives, except that this function takes 255 for 2^128.

Checkpoints of gpt-oss hold experts so (``*_blocks`` and ``*_scales``), and with other names and shapes checkpoints of
compressed-tensors, whose format is called mxfp4-pack-quantized. The bytes are the same, and are stored as they are.

Quantizing gives the bytes of compressed-tensors 0.20. The largest magnitude of a block is rounded to a power of two, up if
its mantissa is at least 1.75 and else down, and the scale is a quarter of it, so that no quotient reaches 7. A scale below
2^-127 becomes that. Where compressed-tensors has no defined result, a block with Inf or NaN gets the scale NaN. Weights in
fp16 are quantized as if they were fp32, because compressed-tensors loses the scales of blocks that are subnormal in fp16.
This was verified against the library (0.20.1) on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .base import DeviceFunctions, PublishedTensor
from .e2m1 import E2m1Format, computed_in, packed

if TYPE_CHECKING:
    from .base import Format4bit

NAN = 255
# The first scale with which the largest weights are infinite: 6 · 2^126.
OVERFLOWS = 253
# The bits of 2^-127 in fp32, which is a subnormal number there.
LOWEST = 0x00400000
# Half of a step between mantissas of one bit, in fp32: what is at least 1.75 gets the next exponent by adding it.
HALF_STEP = 1 << 21


class Mxfp4Tensors(NamedTuple):
    """(E, blocks of all projections) uint8."""

    block_scale: Any


class Mxfp4Layout(NamedTuple):
    """BLOCKS: blocks of an expert, in all projections."""

    BLOCKS: int


class Mxfp4(E2m1Format):
    """Powers of two for 32 neighbours."""

    name = "mxfp4"
    blocksizes = (32,)

    def scale_storage(self, stack: Format4bit) -> dict[str, tuple[int, int]]:
        return {"block_scale": (stack.shape[0], stack.projections * stack.blocks)}

    def scales(self, stack: Format4bit, storage: Mapping[str, Tensor]) -> Tensor:
        exponents = storage["block_scale"].int()
        bits = (exponents << 23).clamp_(min=LOWEST)
        return bits.view(torch.float32).masked_fill_(exponents == NAN, torch.nan)

    def is_broken(self, stack: Format4bit, name: str, values: Tensor) -> Tensor | None:
        return values == NAN

    def broken(self, stack: Format4bit, storage: Mapping[str, Tensor]) -> dict[str, Tensor]:
        broken = storage["block_scale"] >= OVERFLOWS
        for expert in broken.any(1).nonzero().flatten().tolist():  # few if any, so their weights are computed
            row = {name: value[expert : expert + 1] for name, value in storage.items()}
            nibbles = torch.stack((row["packed"] & 15, row["packed"] >> 4), dim=-1).view(-1, stack.blocksize)
            weights = self.code(nibbles.device)[nibbles.int()] * self.scales(stack, row).view(-1, 1)
            broken[expert] = ~weights.isfinite().all(1)
        return {"block_scale": broken}

    def quantize(self, matrix: Tensor, stack: Format4bit) -> dict[str, Tensor]:
        blocks = computed_in(matrix).reshape(-1, stack.blocksize)
        largest = blocks.abs().amax(1).float()
        exponents = ((largest.view(torch.int32) + HALF_STEP) >> 23).sub_(2).clamp_(min=0)
        exponents.masked_fill_(~largest.isfinite(), NAN)
        scale = exponents.to(torch.uint8)
        quotients = blocks.float() / self.scales(stack, {"block_scale": scale})[:, None]
        return {"packed": packed(quotients), "block_scale": scale}

    def published(self, stack: Format4bit) -> tuple[dict[str, PublishedTensor], ...]:
        _, rows, columns = stack.shape
        rows, blocks = rows // stack.projections, columns // stack.blocksize
        scale = PublishedTensor(torch.uint8, (rows, blocks))
        return (
            {"blocks": PublishedTensor(torch.uint8, (rows, blocks, stack.blocksize // 2)), "scales": scale},
            {"weight_packed": PublishedTensor(torch.uint8, (rows, columns // 2)), "weight_scale": scale},
        )

    def tensors(self, stack: Format4bit, *scales: Tensor) -> Mxfp4Tensors:
        return Mxfp4Tensors(scales[0])

    def layout(self, stack: Format4bit) -> Mxfp4Layout:
        return Mxfp4Layout(stack.projections * stack.blocks)

    def device_functions(self) -> DeviceFunctions:
        from .mxfp4_device import block_scale

        return DeviceFunctions(block_scale)
