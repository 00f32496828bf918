"""Blocks that share an absmax, as bitsandbytes has them: what nf4 and fp4 have in common.

Every ``blocksize`` weights share an absmax in fp32. With double quantization an absmax is itself a byte:
``nested_code[byte] · nested_absmax + offset``, each step rounded to fp32, with one nested absmax for 256 absmaxes and one
offset for a projection.

Quantizing gives bit for bit what bitsandbytes 0.50 gives on the device of the weights. Blocks are divided by their
absmax, and each quotient goes to the nearest value of the code; with double quantization the absmaxes, less their mean,
take the same way to a byte. What is near a border between two values depends on the last bit of the quotient, and the
two implementations of bitsandbytes compute it differently:

* The borders of fp4 are the middles of neighbours on the CPU, and decimals of them on the GPU, some rounded to six digits.
* A block of zeros is divided by 1e-38 on the CPU, which gives the nibble of 0; on the GPU 0 · inf is NaN, which gives
  nibble 0.
* NaN weights make the absmax NaN on the CPU and get nibble 15; on the GPU the absmax ignores them, and they get nibble 0.
* An absmax's byte comes from a table of 65536 positions in [-1, 1] on the CPU, and from a binary search on the GPU, which
  leaves an exact tie at the even byte.
* The GPU's kernels are built with --use_fast_math for CUDA: 1 / absmax is ``rcp.approx.ftz``, and subnormal numbers are
  flushed to zero.

Devices that are neither CPU nor a GPU of CUDA or ROCm get what the CPU gets. This was verified against the library on a CPU
(x86), and against its machine code for CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .base import DeviceFunctions, WeightFormat, as_floats, float_pointer
from .tables import Table

if TYPE_CHECKING:
    from .base import Format4bit

# Absmaxes that share a nested absmax; bitsandbytes knows no other number.
GROUP = 256
# Positions of the CPU's table of bytes.
NESTED_POSITIONS = 65536
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


class AbsmaxTensors(NamedTuple):
    """The scales as kernels read them.

    Attributes:
        absmax: (E, projections·blocks) uint8 with double quantization, else fp32.
        nested_absmax: (E, projections·groups) fp32.
        nested_offset: (E, projections) fp32.
        nested_code: (256,) fp32.
    """

    absmax: Any
    nested_absmax: Any
    nested_offset: Any
    nested_code: Any


class AbsmaxLayout(NamedTuple):
    """How kernels find the scale of a block.

    Attributes:
        BLOCK: weights of a block. BLOCKS: blocks of an expert's projection.
        GROUP: blocks of a group. GROUPS: groups of an expert's projection.
        PROJECTIONS: of an expert.
        DOUBLE_QUANT: absmaxes are bytes.
    """

    BLOCK: int
    BLOCKS: int
    GROUP: int
    GROUPS: int
    PROJECTIONS: int
    DOUBLE_QUANT: bool


class AbsmaxFormat(WeightFormat):
    """The part of nf4 and fp4 that does not depend on their codes."""

    blocksizes = (64, 32, 128, 256, 512, 1024, 2048, 4096)
    double_quants = (True, False)

    def scale_storage(self, stack: Format4bit) -> dict[str, tuple[int, int]]:
        num_experts, projections = stack.shape[0], stack.projections
        if not stack.double_quant:
            return {"absmax": (num_experts, 4 * projections * stack.blocks)}
        return {
            "absmax": (num_experts, projections * stack.blocks),
            "nested_absmax": (num_experts, 4 * projections * groups(stack)),
            "nested_offset": (num_experts, 4 * projections),
        }

    def scales(self, stack: Format4bit, storage: Mapping[str, Tensor]) -> Tensor:
        if not stack.double_quant:
            return as_floats(storage["absmax"])
        parts = (stack.shape[0], stack.projections)
        nested_absmax = as_floats(storage["nested_absmax"]).view(*parts, groups(stack))
        offsets = as_floats(storage["nested_offset"]).view(*parts, 1)
        return nested_values(storage["absmax"].view(*parts, stack.blocks), nested_absmax, offsets).flatten(1)

    def is_broken(self, stack: Format4bit, name: str, values: Tensor) -> Tensor | None:
        if name == "absmax" and stack.double_quant:
            return None
        return ~as_floats(values).isfinite()

    def tensors(self, stack: Format4bit, *scales: Tensor) -> AbsmaxTensors:
        absmax, *nested = scales
        code = nested_code(absmax.device)
        if nested:
            return AbsmaxTensors(absmax, float_pointer(nested[0]), float_pointer(nested[1]), code)
        plain = float_pointer(absmax)
        return AbsmaxTensors(plain, plain, plain, code)

    def layout(self, stack: Format4bit) -> AbsmaxLayout:
        return AbsmaxLayout(
            stack.blocksize, stack.blocks, GROUP, groups(stack), stack.projections, bool(stack.double_quant)
        )

    def device_functions(self) -> DeviceFunctions:
        from .absmax_device import block_scale, prepare

        return DeviceFunctions(block_scale, prepare)

    def borders(self, on_gpu: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        """(15,) fp32 borders between the values of the code, and (16,) uint8 their nibbles in ascending order.

        A quotient belongs above a border that is less than it, not equal.
        """
        return _middles(self.codes, device)

    def quantize(self, matrix: Tensor, stack: Format4bit) -> dict[str, Tensor]:
        return self.quantize_matrix(matrix, stack.blocksize, bool(stack.double_quant))

    def quantize_matrix(self, matrix: Tensor, blocksize: int, double_quant: bool) -> dict[str, Tensor]:
        """One matrix as ``bitsandbytes.functional.quantize_4bit`` gives it.

        Args:
            matrix: of any shape and strides, a multiple of ``blocksize`` elements, bfloat16, float16 or float32.
            double_quant: what bitsandbytes calls compress_statistics.

        Returns:
            ``packed`` (n/2,) uint8, ``absmax`` (blocks,) uint8 or fp32, and with double quantization ``nested_absmax``
            (groups,) fp32 and ``nested_offset``, one fp32.
        """
        on_gpu = matrix.device.type == "cuda"
        # A copy in any case, to work in.
        blocks = matrix.to(torch.float32, memory_format=torch.contiguous_format, copy=True).view(-1, blocksize)
        absmax = _normalize_on_gpu(blocks, self.codes[0]) if on_gpu else _normalize_on_cpu(blocks)
        borders, nibbles = self.borders(on_gpu, matrix.device)
        places = torch.bucketize(blocks.view(-1), borders, out_int32=True)  # borders below the quotient
        del blocks
        values = nibbles.index_select(0, places)
        packed = (values[::2] << 4) | values[1::2]
        if not double_quant:
            return {"packed": packed, "absmax": absmax}
        offset = absmax.mean()
        quantize_absmax = _quantize_absmax_on_gpu if on_gpu else _quantize_absmax_on_cpu
        nested, nested_absmax = quantize_absmax(_in_groups(absmax - offset))
        nested = nested.view(-1)[: absmax.numel()]
        return {"packed": packed, "absmax": nested, "nested_absmax": nested_absmax, "nested_offset": offset}


def groups(stack: Format4bit) -> int:
    """Groups of an expert's projection."""
    return math.ceil(stack.blocks / GROUP)


def as_bytes(values: Tensor) -> Tensor:
    """fp32 (E, n) as uint8 (E, 4·n), the same memory."""
    return values.contiguous().view(torch.uint8)


def nested_values(absmax: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """(…, n) fp32 absmaxes from their bytes (…, n), nested absmaxes (…, ⌈n/256⌉) and offsets (…, 1)."""
    scales = nested_absmax.repeat_interleave(GROUP, dim=-1)[..., : absmax.shape[-1]]
    values = nested_code(absmax.device).index_select(0, absmax.reshape(-1).int()).view(absmax.shape)
    return values.mul_(scales).add_(nested_offset)  # two roundings


@Table
def nested_code(device: torch.device) -> Tensor:
    """(256,) fp32 values of an absmax byte: the signed dynamic map of 8-bit optimizers (arXiv:2110.02861).

    Seven decades, each with twice as many values as the one below, at the middles of its equal parts; with 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2.0
        positive = (10.0 ** (decade - 6) * middles).tolist()  # rounded to fp32
        values += positive + [-value for value in positive]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@Table
def _middles(codes: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """As ``AbsmaxFormat.borders``: the middles of neighbours."""
    code = torch.tensor(codes, dtype=torch.float32, device="cpu")
    order = torch.sort(code, stable=True).indices
    borders = (code[order[:-1]] + code[order[1:]]) / 2.0
    return borders.to(device), order.to(device, torch.uint8)


def _normalize_on_cpu(blocks: Tensor) -> Tensor:
    """Divides the blocks (n, blocksize) by their absmax in place, which it returns (n,)."""
    low, high = torch.aminmax(blocks, dim=1)
    absmax = torch.maximum(high, -low).abs_()
    blocks.mul_((1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1.0, 1.0)
    return absmax


def _normalize_on_gpu(blocks: Tensor, of_nan: float) -> Tensor:
    """Divides the blocks (n, blocksize) by their absmax in place, which it returns (n,); ``of_nan`` where that is NaN."""
    _flush(blocks)
    magnitudes = blocks.abs().nan_to_num_(nan=torch.finfo(torch.float32).min, posinf=torch.inf)
    absmax = magnitudes.amax(1)
    _flush(blocks.mul_(_reciprocal(absmax)[:, None]))
    blocks.nan_to_num_(nan=of_nan)
    return absmax


def _in_groups(values: Tensor) -> Tensor:
    """(groups, 256) from (n,), with zeros behind the last."""
    return torch.nn.functional.pad(values, (0, -values.numel() % GROUP)).view(-1, GROUP)


def _quantize_absmax_on_cpu(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes (groups, 256) and absmaxes (groups,) of the absmaxes less their mean (groups, 256)."""
    absmax = groups.abs().nan_to_num_(nan=0.0, posinf=torch.inf).amax(1)
    quotients = (groups * (1.0 / absmax)[:, None]).clamp_(-1.0, 1.0).nan_to_num_(nan=-1.0)
    # Fused there into a multiply-add, which comes to the same position for every fp32 in [-1, 1].
    positions = ((quotients + 1.0) * 0.5 * (NESTED_POSITIONS - 1) + 0.5).int()
    return _nested_table(groups.device).index_select(0, positions.view(-1)), absmax


@Table
def _nested_table(device: torch.device) -> Tensor:
    """(65536,) uint8: the byte of each position."""
    code = nested_code(torch.device("cpu"))
    steps = 2.0 * torch.arange(NESTED_POSITIONS, dtype=torch.float32, device="cpu")
    table = torch.bucketize(-1.0 + steps / (NESTED_POSITIONS - 1), (code[:-1] + code[1:]) * 0.5)
    return table.to(device, torch.uint8)


def _quantize_absmax_on_gpu(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes (groups, 256) and absmaxes (groups,) of the absmaxes less their mean (groups, 256), which it overwrites."""
    absmax = _normalize_on_gpu(groups, float(nested_code(torch.device("cpu"))[0]))
    return torch.bucketize(groups, _nested_borders(groups.device), out_int32=True).to(torch.uint8), absmax


@Table
def _nested_borders(device: torch.device) -> Tensor:
    """(255,) fp32: as ``AbsmaxFormat.borders``, for a search that ends at an even byte and leaves it only for a nearer
    neighbour.
    """
    code = nested_code(torch.device("cpu"))
    borders = (code[:-1] + code[1:]) * 0.5
    borders[1::2] = torch.nextafter(borders[1::2], torch.tensor(-torch.inf, device="cpu"))
    return borders.to(device)


def _fast_math() -> bool:
    """Whether bitsandbytes' GPU kernels are compiled with --use_fast_math."""
    return torch.version.hip is None


def _flush(values: Tensor) -> None:
    """Sets subnormal numbers to zero, in place, where the GPU's kernels do."""
    if _fast_math():
        values.masked_fill_(values.abs() < SMALLEST_NORMAL, 0.0)


def _reciprocal(values: Tensor) -> Tensor:
    """1 / values as the GPU's kernels compute it."""
    return approximate_reciprocal(values) if _fast_math() else values.reciprocal()


def approximate_reciprocal(values: Tensor) -> Tensor:
    """1 / values with ``rcp.approx.ftz.f32``, for contiguous fp32 ``values`` on an NVIDIA GPU."""
    from .absmax_device import reciprocal_kernel

    block = 1024
    out = torch.empty_like(values)
    with torch.cuda.device_of(values):
        reciprocal_kernel[(-(-values.numel() // block),)](values, out, values.numel(), BLOCK=block)
    return out
