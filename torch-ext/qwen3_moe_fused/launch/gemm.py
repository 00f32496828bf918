"""Launches of ``kernels.grouped_gemm``: the up projection with its gate, and the plain grouped GEMM.

Over packed weights too, where ``packed`` says so: they then come dense, some of the features at a time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from .. import tuning
from ..activations import Gate
from ..kernels.grouped_gemm import grouped_gemm_kernel, grouped_up_kernel
from ..plan import Descriptor, Plan
from ..routing import max_tiles
from ..weights import PackedStack
from . import low_rank, packed
from .operands import (
    cdiv,
    config_of,
    gate_constants,
    precision,
    rows_operand,
    stride_constants,
    tile_constants,
    weight_operand,
    whole_rows,
)

if TYPE_CHECKING:
    from ..lora import Extension
    from ..routing import Routing
    from ..tuning import LaunchConfig
    from ..weights import Stack


@functools.cache
def _gemm_plan(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    a_stride: int,
    out_stride: int,
    top_k: int,
    gather: bool,
    has_bias: bool,
    extension: tuple[int, ...],
    scaled: bool,
    a_descriptor: bool,
    weights: str,
    precision: str,
) -> Plan:
    num_experts, n, k = shape
    constants = {
        "NUM_EXPERTS": num_experts,
        **stride_constants(strides),
        "N": n,
        "K": k,
        "A_STRIDE": a_stride,
        "OUT_STRIDE": out_stride,
        "TOP_K": top_k,
        "GATHER": gather,
        "HAS_BIAS": has_bias,
        "LOW_RANK": extension,
        "SCALED": scaled,
        "A_DESCRIPTOR": a_descriptor,
        "WEIGHTS": weights,
        "PRECISION": precision,
        **tile_constants(config),
        "HALF_TILES": config.half_tiles,
    }
    return Plan(grouped_gemm_kernel, constants, config.num_warps, config.num_stages)


def grouped_gemm(
    a: Tensor,
    weight: Stack,
    routing: Routing,
    num_rows: int,
    bias: Tensor | None,
    gather: bool,
    fill: float,
    extension: Extension | None = None,
) -> Tensor:
    """``reference.grouped_gemm``."""
    n, k = weight.shape[1:]
    out = a.new_empty((num_rows, n))
    if out.numel() == 0:
        return out
    a = a.contiguous()
    if extension is not None and extension.separate:
        raise AssertionError("only an up projection takes gate and up apart")
    plain = not gather and bias is None  # all that a product with the transpose of packed weights can be
    if (
        isinstance(weight, PackedStack)
        and (plain or not weight.transposed)
        and packed.decodes("transposed_4bit" if weight.transposed else "gemm_4bit", weight, num_rows, a)
    ):
        packed.gemm(a, weight, routing, bias, gather, fill, out, extension)
        return out
    config = config_of("gemm" if k > tuning.SHORT_K else "gemm_short", num_rows, routing, a)
    for part in packed.dense_parts(weight, routing, a.dtype, config):
        _launch_gemm(a, part, routing, bias, gather, fill, None, out, extension)
    return out


def shrink(a: Tensor, weight: Tensor, routing: Routing, gather: bool, scale: float, out: Tensor) -> None:
    """``reference.shrink``."""
    if out.numel() == 0:
        return
    a = whole_rows(a)
    config = low_rank.thin(config_of("shrink", out.shape[0], routing, a), out.shape[1])
    _launch_gemm(a, packed.Part(weight, config, 0, out.shape[1]), routing, None, gather, 0.0, scale, out, None)


def _launch_gemm(
    a: Tensor,
    part: packed.Part,
    routing: Routing,
    bias: Tensor | None,
    gather: bool,
    fill: float,
    scale: float | None,
    out: Tensor,
    extension: Extension | None,
) -> None:
    """``part``'s columns of out (S, N)."""
    config, num_rows = part.config, out.shape[0]
    a_operand, a_descriptor = (a, False) if gather else rows_operand(a, config, (config.block_m, config.block_k))
    a_half = a_operand
    if isinstance(a_operand, Descriptor) and config.half_tiles:
        a_half = a_operand._replace(block_shape=(config.block_m // 2, config.block_k))
    w_operand, weights = weight_operand(part.stack, config)
    plan = _gemm_plan(
        config,
        part.stack.shape,
        part.stack.stride(),
        a.stride(0),
        out.stride(0),
        routing.top_k,
        gather,
        bias is not None,
        low_rank.constants(extension),
        scale is not None,
        a_descriptor,
        weights,
        precision(a.dtype),
    )
    plan(
        a.device,
        (max_tiles(num_rows, routing.num_experts, config.block_m) * cdiv(part.width, config.block_n), 1, 1),
        a_operand,
        a_half,
        w_operand,
        out if bias is None else part.bias(bias),
        *low_rank.operands(extension, out, part.first),
        part.columns(out),
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
        num_rows,
        fill,
        1.0 if scale is None else scale,
    )


@functools.cache
def _up_plan(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    intermediate: int,
    top_k: int,
    gate: Gate,
    has_bias: bool,
    extension: tuple[int, ...],
    save_h: bool,
    save_gate_up: bool,
    weights: str,
    precision: str,
) -> Plan:
    num_experts, columns, hidden = shape
    _, gate_up_offset = gate.column_layout(intermediate)
    constants = {
        "NUM_EXPERTS": num_experts,
        **stride_constants(strides),
        "H": hidden,
        **gate_constants(gate, gate.intermediate(columns)),
        "H_STRIDE": intermediate,
        "GATE_UP_STRIDE": gate.columns(intermediate),
        "GATE_UP_OFFSET": gate_up_offset,
        "TOP_K": top_k,
        "HAS_BIAS": has_bias,
        "LOW_RANK": extension,
        "SAVE_H": save_h,
        "SAVE_GATE_UP": save_gate_up,
        "WEIGHTS": weights,
        "PRECISION": precision,
        **tile_constants(config),
        "HALF_TILES": config.half_tiles,
    }
    return Plan(grouped_up_kernel, constants, config.num_warps, config.num_stages)


def grouped_up(
    x: Tensor,
    weight: Stack,
    routing: Routing,
    num_rows: int,
    bias: Tensor | None,
    gate: Gate,
    save_gate_up: bool,
    extension: Extension | None = None,
    save_h: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """``reference.grouped_up``."""
    num_experts, columns, _ = weight.shape
    intermediate = gate.intermediate(columns)
    h = x.new_empty((num_rows, intermediate)) if save_h else None
    gate_up = x.new_empty((num_rows, columns)) if save_gate_up else None
    if num_rows * intermediate == 0:
        return h, gate_up
    x = x.contiguous()
    if isinstance(weight, PackedStack) and not weight.transposed and packed.decodes("up_4bit", weight, num_rows, x):
        packed.up(x, weight, routing, bias, gate, h, gate_up, extension)
        return h, gate_up
    config = config_of("up", num_rows, routing, x)
    for part in packed.dense_parts(weight, routing, x.dtype, config, gate):
        stack = part.stack
        w_operand, weights = (stack, "pointer") if gate.interleaved else weight_operand(stack, part.config)
        plan = _up_plan(
            part.config,
            stack.shape,
            stack.stride(),
            intermediate,
            routing.top_k,
            gate,
            bias is not None,
            low_rank.constants(extension),
            save_h,
            save_gate_up,
            weights,
            precision(x.dtype),
        )
        plan(
            x.device,
            (max_tiles(num_rows, num_experts, config.block_m) * cdiv(part.width, part.config.block_n), 1, 1),
            x,
            w_operand,
            x if bias is None else part.bias(bias, gate),
            *low_rank.operands(extension, x, part.offset(gate)),
            x if h is None else part.columns(h),
            x if gate_up is None else part.columns(gate_up, gate),
            routing.offsets,
            routing.row_to_slot,
            routing.tile_expert,
            routing.tile_row,
            num_rows,
        )
    return h, gate_up
