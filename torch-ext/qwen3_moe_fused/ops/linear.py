"""One grouped linear layer as an operator, and its backward as another.

Forward: one grouped GEMM. Backward: the same GEMM with the transposed weights for the input, a grouped weight-gradient
product for the weights (each tile is written once, without atomics), and a row sum for the bias. Each runs only if its
gradient was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from torch import Tensor

from ..routing import Routing
from ..stages import backend_for
from .arguments import LoraArguments, StackArguments
from .autograd import differentiable, eager
from .lora import Adapter
from .schema import Constant, Inline, Operator, layout_of


class Rows(NamedTuple):
    """The rows of a grouped linear layer, all but their values.

    Attributes:
        buffer: the routing buffer.
        sorted_rows: the caller sorted the rows by expert, so the buffer has no map between rows and slots.
        packed: the buffer was made for packed weights, those of this layer or of another that shares the rows.
        top_k: slots per token.
        fill: the value of rows that belong to no expert.
    """

    buffer: Constant
    sorted_rows: bool
    packed: bool
    top_k: int
    fill: float

    def routing(self, num_rows: int, num_experts: int) -> Routing:
        """The routing of ``num_rows`` rows among ``num_experts`` experts."""
        return Routing.from_buffer(self.buffer, num_rows, num_experts, self.top_k, self.sorted_rows, self.packed)


class Linear(NamedTuple):
    """The arguments that forward and backward share: the stack (E, out, in), its adapter, and the rows."""

    stack: Inline[StackArguments]
    lora: LoraArguments
    rows: Inline[Rows]


class LinearForward(NamedTuple):
    """The arguments of the forward: input (S, in), bias (E, out)."""

    input: Tensor
    linear: Inline[Linear]
    bias: Tensor | None = None


class Kept(NamedTuple):
    """What backward reads: the input only where a gradient needs it, so a frozen layer keeps no activations."""

    input: Tensor | None
    linear: Inline[Linear]


LinearGradients, LinearNeeds = layout_of(LinearForward).gradients, layout_of(LinearForward).needs


class LinearBackward(NamedTuple):
    """The arguments of backward: the output's gradient (S, out), and which of ``LinearGradients`` are needed."""

    grad_output: Tensor
    kept: Inline[Kept]
    needs: Annotated[Any, LinearNeeds]


def _linear(forward: LinearForward) -> Tensor:
    """Output (S, out) = input (S, in) × stackᵀ + bias (E, out), adapted; rows of no expert hold ``fill``."""
    input, (stack_arguments, lora, rows), bias = forward
    num_rows = input.shape[0]
    stages = backend_for(input, input.dtype)
    stack = stack_arguments.stack()
    routing = rows.routing(num_rows, stack.shape[0])
    adapter = Adapter.of(lora, input.dtype, stages)
    term = None
    if adapter is not None:
        term = adapter.term(adapter.left(input, routing, num_rows, gather=False))
    y: Tensor = stages.grouped_gemm(input, stack, routing, num_rows, bias, gather=False, fill=rows.fill, term=term)
    return y


def _fake_linear(forward: LinearForward) -> Tensor:
    out_features = forward.linear.stack.stack().shape[1]
    return forward.input.new_empty((forward.input.shape[0], out_features))


linear_operator = Operator("grouped_linear", LinearForward, Tensor, _linear, _fake_linear)


def _linear_backward(backward: LinearBackward) -> Any:
    """``LinearGradients`` with None for those that are not needed."""
    input, (stack_arguments, lora, rows) = backward.kept
    needs = backward.needs
    num_rows = backward.grad_output.shape[0]
    stages = backend_for(backward.grad_output, backward.grad_output.dtype)
    stack = stack_arguments.stack()
    routing = rows.routing(num_rows, stack.shape[0])
    grad_output = backward.grad_output.contiguous()
    gradients: dict[str, Tensor] = {}
    adapter, term = Adapter.of(lora, grad_output.dtype, stages), None
    if adapter is not None:
        if needs.input or needs.lora_a:
            grad_left = adapter.grad_left(grad_output, routing, num_rows, gather=False)
            term = adapter.grad_term(grad_left)
        if needs.lora_a and input is not None:
            gradients["lora_a"] = adapter.grad_a(grad_left, input, routing, gather=False)
        if needs.lora_b and input is not None:
            # The left product is a thin GEMM: computed again rather than kept.
            left = adapter.left(input, routing, num_rows, gather=False)
            gradients["lora_b"] = adapter.grad_b(grad_output, left, routing, gather=False)
    if needs.input:
        gradients["input"] = stages.grouped_gemm(
            grad_output, stack.mT, routing, num_rows, None, gather=False, fill=rows.fill, term=term
        )
    if needs.weight and input is not None:
        grad_stack, gradients["weight"] = stack_arguments.empty_gradient(stack)
        stages.grouped_wgrad(grad_output, input, routing, gather_a=False, gather_b=False, out=grad_stack)
    if needs.bias:
        gradients["bias"] = stages.grouped_row_sum(grad_output, routing, None, gather=False)
    return LinearGradients(**gradients)


def _fake_linear_backward(backward: LinearBackward) -> Any:
    stack_arguments, lora, _ = backward.kept.linear
    needs, new_empty = backward.needs, backward.grad_output.new_empty
    stack = stack_arguments.stack()
    num_experts, out_features, in_features = stack.shape

    def like(need: bool, factor: Tensor | None) -> Tensor | None:
        return factor.new_empty(factor.shape) if need and factor is not None else None

    return LinearGradients(
        input=new_empty((backward.grad_output.shape[0], in_features)) if needs.input else None,
        weight=stack_arguments.empty_gradient(stack)[1] if needs.weight else None,
        bias=new_empty((num_experts, out_features)) if needs.bias else None,
        lora_a=like(needs.lora_a, lora.a),
        lora_b=like(needs.lora_b, lora.b),
    )


linear_backward_operator = Operator(
    "grouped_linear_backward", LinearBackward, LinearGradients, _linear_backward, _fake_linear_backward
)
_linear_gradients = eager(linear_backward_operator)


def _keep(forward: LinearForward, made: None, needs: Any) -> Kept:
    kept = forward.input if needs.weight or needs.lora_a or needs.lora_b else None
    return Kept(kept, forward.linear)


def _backward(grad_output: Tensor, kept: Kept, needs: Any) -> Sequence[Tensor | None]:
    return _linear_gradients(LinearBackward(grad_output, kept, needs))


grouped_linear = differentiable(linear_operator, Kept, _keep, _backward)
