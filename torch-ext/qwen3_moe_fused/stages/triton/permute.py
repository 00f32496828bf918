"""Launches of ``kernels.permute``: tokens to rows and back."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from ...kernels import permute as permute_kernels
from .bound_kernel import BoundKernel
from .operands import cdiv, power_of_2

if TYPE_CHECKING:
    from ...routing import Routing


def _row_block(n: int) -> tuple[int, int]:
    """(columns, warps) of the kernels that pass over a row of n features once: 16 bytes a thread."""
    block = max(32, min(2048, power_of_2(n)))
    return block, max(1, min(8, block // 256))


@functools.cache
def _combine_kernel(n: int, top_k: int, weighted: bool) -> tuple[BoundKernel, int]:
    block, warps = _row_block(n)
    constants = {"N": n, "TOP_K": top_k, "WEIGHTED": weighted, "BLOCK_N": block}
    return BoundKernel(permute_kernels.combine_kernel, constants, num_warps=warps), cdiv(n, block)


def combine(z: Tensor, routing: Routing, num_tokens: int, weights: Tensor | None) -> Tensor:
    """``reference.combine``."""
    y = z.new_empty((num_tokens, z.shape[1]))
    if y.numel() == 0:
        return y
    kernel, blocks = _combine_kernel(z.shape[1], routing.top_k, weights is not None)
    kernel(
        z.device,
        (num_tokens, blocks, 1),
        z,
        y if weights is None else weights.contiguous(),
        y,
        routing.slot_to_row,
    )
    return y


@functools.cache
def _dispatch_kernel(num_experts: int, n: int, top_k: int) -> tuple[BoundKernel, int]:
    block, warps = _row_block(n)
    constants = {"NUM_EXPERTS": num_experts, "N": n, "TOP_K": top_k, "BLOCK_N": block}
    return BoundKernel(permute_kernels.dispatch_kernel, constants, num_warps=warps), cdiv(n, block)


def dispatch(x: Tensor, routing: Routing, num_rows: int) -> Tensor:
    """``reference.dispatch``."""
    rows = x.new_empty((num_rows, x.shape[1]))
    if rows.numel() == 0:
        return rows
    x = x.contiguous()
    kernel, blocks = _dispatch_kernel(routing.num_experts, x.shape[1], routing.top_k)
    kernel(x.device, (x.shape[0], blocks, 1), x, rows, routing.offsets, routing.slot_to_row)
    return rows


@functools.cache
def _combine_backward_kernel(num_experts: int, n: int, top_k: int, need_weights: bool) -> BoundKernel:
    block, warps = _row_block(n)
    constants = {
        "NUM_EXPERTS": num_experts,
        "N": n,
        "TOP_K": top_k,
        "NEED_WEIGHTS": need_weights,
        "BLOCK_N": block,
    }
    return BoundKernel(permute_kernels.combine_backward_kernel, constants, num_warps=warps)


def combine_backward(
    grad_y: Tensor, z: Tensor | None, routing: Routing, weights: Tensor
) -> tuple[Tensor, Tensor | None]:
    """``reference.combine_backward``."""
    n = grad_y.shape[1]
    grad_z = grad_y.new_empty((weights.numel(), n))
    grad_weights = None if z is None else weights.new_empty(weights.shape)
    if grad_z.numel() == 0:
        return grad_z, None if grad_weights is None else grad_weights.zero_()
    _combine_backward_kernel(routing.num_experts, n, routing.top_k, z is not None)(
        grad_y.device,
        (weights.numel(), 1, 1),
        grad_y.contiguous(),
        grad_z if z is None else z.contiguous(),
        weights.contiguous(),
        grad_z,
        weights if grad_weights is None else grad_weights,
        routing.offsets,
        routing.slot_to_row,
    )
    return grad_z, grad_weights
