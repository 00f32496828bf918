"""The one thing that the stages read weights from: a *stack* (E, out, in), a tensor of any strides or a ``PackedStack``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..formats.base import Format4bit


@dataclass(frozen=True, eq=False)
class PackedStack:
    """4-bit weights as a stack, or their transpose; it has those of a tensor's attributes that the stages ask for.

    Attributes:
        format: how they are packed, (E, rows, columns), along the columns.
        storage: the tensors of the format, in its order.
        transposed: the stack is (E, columns, rows).
    """

    format: Format4bit
    storage: tuple[Tensor, ...]
    transposed: bool = False

    @property
    def packed(self) -> Tensor:
        """(E, rows·columns/2) uint8."""
        return self.storage[0]

    @property
    def device(self) -> torch.device:
        return self.storage[0].device

    @property
    def shape(self) -> tuple[int, int, int]:
        num_experts, rows, columns = self.format.shape
        return (num_experts, columns, rows) if self.transposed else (num_experts, rows, columns)

    @property
    def mT(self) -> PackedStack:
        return PackedStack(self.format, self.storage, not self.transposed)

    def numel(self) -> int:
        num_experts, rows, columns = self.format.shape
        return num_experts * rows * columns

    def tensors(self) -> dict[str, Tensor]:
        """The storage by name."""
        return dict(zip(self.format.storage(), self.storage, strict=True))


Stack: TypeAlias = "Tensor | PackedStack"


def dense_stack(parameter: Tensor, transposed: bool = False) -> Tensor:
    """The stack of an (E, out, in) parameter, or of an (E, in, out) one with ``transposed``.

    A stack in which neither features dimension is contiguous is copied: no kernel reads it well. So is one in which an
    expert's matrix spans 2³¹ elements, beyond the 32-bit offsets inside a matrix.
    """
    stack = parameter.mT if transposed else parameter
    _, stride_out, stride_in = stack.stride()
    span = (stack.shape[1] - 1) * stride_out + (stack.shape[2] - 1) * stride_in
    if 1 not in (stride_out, stride_in) or span >= 2**31:
        stack = stack.contiguous()
    return stack


def empty_grad(stack: Stack) -> Tensor:
    """An uninitialised gradient in the layout of the stack, for ``grouped_wgrad`` to fill."""
    if isinstance(stack, PackedStack):
        raise AssertionError("packed weights have no gradient")
    if stack.stride(2) != 1 and stack.stride(1) == 1:
        return stack.new_empty((stack.shape[0], stack.shape[2], stack.shape[1])).mT
    return stack.new_empty(stack.shape)
