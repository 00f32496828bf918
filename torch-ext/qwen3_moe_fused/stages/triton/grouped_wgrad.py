"""Launches of ``kernels.grouped_wgrad``: gradients of weights and biases."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from ...kernels.grouped_wgrad import grouped_row_sum_kernel, grouped_wgrad_kernel
from ...kernels.records import DenseLayout, RowsLayout
from . import low_rank
from .bound_kernel import BoundKernel
from .operands import cdiv, config_of, power_of_2, precision, rows_operand, tile, whole_rows

if TYPE_CHECKING:
    from ...routing import Routing
    from ...tuning import LaunchConfig


@functools.cache
def _wgrad_kernel(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    a: RowsLayout,
    b: RowsLayout,
    top_k: int,
    precision: str,
) -> BoundKernel:
    constants = {
        "M": shape[1],
        "N": shape[2],
        "TOP_K": top_k,
        "A": a,
        "B": b,
        "OUT": DenseLayout(*strides, "pointer"),
        "TILE": tile(config, precision),
        "GROUP_M": 4,
    }
    return BoundKernel(grouped_wgrad_kernel, constants, config.num_warps, config.num_stages)


def grouped_wgrad(
    a: Tensor,
    b: Tensor,
    routing: Routing,
    gather_a: bool,
    gather_b: bool,
    out: Tensor,
    weights: Tensor | None = None,
) -> None:
    """``reference.grouped_wgrad``."""
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
        config = low_rank.thin_wgrad(config_of("wgrad_thin", num_rows, routing, a), m, n)
    else:
        config = config_of("wgrad", num_rows, routing, a)
    a_operand, a_layout = rows_operand(a, config, (config.block_k, config.block_m), gather_a)
    is_weighted = weights is not None
    b_operand, b_layout = rows_operand(b, config, (config.block_k, config.block_n), gather_b, scaled=is_weighted)
    kernel = _wgrad_kernel(
        config,
        out.shape,
        out.stride(),
        a_layout,
        b_layout,
        routing.top_k,
        precision(a.dtype),
    )
    kernel(
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
def _row_sum_kernel(n: int, top_k: int, gather: bool, weighted: bool) -> tuple[BoundKernel, int]:
    block = max(16, min(128, power_of_2(n)))
    constants = {
        "N": n,
        "TOP_K": top_k,
        "GATHER": gather,
        "WEIGHTED": weighted,
        "BLOCK_N": block,
        "BLOCK_K": 32,
    }
    return BoundKernel(grouped_row_sum_kernel, constants), cdiv(n, block)


def grouped_row_sum(a: Tensor, routing: Routing, weights: Tensor | None, gather: bool) -> Tensor:
    """``reference.grouped_row_sum``."""
    out = a.new_zeros((routing.num_experts, a.shape[1]))
    if out.numel() == 0 or a.shape[0] == 0:
        return out
    a = a.contiguous()
    kernel, blocks = _row_sum_kernel(a.shape[1], routing.top_k, gather, weights is not None)
    kernel(
        a.device,
        (routing.num_experts, blocks, 1),
        a,
        a if weights is None else weights.contiguous(),
        out,
        routing.offsets,
        routing.row_to_slot,
    )
    return out
