"""Records of arguments that several operators share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..weights import Stack, empty_grad, stack_of


class StackArguments(NamedTuple):
    """A stack of expert matrices as an operator takes it; ``weights.operands`` gives the first three fields.

    Attributes:
        weight: (E, out, in), or (E, in, out) when ``transposed``; the bytes of packed weights, in their storage's shape.
        scales: the rest of the storage of packed weights; empty for dense ones.
        format: the format of packed weights as a string; empty for dense ones.
        transposed: the weights are stored (E, in, out).
    """

    weight: Tensor
    scales: list[Tensor]
    format: str
    transposed: bool

    def stack(self) -> Stack:
        """The stack (E, out, in) that the stages read."""
        return stack_of(self.weight, self.scales, self.format, self.transposed)

    def empty_gradient(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """An uninitialised gradient as the stages fill it, in the layout of ``stack``, and the same memory in the layout of
        ``weight``."""
        gradient = empty_grad(stack)
        return gradient, gradient.mT if self.transposed else gradient


class LoraArguments(NamedTuple):
    """A low-rank adapter of a stack as an operator takes it; ``a`` and ``b`` are None where there is none.

    Attributes:
        a: (E, R, in), or (E, 2·R, in) where gate and up features have factors apart, the gate's first.
        b: (E, out, R).
        scaling: the factor s of the term s·b·a.
    """

    a: Tensor | None
    b: Tensor | None
    scaling: float


NO_LORA = LoraArguments(None, None, 1.0)
