"""One experts parameter on its way from a checkpoint of one layout into a checkpoint of another.

Dense stacks never become tensors: each layout holds the same matrices in another order, so that they are ranges of bytes to
be copied. Packed ones are read as Transformers' loading loop reads them, first on meta, but for what must be looked at, to
find whatever is wrong with them before anything is written, and again for their bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_fused.hub import get_kernel

from .entries import Entry, by_matrix, by_projection, layout_of, read_packed
from .fused import write_fused
from .names import Names, Place, Target, stacked_names
from .quant_state import read_format, write_matrix, write_piece
from .safetensors_file import DTYPES, Chunks, as_bytes, dtype_name
from .tensor_files import FLOATS, Output, Stored, cast_chunks, cast_name

if TYPE_CHECKING:
    from qwen3_moe_fused.quantization import Packed4bitWeights

T = TypeVar("T")

# What a layout is called by the user, by what ``names`` calls it.
LAYOUTS = {"per expert": "per-expert", "fused": "fused", "stacked": "original"}
# Parts of packed weights whose values do not say whether they fit.
_LARGE = ("", "absmax", "nested_absmax", "nested_offset")


_DOUBLE = ", double quantization"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Found(NamedTuple):
    """A tensor of the checkpoint that belongs to a stack."""

    key: str
    place: Place
    stored: Stored

    def entry(self, real: bool) -> Entry:
        """As what reads it takes it; large tensors are on meta unless ``real``."""
        load = self.stored.load if real or self.place.part not in _LARGE else self.stored.empty
        return Entry(self.key, self.place, functools.partial(load, self.key))


class Latest:
    """Remembers the value that was made last for each purpose, and forgets it before the next one is made."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Hashable, Any]] = {}

    def get(self, purpose: str, key: Hashable, make: Callable[[], T]) -> T:
        if purpose not in self._values or self._values[purpose][0] != key:
            self._values.pop(purpose, None)
            self._values[purpose] = key, make()
        value: T = self._values[purpose][1]
        return value


@dataclass(frozen=True)
class DenseStack:
    """An experts parameter in a checkpoint.

    Attributes:
        target: the parameter.
        layout: of the checkpoint, as ``names`` calls it.
        matrices: those of each expert, by projection.
    """

    target: Target
    layout: str
    matrices: tuple[tuple[Stored, ...], ...]

    @property
    def description(self) -> str:
        return _named(DTYPES[self.matrices[0][0].dtype])

    def description_after(self, dtype: torch.dtype | None, dequantize: bool) -> str:
        """Once it is in another layout."""
        return _named(dtype) if dtype else self.description

    def outputs(self, names: Names, layout: str, dtype: torch.dtype | None) -> dict[str, Output]:
        """The tensors of the stack in ``layout``, by their names in the model.

        Args:
            dtype: to cast to; None to leave them as they are.

        Raises:
            ValueError: there are no such names.
        """
        name = cast_name(self.matrices[0][0], dtype)
        return _dense_outputs(
            self.target, names, layout, name, lambda expert, part: cast_chunks(self.matrices[expert][part], name)
        )


@dataclass(frozen=True)
class PackedStack:
    """An experts parameter in 4 bits in a checkpoint.

    Attributes:
        target, layout: as in ``DenseStack``.
        names: of the model.
        tensors: of the checkpoint.
        weights: on meta.
        source_dtype: of the weights before they were quantized.
        latest: shared by all stacks of a checkpoint, whose tensors are written one after the other.
    """

    target: Target
    layout: str
    names: Names
    tensors: tuple[Found, ...]
    weights: Packed4bitWeights
    source_dtype: torch.dtype
    latest: Latest

    @property
    def description(self) -> str:
        form = self.weights.format
        return f"{form.quant_type} in blocks of {form.blocksize}{_DOUBLE if self._was_double() else ''}"

    def description_after(self, dtype: torch.dtype | None, dequantize: bool) -> str:
        """Once it is in another layout."""
        if dequantize:
            return _named(dtype or self.source_dtype)
        return self.description.removesuffix(_DOUBLE) if self.loses_double_quantization else self.description

    @property
    def loses_double_quantization(self) -> bool:
        """Whether the absmaxes are bytes in the checkpoint, and cannot be in any other layout."""
        return self._was_double() and not self.weights.format.double_quant

    def _was_double(self) -> bool:
        return any(found.place.part == "nested_absmax" for found in self.tensors)

    def dequantized(self, layout: str, dtype: torch.dtype | None) -> dict[str, Output]:
        """The dense tensors of the stack in ``layout``, by their names in the model.

        Args:
            dtype: of these tensors; None for that of the weights before they were quantized.

        Raises:
            ValueError: there are no such names.
        """
        wanted = dtype or self.source_dtype

        def chunks(expert: int, part: int) -> list[memoryview]:
            dense = self.latest.get(
                "dense", (self.target.name, expert), lambda: self._read().narrow(expert, 1).dequantize(wanted)[0]
            )
            return [as_bytes(dense.chunk(self.target.projections)[part])]

        return _dense_outputs(self.target, self.names, layout, dtype_name(wanted), chunks)

    def outputs(self, layout: str) -> dict[str, Output]:
        """The tensors of the stack in ``layout``, by their names in the model.

        Raises:
            ValueError: there are no such names, or that layout cannot hold the stack.
        """
        if layout == "per-expert":
            return dict(self._matrices())
        if layout == "fused":
            example = write_fused(self.weights, self.source_dtype)
            return self._outputs(self.target.name, "_", example, lambda: write_fused(self._read(), self.source_dtype))
        return dict(self._stacks())

    def _read(self) -> Packed4bitWeights:
        def read() -> Packed4bitWeights:
            entries = [found.entry(real=True) for found in self.tensors]
            return read_packed(self.names, self.target, self.layout, entries)[1]

        return self.latest.get("stack", self.target.name, read)

    def _outputs(
        self, name: str, separator: str, example: dict[str, Tensor], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Output]:
        """The tensors that ``make`` gives, by what follows ``name``; ``example`` is like them."""

        def one(part: str) -> Tensor:
            return self.latest.get("parts", name, make)[part]

        return {
            f"{name}{separator}{part}" if part else name: Output.of_tensor(value, functools.partial(one, part))
            for part, value in example.items()
        }

    def _matrices(self) -> Iterator[tuple[str, Output]]:
        form, offsets = self.weights.format, self._offsets()
        for expert, projection, name in _matrix_names(self.names, self.target):
            piece = self.weights.piece(expert, projection)
            if offsets is not None:  # it is in the JSON, whose length must be known
                piece = replace(piece, nested_offset=offsets[expert, projection])
            example = write_piece(piece, self.target.matrix_shape, form, self.source_dtype)

            def make(expert: int = expert, projection: int = projection) -> dict[str, Tensor]:
                return write_matrix(self._read(), expert, projection, self.source_dtype)

            yield from self._outputs(name, ".", example, make).items()

    def _offsets(self) -> Tensor | None:
        """(E, projections) fp32, the nested offset of each matrix."""
        if not self.weights.format.double_quant:
            return None
        size = (self.target.shape[0], self.target.projections)
        if self.layout == "fused":
            (found,) = (found for found in self.tensors if found.place.part == "nested_offset")
            return found.stored.load(found.key).view(torch.float32).view(size)
        entries = [found.entry(real=False) for found in self.tensors]
        shape = (size[0], *self.target.matrix_shape)
        offsets = []
        for projection, stack in enumerate(by_projection(self.names, self.target, entries)):
            parts = {
                entry.place.part: entry.load()
                for entry in entries
                if entry.place.projection == projection and entry.place.part.startswith("quant_state")
            }
            offsets.append(read_format(stack.key, parts, shape)[1])
        return torch.tensor(offsets, dtype=torch.float32).expand(size)

    def _stacks(self) -> Iterator[tuple[str, Output]]:
        if self.weights.format.double_quant:
            raise ValueError(
                f"{self.target.name} cannot be written in the original project's layout: its double quantization has an "
                "offset for each matrix, and that layout one for all experts; dequantize, or choose the fused layout"
            )

        def write(weights: Packed4bitWeights, projection: int) -> dict[str, Tensor]:
            quantization = get_kernel().quantization
            shape = (weights.shape[0], *self.target.matrix_shape)
            packed, absmax = (
                value.view(shape[0], self.target.projections, -1)[:, projection].reshape(-1)
                for value in (weights.packed, quantization.as_floats(weights.absmax))
            )
            return write_piece(quantization.Piece(packed[:, None], absmax), shape, weights.format, self.source_dtype)

        for projection, name in enumerate(_stack_names(self.target)):
            make = functools.partial(lambda projection: write(self._read(), projection), projection)
            yield from self._outputs(name, ".", write(self.weights, projection), make).items()


def find_stack(names: Names, target: Target, tensors: Iterable[Found], latest: Latest) -> DenseStack | PackedStack:
    """What ``tensors`` make up.

    Args:
        latest: one for all stacks of a checkpoint.

    Raises:
        ValueError: names the tensor that is missing, superfluous, or does not fit.
    """
    found = tuple(tensors)
    entries = [one.entry(real=False) for one in found]
    layout = layout_of(target.name, entries)
    if layout not in LAYOUTS:
        raise ValueError(f"{found[0].key} is of experts in a layout of their model's own, which cannot be converted")
    if any(one.place.part for one in found):
        dtype, weights = read_packed(names, target, layout, entries)
        return PackedStack(target, layout, names, found, weights, dtype, latest)
    stored = {one.key: one.stored for one in found}
    count, shape = target.shape[0], target.matrix_shape
    if layout == "fused":
        (whole,) = (_checked(one.key, one.stored, target.shape) for one in found)
        parts = [whole.part(index, count * target.projections, shape) for index in range(count * target.projections)]
        matrices = [parts[first : first + target.projections] for first in range(0, len(parts), target.projections)]
    elif layout == "stacked":
        stacks = [
            _checked(entry.key, stored[entry.key], (count, *shape)) for entry in by_projection(names, target, entries)
        ]
        matrices = [[stack.part(expert, count, shape) for stack in stacks] for expert in range(count)]
    else:
        keys = [parts[""].key for parts in by_matrix(names, target, entries)]
        flat = [_checked(key, stored[key], shape) for key in keys]
        matrices = [flat[first : first + target.projections] for first in range(0, len(flat), target.projections)]
    dtype_name = found[0].stored.dtype
    for one in found:
        if one.stored.dtype != dtype_name:
            raise ValueError(f"{one.key} must be of the dtype of {found[0].key}, {dtype_name}, got {one.stored.dtype}")
    return DenseStack(target, layout, tuple(tuple(row) for row in matrices))


def _checked(key: str, stored: Stored, shape: tuple[int, ...]) -> Stored:
    if stored.dtype not in FLOATS:
        raise ValueError(f"{key} must be bfloat16, float16 or float32, or have an absmax, got {stored.dtype} without")
    if stored.shape != shape:
        raise ValueError(f"{key} must have shape {shape}, got {stored.shape}")
    return stored


def _dense_outputs(
    target: Target,
    names: Names,
    layout: str,
    dtype: str,
    chunks: Callable[[int, int], Chunks],
) -> dict[str, Output]:
    """The tensors in ``layout`` of a stack whose matrices ``chunks`` gives by expert and projection."""
    everything = [(expert, part) for expert in range(target.shape[0]) for part in range(target.projections)]

    def output(shape: tuple[int, ...], matrices: list[tuple[int, int]]) -> Output:
        nbytes = prod(shape) * DTYPES[dtype].itemsize
        return Output(dtype, shape, nbytes, lambda: (chunk for matrix in matrices for chunk in chunks(*matrix)))

    if layout == "fused":
        return {target.name: output(target.shape, everything)}
    if layout == "per-expert":
        return {
            name: output(target.matrix_shape, [(expert, part)]) for expert, part, name in _matrix_names(names, target)
        }
    return {
        name: output((target.shape[0], *target.matrix_shape), [one for one in everything if one[1] == part])
        for part, name in enumerate(_stack_names(target))
    }


def _matrix_names(names: Names, target: Target) -> Iterator[tuple[int, int, str]]:
    """Expert, projection and name of each matrix."""
    patterns = names.per_expert(target)
    if patterns is None:
        raise ValueError(f"{target.name} cannot be written per expert: Transformers knows no such layout of this model")
    for expert in range(target.shape[0]):
        for projection, pattern in enumerate(patterns):
            yield expert, projection, pattern.replace("*", str(expert))


def _stack_names(target: Target) -> list[str]:
    names = stacked_names(target)
    if names is None:
        raise ValueError(f"{target.name} cannot be written in the original project's layout, which has no name for it")
    return names
