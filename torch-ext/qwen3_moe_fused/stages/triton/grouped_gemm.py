"""Launches of ``kernels.grouped_gemm``: the up projection with its gate, the plain grouped GEMM, and a thin product.

The stages begin here for packed weights, too: ``paths`` tells whether the kernels of ``packed_gemm`` serve them, or
these over a workspace, some of the features at a time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from ...activations import Gate
from ...kernels.grouped_gemm import grouped_gemm_kernel, grouped_up_kernel
from ...kernels.records import DenseLayout, LowRankLayout, OutputLayout, Outputs, RowsLayout
from ...routing import max_tiles
from ..stacks import PackedStack
from . import low_rank, packed_gemm
from .bound_kernel import BoundKernel, Descriptor
from .dequantize import Part, dense_parts
from .operands import (
    cdiv,
    config_of,
    gate_layout,
    plain_layout,
    plain_output,
    precision,
    routing_tensors,
    rows_operand,
    tile,
    weight_operand,
    whole_rows,
)
from .paths import IN_PRODUCT, product_path

if TYPE_CHECKING:
    from ...routing import Routing
    from ...tuning import LaunchConfig
    from ..stacks import Stack
    from ..terms import LowRankTerm


@functools.cache
def _gemm_kernel(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    rows: RowsLayout,
    strides: tuple[int, int, int],
    mode: str,
    out_stride: int,
    top_k: int,
    has_bias: bool,
    term: LowRankLayout | None,
    precision: str,
) -> BoundKernel:
    num_experts, n, k = shape
    constants = {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "K": k,
        "A": rows,
        "WEIGHT": DenseLayout(*strides, mode),
        "GATE": plain_layout(n),
        "OUT": plain_output(out_stride),
        "LOW_RANK": term or low_rank.NOTHING,
        "HAS_BIAS": has_bias,
        "TILE": tile(config, precision),
    }
    return BoundKernel(grouped_gemm_kernel, constants, config.num_warps, config.num_stages)


def grouped_gemm(
    a: Tensor,
    weight: Stack,
    routing: Routing,
    num_rows: int,
    bias: Tensor | None,
    gather: bool,
    fill: float,
    term: LowRankTerm | None = None,
) -> Tensor:
    """``reference.grouped_gemm``."""
    out = a.new_empty((num_rows, weight.shape[1]))
    if out.numel() == 0:
        return out
    a = a.contiguous()
    if term is not None and term.separate:
        raise AssertionError("only an up projection takes gate and up apart")
    path, config = product_path("gemm", weight, num_rows, routing, a, plain=not gather and bias is None)
    if path is IN_PRODUCT:
        assert isinstance(weight, PackedStack)
        packed_gemm.gemm(config, a, weight, routing, bias, gather, fill, out, term)
        return out
    for part in dense_parts(weight, routing, a.dtype, config):
        _launch_gemm(a, part, routing, bias, gather, fill, None, out, term)
    return out


def shrink(a: Tensor, weight: Tensor, routing: Routing, gather: bool, scale: float, out: Tensor) -> None:
    """``reference.shrink``."""
    if out.numel() == 0:
        return
    a = whole_rows(a)
    config = low_rank.thin(config_of("shrink", out.shape[0], routing, a), out.shape[1])
    _launch_gemm(a, Part(weight, config, 0, out.shape[1]), routing, None, gather, 0.0, scale, out, None)


def _launch_gemm(
    a: Tensor,
    part: Part,
    routing: Routing,
    bias: Tensor | None,
    gather: bool,
    fill: float,
    scale: float | None,
    out: Tensor,
    term: LowRankTerm | None,
) -> None:
    """``part``'s columns of out (S, N)."""
    config, num_rows = part.config, out.shape[0]
    a_operand, rows = rows_operand(a, config, (config.block_m, config.block_k), gather, scaled=scale is not None)
    a_half = a_operand
    if isinstance(a_operand, Descriptor) and config.half_tiles:
        a_half = a_operand._replace(block_shape=(config.block_m // 2, config.block_k))
    w_operand, mode = weight_operand(part.stack, config, config.block_n)
    kernel = _gemm_kernel(
        config,
        part.stack.shape,
        rows,
        part.stack.stride(),
        mode,
        out.stride(0),
        routing.top_k,
        bias is not None,
        low_rank.layout(term),
        precision(a.dtype),
    )
    columns = part.columns(out)
    kernel(
        a.device,
        (max_tiles(num_rows, routing.num_experts, config.block_m) * cdiv(part.width, config.block_n), 1, 1),
        a_operand,
        a_half,
        w_operand,
        None if bias is None else part.bias(bias),
        low_rank.tensors(term, part.first),
        Outputs(columns, columns),
        routing_tensors(routing),
        num_rows,
        fill,
        1.0 if scale is None else scale,
    )


@functools.cache
def _up_kernel(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    mode: str,
    intermediate: int,
    top_k: int,
    gate: Gate,
    has_bias: bool,
    term: LowRankLayout | None,
    save_h: bool,
    save_gate_up: bool,
    precision: str,
) -> BoundKernel:
    num_experts, columns, hidden = shape
    _, gate_up_offset = gate.column_layout(intermediate)
    constants = {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "H": hidden,
        "WEIGHT": DenseLayout(*strides, mode),
        "GATE": gate_layout(gate, gate.intermediate(columns)),
        "OUT": OutputLayout(intermediate, gate.columns(intermediate), gate_up_offset, save_h, save_gate_up),
        "LOW_RANK": term or low_rank.NOTHING,
        "HAS_BIAS": has_bias,
        "TILE": tile(config, precision),
    }
    return BoundKernel(grouped_up_kernel, constants, config.num_warps, config.num_stages)


def grouped_up(
    x: Tensor,
    weight: Stack,
    routing: Routing,
    num_rows: int,
    bias: Tensor | None,
    gate: Gate,
    save_gate_up: bool,
    term: LowRankTerm | None = None,
    save_h: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """``reference.grouped_up``."""
    columns = weight.shape[1]
    intermediate = gate.intermediate(columns)
    h = x.new_empty((num_rows, intermediate)) if save_h else None
    gate_up = x.new_empty((num_rows, columns)) if save_gate_up else None
    if num_rows * intermediate == 0:
        return h, gate_up
    x = x.contiguous()
    path, config = product_path("up", weight, num_rows, routing, x)
    if path is IN_PRODUCT:
        assert isinstance(weight, PackedStack)
        packed_gemm.up(config, x, weight, routing, bias, gate, h, gate_up, term)
        return h, gate_up
    for part in dense_parts(weight, routing, x.dtype, config, gate):
        _launch_up(x, part, routing, bias, gate, h, gate_up, num_rows, intermediate, term)
    return h, gate_up


def _launch_up(
    x: Tensor,
    part: Part,
    routing: Routing,
    bias: Tensor | None,
    gate: Gate,
    h: Tensor | None,
    gate_up: Tensor | None,
    num_rows: int,
    intermediate: int,
    term: LowRankTerm | None,
) -> None:
    """``part``'s columns of h and gate_up, where they are wanted."""
    config, stack = part.config, part.stack
    width = config.block_n * (2 if gate.interleaved else 1)
    w_operand, mode = weight_operand(stack, config, width)
    kernel = _up_kernel(
        config,
        stack.shape,
        stack.stride(),
        mode,
        intermediate,
        routing.top_k,
        gate,
        bias is not None,
        low_rank.layout(term),
        h is not None,
        gate_up is not None,
        precision(x.dtype),
    )
    kernel(
        x.device,
        (max_tiles(num_rows, routing.num_experts, config.block_m) * cdiv(part.width, config.block_n), 1, 1),
        x,
        w_operand,
        None if bias is None else part.bias(bias, gate),
        low_rank.tensors(term, part.offset(gate)),
        Outputs(x if h is None else part.columns(h), x if gate_up is None else part.columns(gate_up, gate)),
        routing_tensors(routing),
        num_rows,
    )
