"""Launches of ``kernels.grouped_gemm``: the up projection with its gate, and the plain grouped GEMM."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from .. import tuning
from ..activations import Gate
from ..kernels.grouped_gemm import grouped_gemm_kernel, grouped_up_kernel
from ..plan import Plan
from ..routing import max_tiles
from .operands import (
    cdiv,
    config_of,
    device_index,
    gate_constants,
    on_device,
    precision,
    rows_operand,
    stride_constants,
    tile_constants,
    weight_operand,
)

if TYPE_CHECKING:
    from ..routing import Routing
    from ..tuning import LaunchConfig


@functools.cache
def _gemm_plan(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    top_k: int,
    gather: bool,
    has_bias: bool,
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
        "TOP_K": top_k,
        "GATHER": gather,
        "HAS_BIAS": has_bias,
        "A_DESCRIPTOR": a_descriptor,
        "WEIGHTS": weights,
        "PRECISION": precision,
        **tile_constants(config),
        "HALF_TILES": config.half_tiles,
    }
    return Plan(grouped_gemm_kernel, constants, config.num_warps, config.num_stages)


@on_device
def grouped_gemm(
    a: Tensor, weight: Tensor, routing: Routing, num_rows: int, bias: Tensor | None, gather: bool, fill: float
) -> Tensor:
    """``reference.grouped_gemm``."""
    num_experts, n, k = weight.shape
    out = a.new_empty((num_rows, n))
    if out.numel() == 0:
        return out
    a = a.contiguous()
    config = config_of("gemm" if k > tuning.SHORT_K else "gemm_short", num_rows, num_experts, a)
    a_operand, a_descriptor = (a, False) if gather else rows_operand(a, config, (config.block_m, config.block_k))
    a_half = a_operand
    if a_descriptor and config.half_tiles:
        a_half, _ = rows_operand(a, config, (config.block_m // 2, config.block_k))
    w_operand, weights = weight_operand(weight, config)
    plan = _gemm_plan(
        config,
        weight.shape,
        weight.stride(),
        routing.top_k,
        gather,
        bias is not None,
        a_descriptor,
        weights,
        precision(a.dtype),
    )
    plan(
        device_index(a),
        (max_tiles(num_rows, num_experts, config.block_m) * cdiv(n, config.block_n), 1, 1),
        a_operand,
        a_half,
        w_operand,
        out if bias is None else bias.contiguous(),
        out,
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
        num_rows,
        fill,
    )
    return out


@functools.cache
def _up_plan(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    top_k: int,
    gate: Gate,
    has_bias: bool,
    save_gate_up: bool,
    weights: str,
    precision: str,
) -> Plan:
    num_experts, columns, hidden = shape
    intermediate = gate.intermediate(columns)
    constants = {
        "NUM_EXPERTS": num_experts,
        **stride_constants(strides),
        "H": hidden,
        **gate_constants(gate, intermediate),
        "TOP_K": top_k,
        "HAS_BIAS": has_bias,
        "SAVE_GATE_UP": save_gate_up,
        "WEIGHTS": weights,
        "PRECISION": precision,
        **tile_constants(config),
        "HALF_TILES": config.half_tiles,
    }
    return Plan(grouped_up_kernel, constants, config.num_warps, config.num_stages)


@on_device
def grouped_up(
    x: Tensor, weight: Tensor, routing: Routing, num_rows: int, bias: Tensor | None, gate: Gate, save_gate_up: bool
) -> tuple[Tensor, Tensor | None]:
    """``reference.grouped_up``."""
    num_experts, columns, _ = weight.shape
    intermediate = gate.intermediate(columns)
    h = x.new_empty((num_rows, intermediate))
    gate_up = x.new_empty((num_rows, columns)) if save_gate_up else None
    if h.numel() == 0:
        return h, gate_up
    x = x.contiguous()
    config = config_of("up", num_rows, num_experts, x)
    w_operand, weights = (weight, "pointer") if gate.interleaved else weight_operand(weight, config)
    plan = _up_plan(
        config,
        weight.shape,
        weight.stride(),
        routing.top_k,
        gate,
        bias is not None,
        save_gate_up,
        weights,
        precision(x.dtype),
    )
    plan(
        device_index(x),
        (max_tiles(num_rows, num_experts, config.block_m) * cdiv(intermediate, config.block_n), 1, 1),
        x,
        w_operand,
        h if bias is None else bias.contiguous(),
        h,
        h if gate_up is None else gate_up,
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
        num_rows,
    )
    return h, gate_up
