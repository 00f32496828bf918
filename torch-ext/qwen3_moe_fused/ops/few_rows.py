"""Linear layers of a few rows over 4-bit matrices as an operator, without a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ..formats.base import parse
from ..stages import backend_for
from ..stages.stacks import PackedStack
from .autograd import eager
from .schema import Constant, Operator

SEPARATOR = ";"  # of formats, whose strings have none


class FewRowsArguments(NamedTuple):
    """The arguments: input (T, in), and for each matrix a stack of one.

    Attributes:
        packed: the bytes of each matrix.
        scales: the rest of the storage of each, one after the other.
        formats: of each, as strings between ``SEPARATOR``.
        biases: (out,) of each; an empty tensor where there is none.
    """

    input: Constant
    packed: list[Tensor]
    scales: list[Tensor]
    formats: str
    biases: list[Tensor]

    def stacks(self) -> Iterator[PackedStack]:
        """The matrices as the stages read them."""
        scales = iter(self.scales)
        for packed, spec in zip(self.packed, self.formats.split(SEPARATOR), strict=True):
            format = parse(spec)
            yield PackedStack(format, (packed, *(next(scales) for _ in range(len(format.storage()) - 1))))


def _few_rows(arguments: FewRowsArguments) -> Tensor:
    """The outputs (T, out) of all matrices, one after the other in memory, flat."""
    input, stacks = arguments.input, list(arguments.stacks())
    out = _fake_few_rows(arguments)
    parts = parts_of(out, input.shape[0], [stack.shape[1] for stack in stacks])
    biases = [bias if bias.numel() else None for bias in arguments.biases]
    backend_for(input, input.dtype).few_rows_linear(input, stacks, biases, parts)
    return out


def parts_of(flat: Tensor, num_rows: int, columns: list[int]) -> list[Tensor]:
    """The output of each matrix (T, out)."""
    parts = flat.split([num_rows * count for count in columns])
    return [part.view(num_rows, count) for part, count in zip(parts, columns, strict=True)]


def _fake_few_rows(arguments: FewRowsArguments) -> Tensor:
    columns = sum(parse(spec).shape[1] for spec in arguments.formats.split(SEPARATOR))
    return arguments.input.new_empty((arguments.input.shape[0] * columns,))


few_rows_operator = Operator("few_rows_linear", FewRowsArguments, Tensor, _few_rows, _fake_few_rows)
few_rows_linear = eager(few_rows_operator)
