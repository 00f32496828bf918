"""Launches of ``kernels.grouped_gram``: gradients of weights and biases."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from ..kernels.grouped_gram import grouped_gram_kernel, grouped_row_sum_kernel
from ..plan import Plan
from . import low_rank
from .operands import (
    cdiv,
    config_of,
    power_of_2,
    precision,
    rows_operand,
    tile_constants,
    whole_rows,
)

if TYPE_CHECKING:
    from ..routing import Routing
    from ..tuning import LaunchConfig


@functools.cache
def _gram_plan(
    config: LaunchConfig,
    num_experts: int,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    row_strides: tuple[int, int],
    top_k: int,
    gather_a: bool,
    gather_b: bool,
    weighted: bool,
    a_descriptor: bool,
    b_descriptor: bool,
    precision: str,
) -> Plan:
    constants = {
        "STRIDE_OE": strides[0],
        "STRIDE_OM": strides[1],
        "STRIDE_ON": strides[2],
        "M": shape[1],
        "N": shape[2],
        "A_STRIDE": row_strides[0],
        "B_STRIDE": row_strides[1],
        "TOP_K": top_k,
        "GATHER_A": gather_a,
        "GATHER_B": gather_b,
        "WEIGHTED": weighted,
        "A_DESCRIPTOR": a_descriptor,
        "B_DESCRIPTOR": b_descriptor,
        "PRECISION": precision,
        **tile_constants(config),
        "GROUP_M": 4,
    }
    return Plan(grouped_gram_kernel, constants, config.num_warps, config.num_stages)


def grouped_gram(
    a: Tensor,
    b: Tensor,
    routing: Routing,
    gather_a: bool,
    gather_b: bool,
    out: Tensor,
    weights: Tensor | None = None,
) -> None:
    """``reference.grouped_gram``."""
    if weights is None and out.stride(2) != 1 and out.stride(1) == 1:
        # Columns of the output are what the kernel stores side by side.
        a, b, gather_a, gather_b, out = b, a, gather_b, gather_a, out.mT
    num_experts, m, n = out.shape
    if out.numel() == 0:
        return
    if a.shape[0] == 0:
        out.zero_()
        return
    a, b = whole_rows(a), whole_rows(b)
    num_rows = a.shape[0] * (routing.top_k if gather_a else 1)
    if min(m, n) <= low_rank.MAX_THIN:
        config = low_rank.thin_gram(config_of("gram_thin", num_rows, routing, a), m, n)
    else:
        config = config_of("gram", num_rows, routing, a)
    a_operand, a_descriptor = (a, False) if gather_a else rows_operand(a, config, (config.block_k, config.block_m))
    b_operand, b_descriptor = (b, False) if gather_b else rows_operand(b, config, (config.block_k, config.block_n))
    plan = _gram_plan(
        config,
        num_experts,
        out.shape,
        out.stride(),
        (a.stride(0), b.stride(0)),
        routing.top_k,
        gather_a,
        gather_b,
        weights is not None,
        a_descriptor,
        b_descriptor,
        precision(a.dtype),
    )
    plan(
        a.device,
        (num_experts * cdiv(m, config.block_m) * cdiv(n, config.block_n), 1, 1),
        a,
        b,
        a_operand,
        b_operand,
        a if weights is None else weights.contiguous(),
        out,
        routing.offsets,
        routing.row_to_slot,
    )


@functools.cache
def _row_sum_plan(n: int, top_k: int, gather: bool, weighted: bool) -> tuple[Plan, int]:
    block = max(16, min(128, power_of_2(n)))
    constants = {
        "N": n,
        "TOP_K": top_k,
        "GATHER": gather,
        "WEIGHTED": weighted,
        "BLOCK_N": block,
        "BLOCK_K": 32,
    }
    return Plan(grouped_row_sum_kernel, constants), cdiv(n, block)


def grouped_row_sum(a: Tensor, routing: Routing, weights: Tensor | None, gather: bool) -> Tensor:
    """``reference.grouped_row_sum``."""
    out = a.new_zeros((routing.num_experts, a.shape[1]))
    if out.numel() == 0 or a.shape[0] == 0:
        return out
    a = a.contiguous()
    plan, blocks = _row_sum_plan(a.shape[1], routing.top_k, gather, weights is not None)
    plan(
        a.device,
        (routing.num_experts, blocks, 1),
        a,
        a if weights is None else weights.contiguous(),
        out,
        routing.offsets,
        routing.row_to_slot,
    )
    return out
