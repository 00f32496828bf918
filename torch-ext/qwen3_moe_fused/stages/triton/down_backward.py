"""Launches of ``kernels.down_backward``; ``paths`` tells whether ``packed_down_backward`` serves packed weights."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...activations import Gate
from ...kernels.down_backward import bias_dots_kernel, down_backward_kernel, sum_parts_kernel
from ...kernels.records import BackwardLayout, BackwardTensors, DenseLayout, LowRankLayout
from ...routing import max_tiles
from ..stacks import PackedStack
from . import low_rank, packed_down_backward
from .bound_kernel import BoundKernel
from .dequantize import Part, dense_parts, part_tiles
from .operands import cdiv, gate_layout, precision, routing_tensors, tile, weight_operand
from .paths import IN_PRODUCT, product_path

if TYPE_CHECKING:
    from ...routing import Routing
    from ...tuning import LaunchConfig
    from ..stacks import Stack
    from ..terms import LowRankTerm


@functools.cache
def _down_backward_kernel(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    mode: str,
    intermediate: int,
    top_k: int,
    gate: Gate,
    layout: BackwardLayout,
    term: LowRankLayout | None,
    precision: str,
) -> BoundKernel:
    num_experts, width, hidden = shape
    constants = {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "H": hidden,
        "WEIGHT": DenseLayout(*strides, mode),
        "GATE": gate_layout(gate, intermediate, width),
        "LAYOUT": layout,
        "LOW_RANK": term or low_rank.NOTHING,
        "TILE": tile(config, precision),
    }
    return BoundKernel(down_backward_kernel, constants, config.num_warps, config.num_stages)


@functools.cache
def _bias_dots_kernel(num_experts: int, hidden: int, top_k: int, num_parts: int, block_m: int) -> BoundKernel:
    constants = {
        "NUM_EXPERTS": num_experts,
        "H": hidden,
        "TOP_K": top_k,
        "PARTS": num_parts,
        "BLOCK_M": block_m,
        "BLOCK_K": 64,
    }
    return BoundKernel(bias_dots_kernel, constants)


@functools.cache
def _sum_parts_kernel(num_parts: int) -> tuple[BoundKernel, int]:
    block = 256
    return BoundKernel(sum_parts_kernel, {"PARTS": num_parts, "BLOCK_S": block}), block


def down_backward(
    grad_y: Tensor,
    weight: Stack,
    bias: Tensor | None,
    gate_up: Tensor,
    routing: Routing,
    top_k_weights: Tensor,
    gate: Gate,
    need_weighted_h: bool,
    term: LowRankTerm | None = None,
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
    top_k_weights = top_k_weights.contiguous()
    path, config = product_path("down_backward", weight, num_rows, routing, grad_y)
    if path is IN_PRODUCT:
        config = packed_down_backward.fit(config, intermediate)
        block_n = config.block_n
    else:
        block_n = part_tiles(weight.mT, grad_y.dtype, config)
    num_parts = cdiv(intermediate, block_n) + (bias is not None)
    parts = torch.empty((num_rows, num_parts), dtype=torch.float32, device=grad_y.device)
    layout = BackwardLayout(intermediate, num_parts, 0, need_weighted_h, in_place)
    tensors = BackwardTensors(
        gate_up, top_k_weights, grad_gate_up, grad_gate_up if weighted_h is None else weighted_h, parts
    )
    if path is IN_PRODUCT:
        assert isinstance(weight, PackedStack)
        packed_down_backward.launch(config, grad_y, weight, routing, gate, tensors, layout, num_rows, term)
    else:
        for part in dense_parts(weight.mT, routing, grad_y.dtype, config):
            _launch(
                grad_y, part, routing, gate, tensors, layout._replace(FIRST_PART=part.first // block_n), num_rows, term
            )
    if bias is not None:
        _bias_dots_kernel(num_experts, hidden, routing.top_k, num_parts, config.block_m)(
            grad_y.device,
            (max_tiles(num_rows, num_experts, config.block_m), 1, 1),
            grad_y,
            bias.contiguous(),
            parts,
            routing_tensors(routing),
        )
    grad_weights = torch.empty_like(top_k_weights)
    kernel, block = _sum_parts_kernel(num_parts)
    kernel(grad_y.device, (cdiv(num_rows, block), 1, 1), parts, routing.slot_to_row, grad_weights, num_rows)
    return grad_gate_up, weighted_h, grad_weights


def _launch(
    grad_y: Tensor,
    part: Part,
    routing: Routing,
    gate: Gate,
    tensors: BackwardTensors,
    layout: BackwardLayout,
    num_rows: int,
    term: LowRankTerm | None,
) -> None:
    """``part``'s columns of the outputs among ``tensors``."""
    config = part.config
    w_operand, mode = weight_operand(part.stack, config, config.block_n)
    kernel = _down_backward_kernel(
        config,
        part.stack.shape,
        part.stack.stride(),
        mode,
        layout.H_STRIDE,
        routing.top_k,
        gate,
        layout,
        low_rank.layout(term),
        precision(grad_y.dtype),
    )
    if part.first:
        weighted_h = part.columns(tensors.weighted_h) if layout.SAVE_WEIGHTED_H else tensors.weighted_h
        tensors = tensors._replace(
            gate_up=part.columns(tensors.gate_up, gate),
            grad_gate_up=part.columns(tensors.grad_gate_up, gate),
            weighted_h=weighted_h,
        )
    kernel(
        grad_y.device,
        (max_tiles(num_rows, routing.num_experts, config.block_m) * cdiv(part.width, config.block_n), 1, 1),
        grad_y,
        w_operand,
        low_rank.tensors(term, part.first),
        tensors,
        routing_tensors(routing),
    )
