"""``moe_fused_linear``: one grouped linear layer over rows sorted by expert.

Forward: one grouped GEMM. Backward: the same GEMM against the transposed weights for the input, a grouped Gram product for
the weights (each tile written once, no atomics), a row sum for the bias; each only if its gradient was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from ._ops import add_op_namespace_prefix
from .autograd import differentiable, eager
from .backend import backend_for
from .lora import Adapter, Loras, LoraWeights, fused
from .lora import check as check_loras
from .permute import route_sorted
from .quantization import Packed4bitWeights
from .routing import Routing
from .weights import any_packed, check, empty_grad, operands, stack_of

# Arguments of the operators below, in the order of the functions behind them.
_OPTIONS = (
    "Tensor[] scales, str format, bool transposed, bool sorted_rows, bool packed, int top_k, float fill, float scaling"
)


def _grouped_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    routing: Tensor,
    scales: Sequence[Tensor],
    format: str,
    transposed: bool,
    sorted_rows: bool,
    packed: bool,
    top_k: int,
    fill: float,
    scaling: float,
) -> Tensor:
    """(S, out) = input (S, in) × weight (E, out, in)ᵀ + bias (E, out), adapted; rows of no expert hold ``fill``."""
    num_rows = input.shape[0]
    stages = backend_for(input, input.dtype)
    stack = stack_of(weight, scales, format, transposed)
    view = Routing.from_buffer(routing, num_rows, stack.shape[0], top_k, sorted_rows, packed)
    adapter = Adapter.of(lora_a, lora_b, scaling, input.dtype, stages)
    extension = None
    if adapter is not None:
        extension = adapter.extension(adapter.left(input, view, num_rows, gather=False))
    return stages.grouped_gemm(input, stack, view, num_rows, bias, gather=False, fill=fill, extension=extension)


@torch.library.custom_op(
    add_op_namespace_prefix("grouped_linear"),
    mutates_args=(),
    schema="(Tensor input, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, Tensor routing, "
    f"{_OPTIONS}) -> Tensor",
)
def grouped_linear_op(*args: Any) -> Tensor:
    return _grouped_linear(*args)


@grouped_linear_op.register_fake
def _(*args: Any) -> Tensor:
    input, weight, _, _, _, _, scales, format, transposed, *_ = args
    return input.new_empty((input.shape[0], stack_of(weight, scales, format, transposed).shape[1]))


def _grouped_linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    routing: Tensor,
    scales: Sequence[Tensor],
    format: str,
    transposed: bool,
    sorted_rows: bool,
    packed: bool,
    top_k: int,
    fill: float,
    scaling: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias and the adapter's factors; None unless needed."""
    need_input, need_weight, need_bias, need_a, need_b = needs
    num_rows = grad_output.shape[0]
    stages = backend_for(grad_output, grad_output.dtype)
    stack = stack_of(weight, scales, format, transposed)
    view = Routing.from_buffer(routing, num_rows, stack.shape[0], top_k, sorted_rows, packed)
    grad_output = grad_output.contiguous()
    grad_input = grad_weight = grad_bias = grad_a = grad_b = extension = None
    adapter = Adapter.of(lora_a, lora_b, scaling, grad_output.dtype, stages)
    if adapter is not None:
        if need_input or need_a:
            grad_left = adapter.grad_left(grad_output, view, num_rows, gather=False)
            extension = adapter.grad_extension(grad_left)
        if need_a and input is not None:
            grad_a = adapter.grad_a(grad_left, input, view, gather=False)
        if need_b and input is not None:
            # Its left product again, a thin GEMM, rather than kept.
            left = adapter.left(input, view, num_rows, gather=False)
            grad_b = adapter.grad_b(grad_output, left, view, gather=False)
    if need_input:
        grad_input = stages.grouped_gemm(
            grad_output, stack.mT, view, num_rows, None, gather=False, fill=fill, extension=extension
        )
    if need_weight and input is not None:
        grad_weight = empty_grad(stack)
        stages.grouped_gram(grad_output, input, view, gather_a=False, gather_b=False, out=grad_weight)
        grad_weight = grad_weight.mT if transposed else grad_weight
    if need_bias:
        grad_bias = stages.grouped_row_sum(grad_output, view, None, gather=False)
    return grad_input, grad_weight, grad_bias, grad_a, grad_b


@torch.library.custom_op(
    add_op_namespace_prefix("grouped_linear_backward"),
    mutates_args=(),
    schema="(Tensor grad_output, Tensor? input, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor routing, "
    f"{_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def grouped_linear_backward_op(*args: Any) -> tuple[Tensor, ...]:
    grad_output = args[0]
    return tuple(grad_output.new_empty(0) if grad is None else grad for grad in _grouped_linear_backward(*args))


@grouped_linear_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    grad_output, _, weight, lora_a, lora_b, _, scales, format, transposed, *_, needs = args
    need_input, need_weight, need_bias, need_a, need_b = needs
    stack = stack_of(weight, scales, format, transposed)
    num_experts, out_features, in_features = stack.shape
    grad_weight = empty_grad(stack) if need_weight else grad_output.new_empty(0)
    return (
        grad_output.new_empty((grad_output.shape[0], in_features) if need_input else 0),
        grad_weight.mT if need_weight and transposed else grad_weight,
        grad_output.new_empty((num_experts, out_features) if need_bias else 0),
        lora_a.new_empty(lora_a.shape) if need_a else grad_output.new_empty(0),
        lora_b.new_empty(lora_b.shape) if need_b else grad_output.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, weight, _, lora_a, lora_b, routing, scales, *options = inputs
    # A frozen weight's layer keeps no activations.
    _, need_weight, _, need_a, need_b = ctx.needs_input_grad[:5]
    kept = input if need_weight or need_a or need_b else None
    ctx.save_for_backward(kept, weight, lora_a, lora_b, routing, *scales)
    ctx.options = options


_backward_of_linear = eager(grouped_linear_backward_op, _grouped_linear_backward)


def _backward(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
    needs = list(ctx.needs_input_grad[:5])
    tensors = ctx.saved_tensors  # once: checkpointing hands each of them out once
    *saved, routing = tensors[:5]
    scales = list(tensors[5:])
    grads = _backward_of_linear(grad_output, *saved, routing, scales, *ctx.options, needs)
    grads = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*grads, None, [None] * len(scales), *(None for _ in ctx.options))


grouped_linear = differentiable(grouped_linear_op, _grouped_linear, _setup_context, _backward)


def adapted_linear(
    input: Tensor,
    weight: Tensor | Packed4bitWeights,
    bias: Tensor | None,
    routing: Tensor,
    loras: list[LoraWeights],
    options: tuple[bool, bool, bool, int, float],
) -> Tensor:
    """``grouped_linear`` with adapters: fused, but for those with dropout, whose input is not the layer's, or halves apart.

    Args:
        options: transposed, sorted_rows, packed, top_k and fill of ``grouped_linear``.
    """
    apart = [own for own in loras if own.dropout or own.separate]
    a, b, scaling = fused([own for own in loras if not (own.dropout or own.separate)])
    values, scales, format = operands(weight)
    y: Tensor = grouped_linear(input, values, bias, a, b, routing, scales, format, *options, scaling)
    thin: tuple[Any, ...] = (routing, [], "", False, *options[1:])
    for own in apart:
        dropped = torch.nn.functional.dropout(input, own.dropout)
        left = own.scaling * grouped_linear(dropped, own.a.to(input.dtype), None, None, None, *thin, 1.0)
        lefts = left.chunk(2, dim=1) if own.separate else (left,)
        rights = own.b.to(input.dtype).chunk(len(lefts), dim=1)
        parts = [
            grouped_linear(one, right, None, None, None, *thin, 1.0) for one, right in zip(lefts, rights, strict=True)
        ]
        y = y + (torch.cat(parts, dim=1) if own.separate else parts[0])
    return y


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype matrix products compute in under autocast on ``device``, or None outside autocast."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def moe_fused_linear(
    input: Tensor,
    weight: Tensor | Packed4bitWeights,
    m_sizes: Tensor,
    bias: Tensor | None = None,
    lora: Loras = None,
) -> Tensor:
    """Grouped linear layer: ``output[b, o] = Σ_i weight[expert(b), o, i] · input[b, i] + bias[expert(b), o]``.

    Differentiable in input, weight, bias and adapters. Computes in the dtype of weight (of autocast, where it is on),
    accumulating in fp32. Never waits for the GPU: there, sizes that do not sum to S are only checked with
    ``MOE_FUSED_CHECK=1``; otherwise rows of no expert come back as NaN, all rows if the sizes sum to more than S. Also named
    ``moe_fused_linear_4bit``.

    Args:
        input: (S, in), rows sorted by expert; any strides.
        weight: (E, out, in); dense, of any strides, or packed, and then frozen.
        m_sizes: (E,) any integer dtype; the number of rows of each expert.
        bias: (E, out), optional.
        lora: an adapter, or several that all count: weight[e] + scaling · b[e] · a[e], never formed.

    Returns:
        (S, out) in the dtype it computed in.

    Raises:
        TypeError: not a tensor, or of a dtype that does not fit.
        ValueError: a shape or device that does not fit, or sizes that do not sum to S.
        RuntimeError: a GPU or Triton version that is not supported.
    """
    check("weight", weight, ("E", "out", "in"))
    num_experts, out_features, in_features = weight.shape
    checks.tensor("input", input, ("S", in_features))
    checks.tensor("m_sizes", m_sizes, (num_experts,))
    checks.dtype("weight", weight, checks.FLOAT_DTYPES)
    checks.dtype("m_sizes", m_sizes, checks.INDEX_DTYPES)
    checks.device("weight", weight, "input", input)
    checks.device("m_sizes", m_sizes, "input", input)
    if bias is not None:
        checks.tensor("bias", bias, (num_experts, out_features))
        checks.device("bias", bias, "input", input)
    dtype = autocast_dtype(input.device)
    if dtype is None:
        checks.dtype("input", input, (weight.dtype,), " like weight")
        if bias is not None:
            checks.dtype("bias", bias, (weight.dtype,), " like weight")
    else:
        checks.dtype("input", input, checks.FLOAT_DTYPES)
        input, weight = input.to(dtype), weight.to(dtype=dtype)
        bias = None if bias is None else bias.to(dtype)
    num_rows = input.shape[0]
    checks.sizes_sum(m_sizes, num_rows)
    loras = check_loras("lora", lora, weight, "input", input)
    packed = any_packed(weight)
    routing = route_sorted(m_sizes, num_rows, weight.dtype, packed)
    return adapted_linear(input, weight, bias, routing, loras, (False, True, packed, 1, float("nan")))


moe_fused_linear_4bit = moe_fused_linear
