"""The expert MLP as one operator, its backward as another, and their memory plan.

    x (T,H) ─ up: gather, grouped GEMM, gate ─► h (S,I) ─ down: grouped GEMM ─► z (S,H) ─ combine ─► y (T,H)

Backward keeps x, the routing buffer, the routing weights, gate_up (S, 2·I), an adapter's thin products (S, R) and the
weights by reference. h and z are transient: backward computes h again from gate_up beside the gate's derivative, and the
gradient of a routing weight is rowsum(grad_h · h), so the down projection's output is never needed again. With
``recompute`` gate_up is not kept either: backward makes it again, by the up projection alone, and overwrites it with its
gradient. Everything that backward keeps is there before the down projection, so when ``torch.utils.checkpoint`` computes
a layer again, it stops there.

With few slots and no gradient to come there is nothing to sort: each slot is a matrix-vector product (``gemv_experts``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Annotated, Any, NamedTuple, cast

import torch
from torch import Tensor

from ..activations import Gate
from ..routing import Routing
from ..stages import backend_for
from ..weights import Stack, any_packed
from .arguments import LoraArguments, StackArguments
from .autograd import differentiable, eager
from .lora import Adapter
from .schema import Constant, Inline, Operator, layout_of


class Experts(NamedTuple):
    """The arguments that forward and backward share.

    Attributes:
        hidden_states: (T, H).
        top_k_weights: (T, top_k).
        up: the stack (E, 2·I or I, H).
        down: the stack (E, H, I).
        gate_up_bias: (E, 2·I or I). Backward has it only with ``recompute``.
        down_bias: (E, H).
        up_lora, down_lora: the adapters of the two stacks.
        gate: how gate_up becomes h.
        recompute: backward computes gate_up again.
    """

    hidden_states: Tensor
    top_k_weights: Tensor
    up: StackArguments
    down: StackArguments
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    up_lora: LoraArguments
    down_lora: LoraArguments
    gate: Gate
    recompute: bool


class ExpertsForward(NamedTuple):
    """The arguments of the forward: top_k_index (T, top_k), and whether a backward will come."""

    experts: Inline[Experts]
    top_k_index: Constant
    save_for_backward: bool


class Made(NamedTuple):
    """What the forward makes for backward; None where there is no such tensor, or no backward to come.

    Attributes:
        gate_up: (S, 2·I or I), the up projection's output; None with ``recompute``.
        buffer: the routing buffer.
        up_left, down_left: the adapters' left products (S, R or 2·R).
    """

    gate_up: Constant | None = None
    buffer: Constant | None = None
    up_left: Constant | None = None
    down_left: Constant | None = None


class ExpertsResults(NamedTuple):
    """y (T, H), and what the forward made for backward."""

    y: Tensor
    made: Inline[Made]


class Kept(NamedTuple):
    """What backward reads."""

    experts: Inline[Experts]
    made: Inline[Made]


ExpertsGradients, ExpertsNeeds = layout_of(Experts).gradients, layout_of(Experts).needs


class ExpertsBackward(NamedTuple):
    """The arguments of backward: the gradient of y, and which of ``ExpertsGradients`` are needed."""

    grad_y: Tensor
    kept: Inline[Kept]
    needs: Annotated[Any, ExpertsNeeds]


def _products(experts: Experts) -> tuple[ModuleType, Stack, Stack, Adapter | None, Adapter | None]:
    """The stages that serve these experts, the stacks up and down, and the adapters of up and down."""
    dtype = experts.hidden_states.dtype
    stages = backend_for(experts.hidden_states, dtype)
    up_lora = Adapter.of(experts.up_lora, dtype, stages)
    down_lora = Adapter.of(experts.down_lora, dtype, stages)
    return stages, experts.up.stack(), experts.down.stack(), up_lora, down_lora


def _experts_in_two(forward: ExpertsForward, zeroed: bool = False) -> tuple[Made, Callable[[], Tensor]]:
    """The forward up to h, and a function that makes y (T, H) of it, once. All that backward keeps is there before.

    Some entries of the routing buffer are neither written nor read. ``zeroed`` gives them a value: an operator's results
    must be reproducible.
    """
    experts, top_k_index, save_for_backward = forward
    x, top_k_weights = experts.hidden_states, experts.top_k_weights
    gate_up_bias, down_bias, gate = experts.gate_up_bias, experts.down_bias, experts.gate
    num_tokens, top_k = top_k_index.shape
    num_rows = num_tokens * top_k
    stages, up, down, up_lora, down_lora = _products(experts)
    adapted = up_lora is not None or down_lora is not None
    if not save_for_backward and not adapted and stages.use_gemv(num_tokens, top_k, up, down):
        inputs = (x, top_k_index, top_k_weights)
        return Made(), lambda: stages.gemv_experts(*inputs, up, down, gate_up_bias, down_bias, gate)
    num_experts = up.shape[0]
    buffer = Routing.new_buffer(top_k_index, num_rows, num_experts, zeroed=zeroed)
    routing = Routing.from_buffer(buffer, num_rows, num_experts, top_k, packed=any_packed(up, down))
    stages.route(top_k_index, routing, x.dtype)
    up_left = down_left = up_term = down_term = None
    if up_lora is not None:
        up_left = up_lora.left(x, routing, num_rows, gather=True)
        up_term = up_lora.term(up_left)
    save_gate_up = save_for_backward and not experts.recompute
    h, gate_up = stages.grouped_up(x, up, routing, num_rows, gate_up_bias, gate, save_gate_up, up_term)
    if down_lora is not None:
        down_left = down_lora.left(h, routing, num_rows, gather=False)
        down_term = down_lora.term(down_left)

    def end() -> Tensor:
        nonlocal h
        z = stages.grouped_gemm(h, down, routing, num_rows, down_bias, gather=False, fill=0.0, term=down_term)
        del h
        return stages.combine(z, routing, num_tokens, top_k_weights)

    return Made(gate_up, buffer, up_left, down_left) if save_for_backward else Made(), end


def _experts(forward: ExpertsForward, zeroed: bool = False) -> ExpertsResults:
    made, end = _experts_in_two(forward, zeroed)
    return ExpertsResults(end(), made)


def _fake_experts(forward: ExpertsForward) -> ExpertsResults:
    experts, top_k_index, save_for_backward = forward
    x = experts.hidden_states
    y = x.new_empty(x.shape)
    if not save_for_backward:
        return ExpertsResults(y, Made())
    num_rows = top_k_index.numel()
    num_experts, columns, _ = experts.up.stack().shape

    def left(lora: LoraArguments) -> Tensor | None:
        return None if lora.a is None else x.new_empty((num_rows, lora.a.shape[1]))

    gate_up = None if experts.recompute else x.new_empty((num_rows, columns))
    buffer = top_k_index.new_empty(Routing.buffer_size(num_rows, num_experts), dtype=torch.int32)
    return ExpertsResults(y, Made(gate_up, buffer, left(experts.up_lora), left(experts.down_lora)))


experts_operator = Operator("experts", ExpertsForward, ExpertsResults, _experts, _fake_experts, zeroed=True)


class _Backward:
    """One backward: what its products share, and the gradients as they come."""

    def __init__(self, backward: ExpertsBackward) -> None:
        kept = backward.kept
        self.experts = kept.experts
        self.made = cast(Any, kept.made)  # what is None in it is never read
        self.needs = backward.needs
        self.num_tokens, top_k = self.experts.top_k_weights.shape
        self.num_rows = self.num_tokens * top_k
        self.stages, self.up, self.down, self.up_lora, self.down_lora = _products(self.experts)
        packed = any_packed(self.up, self.down)
        self.routing = Routing.from_buffer(self.made.buffer, self.num_rows, self.up.shape[0], top_k, packed=packed)
        self.grad_y = backward.grad_y.contiguous()
        self.gradients: dict[str, Tensor | None] = {}

    def run(self) -> Any:
        """The gradients that are needed. The order is that of the peak of memory: see the comments."""
        needs, experts, gradients = self.needs, self.experts, self.gradients
        if needs.down_bias:
            gradients["down_bias"] = self.stages.grouped_row_sum(
                self.grad_y, self.routing, experts.top_k_weights, gather=True
            )
        if needs.down_lora_b and self.down_lora is not None:
            gradients["down_lora_b"] = self.down_lora.grad_b(
                self.grad_y, self.made.down_left, self.routing, gather=True, weights=experts.top_k_weights
            )
        if sum(needs) > needs.down_bias + needs.down_lora_b:  # any other than these two
            grad_gate_up, weighted_h = self.through_down()
            self.through_up(grad_gate_up)
            # The larger of the two rows that remain is gone before the last weight's gradient is there.
            del grad_gate_up
            if needs.down_weight:
                grad_stack, gradients["down_weight"] = experts.down.empty_gradient(self.down)
                self.stages.grouped_wgrad(
                    self.grad_y, weighted_h, self.routing, gather_a=True, gather_b=False, out=grad_stack
                )
        return ExpertsGradients(**gradients)

    def gate_up(self) -> Tensor:
        """gate_up (S, 2·I or I), kept or computed again."""
        experts = self.experts
        if not experts.recompute:
            gate_up: Tensor = self.made.gate_up
            return gate_up
        term = None if self.up_lora is None else self.up_lora.term(self.made.up_left)
        _, gate_up = self.stages.grouped_up(
            experts.hidden_states, self.up, self.routing, self.num_rows, experts.gate_up_bias, experts.gate, True, term,
            save_h=False,
        )  # fmt: skip
        return gate_up

    def through_down(self) -> tuple[Tensor, Tensor | None]:
        """The gradient of gate_up (S, 2·I or I), and h with the weight of its slot (S, I) if the weight's gradient needs it.

        Adds the gradients of the routing weights and of the down adapter's a. After recomputation the gradient of gate_up
        is in the memory of gate_up.
        """
        needs, experts, adapter, term = self.needs, self.experts, self.down_lora, None
        gate_up = self.gate_up()
        if adapter is not None:
            grad_left = adapter.grad_left(self.grad_y, self.routing, self.num_rows, gather=True)
            term = adapter.grad_term(grad_left)
        grad_gate_up, weighted_h, grad_weights = self.stages.down_backward(
            self.grad_y, self.down, experts.down_bias, gate_up, self.routing, experts.top_k_weights, experts.gate,
            needs.down_weight or needs.down_lora_a, term, in_place=experts.recompute,
        )  # fmt: skip
        if needs.top_k_weights:
            self.gradients["top_k_weights"] = grad_weights
        if needs.down_lora_a and adapter is not None:
            self.gradients["down_lora_a"] = adapter.grad_a(grad_left, weighted_h, self.routing, gather=False)
        return grad_gate_up, weighted_h if needs.down_weight else None

    def through_up(self, grad_gate_up: Tensor) -> None:
        """Adds the gradients of x, of the up projection's weight and bias, and of its adapter."""
        needs, experts, gradients = self.needs, self.experts, self.gradients
        routing, adapter, term = self.routing, self.up_lora, None
        if adapter is not None:
            if needs.up_lora_b:
                gradients["up_lora_b"] = adapter.grad_b(grad_gate_up, self.made.up_left, routing, gather=False)
            if needs.hidden_states or needs.up_lora_a:
                grad_left = adapter.grad_left(grad_gate_up, routing, self.num_rows, gather=False)
                term = adapter.grad_term(grad_left)
            if needs.up_lora_a:
                gradients["up_lora_a"] = adapter.grad_a(grad_left, experts.hidden_states, routing, gather=True)
        # The largest transient, the rows of grad_x, is gone before the weights' gradients take their memory.
        if needs.hidden_states:
            grad_rows = self.stages.grouped_gemm(
                grad_gate_up, self.up.mT, routing, self.num_rows, None, gather=False, fill=0.0, term=term
            )
            gradients["hidden_states"] = self.stages.combine(grad_rows, routing, self.num_tokens, None)
            del grad_rows
        if needs.gate_up_bias:
            gradients["gate_up_bias"] = self.stages.grouped_row_sum(grad_gate_up, routing, None, gather=False)
        if needs.up_weight:
            grad_stack, gradients["up_weight"] = experts.up.empty_gradient(self.up)
            self.stages.grouped_wgrad(
                grad_gate_up, experts.hidden_states, routing, gather_a=False, gather_b=True, out=grad_stack
            )


def _experts_backward(backward: ExpertsBackward) -> Any:
    """``ExpertsGradients`` with None for those that are not needed."""
    return _Backward(backward).run()


def _fake_experts_backward(backward: ExpertsBackward) -> Any:
    experts, needs = backward.kept.experts, backward.needs
    x = experts.hidden_states
    up, down = experts.up.stack(), experts.down.stack()

    def like(need: bool, value: Tensor | None) -> Tensor | None:
        return torch.empty_like(value, memory_format=torch.contiguous_format) if need and value is not None else None

    def weight(need: bool, arguments: StackArguments, stack: Stack) -> Tensor | None:
        return arguments.empty_gradient(stack)[1] if need else None

    def bias(need: bool, stack: Stack) -> Tensor | None:
        return x.new_empty(stack.shape[:2]) if need else None

    return ExpertsGradients(
        hidden_states=like(needs.hidden_states, x),
        top_k_weights=like(needs.top_k_weights, experts.top_k_weights),
        up_weight=weight(needs.up_weight, experts.up, up),
        down_weight=weight(needs.down_weight, experts.down, down),
        gate_up_bias=bias(needs.gate_up_bias, up),
        down_bias=bias(needs.down_bias, down),
        up_lora_a=like(needs.up_lora_a, experts.up_lora.a),
        up_lora_b=like(needs.up_lora_b, experts.up_lora.b),
        down_lora_a=like(needs.down_lora_a, experts.down_lora.a),
        down_lora_b=like(needs.down_lora_b, experts.down_lora.b),
    )


experts_backward_operator = Operator(
    "experts_backward", ExpertsBackward, ExpertsGradients, _experts_backward, _fake_experts_backward
)
_experts_gradients = eager(experts_backward_operator)


def _keep(forward: ExpertsForward, made: Made, needs: Any) -> Kept:
    experts = forward.experts
    return Kept(experts if experts.recompute else experts._replace(gate_up_bias=None), made)


def _backward(grad_y: Tensor, kept: Kept, needs: Any) -> Sequence[Tensor | None]:
    return _experts_gradients(ExpertsBackward(grad_y, kept, needs))


fused_experts = differentiable(experts_operator, Kept, _keep, _backward, _experts_in_two)
