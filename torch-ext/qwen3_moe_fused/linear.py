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
from .permute import route_sorted
from .quantization import Packed4bitWeights
from .routing import Routing
from .weights import any_packed, check, empty_grad, operands, stack_of

# Arguments of the operators below, in the order of the functions behind them.
_OPTIONS = "Tensor[] scales, str format, bool transposed, bool sorted_rows, bool packed, int top_k, float fill"


def _grouped_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routing: Tensor,
    scales: Sequence[Tensor],
    format: str,
    transposed: bool,
    sorted_rows: bool,
    packed: bool,
    top_k: int,
    fill: float,
) -> Tensor:
    """(S, out) = input (S, in) × weight (E, out, in)ᵀ + bias (E, out); rows of no expert hold ``fill``."""
    num_rows = input.shape[0]
    stages = backend_for(input, input.dtype)
    stack = stack_of(weight, scales, format, transposed)
    view = Routing.from_buffer(routing, num_rows, stack.shape[0], top_k, sorted_rows, packed)
    return stages.grouped_gemm(input, stack, view, num_rows, bias, gather=False, fill=fill)


@torch.library.custom_op(
    add_op_namespace_prefix("grouped_linear"),
    mutates_args=(),
    schema=f"(Tensor input, Tensor weight, Tensor? bias, Tensor routing, {_OPTIONS}) -> Tensor",
)
def grouped_linear_op(*args: Any) -> Tensor:
    return _grouped_linear(*args)


@grouped_linear_op.register_fake
def _(*args: Any) -> Tensor:
    input, weight, _, _, scales, format, transposed, *_ = args
    return input.new_empty((input.shape[0], stack_of(weight, scales, format, transposed).shape[1]))


def _grouped_linear_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor,
    routing: Tensor,
    scales: Sequence[Tensor],
    format: str,
    transposed: bool,
    sorted_rows: bool,
    packed: bool,
    top_k: int,
    fill: float,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias; None unless needed."""
    need_input, need_weight, need_bias = needs
    num_rows = grad_output.shape[0]
    stages = backend_for(grad_output, grad_output.dtype)
    stack = stack_of(weight, scales, format, transposed)
    view = Routing.from_buffer(routing, num_rows, stack.shape[0], top_k, sorted_rows, packed)
    grad_output = grad_output.contiguous()
    grad_input = grad_weight = grad_bias = None
    if need_input:
        grad_input = stages.grouped_gemm(grad_output, stack.mT, view, num_rows, None, gather=False, fill=fill)
    if need_weight and input is not None:
        grad_weight = empty_grad(stack)
        stages.grouped_gram(grad_output, input, view, gather_a=False, gather_b=False, out=grad_weight)
        grad_weight = grad_weight.mT if transposed else grad_weight
    if need_bias:
        grad_bias = stages.grouped_row_sum(grad_output, view, None, gather=False)
    return grad_input, grad_weight, grad_bias


@torch.library.custom_op(
    add_op_namespace_prefix("grouped_linear_backward"),
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor? input, Tensor weight, Tensor routing, {_OPTIONS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
)
def grouped_linear_backward_op(*args: Any) -> tuple[Tensor, ...]:
    grad_output = args[0]
    return tuple(grad_output.new_empty(0) if grad is None else grad for grad in _grouped_linear_backward(*args))


@grouped_linear_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, _, weight, _, scales, format, transposed, *_, needs = args
    need_input, need_weight, need_bias = needs
    stack = stack_of(weight, scales, format, transposed)
    num_experts, out_features, in_features = stack.shape
    grad_weight = empty_grad(stack) if need_weight else grad_output.new_empty(0)
    return (
        grad_output.new_empty((grad_output.shape[0], in_features) if need_input else 0),
        grad_weight.mT if need_weight and transposed else grad_weight,
        grad_output.new_empty((num_experts, out_features) if need_bias else 0),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    input, weight, _, routing, scales, *options = inputs
    # A frozen weight's layer keeps no activations.
    ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight, routing, *scales)
    ctx.options = options


_backward_of_linear = eager(grouped_linear_backward_op, _grouped_linear_backward)


def _backward(ctx, grad_output: Tensor):  # type: ignore[no-untyped-def]
    needs = list(ctx.needs_input_grad[:3])
    input, weight, routing, *scales = ctx.saved_tensors
    grads = _backward_of_linear(grad_output, input, weight, routing, scales, *ctx.options, needs)
    grads = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (*grads, None, [None] * len(scales), *(None for _ in ctx.options))


grouped_linear = differentiable(grouped_linear_op, _grouped_linear, _setup_context, _backward)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype matrix products compute in under autocast on ``device``, or None outside autocast."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def moe_fused_linear(
    input: Tensor, weight: Tensor | Packed4bitWeights, m_sizes: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Grouped linear layer: ``output[b, o] = Σ_i weight[expert(b), o, i] · input[b, i] + bias[expert(b), o]``.

    Differentiable in input, weight and bias. Computes in the dtype of weight (of autocast, where it is on), accumulating in
    fp32. Never waits for the GPU: there, sizes that do not sum to S are only checked with ``MOE_FUSED_CHECK=1``; otherwise
    rows of no expert come back as NaN, all rows if the sizes sum to more than S. Also named ``moe_fused_linear_4bit``.

    Args:
        input: (S, in), rows sorted by expert; any strides.
        weight: (E, out, in); dense, of any strides, or packed, and then frozen.
        m_sizes: (E,) any integer dtype; the number of rows of each expert.
        bias: (E, out), optional.

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
    packed = any_packed(weight)
    routing = route_sorted(m_sizes, num_rows, weight.dtype, packed)
    values, scales, format = operands(weight)
    y: Tensor = grouped_linear(input, values, bias, routing, scales, format, False, True, packed, 1, float("nan"))
    return y


moe_fused_linear_4bit = moe_fused_linear
