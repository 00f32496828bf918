"""Launches of ``kernels.routing``: slots to rows, and row tiles to experts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import routing as routing_kernels
from ...routing import max_tiles
from .bound_kernel import BoundKernel
from .operands import cdiv, power_of_2, tile_height

if TYPE_CHECKING:
    from ...routing import Routing


# Elements of the (blocks, experts) matrices of counts, slots compared pairwise, tiles written, at a time.
ROUTING_TILE = 4096
ROUTING_SUB_SLOTS = 128
ROUTING_SUB_TILES = 128
# Slots that a single program routes; beyond, blocks of slots are counted first, in at most so many blocks.
ROUTING_SINGLE_SLOTS = 512
ROUTING_BLOCKS = 128


def _experts_block(num_experts: int) -> int:
    return max(power_of_2(num_experts), 2)


@functools.cache
def _count_kernel(num_experts: int, block: int) -> BoundKernel:
    constants = {"NUM_EXPERTS": num_experts, "BLOCK_S": block, "EXPERTS": _experts_block(num_experts)}
    return BoundKernel(routing_kernels.count_kernel, constants)


@functools.cache
def _route_kernel(num_experts: int, block: int, sub_blocks: int, block_m: int, single: bool) -> BoundKernel:
    experts = _experts_block(num_experts)
    constants = {
        "NUM_EXPERTS": num_experts,
        "BLOCK_S": block,
        "SUB_S": min(block, ROUTING_SUB_SLOTS),
        "SUB_B": sub_blocks,
        "SUB_T": ROUTING_SUB_TILES,
        "EXPERTS": experts,
        "BLOCK_M": block_m,
        "SINGLE": single,
    }
    return BoundKernel(routing_kernels.route_kernel, constants, num_warps=8 if single else 4)


def route(top_k_index: Tensor, routing: Routing, dtype: torch.dtype) -> None:
    """``reference.route``."""
    num_slots, num_experts = top_k_index.numel(), routing.num_experts
    if num_slots == 0:
        routing.offsets.zero_()
        return
    ids = top_k_index.contiguous()
    device = ids.device
    # A power of two, so that few block sizes are ever compiled.
    single = num_slots <= ROUTING_SINGLE_SLOTS
    if single:
        num_blocks, sub_blocks = 1, 1
        block = max(16, power_of_2(num_slots))
        counts = routing.offsets  # not read
    else:
        experts = _experts_block(num_experts)
        block = max(ROUTING_SUB_SLOTS, power_of_2(cdiv(num_slots, ROUTING_BLOCKS)))
        num_blocks = cdiv(num_slots, block)
        sub_blocks = min(max(1, ROUTING_TILE // experts), power_of_2(num_blocks))
        counts = ids.new_empty((num_blocks, experts), dtype=torch.int32)
        _count_kernel(num_experts, block)(device, (num_blocks, 1, 1), ids, counts, num_slots)
    block_m = tile_height(num_slots, routing, dtype)
    tiles = max_tiles(num_slots, num_experts, block_m)
    _route_kernel(num_experts, block, sub_blocks, block_m, single)(
        device,
        (num_blocks, 1, 1),
        ids,
        counts,
        routing.offsets,
        routing.row_to_slot,
        routing.slot_to_row,
        routing.tile_expert,
        routing.tile_row,
        num_slots,
        num_blocks,
        tiles,
    )


@functools.cache
def _route_sorted_kernel(num_experts: int, block_m: int) -> BoundKernel:
    experts = _experts_block(num_experts)
    constants = {
        "NUM_EXPERTS": num_experts,
        "EXPERTS": experts,
        "BLOCK_M": block_m,
        "SUB_T": ROUTING_SUB_TILES,
    }
    return BoundKernel(routing_kernels.route_sorted_kernel, constants)


def route_sorted(m_sizes: Tensor, num_rows: int, routing: Routing, dtype: torch.dtype) -> None:
    """``reference.route_sorted``."""
    num_experts = routing.num_experts
    if num_experts == 0:
        routing.offsets.zero_()
        routing.tile_expert.fill_(-1)
        return
    block_m = tile_height(num_rows, routing, dtype)
    tiles = max_tiles(num_rows, num_experts, block_m)
    num_blocks = cdiv(tiles, ROUTING_SUB_TILES)
    _route_sorted_kernel(num_experts, block_m)(
        m_sizes.device,
        (num_blocks, 1, 1),
        m_sizes.contiguous(),
        routing.offsets,
        routing.tile_expert,
        routing.tile_row,
        num_rows,
        tiles,
    )
