"""What the launches share: their configuration, and how tensors and descriptions become the arguments of kernels."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import tuning
from ...formats.base import ROW_UNIT
from ...formats.ptx import WordPtx
from ...kernels import dequantize as dequantize_kernels
from ...kernels.records import (
    FormatCode,
    GateLayout,
    OutputLayout,
    PackedTensors,
    RoutingTensors,
    RowsLayout,
    Tile,
)
from .bound_kernel import Descriptor, Prepared

if TYPE_CHECKING:
    from ...activations import Gate
    from ...formats.base import Format4bit
    from ...routing import Routing
    from ...tuning import LaunchConfig
    from ..stacks import PackedStack


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def precision(dtype: torch.dtype) -> str:
    """tl.dot's fp32 arithmetic: as torch multiplies matrices, but on AMD GPUs, of which few have tf32, always exact."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    # The newer of torch's two settings; reading the older one raises once somebody set the newer.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:
        setting = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if setting == "tf32" else "ieee"


def config_of(kernel: str, num_rows: int, routing: Routing, like: Tensor) -> LaunchConfig:
    """The launch configuration of ``kernel`` for S = num_rows on the device and in the dtype of ``like``."""
    target = tuning.target_of(like.device)
    block_m = tuning.bucket(num_rows, routing.num_experts, routing.packed, target)
    return tuning.launch_config(kernel, block_m, target, like.itemsize)


def tile_height(num_rows: int, routing: Routing, dtype: torch.dtype) -> int:
    """The height of the row tiles that all row-tiled kernels of a call share."""
    target = tuning.target_of(routing.offsets.device)
    block_m = tuning.bucket(num_rows, routing.num_experts, routing.packed, target)
    return tuning.tile_height(block_m, dtype.itemsize)


def tile(config: LaunchConfig, precision: str) -> Tile:
    """The tile of a launch with ``config``."""
    return Tile(config.block_m, config.block_n, config.block_k, precision, config.half_tiles, config.slices)


# --------------------------------------------------------------------------------------------------------------- operands


def routing_tensors(routing: Routing) -> Prepared:
    """The ``RoutingTensors`` that the row-tiled kernels read of ``routing``; made once for all launches of a pass."""
    if not routing.prepared:
        record = RoutingTensors(routing.offsets, routing.row_to_slot, routing.tile_expert, routing.tile_row)
        routing.prepared.append(Prepared(record))
    prepared: Prepared = routing.prepared[0]
    return prepared


# The longest side of a block that a descriptor loads.
_WIDEST_BLOCK = 256


def weight_operand(stack: Tensor, config: LaunchConfig, width: int) -> tuple[Any, str]:
    """(kernel argument, ``DenseLayout.MODE``) of an (E, N, K) stack: a descriptor if asked for and the layout allows it.

    Args:
        width: the number of out features that a program loads at a time.
    """
    if config.descriptor and width <= _WIDEST_BLOCK and stack.data_ptr() % 16 == 0:
        num_experts, n, k = stack.shape
        stride_e, stride_n, stride_k = stack.stride()
        itemsize = stack.element_size()
        if stride_k == 1 and stride_n == k and stride_e == n * k and k * itemsize % 16 == 0:
            return Descriptor(stack, (num_experts * n, k), (k, 1), (width, config.block_k)), "rows"
        # A block across the end of an expert would multiply zeros with the next expert's weights, which may be Inf.
        aligned = n * itemsize % 16 == 0 and k % config.block_k == 0
        if stride_n == 1 and stride_k == n and stride_e == n * k and aligned:
            return Descriptor(stack, (num_experts * k, n), (n, 1), (config.block_k, width)), "columns"
    return stack, "pointer"


def rows_operand(
    a: Tensor, config: LaunchConfig, block: tuple[int, int], gather: bool = False, scaled: bool = False
) -> tuple[Any, RowsLayout]:
    """(kernel argument, its layout) of rows (S, K) of contiguous columns, read in blocks of ``block``.

    Args:
        gather: ``a`` is (T, K), and rows are gathered from it, which no descriptor does.
        scaled: as in ``RowsLayout``.
    """
    stride = a.stride(0)
    if gather or not config.descriptor:
        return a, rows_layout(stride, gather, False, scaled)
    if a.numel() > 0 and stride * a.element_size() % 16 == 0 and a.data_ptr() % 16 == 0:
        descriptor = Descriptor(a, tuple(a.shape), (stride, 1), block)  # type: ignore[arg-type]
        return descriptor, rows_layout(stride, False, True, scaled)
    return a, rows_layout(stride, False, False, scaled)


rows_layout = functools.cache(RowsLayout)  # a record that is looked up takes half the time of one that is made


def whole_rows(a: Tensor) -> Tensor:
    """``a`` (S, K) with contiguous rows, which may lie apart."""
    if a.is_contiguous():
        return a
    row, column = a.stride()
    return a if column == 1 and row >= a.shape[1] else a.contiguous()


def gate_layout(gate: Gate, intermediate: int, of_launch: int | None = None) -> GateLayout:
    """The gate of a kernel, and how gate_up is laid out.

    Args:
        intermediate: I of the whole layer.
        of_launch: features that a launch computes, if fewer.
    """
    column_stride, up_offset = gate.column_layout(intermediate)
    return GateLayout(
        intermediate if of_launch is None else of_launch,
        gate.columns(intermediate),
        column_stride,
        up_offset,
        gate.activation,
        gate.gated,
        gate.alpha,
        gate.limit,
    )


def plain_layout(n: int) -> GateLayout:
    """A product of ``n`` features without a gate."""
    return GateLayout(n, n, 1, 0, "none", False, 0.0, 0.0)


def plain_output(stride: int) -> OutputLayout:
    """The output of a plain product, rows ``stride`` apart."""
    return OutputLayout(stride, 0, 0, True, False)


# --------------------------------------------------------------------------------------------------------- 4-bit formats


def in_ptx(like: Tensor) -> bool:
    """Whether kernels that compute in the dtype and on the device of ``like`` dequantize words in PTX."""
    return like.device.type != "cpu" and like.itemsize == 2 and tuning.target_of(like.device).backend == "cuda"


@functools.cache
def format_code(format: Format4bit, dtype: torch.dtype | None) -> FormatCode:
    """The format of a stack as kernels see it, dequantizing in PTX to ``dtype``, or to any dtype if that is None."""
    weight_format = format.weight_format
    functions = weight_format.device_functions()
    words = WordPtx("", "", "") if dtype is None else weight_format.word_ptx(dtype)
    return FormatCode(
        functions.prepare or dequantize_kernels.nothing_to_prepare,
        functions.block_scale,
        functions.pair or dequantize_kernels.pair_by_table,
        functions.in_order or dequantize_kernels.in_order_by_table,
        weight_format.layout(format),
        format.blocksize,
        min(format.blocksize, ROW_UNIT),
        2 if dtype is None else 8,
        weight_format.high_nibble_first,
        words.table,
        words.even_odd,
        words.in_order,
    )


def packed_tensors(stack: PackedStack) -> PackedTensors:
    """What kernels read of a packed stack."""
    weight_format = stack.format.weight_format
    return PackedTensors(
        stack.storage[0], weight_format.tensors(stack.format, *stack.storage[1:]), weight_format.code(stack.device)
    )
