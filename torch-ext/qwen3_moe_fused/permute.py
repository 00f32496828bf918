"""``dispatch`` and ``combine``: tokens to rows in expert order and back, each the other's backward.

The composed path of ``moe_experts`` runs between them; the fused path gathers inside the up projection instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .autograd import differentiable
from .backend import backend_for
from .routing import Routing


@torch.library.custom_op(add_op_namespace_prefix("dispatch"), mutates_args=())
def dispatch_op(x: Tensor, buffer: Tensor, num_experts: int, top_k: int) -> Tensor:
    return _dispatch(x, buffer, num_experts, top_k)


def _dispatch(x: Tensor, buffer: Tensor, num_experts: int, top_k: int) -> Tensor:
    """(S, N) rows in expert order from x (T, N); rows of no expert are zero."""
    num_rows = x.shape[0] * top_k
    routing = Routing.from_buffer(buffer, num_rows, num_experts, top_k)
    return backend_for(x, x.dtype).dispatch(x, routing, num_rows)


@dispatch_op.register_fake
def _(x: Tensor, buffer: Tensor, num_experts: int, top_k: int) -> Tensor:
    return x.new_empty((x.shape[0] * top_k, x.shape[1]))


def _dispatch_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, buffer, num_experts, top_k = inputs
    ctx.save_for_backward(buffer)
    ctx.options = (num_experts, top_k)


def _dispatch_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    (buffer,) = ctx.saved_tensors
    return combine_op(grad, None, buffer, *ctx.options), None, None, None


@torch.library.custom_op(add_op_namespace_prefix("combine"), mutates_args=())
def combine_op(z: Tensor, weights: Tensor | None, buffer: Tensor, num_experts: int, top_k: int) -> Tensor:
    return _combine(z, weights, buffer, num_experts, top_k)


def _combine(z: Tensor, weights: Tensor | None, buffer: Tensor, num_experts: int, top_k: int) -> Tensor:
    """y (T, N): each token's sum of its rows of z (S, N), weighted by weights (T, top_k) or by one, in slot order."""
    routing = Routing.from_buffer(buffer, z.shape[0], num_experts, top_k)
    return backend_for(z, z.dtype).combine(z.contiguous(), routing, z.shape[0] // top_k, weights)


@combine_op.register_fake
def _(z: Tensor, weights: Tensor | None, buffer: Tensor, num_experts: int, top_k: int) -> Tensor:
    return z.new_empty((z.shape[0] // top_k, z.shape[1]))


@torch.library.custom_op(add_op_namespace_prefix("combine_backward"), mutates_args=())
def combine_backward_op(
    grad_y: Tensor, z: Tensor, weights: Tensor, buffer: Tensor, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    routing = Routing.from_buffer(buffer, z.shape[0], num_experts, top_k)
    return backend_for(z, z.dtype).combine_backward(grad_y.contiguous(), z.contiguous(), routing, weights)


@combine_backward_op.register_fake
def _(
    grad_y: Tensor, z: Tensor, weights: Tensor, buffer: Tensor, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), weights.new_empty(weights.shape)


def _combine_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    z, weights, buffer, num_experts, top_k = inputs
    ctx.save_for_backward(z if weights is not None else None, weights, buffer)
    ctx.options = (num_experts, top_k)


def _combine_backward(ctx, grad_y: Tensor):  # type: ignore[no-untyped-def]
    z, weights, buffer = ctx.saved_tensors
    if weights is None:
        return dispatch_op(grad_y, buffer, *ctx.options), None, None, None, None
    grad_z, grad_weights = combine_backward_op(grad_y, z, weights, buffer, *ctx.options)
    return grad_z, grad_weights, None, None, None


dispatch = differentiable(dispatch_op, _dispatch, _dispatch_setup, _dispatch_backward)
combine = differentiable(combine_op, _combine, _combine_setup, _combine_backward)
