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

from collections.abc import Callable, Sequence
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
from .quantization import Packed4bitWeights
from .routing import Routing
from .weights import Stack, any_packed, check, empty_grad, operands, stack_of

# Arguments of the operators below, in the order of the functions behind them.
_INPUTS = (
    "Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, "
    "Tensor? gate_up_bias, Tensor? down_bias, Tensor[] up_scales, Tensor[] down_scales"
)
_SAVED = (
    "Tensor hidden_states, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, Tensor? down_bias, "
    "Tensor gate_up, Tensor buffer, Tensor[] up_scales, Tensor[] down_scales"
)
_OPTIONS = (
    "str activation, bool gated, bool interleaved, float alpha, float limit, bool transposed, "
    "str up_format, str down_format"
)


def _experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_scales: Sequence[Tensor],
    down_scales: Sequence[Tensor],
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    transposed: bool,
    up_format: str,
    down_format: str,
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
    up = stack_of(gate_up_proj, up_scales, up_format, transposed)
    down = stack_of(down_proj, down_scales, down_format, transposed)
    dtype = hidden_states.dtype
    stages = backend_for(hidden_states, dtype)
    if not save_for_backward and stages.use_decode(num_tokens, top_k, up, down):
        y = stages.decode(hidden_states, top_k_index, top_k_weights, up, down, gate_up_bias, down_bias, gate)
        return y, None, None
    num_experts = up.shape[0]
    buffer = Routing.new_buffer(top_k_index, num_rows, num_experts, zeroed=zeroed)
    routing = Routing.from_buffer(buffer, num_rows, num_experts, top_k, packed=any_packed(up, down))
    stages.route(top_k_index, routing, dtype)
    h, gate_up = stages.grouped_up(hidden_states, up, routing, num_rows, gate_up_bias, gate, save_for_backward)
    z = stages.grouped_gemm(h, down, routing, num_rows, down_bias, gather=False, fill=0.0)
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
    hidden_states, top_k_index, _, gate_up_proj, _, _, _, up_scales, *_ = args
    transposed, up_format, _, save_for_backward = args[-4:]
    y = hidden_states.new_empty(hidden_states.shape)
    if not save_for_backward:
        return y, y.new_empty(0), y.new_empty(0)
    num_rows = top_k_index.numel()
    num_experts, columns, _ = stack_of(gate_up_proj, up_scales, up_format, transposed).shape
    size = Routing.buffer_size(num_rows, num_experts)
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
    up_scales: Sequence[Tensor],
    down_scales: Sequence[Tensor],
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    transposed: bool,
    up_format: str,
    down_format: str,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden_states, top_k_weights, gate_up_proj, down_proj, gate_up_bias, down_bias; None unless needed."""
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias = needs
    num_tokens, top_k = top_k_weights.shape
    num_rows = num_tokens * top_k
    gate = Gate(activation, gated, interleaved, alpha, limit)
    up = stack_of(gate_up_proj, up_scales, up_format, transposed)
    down = stack_of(down_proj, down_scales, down_format, transposed)
    stages = backend_for(hidden_states, hidden_states.dtype)
    routing = Routing.from_buffer(buffer, num_rows, up.shape[0], top_k, packed=any_packed(up, down))
    grad_y = grad_y.contiguous()
    grad_x = grad_weights = grad_up = grad_down = grad_up_bias = grad_down_bias = None

    if need_down_bias:
        grad_down_bias = stages.grouped_row_sum(grad_y, routing, top_k_weights, gather=True)
    if need_x or need_weights or need_up or need_down or need_up_bias:
        grad_gate_up, weighted_h, grad_weights = stages.down_backward(
            grad_y, down, down_bias, gate_up, routing, top_k_weights, gate, need_down
        )
        # The largest transient, the rows of grad_x, is gone before the weights' gradients take their memory.
        if need_x:
            grad_rows = stages.grouped_gemm(grad_gate_up, up.mT, routing, num_rows, None, gather=False, fill=0.0)
            grad_x = stages.combine(grad_rows, routing, num_tokens, None)
            del grad_rows
        # Then the larger of the two that remain, before the last weight's gradient is there.
        if need_up_bias:
            grad_up_bias = stages.grouped_row_sum(grad_gate_up, routing, None, gather=False)
        if need_up:
            grad_up = empty_grad(up)
            stages.grouped_gram(grad_gate_up, hidden_states, routing, gather_a=False, gather_b=True, out=grad_up)
        del grad_gate_up
        if need_down:
            grad_down = empty_grad(down)
            stages.grouped_gram(grad_y, weighted_h, routing, gather_a=True, gather_b=False, out=grad_down)
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
    _, hidden_states, top_k_weights, gate_up_proj, down_proj, _, gate_up, _, up_scales, down_scales, *_ = args
    transposed, up_format, down_format, needs = args[-4:]
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias = needs
    up = stack_of(gate_up_proj, up_scales, up_format, transposed)
    down = stack_of(down_proj, down_scales, down_format, transposed)

    def like(need: bool, value: Tensor) -> Tensor:
        return value.new_empty(value.shape if need else 0)

    def weight(need: bool, stack: Stack) -> Tensor:
        if not need:
            return gate_up.new_empty(0)
        grad = empty_grad(stack)
        return grad.mT if transposed else grad

    def bias(need: bool, stack: Stack) -> Tensor:
        return gate_up.new_empty(stack.shape[:2] if need else 0)

    return (
        like(need_x, hidden_states),
        like(need_weights, top_k_weights),
        weight(need_up, up),
        weight(need_down, down),
        bias(need_up_bias, up),
        bias(need_down_bias, down),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, _, top_k_weights, gate_up_proj, down_proj, _, down_bias, up_scales, down_scales, *options, _ = inputs
    _, gate_up, buffer = output
    weights = (gate_up_proj, down_proj, down_bias)
    ctx.save_for_backward(x, top_k_weights, *weights, gate_up, buffer, *up_scales, *down_scales)
    ctx.num_up_scales = len(up_scales)
    ctx.mark_non_differentiable(gate_up, buffer)
    ctx.set_materialize_grads(False)  # or autograd makes zeros the size of gate_up
    ctx.options = options


_backward_of_experts = eager(experts_backward_op, _experts_backward)


def _backward(ctx, grad_y: Tensor | None, *_):  # type: ignore[no-untyped-def]
    x, _, w, up, down, up_bias, down_bias, *_ = ctx.needs_input_grad
    needs = [x, w, up, down, up_bias, down_bias]
    tensors = ctx.saved_tensors  # once: checkpointing hands each of them out once
    saved, scales = tensors[:7], list(tensors[7:])
    scales_of = (scales[: ctx.num_up_scales], scales[ctx.num_up_scales :])
    no_grads = (*([None] * len(own) for own in scales_of), *(None for _ in ctx.options), None)
    if grad_y is None:
        return (*(None for _ in range(7)), *no_grads)
    grads = _backward_of_experts(grad_y, *saved, *scales_of, *ctx.options, needs)
    gx, gw, gu, gd, gub, gdb = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (gx, None, gw, gu, gd, gub, gdb, *no_grads)


_differentiable_experts = differentiable(experts_op, _experts, _setup_context, _backward)


def _composed_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor | Packed4bitWeights,
    down_proj: Tensor | Packed4bitWeights,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_fn: Callable[[Tensor], Tensor],
    transposed: bool,
) -> Tensor:
    """The experts around a gate function of the caller's own."""
    num_experts, top_k = gate_up_proj.shape[0], top_k_index.shape[1]
    intermediate = down_proj.shape[1 if transposed else 2]
    packed = any_packed(gate_up_proj, down_proj)
    buffer = routing_buffer(top_k_index, num_experts, gate_up_proj.dtype, packed)
    rows = dispatch(hidden_states, buffer, num_experts, top_k)
    options = (transposed, False, packed, top_k, 0.0)
    up, up_scales, up_format = operands(gate_up_proj)
    gate_up = grouped_linear(rows, up, gate_up_bias, buffer, up_scales, up_format, *options)
    h = gate_fn(gate_up)
    if h.shape != (rows.shape[0], intermediate):
        raise ValueError(
            f"activation must map {tuple(gate_up.shape)} to {(rows.shape[0], intermediate)}, it gave {tuple(h.shape)}"
        )
    down, down_scales, down_format = operands(down_proj)
    z = grouped_linear(h.to(down_proj.dtype), down, down_bias, buffer, down_scales, down_format, *options)
    return combine(z, top_k_weights, buffer, num_experts, top_k)


def _check(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor | Packed4bitWeights,
    down_proj: Tensor | Packed4bitWeights,
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
    check("gate_up_proj", gate_up_proj, ("E", hidden, columns) if transposed else ("E", columns, hidden))
    num_experts, size = gate_up_proj.shape[0], gate_up_proj.shape[2 if transposed else 1]
    if gated and size % 2:
        raise ValueError(f"gate_up_proj must have an even number of gate and up features, got {size}")
    intermediate = size // 2 if gated else size
    down_shape = (num_experts, intermediate, hidden) if transposed else (num_experts, hidden, intermediate)
    check("down_proj", down_proj, down_shape)
    tensors: dict[str, Any] = {"top_k_weights": top_k_weights, "gate_up_proj": gate_up_proj, "down_proj": down_proj}
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
    gate_up_proj: Tensor | Packed4bitWeights,
    down_proj: Tensor | Packed4bitWeights,
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
    autocast, where it is on), accumulating in fp32, and never waits for the GPU. Packed weights are frozen, and are decoded
    inside the products or into a workspace of some 256 MiB, whichever is faster.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, top_k) any integer dtype. An id outside [0, E) means the expert is not held here: the slot
            contributes zero and gets zero gradients. ``MOE_FUSED_CHECK=1`` makes ids outside [0, E] an error.
        top_k_weights: (T, top_k), any floating dtype.
        gate_up_proj: (E, 2·I, H); (E, I, H) when not gated; the last two swapped when ``transposed``. Dense or packed, as
            is down_proj.
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
        hidden_states = hidden_states.to(dtype)
        gate_up_proj, down_proj = gate_up_proj.to(dtype=dtype), down_proj.to(dtype=dtype)
        biases = tuple(None if bias is None else bias.to(dtype) for bias in biases)  # type: ignore[assignment]
    checks.number("swiglu_alpha", swiglu_alpha)
    checks.number("swiglu_limit", swiglu_limit)
    if callable(activation):
        y = _composed_experts(
            hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, *biases, activation, transposed
        )
    else:
        (up, up_scales, up_format), (down, down_scales, down_format) = operands(gate_up_proj), operands(down_proj)
        tensors = (hidden_states, top_k_index, top_k_weights, up, down, *biases)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        options = (activation, gated, interleaved, swiglu_alpha, swiglu_limit, transposed, up_format, down_format, save)
        y, _, _ = _differentiable_experts(*tensors, up_scales, down_scales, *options)
    return y if y.dtype == out_dtype else y.to(out_dtype)
