"""Launch of ``kernels.down_backward``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..activations import Gate
from ..kernels.down_backward import bias_dots_kernel, down_backward_kernel, sum_parts_kernel
from ..plan import Plan
from ..routing import max_tiles
from ..weights import PackedStack
from . import low_rank, packed
from .operands import (
    cdiv,
    config_of,
    gate_constants,
    precision,
    stride_constants,
    tile_constants,
    weight_operand,
)

if TYPE_CHECKING:
    from ..lora import Extension
    from ..routing import Routing
    from ..tuning import LaunchConfig
    from ..weights import Stack


@functools.cache
def _down_backward_plan(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    intermediate: int,
    top_k: int,
    gate: Gate,
    num_parts: int,
    first_part: int,
    extension: tuple[int, ...],
    save_weighted_h: bool,
    in_place: bool,
    weights: str,
    precision: str,
) -> Plan:
    num_experts, width, hidden = shape
    constants = {
        "NUM_EXPERTS": num_experts,
        **stride_constants(strides),
        "H": hidden,
        **gate_constants(gate, intermediate),
        "I": width,
        "H_STRIDE": intermediate,
        "TOP_K": top_k,
        "PARTS": num_parts,
        "FIRST_PART": first_part,
        "LOW_RANK": extension,
        "SAVE_WEIGHTED_H": save_weighted_h,
        "IN_PLACE": in_place,
        "WEIGHTS": weights,
        "PRECISION": precision,
        **tile_constants(config),
        "SLICES": config.slices,
        "HALF_TILES": config.half_tiles,
    }
    return Plan(down_backward_kernel, constants, config.num_warps, config.num_stages)


@functools.cache
def _bias_dots_plan(num_experts: int, hidden: int, top_k: int, num_parts: int, block_m: int) -> Plan:
    constants = {
        "NUM_EXPERTS": num_experts,
        "H": hidden,
        "TOP_K": top_k,
        "PARTS": num_parts,
        "BLOCK_M": block_m,
        "BLOCK_K": 64,
    }
    return Plan(bias_dots_kernel, constants)


@functools.cache
def _sum_parts_plan(num_parts: int) -> tuple[Plan, int]:
    block = 256
    return Plan(sum_parts_kernel, {"PARTS": num_parts, "BLOCK_S": block}), block


def down_backward(
    grad_y: Tensor,
    weight: Stack,
    bias: Tensor | None,
    gate_up: Tensor,
    routing: Routing,
    top_k_weights: Tensor,
    gate: Gate,
    need_weighted_h: bool,
    extension: Extension | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``reference.down_backward``."""
    num_experts, hidden, intermediate = weight.shape
    num_rows = gate_up.shape[0]
    grad_gate_up = gate_up if in_place else torch.empty_like(gate_up)
    weighted_h = gate_up.new_empty((num_rows, intermediate)) if need_weighted_h else None
    if gate_up.numel() == 0:
        return grad_gate_up, weighted_h, torch.zeros_like(top_k_weights)
    grad_y = grad_y.contiguous()
    device = grad_y.device
    top_k_weights = top_k_weights.contiguous()
    stored: PackedStack | None = None  # decoded in the product
    if (
        isinstance(weight, PackedStack)
        and not weight.transposed
        and packed.decodes("down_backward_4bit", weight, num_rows, grad_y)
    ):
        stored = weight
        config = packed.down_backward_config(num_rows, routing, grad_y, intermediate)
        block_n = config.block_n
    else:
        config = config_of("down_backward", num_rows, routing, grad_y)
        block_n = packed.part_tiles(weight.mT, grad_y.dtype, config)
    tiles = max_tiles(num_rows, num_experts, config.block_m)
    num_parts = cdiv(intermediate, block_n) + (bias is not None)
    dots = torch.empty((num_rows, num_parts), dtype=torch.float32, device=grad_y.device)
    if stored is not None:
        operands = (grad_y, stored, gate_up, routing, top_k_weights, gate, grad_gate_up, weighted_h, dots, extension)
        packed.down_backward(config, *operands)
    for part in () if stored is not None else packed.dense_parts(weight.mT, routing, grad_y.dtype, config):
        w_operand, weights = weight_operand(part.stack, part.config)
        plan = _down_backward_plan(
            part.config,
            part.stack.shape,
            part.stack.stride(),
            intermediate,
            routing.top_k,
            gate,
            num_parts,
            part.first // block_n,
            low_rank.constants(extension),
            need_weighted_h,
            in_place,
            weights,
            precision(grad_y.dtype),
        )
        plan(
            device,
            (tiles * cdiv(part.width, block_n), 1, 1),
            grad_y,
            w_operand,
            *low_rank.operands(extension, grad_y, part.first),
            part.columns(gate_up, gate),
            top_k_weights,
            part.columns(grad_gate_up, gate),
            grad_gate_up if weighted_h is None else part.columns(weighted_h),
            dots,
            routing.offsets,
            routing.row_to_slot,
            routing.tile_expert,
            routing.tile_row,
        )
    if bias is not None:
        _bias_dots_plan(num_experts, hidden, routing.top_k, num_parts, config.block_m)(
            device,
            (tiles, 1, 1),
            grad_y,
            bias.contiguous(),
            dots,
            routing.offsets,
            routing.row_to_slot,
            routing.tile_expert,
            routing.tile_row,
        )
    grad_weights = torch.empty_like(top_k_weights)
    plan, block = _sum_parts_plan(num_parts)
    plan(device, (cdiv(num_rows, block), 1, 1), dots, routing.slot_to_row, grad_weights, num_rows)
    return grad_gate_up, weighted_h, grad_weights
