"""``moe_experts``: the whole expert MLP, its autograd and its memory plan.

The fused path, for an activation the kernels know:

    x (T,H) ─ up: gather, grouped GEMM, gate ─► h (S,I) ─ down: grouped GEMM ─► z (S,H) ─ combine ─► y (T,H)

Saved for backward: x, the routing buffer, the routing weights, gate_up (S, 2·I), an adapter's thin products (S, R) and the
weights by reference. h and z are transient: backward recomputes h from gate_up next to the gate's derivative, and the
gradient of a routing weight is rowsum(grad_h · h), so the down projection's output is never needed again. With ``recompute``
gate_up is not saved either: backward makes it again, by the up projection alone, and overwrites it with its gradient.
All of it is there before the down projection, so a layer that ``torch.utils.checkpoint`` computes again ends there.

With few slots and no gradient to come there is nothing to sort: each slot is a matrix-vector product (``decode``).

A gate function of the caller's own runs between two grouped linear layers, each stage with its own autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import checks, lora
from ._ops import add_op_namespace_prefix
from .activations import ACTIVATIONS, Gate, apply_gate
from .autograd import differentiable, eager
from .backend import backend_for
from .linear import adapted_linear, autocast_dtype
from .lora import Adapter, Loras, LoraWeights
from .permute import combine, dispatch, routing_buffer
from .quantization import Packed4bitWeights
from .routing import Routing
from .weights import Stack, any_packed, check, empty_grad, operands, stack_of

# Arguments of the operators below, in the order of the functions behind them.
_INPUTS = (
    "Tensor hidden_states, Tensor top_k_index, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, "
    "Tensor? gate_up_bias, Tensor? down_bias, Tensor? up_a, Tensor? up_b, Tensor? down_a, Tensor? down_b, "
    "Tensor[] up_scales, Tensor[] down_scales"
)
_SAVED = (
    "Tensor hidden_states, Tensor top_k_weights, Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, "
    "Tensor? down_bias, Tensor? up_a, Tensor? up_b, Tensor? down_a, Tensor? down_b, Tensor gate_up, Tensor buffer, "
    "Tensor up_left, Tensor down_left, Tensor[] up_scales, Tensor[] down_scales"
)
_OPTIONS = (
    "str activation, bool gated, bool interleaved, float alpha, float limit, bool transposed, "
    "str up_format, str down_format, float up_scaling, float down_scaling, bool recompute"
)


def _experts_in_two(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
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
    up_scaling: float,
    down_scaling: float,
    recompute: bool,
    save_for_backward: bool,
    *,
    zeroed: bool = False,
) -> tuple[tuple[Tensor | None, ...], Callable[[], Tensor]]:
    """The forward up to h, and a function that makes y (T, H) of it, once: what backward needs is there before.

    The first are gate_up, routing buffer and the adapters' left products, None where there is none or nothing to save. The
    buffer has entries that nobody writes or reads: an operator's outputs must be ``zeroed`` to be reproducible.
    """
    num_tokens, top_k = top_k_index.shape
    num_rows = num_tokens * top_k
    gate = Gate(activation, gated, interleaved, alpha, limit)
    up = stack_of(gate_up_proj, up_scales, up_format, transposed)
    down = stack_of(down_proj, down_scales, down_format, transposed)
    dtype = hidden_states.dtype
    stages = backend_for(hidden_states, dtype)
    up_lora = Adapter.of(up_a, up_b, up_scaling, dtype, stages)
    down_lora = Adapter.of(down_a, down_b, down_scaling, dtype, stages)
    adapted = up_lora is not None or down_lora is not None
    if not save_for_backward and not adapted and stages.use_decode(num_tokens, top_k, up, down):
        inputs = (hidden_states, top_k_index, top_k_weights)
        return (None,) * 4, lambda: stages.decode(*inputs, up, down, gate_up_bias, down_bias, gate)
    num_experts = up.shape[0]
    buffer = Routing.new_buffer(top_k_index, num_rows, num_experts, zeroed=zeroed)
    routing = Routing.from_buffer(buffer, num_rows, num_experts, top_k, packed=any_packed(up, down))
    stages.route(top_k_index, routing, dtype)
    up_left = down_left = up_extension = down_extension = None
    if up_lora is not None:
        up_left = up_lora.left(hidden_states, routing, num_rows, gather=True)
        up_extension = up_lora.extension(up_left)
    save_gate_up = save_for_backward and not recompute
    h, gate_up = stages.grouped_up(hidden_states, up, routing, num_rows, gate_up_bias, gate, save_gate_up, up_extension)
    if down_lora is not None:
        down_left = down_lora.left(h, routing, num_rows, gather=False)
        down_extension = down_lora.extension(down_left)

    def rest() -> Tensor:
        nonlocal h
        z = stages.grouped_gemm(h, down, routing, num_rows, down_bias, gather=False, fill=0.0, extension=down_extension)
        del h
        return stages.combine(z, routing, num_tokens, top_k_weights)

    return (gate_up, buffer, up_left, down_left) if save_for_backward else (None,) * 4, rest


def _experts(*args: Any, zeroed: bool = False) -> tuple[Tensor | None, ...]:
    """y (T, H), and what backward needs beside the arguments."""
    saved, rest = _experts_in_two(*args, zeroed=zeroed)
    return rest(), *saved


def _tensors(results: tuple[Tensor | None, ...], like: Tensor) -> tuple[Any, ...]:
    """``results`` with an empty tensor for every None, as the schema of an operator wants it."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


@torch.library.custom_op(
    add_op_namespace_prefix("experts"),
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}, bool save_for_backward) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def experts_op(*args: Any) -> tuple[Tensor, ...]:
    return _tensors(_experts(*args, zeroed=True), args[0])


@experts_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    hidden_states, top_k_index, _, gate_up_proj, _, _, _, up_a, _, down_a, _, up_scales, *_ = args
    transposed, up_format, _, _, _, recompute, save_for_backward = args[-7:]
    y = hidden_states.new_empty(hidden_states.shape)
    if not save_for_backward:
        return y, *(y.new_empty(0) for _ in range(4))
    num_rows = top_k_index.numel()
    num_experts, columns, _ = stack_of(gate_up_proj, up_scales, up_format, transposed).shape
    size = Routing.buffer_size(num_rows, num_experts)

    def left(a: Tensor | None) -> Tensor:
        return y.new_empty(0 if a is None else (num_rows, a.shape[1]))

    gate_up = y.new_empty(0 if recompute else (num_rows, columns))
    return y, gate_up, top_k_index.new_empty(size, dtype=torch.int32), left(up_a), left(down_a)


def _experts_backward(
    grad_y: Tensor,
    hidden_states: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    gate_up: Tensor,
    buffer: Tensor,
    up_left: Tensor,
    down_left: Tensor,
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
    up_scaling: float,
    down_scaling: float,
    recompute: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden_states, top_k_weights, the weights, the biases and the adapters' factors; None unless needed."""
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias, *need_factors = needs
    need_up_a, need_up_b, need_down_a, need_down_b = need_factors
    num_tokens, top_k = top_k_weights.shape
    num_rows = num_tokens * top_k
    gate = Gate(activation, gated, interleaved, alpha, limit)
    up = stack_of(gate_up_proj, up_scales, up_format, transposed)
    down = stack_of(down_proj, down_scales, down_format, transposed)
    stages = backend_for(hidden_states, hidden_states.dtype)
    routing = Routing.from_buffer(buffer, num_rows, up.shape[0], top_k, packed=any_packed(up, down))
    grad_y = grad_y.contiguous()
    grad_x = grad_weights = grad_up = grad_down = grad_up_bias = grad_down_bias = None
    grad_up_a = grad_up_b = grad_down_a = grad_down_b = up_extension = down_extension = None
    up_lora = Adapter.of(up_a, up_b, up_scaling, hidden_states.dtype, stages)
    down_lora = Adapter.of(down_a, down_b, down_scaling, hidden_states.dtype, stages)

    if need_down_bias:
        grad_down_bias = stages.grouped_row_sum(grad_y, routing, top_k_weights, gather=True)
    if need_down_b and down_lora is not None:
        grad_down_b = down_lora.grad_b(grad_y, down_left, routing, gather=True, weights=top_k_weights)
    if any((need_x, need_weights, need_up, need_down, need_up_bias, need_up_a, need_up_b, need_down_a)):
        if recompute:
            extension = None if up_lora is None else up_lora.extension(up_left)
            _, gate_up = stages.grouped_up(
                hidden_states, up, routing, num_rows, gate_up_bias, gate, True, extension, save_h=False
            )
        if down_lora is not None:
            grad_left = down_lora.grad_left(grad_y, routing, num_rows, gather=True)
            down_extension = down_lora.grad_extension(grad_left)
        grad_gate_up, weighted_h, grad_weights = stages.down_backward(
            grad_y, down, down_bias, gate_up, routing, top_k_weights, gate, need_down or need_down_a, down_extension,
            in_place=recompute,
        )  # fmt: skip
        if need_down_a and down_lora is not None:
            grad_down_a = down_lora.grad_a(grad_left, weighted_h, routing, gather=False)
        if not need_down:
            weighted_h = None
        if up_lora is not None:
            if need_up_b:
                grad_up_b = up_lora.grad_b(grad_gate_up, up_left, routing, gather=False)
            if need_x or need_up_a:
                grad_left = up_lora.grad_left(grad_gate_up, routing, num_rows, gather=False)
                up_extension = up_lora.grad_extension(grad_left)
            if need_up_a:
                grad_up_a = up_lora.grad_a(grad_left, hidden_states, routing, gather=True)
        # The largest transient, the rows of grad_x, is gone before the weights' gradients take their memory.
        if need_x:
            grad_rows = stages.grouped_gemm(
                grad_gate_up, up.mT, routing, num_rows, None, gather=False, fill=0.0, extension=up_extension
            )
            grad_x = stages.combine(grad_rows, routing, num_tokens, None)
            del grad_rows
        # Then the larger of the two that remain, before the last weight's gradient is there.
        if need_up_bias:
            grad_up_bias = stages.grouped_row_sum(grad_gate_up, routing, None, gather=False)
        if need_up:
            grad_up = empty_grad(up)
            stages.grouped_gram(grad_gate_up, hidden_states, routing, gather_a=False, gather_b=True, out=grad_up)
        del gate_up, grad_gate_up  # one tensor after recomputation
        if need_down:
            grad_down = empty_grad(down)
            stages.grouped_gram(grad_y, weighted_h, routing, gather_a=True, gather_b=False, out=grad_down)
    if transposed:
        grad_up, grad_down = (None if grad is None else grad.mT for grad in (grad_up, grad_down))
    grads = (grad_x, grad_weights if need_weights else None, grad_up, grad_down, grad_up_bias, grad_down_bias)
    return *grads, grad_up_a, grad_up_b, grad_down_a, grad_down_b


@torch.library.custom_op(
    add_op_namespace_prefix("experts_backward"),
    mutates_args=(),
    schema=f"(Tensor grad_y, {_SAVED}, {_OPTIONS}, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def experts_backward_op(*args: Any) -> tuple[Tensor, ...]:
    return _tensors(_experts_backward(*args), args[0])


@experts_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    _, hidden_states, top_k_weights, gate_up_proj, down_proj, _, _, *factors = args[:11]
    up_scales, down_scales = args[15:17]
    transposed, up_format, down_format, _, _, _, needs = args[-7:]
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias, *need_factors = needs
    up = stack_of(gate_up_proj, up_scales, up_format, transposed)
    down = stack_of(down_proj, down_scales, down_format, transposed)

    def like(need: bool, value: Tensor | None) -> Tensor:
        if not need or value is None:
            return hidden_states.new_empty(0)
        return torch.empty_like(value, memory_format=torch.contiguous_format)

    def weight(need: bool, stack: Stack) -> Tensor:
        if not need:
            return hidden_states.new_empty(0)
        grad = empty_grad(stack)
        return grad.mT if transposed else grad

    def bias(need: bool, stack: Stack) -> Tensor:
        return hidden_states.new_empty(stack.shape[:2] if need else 0)

    return (
        like(need_x, hidden_states),
        like(need_weights, top_k_weights),
        weight(need_up, up),
        weight(need_down, down),
        bias(need_up_bias, up),
        bias(need_down_bias, down),
        *(like(need, factor) for need, factor in zip(need_factors, factors, strict=True)),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, _, top_k_weights, up, down, up_bias, down_bias, *factors, up_scales, down_scales = inputs[:13]
    *options, recompute, _ = inputs[13:]
    _, *saved = output
    weights = (up, down, up_bias if recompute else None, down_bias)
    ctx.save_for_backward(x, top_k_weights, *weights, *factors, *saved, *up_scales, *down_scales)
    ctx.num_up_scales = len(up_scales)
    ctx.mark_non_differentiable(*(value for value in saved if value is not None))
    ctx.set_materialize_grads(False)  # or autograd makes zeros the size of gate_up
    ctx.options = (*options, recompute)


_backward_of_experts = eager(experts_backward_op, _experts_backward)


def _backward(ctx, grad_y: Tensor | None, *_):  # type: ignore[no-untyped-def]
    x, _, *others = ctx.needs_input_grad[:11]
    needs = [x, *others]
    tensors = ctx.saved_tensors  # once: checkpointing hands each of them out once
    scales = list(tensors[14:])
    # What there was nothing of to save is empty, as an operator's output is.
    saved = [*tensors[:10], *(tensors[0].new_empty(0) if own is None else own for own in tensors[10:14])]
    scales_of = (scales[: ctx.num_up_scales], scales[ctx.num_up_scales :])
    no_grads = (*([None] * len(own) for own in scales_of), *(None for _ in ctx.options), None)
    if grad_y is None:
        return (*(None for _ in range(11)), *no_grads)
    grads = _backward_of_experts(grad_y, *saved, *scales_of, *ctx.options, needs)
    gx, *others = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (gx, None, *others, *no_grads)


_differentiable_experts = differentiable(experts_op, _experts, _setup_context, _backward, _experts_in_two)


def _composed_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor | Packed4bitWeights,
    down_proj: Tensor | Packed4bitWeights,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_loras: list[LoraWeights],
    down_loras: list[LoraWeights],
    gate_fn: Callable[[Tensor], Tensor],
    transposed: bool,
) -> Tensor:
    """The experts as stages with autograd of their own: around a caller's gate function, or an adapter's dropout."""
    num_experts, top_k = gate_up_proj.shape[0], top_k_index.shape[1]
    intermediate = down_proj.shape[1 if transposed else 2]
    packed = any_packed(gate_up_proj, down_proj)
    buffer = routing_buffer(top_k_index, num_experts, gate_up_proj.dtype, packed)
    rows = dispatch(hidden_states, buffer, num_experts, top_k)
    options = (transposed, False, packed, top_k, 0.0)
    gate_up = adapted_linear(rows, gate_up_proj, gate_up_bias, buffer, up_loras, options)
    h = gate_fn(gate_up)
    if h.shape != (rows.shape[0], intermediate):
        raise ValueError(
            f"activation must map {tuple(gate_up.shape)} to {(rows.shape[0], intermediate)}, it gave {tuple(h.shape)}"
        )
    z = adapted_linear(h.to(down_proj.dtype), down_proj, down_bias, buffer, down_loras, options)
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
    gate_up_lora: Loras = None,
    down_lora: Loras = None,
    recompute: bool = False,
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
        gate_up_lora, down_lora: an adapter of either projection, (E, out, in) whether or not ``transposed``, or several that
            all count. No product with weights merged, and no gradient of weights, is ever formed for them.
        recompute: backward computes the up projection again instead of keeping its output, (T·top_k, 2·I); all of the
            experts where a caller's activation or an adapter's dropout runs between them.

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
    like = ("hidden_states", hidden_states)
    halves = gated and not interleaved
    up_loras = lora.check("gate_up_lora", gate_up_lora, gate_up_proj, *like, transposed=transposed, halves=halves)
    down_loras = lora.check("down_lora", down_lora, down_proj, *like, transposed=transposed)
    if not callable(activation) and any(own.dropout for own in up_loras + down_loras):
        gate = Gate(activation, gated, interleaved, swiglu_alpha, swiglu_limit)
        activation = functools.partial(apply_gate, gate=gate)
    inputs = (hidden_states, top_k_index, top_k_weights)
    if callable(activation):
        composed: Callable[..., Tensor] = _composed_experts
        if recompute and torch.is_grad_enabled():
            composed = functools.partial(checkpoint, _composed_experts, use_reentrant=False)
        loras = (up_loras, down_loras)
        y = composed(*inputs, gate_up_proj, down_proj, *biases, *loras, activation, transposed)
    else:
        (up, up_scales, up_format), (down, down_scales, down_format) = operands(gate_up_proj), operands(down_proj)
        up_a, up_b, up_scaling = lora.fused(up_loras)
        down_a, down_b, down_scaling = lora.fused(down_loras)
        tensors: tuple[Tensor | None, ...] = (*inputs, up, down, *biases, up_a, up_b, down_a, down_b)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        options = (activation, gated, interleaved, swiglu_alpha, swiglu_limit, transposed, up_format, down_format)
        scaling = (up_scaling, down_scaling)
        y, *_ = _differentiable_experts(*tensors, up_scales, down_scales, *options, *scaling, recompute, save)
    return y if y.dtype == out_dtype else y.to(out_dtype)
