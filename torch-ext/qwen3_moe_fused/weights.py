"""The weights that callers pass to the public functions, and how they reach the stages.

Callers give a parameter in whatever layout their model keeps, or packed weights. An operator takes tensors and plain values,
so weights travel as (tensor, scales, format): a dense parameter with no scales and no format, packed weights as their bytes,
the rest of their storage, and their format as a string. The stages get a *stack* (``stages.stacks``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from . import checks
from .formats.base import parse
from .packed import Packed4bitWeights
from .stages.stacks import PackedStack, Stack, dense_stack, empty_grad

__all__ = [
    "Operands",
    "PackedStack",
    "Stack",
    "any_packed",
    "check",
    "dense_stack",
    "empty_grad",
    "operands",
    "stack_of",
]

Operands: TypeAlias = "tuple[Tensor, list[Tensor], str]"


def any_packed(*weights: object) -> bool:
    """Whether there are packed ones among ``weights``, stacks or what callers gave."""
    return any(isinstance(value, (PackedStack, Packed4bitWeights)) for value in weights)  # torch 2.9 traces no union


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


def operands(weights: Tensor | Packed4bitWeights) -> Operands:
    """``weights`` as an operator's arguments."""
    if isinstance(weights, Packed4bitWeights):
        packed, *scales = weights.tensors().values()
        return packed, scales, weights.format.spec
    return weights, [], ""


def stack_of(parameter: Tensor, scales: Sequence[Tensor], spec: str, transposed: bool = False) -> Stack:
    """The stack of an operator's arguments, (E, out, in) as they are, or (E, in, out) with ``transposed``."""
    if spec:
        return PackedStack(parse(spec), (parameter, *scales), transposed)
    return dense_stack(parameter, transposed)
