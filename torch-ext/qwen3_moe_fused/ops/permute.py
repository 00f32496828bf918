"""Tokens to rows in expert order and back, as operators: routing decides, ``dispatch`` and ``combine`` move.

``dispatch`` and ``combine`` are each other's backward. The composed path of ``moe_experts`` runs between the two; the fused
path gathers inside the up projection instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..routing import Routing
from ..stages import backend_for
from .autograd import differentiable, eager
from .schema import Constant, Inline, Operator


class RouteArguments(NamedTuple):
    """What ``route`` takes.

    Attributes:
        top_k_index: (T, top_k) expert ids.
        num_experts: E.
        dtype, packed: what the grouped GEMMs compute in, and whether their weights are packed: the height of the row tiles
            depends on them.
    """

    top_k_index: Constant
    num_experts: int
    dtype: torch.dtype
    packed: bool


def _route(arguments: RouteArguments, zeroed: bool = False) -> Tensor:
    """The routing buffer of (T, top_k) expert ids; ``zeroed`` gives a value to the entries that nobody writes."""
    top_k_index, num_experts, dtype, packed = arguments
    num_rows = top_k_index.numel()
    buffer = Routing.new_buffer(top_k_index, num_rows, num_experts, zeroed=zeroed)
    routing = Routing.from_buffer(buffer, num_rows, num_experts, top_k_index.shape[-1], packed=packed)
    backend_for(top_k_index, dtype).route(top_k_index, routing, dtype)
    return buffer


def _fake_route(arguments: RouteArguments) -> Tensor:
    size = Routing.buffer_size(arguments.top_k_index.numel(), arguments.num_experts)
    return arguments.top_k_index.new_empty(size, dtype=torch.int32)


class RouteSortedArguments(NamedTuple):
    """What ``route_sorted`` takes: (E,) sizes of the experts' rows, their number S, and what ``route`` takes, too."""

    m_sizes: Constant
    num_rows: int
    dtype: torch.dtype
    packed: bool


def _route_sorted(arguments: RouteSortedArguments, zeroed: bool = False) -> Tensor:
    """The routing buffer of rows that the caller sorted by expert."""
    m_sizes, num_rows, dtype, packed = arguments
    num_experts = m_sizes.shape[0]
    buffer = Routing.new_buffer(m_sizes, num_rows, num_experts, sorted_rows=True, zeroed=zeroed)
    routing = Routing.from_buffer(buffer, num_rows, num_experts, 1, sorted_rows=True, packed=packed)
    backend_for(m_sizes, dtype).route_sorted(m_sizes, num_rows, routing, dtype)
    return buffer


def _fake_route_sorted(arguments: RouteSortedArguments) -> Tensor:
    m_sizes, num_rows, _, _ = arguments
    return m_sizes.new_empty(Routing.buffer_size(num_rows, m_sizes.shape[0], sorted_rows=True), dtype=torch.int32)


route_operator = Operator("route", RouteArguments, Tensor, _route, _fake_route, zeroed=True)
route_sorted_operator = Operator(
    "route_sorted", RouteSortedArguments, Tensor, _route_sorted, _fake_route_sorted, zeroed=True
)
routing_buffer = eager(route_operator)
sorted_routing_buffer = eager(route_sorted_operator)


class Slots(NamedTuple):
    """How rows in expert order belong to slots: the routing buffer, E, and slots per token."""

    buffer: Constant
    num_experts: int
    top_k: int

    def routing(self, num_rows: int) -> Routing:
        """The routing of ``num_rows`` rows."""
        return Routing.from_buffer(self.buffer, num_rows, self.num_experts, self.top_k)


class DispatchArguments(NamedTuple):
    """What ``dispatch`` takes: x (T, N), and how its rows are ordered."""

    x: Tensor
    slots: Inline[Slots]


def _dispatch(arguments: DispatchArguments) -> Tensor:
    """(S, N) rows in expert order from x (T, N); rows of no expert are zero."""
    x, slots = arguments
    num_rows = x.shape[0] * slots.top_k
    rows: Tensor = backend_for(x, x.dtype).dispatch(x, slots.routing(num_rows), num_rows)
    return rows


def _fake_dispatch(arguments: DispatchArguments) -> Tensor:
    x, slots = arguments
    return x.new_empty((x.shape[0] * slots.top_k, x.shape[1]))


class CombineArguments(NamedTuple):
    """What ``combine`` takes: z (S, N), the weights of slots (T, top_k) or None for ones, and how rows are ordered."""

    z: Tensor
    weights: Tensor | None
    slots: Inline[Slots]


def _combine(arguments: CombineArguments) -> Tensor:
    """y (T, N): each token's sum of its rows of z (S, N), weighted by weights (T, top_k) or by one, in slot order."""
    z, weights, slots = arguments
    num_rows = z.shape[0]
    routing = slots.routing(num_rows)
    y: Tensor = backend_for(z, z.dtype).combine(z.contiguous(), routing, num_rows // slots.top_k, weights)
    return y


def _fake_combine(arguments: CombineArguments) -> Tensor:
    z, _, slots = arguments
    return z.new_empty((z.shape[0] // slots.top_k, z.shape[1]))


class KeptByCombine(NamedTuple):
    """What the backward of ``combine`` reads: z only where the weights' gradient needs it."""

    z: Tensor | None
    weights: Tensor | None
    slots: Inline[Slots]


class CombineBackward(NamedTuple):
    """What ``combine_backward`` takes."""

    grad_y: Tensor
    z: Tensor | None
    weights: Tensor
    slots: Inline[Slots]


class CombineGradients(NamedTuple):
    """The gradients of z (S, N) and of the weights (T, top_k); the second is None without z."""

    z: Tensor
    weights: Tensor | None


def _combine_backward(arguments: CombineBackward) -> CombineGradients:
    grad_y, z, weights, slots = arguments
    stages = backend_for(grad_y, grad_y.dtype)
    return CombineGradients(*stages.combine_backward(grad_y.contiguous(), z, slots.routing(weights.numel()), weights))


def _fake_combine_backward(arguments: CombineBackward) -> CombineGradients:
    grad_y, z, weights, _ = arguments
    grad_z = grad_y.new_empty((weights.numel(), grad_y.shape[1]))
    return CombineGradients(grad_z, None if z is None else weights.new_empty(weights.shape))


dispatch_operator = Operator("dispatch", DispatchArguments, Tensor, _dispatch, _fake_dispatch)
combine_operator = Operator("combine", CombineArguments, Tensor, _combine, _fake_combine)
combine_backward_operator = Operator(
    "combine_backward", CombineBackward, CombineGradients, _combine_backward, _fake_combine_backward
)
_dispatch_without_grad = eager(dispatch_operator)
_combine_without_grad = eager(combine_operator)
_combine_gradients = eager(combine_backward_operator)


def _keep_dispatch(arguments: DispatchArguments, made: None, needs: Any) -> Slots:
    return arguments.slots


def _backward_of_dispatch(grad: Tensor, kept: Slots, needs: Any) -> Sequence[Tensor | None]:
    return (_combine_without_grad(CombineArguments(grad, None, kept)),)


def _keep_combine(arguments: CombineArguments, made: None, needs: Any) -> KeptByCombine:
    return KeptByCombine(arguments.z if needs.weights else None, arguments.weights, arguments.slots)


def _backward_of_combine(grad_y: Tensor, kept: KeptByCombine, needs: Any) -> Sequence[Tensor | None]:
    z, weights, slots = kept
    if weights is None:
        return _dispatch_without_grad(DispatchArguments(grad_y, slots)), None
    gradients: Sequence[Tensor | None] = _combine_gradients(CombineBackward(grad_y, z, weights, slots))
    return gradients


dispatch = differentiable(dispatch_operator, Slots, _keep_dispatch, _backward_of_dispatch)
combine = differentiable(combine_operator, KeptByCombine, _keep_combine, _backward_of_combine)
