"""Weight providers: how the grouped GEMMs see a stack of expert matrices.

Callers hand the public functions a parameter in whatever layout their model keeps, or packed weights; here either becomes
the one thing the stages read, a *stack* (E, out, in): a tensor of any strides, or a ``PackedStack``. This is the only place
that knows how a layer's weights are stored, and ``launch.packed`` the only one that decides where they are decoded.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from . import checks
from .quantization import Format4bit, Packed4bitWeights


@dataclass(frozen=True, eq=False)
class PackedStack:
    """4-bit weights as a stack, or their transpose; of a tensor's attributes those that the stages ask for.

    Attributes:
        weights: as they are stored, (E, rows, columns), packed along the columns.
        transposed: the stack is (E, columns, rows).
    """

    weights: Packed4bitWeights
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        num_experts, rows, columns = self.weights.format.shape
        return (num_experts, columns, rows) if self.transposed else (num_experts, rows, columns)

    @property
    def mT(self) -> PackedStack:
        return PackedStack(self.weights, not self.transposed)

    def numel(self) -> int:
        num_experts, rows, columns = self.weights.format.shape
        return num_experts * rows * columns


Stack: TypeAlias = "Tensor | PackedStack"


def any_packed(*weights: object) -> bool:
    """Whether there are packed ones among ``weights``, stacks or what callers gave."""
    return any(isinstance(own, PackedStack | Packed4bitWeights) for own in weights)


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
    """An uninitialised gradient in the layout of the stack, for ``grouped_gram`` to fill."""
    if isinstance(stack, PackedStack):
        raise AssertionError("packed weights have no gradient")
    if stack.stride(2) != 1 and stack.stride(1) == 1:
        return stack.new_empty((stack.shape[0], stack.shape[2], stack.shape[1])).mT
    return stack.new_empty(stack.shape)


def check(name: str, value: object, shape: tuple[int | str, ...]) -> None:
    """``checks.tensor`` for weights, which may be packed.

    Raises:
        TypeError: neither a tensor nor packed weights.
        ValueError: another shape.
    """
    if isinstance(value, Packed4bitWeights):
        checks.sizes(name, value.shape, shape)
    elif isinstance(value, Tensor):
        checks.tensor(name, value, shape)
    else:
        raise TypeError(f"{name} must be a tensor or Packed4bitWeights, got {type(value).__name__}")


# An operator takes tensors and plain values, so weights travel as (tensor, scales, format): a dense stack with no scales
# and no format, packed weights as their bytes, the rest of their storage, and their format as a string.
Operands: TypeAlias = "tuple[Tensor, list[Tensor], str]"


def operands(weights: Tensor | Packed4bitWeights) -> Operands:
    """``weights`` as an operator's arguments."""
    if isinstance(weights, Packed4bitWeights):
        packed, *scales = weights.tensors().values()
        return packed, scales, weights.format.spec
    return weights, [], ""


@functools.cache
def _parse(spec: str) -> Format4bit:
    quant_type, blocksize, double_quant, projections, dtype, *shape = spec.split(" ")
    num_experts, out_features, in_features = map(int, shape)
    return Format4bit(
        (num_experts, out_features, in_features),
        quant_type,
        int(blocksize),
        double_quant == "double",
        int(projections),
        getattr(torch, dtype),
    )


def stack_of(parameter: Tensor, scales: Sequence[Tensor], spec: str, transposed: bool = False) -> Stack:
    """The stack of an operator's arguments, (E, out, in) as they are, or (E, in, out) with ``transposed``."""
    if spec:
        return PackedStack(Packed4bitWeights(_parse(spec), parameter, *scales), transposed)
    return dense_stack(parameter, transposed)
