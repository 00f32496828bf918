"""Tokens to rows in expert order and back: ``route`` decides, ``dispatch`` and ``combine`` move, each the other's backward.

The composed path of ``moe_experts`` runs between the two; the fused path gathers inside the up projection instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from ._ops import add_op_namespace_prefix
from .autograd import differentiable, eager
from .backend import backend_for
from .routing import Routing


def _route(top_k_index: Tensor, num_experts: int, dtype: torch.dtype, packed: bool, zeroed: bool = False) -> Tensor:
    """The routing buffer of (T, top_k) expert ids."""
    num_rows = top_k_index.numel()
    buffer = Routing.new_buffer(top_k_index, num_rows, num_experts, zeroed=zeroed)
    routing = Routing.from_buffer(buffer, num_rows, num_experts, top_k_index.shape[-1], packed=packed)
    backend_for(top_k_index, dtype).route(top_k_index, routing, dtype)
    return buffer


@torch.library.custom_op(add_op_namespace_prefix("route"), mutates_args=())
def route_op(top_k_index: Tensor, num_experts: int, dtype: torch.dtype, packed: bool) -> Tensor:
    return _route(top_k_index, num_experts, dtype, packed, zeroed=True)


@route_op.register_fake
def _(top_k_index: Tensor, num_experts: int, dtype: torch.dtype, packed: bool) -> Tensor:
    return top_k_index.new_empty(Routing.buffer_size(top_k_index.numel(), num_experts), dtype=torch.int32)


def _route_sorted(m_sizes: Tensor, num_rows: int, dtype: torch.dtype, packed: bool, zeroed: bool = False) -> Tensor:
    """The routing buffer of rows sorted by expert, (E,) sizes."""
    num_experts = m_sizes.shape[0]
    buffer = Routing.new_buffer(m_sizes, num_rows, num_experts, sorted_rows=True, zeroed=zeroed)
    routing = Routing.from_buffer(buffer, num_rows, num_experts, 1, sorted_rows=True, packed=packed)
    backend_for(m_sizes, dtype).route_sorted(m_sizes, num_rows, routing, dtype)
    return buffer


@torch.library.custom_op(add_op_namespace_prefix("route_sorted"), mutates_args=())
def route_sorted_op(m_sizes: Tensor, num_rows: int, dtype: torch.dtype, packed: bool) -> Tensor:
    return _route_sorted(m_sizes, num_rows, dtype, packed, zeroed=True)


@route_sorted_op.register_fake
def _(m_sizes: Tensor, num_rows: int, dtype: torch.dtype, packed: bool) -> Tensor:
    return m_sizes.new_empty(Routing.buffer_size(num_rows, m_sizes.shape[0], sorted_rows=True), dtype=torch.int32)


routing_buffer = eager(route_op, _route)
route_sorted = eager(route_sorted_op, _route_sorted)


def route(top_k_index: Tensor, num_experts: int, dtype: torch.dtype = torch.bfloat16, packed: bool = False) -> Routing:
    """Sorts the slots of ``top_k_index`` by expert, stably and without a host synchronisation.

    Args:
        top_k_index: (T, top_k) integer expert ids; ids outside [0, num_experts) belong to no expert.
        num_experts: E.
        dtype, packed: of the grouped GEMMs that will use it, and whether their weights are packed; the height of the row
            tiles depends on them.

    Returns:
        The ``Routing`` of the T·top_k slots.

    Raises:
        TypeError, ValueError: ``top_k_index`` is not a two-dimensional tensor of integers.
    """
    checks.tensor("top_k_index", top_k_index, ("T", "top_k"))
    checks.dtype("top_k_index", top_k_index, checks.INDEX_DTYPES)
    checks.expert_ids(top_k_index, num_experts)
    buffer = routing_buffer(top_k_index, num_experts, dtype, packed)
    return Routing.from_buffer(buffer, top_k_index.numel(), num_experts, top_k_index.shape[-1], packed=packed)


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
    return combine_without_grad(grad, None, buffer, *ctx.options), None, None, None


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


def _gradients_of_combine(
    grad_y: Tensor, z: Tensor | None, weights: Tensor, buffer: Tensor, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """The gradients of z (S, N) and of weights (T, top_k), the latter without elements if z is None."""
    routing = Routing.from_buffer(buffer, weights.numel(), num_experts, top_k)
    stages = backend_for(grad_y, grad_y.dtype)
    grad_z, grad_weights = stages.combine_backward(grad_y.contiguous(), z, routing, weights)
    return grad_z, weights.new_empty(0) if grad_weights is None else grad_weights


@torch.library.custom_op(add_op_namespace_prefix("combine_backward"), mutates_args=())
def combine_backward_op(
    grad_y: Tensor, z: Tensor | None, weights: Tensor, buffer: Tensor, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    return _gradients_of_combine(grad_y, z, weights, buffer, num_experts, top_k)


@combine_backward_op.register_fake
def _(
    grad_y: Tensor, z: Tensor | None, weights: Tensor, buffer: Tensor, num_experts: int, top_k: int
) -> tuple[Tensor, Tensor]:
    grad_z = grad_y.new_empty((weights.numel(), grad_y.shape[1]))
    return grad_z, weights.new_empty(0 if z is None else weights.shape)


gradients_of_combine = eager(combine_backward_op, _gradients_of_combine)
dispatch_without_grad = eager(dispatch_op, _dispatch)
combine_without_grad = eager(combine_op, _combine)


def _combine_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    z, weights, buffer, num_experts, top_k = inputs
    # z is there for the gradient of the weights alone.
    ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, weights, buffer)
    ctx.options = (num_experts, top_k)


def _combine_backward(ctx, grad_y: Tensor):  # type: ignore[no-untyped-def]
    z, weights, buffer = ctx.saved_tensors
    if weights is None:
        return dispatch_without_grad(grad_y, buffer, *ctx.options), None, None, None, None
    grad_z, grad_weights = gradients_of_combine(grad_y, z, weights, buffer, *ctx.options)
    return grad_z, None if z is None else grad_weights, None, None, None


dispatch = differentiable(dispatch_op, _dispatch, _dispatch_setup, _dispatch_backward)
combine = differentiable(combine_op, _combine, _combine_setup, _combine_backward)
