"""nvfp4: 16 E2M1 values share a scale in E4M3 (torch's float8_e4m3fn), and each matrix has a scale in fp32.

A weight is ``value · (block scale / global scale)``, the quotient and the product each rounded to fp32. That is how
compressed-tensors dequantizes what it calls nvfp4-pack-quantized: ``weight_packed``, ``weight_scale`` and
``weight_global_scale``, whose bytes are stored as they are. ModelOpt's ``weight_scale_2`` is the reciprocal of the global
scale.

Quantizing gives the bytes of compressed-tensors 0.20, whose operations run in the dtype of the weights. The global scale is
2688 = 448 · 6 over the largest magnitude, whose block then gets the largest scale and the largest value. It is 1 where that
is no finite number. Gate and up of an expert get one global scale, that of the larger magnitude: vLLM multiplies both in one
product and takes the gate's for both, and llm-compressor quantizes them so. Published weights keep what they have. A block's
scale is a sixth of its largest magnitude times the global scale, rounded to E4M3, and 0.125 where that is 0. Weights in fp16
are quantized as if they were fp32: in fp16 most global scales would overflow, and compressed-tensors would take 1 for them.
This was verified against the library (0.20.1) on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .base import DeviceFunctions, PublishedTensor, as_floats, float_pointer
from .e2m1 import LARGEST, E2m1Format, computed_in, packed

if TYPE_CHECKING:
    from .base import Format4bit

E4M3 = torch.float8_e4m3fn
LARGEST_SCALE = torch.finfo(E4M3).max
# The bits that are all set in the two bytes of E4M3 that are NaN. It has no infinite values.
NAN = 0x7F
# The smallest global scale with which the largest weights are finite.
LOWEST = LARGEST_SCALE * LARGEST / torch.finfo(torch.float32).max
# The scale of a block for which the rule gives 0.
INSTEAD_OF_ZERO = 0.125

# A byte as a signed integer $1 to its scale $0, for a divisor $2 and a factor $3 that ``nvfp4_device`` makes of the global
# scale: a quarter of it and the reciprocal of that.
#
# The byte's bits as those of an fp32 are the scale times 2^-120; a quarter of the scale is 2^118 times that, and the byte of
# NaN becomes 120. A product with a reciprocal, corrected by its remainder, is the correctly rounded quotient (Markstein, IBM
# J. Res. Dev. 34, 1990). Quarters keep the reciprocal of the largest global scales a normal number. This needs positive
# global scales from 2^-117 on, and no matrix of finite fp32 has a smaller one; 0, Inf and NaN are right as well.
SCALE_PTX = """
{
    .reg .b32 bits;
    .reg .f32 value, size, minus, quotient, rest;
    .reg .pred is_nan;
    shl.b32 bits, $1, 20;
    and.b32 bits, bits, 0x87f00000;
    mov.b32 value, bits;
    mul.rn.f32 value, value, 0f7A800000;
    abs.f32 size, value;
    setp.eq.f32 is_nan, size, 0f42F00000;
    selp.f32 value, 0f7FC00000, value, is_nan;
    mul.rn.f32 quotient, value, $3;
    neg.f32 minus, value;
    fma.rn.f32 rest, quotient, $2, minus;
    neg.f32 minus, rest;
    fma.rn.f32 $0, minus, $3, quotient;
}
"""


class Nvfp4Tensors(NamedTuple):
    """The scales as kernels read them.

    Attributes:
        block_scale: (E, blocks of all projections) uint8.
        global_scale: (E, projections) fp32.
    """

    block_scale: Any
    global_scale: Any


class Nvfp4Layout(NamedTuple):
    """How kernels find the scale of a block.

    Attributes:
        BLOCKS: of an expert's projection. PROJECTIONS: of an expert.
        SCALE_PTX: from a byte to its scale, on NVIDIA GPUs.
    """

    BLOCKS: int
    PROJECTIONS: int
    SCALE_PTX: str


class Nvfp4(E2m1Format):
    """Scales in E4M3 for 16 neighbours, and one in fp32 for a matrix."""

    name = "nvfp4"
    blocksizes = (16,)

    def scale_storage(self, stack: Format4bit) -> dict[str, tuple[int, int]]:
        num_experts, projections = stack.shape[0], stack.projections
        return {
            "block_scale": (num_experts, projections * stack.blocks),
            "global_scale": (num_experts, 4 * projections),
        }

    def scales(self, stack: Format4bit, storage: Mapping[str, Tensor]) -> Tensor:
        blocks = storage["block_scale"].view(E4M3).float().view(stack.shape[0], stack.projections, stack.blocks)
        return blocks.div_(as_floats(storage["global_scale"])[..., None]).flatten(1)

    def is_broken(self, stack: Format4bit, name: str, values: Tensor) -> Tensor | None:
        if name == "block_scale":
            return (values & NAN) == NAN
        global_scale = as_floats(values)
        return ~(global_scale.isfinite() & (global_scale >= LOWEST))

    def quantize(self, matrix: Tensor, stack: Format4bit) -> dict[str, Tensor]:
        (parts,) = self.quantize_expert([matrix], stack)
        return parts

    def quantize_expert(self, matrices: Iterable[Tensor], stack: Format4bit) -> Iterator[dict[str, Tensor]]:
        together = list(matrices)
        of_all = torch.stack([computed_in(matrix).abs().amax() for matrix in together]).amax()
        return (self._quantize(matrix, of_all, stack) for matrix in together)

    def _quantize(self, matrix: Tensor, of_all: Tensor, stack: Format4bit) -> dict[str, Tensor]:
        """As ``quantize``; ``of_all`` is the largest magnitude of all matrices with the same global scale."""
        blocks = computed_in(matrix).reshape(-1, stack.blocksize)
        largest = blocks.abs().amax(1)
        of_all = of_all.clamp(min=torch.finfo(of_all.dtype).tiny)
        global_scale = (LARGEST_SCALE * LARGEST / of_all).nan_to_num(nan=1.0, posinf=1.0).float()
        wanted = global_scale * (largest / LARGEST).float()
        block_scale = wanted.clamp(max=LARGEST_SCALE).to(E4M3)
        rounded = block_scale.float()
        rounded.masked_fill_(rounded == 0, INSTEAD_OF_ZERO)
        quotients = blocks.float() / (rounded / global_scale)[:, None]
        return {"packed": packed(quotients), "block_scale": rounded.to(E4M3), "global_scale": global_scale}

    def published(self, stack: Format4bit) -> tuple[dict[str, PublishedTensor], ...]:
        _, rows, columns = stack.shape
        rows = rows // stack.projections
        return (
            {
                "weight_packed": PublishedTensor(torch.uint8, (rows, columns // 2)),
                "weight_scale": PublishedTensor(E4M3, (rows, columns // stack.blocksize)),
                "weight_global_scale": PublishedTensor(torch.float32, (1,)),
            },
        )

    def tensors(self, stack: Format4bit, *scales: Tensor) -> Nvfp4Tensors:
        block_scale, global_scale = scales
        return Nvfp4Tensors(block_scale, float_pointer(global_scale))

    def layout(self, stack: Format4bit) -> Nvfp4Layout:
        return Nvfp4Layout(stack.blocks, stack.projections, SCALE_PTX)

    def device_functions(self) -> DeviceFunctions:
        from .nvfp4_device import block_scale, prepare

        return DeviceFunctions(block_scale, prepare)
