"""Quantization to 4 bits, bit for bit as bitsandbytes 0.50 does it on the device of the weights.

Blocks are divided by their absmax and each quotient goes to the nearest value of the code; with double quantization the
absmaxes, less their mean, take the same way to a byte. What is near a border between two values depends on the last bit
of the quotient, and bitsandbytes' two implementations compute it differently:

* The borders of fp4: on the CPU the middles of neighbours, on the GPU decimals of them, some rounded to six digits.
* A block of zeros: divided by 1e-38 on the CPU, which gives the nibble of 0; on the GPU 0 · inf is NaN, nibble 0.
* NaN weights: on the CPU they make the absmax NaN and get nibble 15, on the GPU the absmax ignores them, nibble 0.
* An absmax's byte: on the CPU from a table of 65536 positions in [-1, 1], on the GPU by a binary search that leaves an
  exact tie at the even byte.
* Built for CUDA with --use_fast_math: 1 / absmax is ``rcp.approx.ftz``, and subnormal numbers are flushed to zero.

Devices that are neither CPU nor a GPU of CUDA or ROCm get what the CPU gets. Verified against the library on a CPU (x86),
and against its machine code for CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantization import CODES, NESTED_BLOCKSIZE, Piece, Table, nested_code

# The magnitudes between which the CUDA kernel changes from one value of fp4 to the next.
FP4_BORDERS_CUDA = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
# Positions of the CPU's table of bytes.
NESTED_POSITIONS = 65536
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def quantize_matrix(matrix: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> Piece:
    """One matrix as ``bitsandbytes.functional.quantize_4bit`` gives it.

    Args:
        matrix: of any shape and strides, a multiple of ``blocksize`` elements, bfloat16, float16 or float32.
        quant_type: "nf4" or "fp4".
        double_quant: what bitsandbytes calls compress_statistics.
    """
    on_gpu = matrix.device.type == "cuda"
    # A copy in any case, to work in.
    blocks = matrix.to(torch.float32, memory_format=torch.contiguous_format, copy=True).view(-1, blocksize)
    absmax = _normalize_on_gpu(blocks, CODES[quant_type][0]) if on_gpu else _normalize_on_cpu(blocks)
    borders, nibbles = _borders(quant_type, on_gpu, matrix.device)
    places = torch.bucketize(blocks.view(-1), borders, out_int32=True)  # borders below the quotient
    del blocks
    values = nibbles.index_select(0, places)
    packed = (values[::2] << 4) | values[1::2]
    if not double_quant:
        return Piece(packed.view(-1, 1), absmax)
    offset = absmax.mean()
    quantize_absmax = _quantize_absmax_on_gpu if on_gpu else _quantize_absmax_on_cpu
    nested, nested_absmax = quantize_absmax(_in_groups(absmax - offset))
    return Piece(packed.view(-1, 1), nested.view(-1)[: absmax.numel()], nested_absmax, offset)


@Table
def _borders(quant_type: str, on_gpu: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(15,) fp32 borders between the values of a code, and (16,) uint8 their nibbles in ascending order.

    A quotient belongs above a border that is less than it, not equal.
    """
    code = torch.tensor(CODES[quant_type], dtype=torch.float32, device="cpu")
    if quant_type == "fp4" and on_gpu:
        # Chosen by magnitude, with the sign bit for all less than 0: below zero a border belongs to the value above it.
        positive = torch.tensor(FP4_BORDERS_CUDA, dtype=torch.float32, device="cpu")
        down = torch.tensor(-torch.inf, device="cpu")
        from_zero_down = torch.nextafter(-torch.cat((torch.zeros(1, device="cpu"), positive)), down)
        borders = torch.cat((from_zero_down.flip(0), positive))
        negative, zero_up = torch.sort(code[8:], stable=True).indices + 8, torch.sort(code[:8], stable=True).indices
        order = torch.cat((negative, zero_up))
    else:
        order = torch.sort(code, stable=True).indices  # of the two zeros of fp4, nibble 0 comes first
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
    return torch.nn.functional.pad(values, (0, -values.numel() % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)


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
    """(255,) fp32: as ``_borders``, for a search that ends at an even byte and leaves it only for a nearer neighbour."""
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
    if not _fast_math():
        return values.reciprocal()
    from .launch.reciprocal import approximate_reciprocal  # imports triton

    return approximate_reciprocal(values)
