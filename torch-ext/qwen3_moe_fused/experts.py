"""``moe_experts``: the whole expert MLP, its autograd and its memory plan.

The fused path, for an activation the kernels know:

    x (T,H) ─ up: gather, grouped GEMM, gate ─► h (S,I) ─ down: grouped GEMM ─► z (S,H) ─ combine ─► y (T,H)

Saved for backward: x, the routing buffer, the routing weights, gate_up (S, 2·I) and the weights by reference. h and z are
transient: backward recomputes h from gate_up next to the gate's derivative, and the gradient of a routing weight is
rowsum(grad_h · h), so the down projection's output is never needed again.

With few slots and no gradient to come there is nothing to sort: each slot is a matrix-vector product (``decode``).

A gate function of the caller's own runs between two grouped linear layers, each stage with its own autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks
from ._ops import add_op_namespace_prefix
from .activations import ACTIVATIONS, Gate
from .autograd import differentiable, eager
from .backend import backend_for
from .linear import autocast_dtype, grouped_linear
from .permute import combine, dispatch, routing_buffer
from .routing import Routing
from .weights import DenseWeights

# Arguments of the operators below, in the order of the functions behind them.
_INPUTS = (
    "Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, "
    "Tensor? gate_up_bias, Tensor? down_bias"
)
_SAVED = (
    "Tensor hidden_states, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, Tensor? down_bias, "
    "Tensor gate_up, Tensor buffer"
)
_OPTIONS = "str activation, bool gated, bool interleaved, float alpha, float limit, bool transposed"


def _experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    transposed: bool,
    save_for_backward: bool,
    *,
    zeroed: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y (T, H), gate_up and routing buffer; the last two None unless ``save_for_backward``.

    The buffer has entries that nobody writes or reads: an operator's outputs must be ``zeroed`` to be reproducible.
    """
    num_tokens, top_k = top_k_index.shape
    num_rows = num_tokens * top_k
    gate = Gate(activation, gated, interleaved, alpha, limit)
    up, down = DenseWeights.of(gate_up_proj, transposed), DenseWeights.of(down_proj, transposed)
    stages = backend_for(hidden_states, gate_up_proj.dtype)
    if not save_for_backward and stages.use_decode(num_tokens, top_k, down.stack):
        y = stages.decode(
            hidden_states, top_k_index, top_k_weights, up.stack, down.stack, gate_up_bias, down_bias, gate
        )
        return y, None, None
    num_experts = up.stack.shape[0]
    buffer = Routing.new_buffer(top_k_index, num_rows, num_experts, zeroed=zeroed)
    routing = Routing.from_buffer(buffer, num_rows, num_experts, top_k)
    stages.route(top_k_index, routing, gate_up_proj.dtype)
    h, gate_up = stages.grouped_up(hidden_states, up.stack, routing, num_rows, gate_up_bias, gate, save_for_backward)
    z = stages.grouped_gemm(h, down.stack, routing, num_rows, down_bias, gather=False, fill=0.0)
    del h
    y = stages.combine(z, routing, num_tokens, top_k_weights)
    return (y, gate_up, buffer) if save_for_backward else (y, None, None)


def _tensors(results: tuple[Tensor | None, ...], like: Tensor) -> tuple[Any, ...]:
    """``results`` with an empty tensor for every None, as the schema of an operator wants it."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


@torch.library.custom_op(
    add_op_namespace_prefix("experts"),
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}, bool save_for_backward) -> (Tensor, Tensor, Tensor)",
)
def experts_op(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _tensors(_experts(*args, zeroed=True), args[0])


@experts_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden_states, top_k_index, _, gate_up_proj, *_, transposed, save_for_backward = args
    y = hidden_states.new_empty(hidden_states.shape)
    if not save_for_backward:
        return y, y.new_empty(0), y.new_empty(0)
    num_rows = top_k_index.numel()
    columns = gate_up_proj.shape[2 if transposed else 1]
    size = Routing.buffer_size(num_rows, gate_up_proj.shape[0])
    return y, y.new_empty((num_rows, columns)), top_k_index.new_empty(size, dtype=torch.int32)


def _experts_backward(
    grad_y: Tensor,
    hidden_states: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    down_bias: Tensor | None,
    gate_up: Tensor,
    buffer: Tensor,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    transposed: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden_states, top_k_weights, gate_up_proj, down_proj, gate_up_bias, down_bias; None unless needed."""
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias = needs
    num_tokens, top_k = top_k_weights.shape
    num_rows = num_tokens * top_k
    gate = Gate(activation, gated, interleaved, alpha, limit)
    up, down = DenseWeights.of(gate_up_proj, transposed), DenseWeights.of(down_proj, transposed)
    stages = backend_for(hidden_states, gate_up_proj.dtype)
    routing = Routing.from_buffer(buffer, num_rows, up.stack.shape[0], top_k)
    grad_y = grad_y.contiguous()
    grad_x = grad_weights = grad_up = grad_down = grad_up_bias = grad_down_bias = None

    if need_down_bias:
        grad_down_bias = stages.grouped_row_sum(grad_y, routing, top_k_weights, gather=True)
    if need_x or need_weights or need_up or need_down or need_up_bias:
        grad_gate_up, weighted_h, grad_weights = stages.down_backward(
            grad_y, down.stack, down_bias, gate_up, routing, top_k_weights, gate, need_down
        )
        # The largest transient, the rows of grad_x, is gone before the weights' gradients take their memory.
        if need_x:
            grad_rows = stages.grouped_gemm(grad_gate_up, up.stack.mT, routing, num_rows, None, gather=False, fill=0.0)
            grad_x = stages.combine(grad_rows, routing, num_tokens, None)
            del grad_rows
        if need_down:
            grad_down = down.empty_grad()
            stages.grouped_gram(grad_y, weighted_h, routing, gather_a=True, gather_b=False, out=grad_down)
        del weighted_h
        if need_up_bias:
            grad_up_bias = stages.grouped_row_sum(grad_gate_up, routing, None, gather=False)
        if need_up:
            grad_up = up.empty_grad()
            stages.grouped_gram(grad_gate_up, hidden_states, routing, gather_a=False, gather_b=True, out=grad_up)
    if transposed:
        grad_up, grad_down = (None if grad is None else grad.mT for grad in (grad_up, grad_down))
    return grad_x, grad_weights if need_weights else None, grad_up, grad_down, grad_up_bias, grad_down_bias


@torch.library.custom_op(
    add_op_namespace_prefix("experts_backward"),
    mutates_args=(),
    schema=f"(Tensor grad_y, {_SAVED}, {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def experts_backward_op(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _tensors(_experts_backward(*args), args[0])


@experts_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_y, hidden_states, top_k_weights, gate_up_proj, down_proj, _, gate_up, *_, transposed, needs = args
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias = needs
    num_experts = gate_up_proj.shape[0]
    up, down = DenseWeights.of(gate_up_proj, transposed), DenseWeights.of(down_proj, transposed)
    grad_up, grad_down = up.empty_grad(), down.empty_grad()
    if transposed:
        grad_up, grad_down = grad_up.mT, grad_down.mT

    def empty(need: bool, grad: Tensor) -> Tensor:
        return grad if need else grad_y.new_empty(0)

    return (
        empty(need_x, hidden_states.new_empty(hidden_states.shape)),
        empty(need_weights, top_k_weights.new_empty(top_k_weights.shape)),
        empty(need_up, grad_up),
        empty(need_down, grad_down),
        empty(need_up_bias, gate_up.new_empty((num_experts, up.stack.shape[1]))),
        empty(need_down_bias, gate_up.new_empty((num_experts, down.stack.shape[1]))),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, _, top_k_weights, gate_up_proj, down_proj, _, down_bias, *options, _ = inputs
    _, gate_up, buffer = output
    ctx.save_for_backward(x, top_k_weights, gate_up_proj, down_proj, down_bias, gate_up, buffer)
    ctx.mark_non_differentiable(gate_up, buffer)
    ctx.set_materialize_grads(False)  # or autograd makes zeros the size of gate_up
    ctx.options = options


_backward_of_experts = eager(experts_backward_op, _experts_backward)


def _backward(ctx, grad_y: Tensor | None, *_):  # type: ignore[no-untyped-def]
    x, _, w, up, down, up_bias, down_bias, *rest = ctx.needs_input_grad
    needs = [x, w, up, down, up_bias, down_bias]
    if grad_y is None:
        return (None,) * (7 + len(rest))
    grads = _backward_of_experts(grad_y, *ctx.saved_tensors, *ctx.options, needs)
    gx, gw, gu, gd, gub, gdb = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (gx, None, gw, gu, gd, gub, gdb, *(None for _ in rest))


_differentiable_experts = differentiable(experts_op, _experts, _setup_context, _backward)


def _composed_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_fn: Callable[[Tensor], Tensor],
    transposed: bool,
) -> Tensor:
    """The experts around a gate function of the caller's own."""
    if transposed:
        gate_up_proj, down_proj = gate_up_proj.mT, down_proj.mT
    num_experts, top_k = gate_up_proj.shape[0], top_k_index.shape[1]
    intermediate = down_proj.shape[2]
    buffer = routing_buffer(top_k_index, num_experts, gate_up_proj.dtype)
    rows = dispatch(hidden_states, buffer, num_experts, top_k)
    gate_up = grouped_linear(rows, gate_up_proj, gate_up_bias, buffer, False, top_k, 0.0)
    h = gate_fn(gate_up)
    if h.shape != (rows.shape[0], intermediate):
        raise ValueError(
            f"activation must map {tuple(gate_up.shape)} to {(rows.shape[0], intermediate)}, it gave {tuple(h.shape)}"
        )
    z = grouped_linear(h.to(down_proj.dtype), down_proj, down_bias, buffer, False, top_k, 0.0)
    return combine(z, top_k_weights, buffer, num_experts, top_k)


def _check(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str | Callable[[Tensor], Tensor],
    gated: bool,
    transposed: bool,
) -> None:
    """Raises TypeError or ValueError unless the arguments of ``moe_experts`` fit each other; dtypes are checked later."""
    checks.tensor("hidden_states", hidden_states, ("T", "H"))
    num_tokens, hidden = hidden_states.shape
    checks.tensor("top_k_index", top_k_index, (num_tokens, "top_k"))
    checks.tensor("top_k_weights", top_k_weights, (num_tokens, top_k_index.shape[1]))
    columns = "2*I" if gated else "I"
    checks.tensor("gate_up_proj", gate_up_proj, ("E", hidden, columns) if transposed else ("E", columns, hidden))
    num_experts, size = gate_up_proj.shape[0], gate_up_proj.shape[2 if transposed else 1]
    if gated and size % 2:
        raise ValueError(f"gate_up_proj must have an even number of gate and up features, got {size}")
    intermediate = size // 2 if gated else size
    down_shape = (num_experts, intermediate, hidden) if transposed else (num_experts, hidden, intermediate)
    checks.tensor("down_proj", down_proj, down_shape)
    tensors = {"top_k_weights": top_k_weights, "gate_up_proj": gate_up_proj, "down_proj": down_proj}
    if gate_up_bias is not None:
        tensors["gate_up_bias"] = checks.tensor("gate_up_bias", gate_up_bias, (num_experts, size))
    if down_bias is not None:
        tensors["down_bias"] = checks.tensor("down_bias", down_bias, (num_experts, hidden))
    checks.dtype("top_k_index", top_k_index, checks.INDEX_DTYPES)
    checks.device("top_k_index", top_k_index, "hidden_states", hidden_states)
    for name, value in tensors.items():
        checks.dtype(name, value, checks.FLOAT_DTYPES)
        checks.device(name, value, "hidden_states", hidden_states)
    if top_k_index.shape[1] == 0:
        raise ValueError(
            "top_k_index must have at least one expert per token, got shape " + str(tuple(top_k_index.shape))
        )
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be a callable or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if activation == "swiglu_oai" and not gated:
            raise ValueError("activation 'swiglu_oai' needs gated experts, got gated=False")
    elif not callable(activation):
        raise TypeError(f"activation must be a name or a callable, got {type(activation).__name__}")
    checks.expert_ids(top_k_index, num_experts)


def moe_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
) -> Tensor:
    """The experts of a mixture-of-experts layer.

    ``y[t] = Σ_k top_k_weights[t, k] · down[e](gate(up[e](x[t])))`` with ``e = top_k_index[t, k]``; the arguments of
    Transformers' experts modules, computed as SwiGLU (arXiv:2002.05202) by default. Differentiable in everything that is
    not an index; only gradients asked for are computed. Deterministic: no atomics. Computes in the dtype of the weights (of
    autocast, where it is on), accumulating in fp32, and never waits for the GPU.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, top_k) any integer dtype. An id outside [0, E) means the expert is not held here: the slot
            contributes zero and gets zero gradients. ``MOE_FUSED_CHECK=1`` makes ids outside [0, E] an error.
        top_k_weights: (T, top_k), any floating dtype.
        gate_up_proj: (E, 2·I, H); (E, I, H) when not gated; the last two swapped when ``transposed``.
        down_proj: (E, H, I); (E, I, H) when ``transposed``.
        gate_up_bias: (E, 2·I or I), optional.
        down_bias: (E, H), optional.
        activation: one of ``silu``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu2``, ``swiglu_oai``, or a function from the up
            projection's output (S, 2·I or I), columns as in the weights, to (S, I), row by row.
        gated: the up projection makes gate and up features; otherwise h = activation(up).
        interleaved: gate and up features alternate instead of standing side by side.
        transposed: weights are stored (E, in, out).
        swiglu_alpha, swiglu_limit: of ``swiglu_oai``.

    Returns:
        (T, H) in the dtype of hidden_states.

    Raises:
        TypeError: not a tensor, or of a dtype that does not fit.
        ValueError: a shape, device or option that does not fit.
        RuntimeError: a GPU or Triton version that is not supported.
    """
    biases = (gate_up_bias, down_bias)
    _check(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, *biases, activation, gated, transposed)
    out_dtype = hidden_states.dtype
    dtype = autocast_dtype(hidden_states.device)
    if dtype is None:
        dtype = gate_up_proj.dtype
        checks.dtype("hidden_states", hidden_states, (dtype,), " like gate_up_proj")
        checks.dtype("down_proj", down_proj, (dtype,), " like gate_up_proj")
        for name, bias in zip(("gate_up_bias", "down_bias"), biases, strict=True):
            if bias is not None:
                checks.dtype(name, bias, (dtype,), " like gate_up_proj")
    else:
        checks.dtype("hidden_states", hidden_states, checks.FLOAT_DTYPES)
        hidden_states, gate_up_proj, down_proj = (t.to(dtype) for t in (hidden_states, gate_up_proj, down_proj))
        biases = tuple(None if bias is None else bias.to(dtype) for bias in biases)  # type: ignore[assignment]
    checks.number("swiglu_alpha", swiglu_alpha)
    checks.number("swiglu_limit", swiglu_limit)
    tensors = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, *biases)
    if callable(activation):
        y = _composed_experts(*tensors, activation, transposed)
    else:
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        options = (activation, gated, interleaved, swiglu_alpha, swiglu_limit, transposed, save)
        y, _, _ = _differentiable_experts(*tensors, *options)
    return y if y.dtype == out_dtype else y.to(out_dtype)
