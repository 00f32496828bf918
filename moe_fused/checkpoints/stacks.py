"""Converts one experts parameter from a checkpoint in one layout into a checkpoint in another.

Dense stacks never become tensors: each layout holds the same matrices in another order, so ranges of bytes are copied.
Packed stacks are read as in Transformers' loading loop, twice. The first time, all large tensors are on meta, so that errors
are found before anything is written. The second time, they are read for their bits.
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
from .names import MATRIX_PARTS, STACK_PARTS, Names, Target, TensorRole, stacked_names
from .quant_state import read_format, write_matrix, write_piece
from .safetensors_file import DTYPES, Chunks, as_bytes, dtype_name
from .tensor_files import FLOATS, Output, Stored, cast_chunks, cast_name

if TYPE_CHECKING:
    from qwen3_moe_fused import Packed4bitWeights

T = TypeVar("T")

# For each layout, by its name in ``names``, the name that users know.
LAYOUTS = {
    "per expert": "per-expert",
    "fused": "fused",
    "stacked": "original",
    "published per expert": "per-expert",
    "published": "fused",
}
# Parts of packed weights whose values need not be read to check that they fit.
_LARGE = ("", "absmax", "nested_absmax", "nested_offset", *STACK_PARTS, *MATRIX_PARTS)


_DOUBLE = ", double quantization"


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Found(NamedTuple):
    """A tensor in the checkpoint that belongs to a stack or to a matrix."""

    key: str
    role: TensorRole
    stored: Stored

    def entry(self, real: bool) -> Entry:
        """Makes the entry that readers take. Large tensors are on meta unless ``real``."""
        load = self.stored.load if real or self.role.part not in _LARGE else self.stored.empty
        return Entry(self.key, self.role, functools.partial(load, self.key))


class Latest:
    """Keeps the last value that was made for each purpose, and drops it before the next one is made."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Hashable, Any]] = {}

    def get(self, purpose: str, key: Hashable, make: Callable[[], T]) -> T:
        if purpose not in self._values or self._values[purpose][0] != key:
            self._values.pop(purpose, None)
            self._values[purpose] = key, make()
        value: T = self._values[purpose][1]
        return value


@dataclass(frozen=True)
class DenseCheckpointStack:
    """A dense experts parameter in a checkpoint.

    Attributes:
        target: the parameter.
        layout: the layout of the checkpoint, by its name in ``names``.
        matrices: for each expert, its matrices, one for each projection.
    """

    target: Target
    layout: str
    matrices: tuple[tuple[Stored, ...], ...]

    @property
    def description(self) -> str:
        return named(DTYPES[self.matrices[0][0].dtype])

    def description_after(self, dtype: torch.dtype | None, dequantize: bool) -> str:
        """Describes the stack after its conversion."""
        return named(dtype) if dtype else self.description

    def outputs(self, names: Names, layout: str, dtype: torch.dtype | None) -> dict[str, Output]:
        """Returns the tensors of the stack in ``layout``, by their names in the model.

        Args:
            dtype: the dtype to cast to, or None for no cast.

        Raises:
            ValueError: the model has no names for that layout.
        """
        name = cast_name(self.matrices[0][0], dtype)
        return dense_outputs(
            self.target, names, layout, name, lambda expert, part: cast_chunks(self.matrices[expert][part], name)
        )


@dataclass(frozen=True)
class PackedCheckpointStack:
    """An experts parameter in a checkpoint that is in 4 bits.

    Attributes:
        target, layout: as in ``DenseCheckpointStack``.
        names: the names of the model's experts in checkpoints.
        tensors: the tensors of the parameter in the checkpoint.
        weights: the packed weights, on meta.
        source_dtype: the dtype of the weights before they were quantized.
        latest: the values read last. All stacks of a checkpoint share it, because they are written one after the other.
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
        """Describes the stack after its conversion."""
        if dequantize:
            return named(dtype or self.source_dtype)
        return self.description.removesuffix(_DOUBLE) if self.loses_double_quantization else self.description

    @property
    def loses_double_quantization(self) -> bool:
        """Whether the absmaxes are in 8 bits in the checkpoint, and cannot be in any other layout."""
        return self._was_double() and not self.weights.format.double_quant

    def _was_double(self) -> bool:
        return any(found.role.part == "nested_absmax" for found in self.tensors)

    def dequantized(self, layout: str, dtype: torch.dtype | None) -> dict[str, Output]:
        """Returns the dense tensors of the stack in ``layout``, by their names in the model.

        Args:
            dtype: the dtype of these tensors. None is that of the weights before they were quantized.

        Raises:
            ValueError: the model has no names for that layout.
        """
        wanted = dtype or self.source_dtype

        def chunks(expert: int, part: int) -> list[memoryview]:
            dense = self.latest.get(
                "dense", (self.target.name, expert), lambda: self._read().narrow(expert, 1).dequantize(wanted)[0]
            )
            return [as_bytes(dense.chunk(self.target.projections)[part])]

        return dense_outputs(self.target, self.names, layout, dtype_name(wanted), chunks)

    def outputs(self, layout: str) -> dict[str, Output]:
        """Returns the tensors of the stack in ``layout``, by their names in the model.

        Raises:
            ValueError: the model has no names for that layout, or the layout cannot hold the stack.
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
        """Makes outputs of the tensors that ``make`` returns, by the end of their names. ``example`` is like its result."""

        def one(part: str) -> Tensor:
            return self.latest.get("parts", name, make)[part]

        return {
            f"{name}{separator}{part}" if part else name: Output.of_tensor(value, functools.partial(one, part))
            for part, value in example.items()
        }

    def _matrices(self) -> Iterator[tuple[str, Output]]:
        form, offsets = self.weights.format, self._offsets()
        for expert, projection, name in matrix_names(self.names, self.target):
            piece = get_kernel().interchange.piece_of(self.weights, expert, projection)
            if offsets is not None:  # the offset is part of the JSON, whose length must be known
                piece = replace(piece, nested_offset=offsets[expert, projection])
            example = write_piece(piece, self.target.matrix_shape, form, self.source_dtype)

            def make(expert: int = expert, projection: int = projection) -> dict[str, Tensor]:
                return write_matrix(self._read(), expert, projection, self.source_dtype)

            yield from self._outputs(name, ".", example, make).items()

    def _offsets(self) -> Tensor | None:
        """Returns the nested offset of each matrix, (E, projections) fp32, or None without double quantization."""
        if not self.weights.format.double_quant:
            return None
        size = (self.target.shape[0], self.target.projections)
        if self.layout == "fused":
            (found,) = (found for found in self.tensors if found.role.part == "nested_offset")
            return found.stored.load(found.key).view(torch.float32).view(size)
        entries = [found.entry(real=False) for found in self.tensors]
        shape = (size[0], *self.target.matrix_shape)
        offsets = []
        for projection, stack in enumerate(by_projection(self.names, self.target, entries)):
            parts = {
                entry.role.part: entry.load()
                for entry in entries
                if entry.role.projection == projection and entry.role.part.startswith("quant_state")
            }
            offsets.append(read_format(stack.key, parts, shape)[1])
        return torch.tensor(offsets, dtype=torch.float32).expand(size)

    def _stacks(self) -> Iterator[tuple[str, Output]]:
        if self.weights.format.double_quant:
            raise ValueError(
                f"{self.target.name} cannot be written in the original project's layout: its double quantization has an "
                "offset for each matrix, and that layout one for all experts; give --dequantize or --to fused"
            )

        def write(weights: Packed4bitWeights, projection: int) -> dict[str, Tensor]:
            kernel = get_kernel()
            shape = (weights.shape[0], *self.target.matrix_shape)
            packed, absmax = (
                value.view(shape[0], self.target.projections, -1)[:, projection].reshape(-1)
                for value in (weights.packed, weights.scales())
            )
            return write_piece(kernel.Piece(packed[:, None], absmax), shape, weights.format, self.source_dtype)

        for projection, name in enumerate(_stack_names(self.target)):
            make = functools.partial(lambda projection: write(self._read(), projection), projection)
            yield from self._outputs(name, ".", write(self.weights, projection), make).items()


def find_stack(
    names: Names, target: Target, tensors: Iterable[Found], latest: Latest
) -> DenseCheckpointStack | PackedCheckpointStack:
    """Joins ``tensors`` to the stack that they make up.

    Args:
        latest: the same object for all stacks of a checkpoint.

    Raises:
        ValueError: a tensor is missing, superfluous or does not fit. The message names it.
    """
    found = tuple(tensors)
    entries = [one.entry(real=False) for one in found]
    layout = layout_of(target.name, entries)
    if layout not in LAYOUTS:
        raise ValueError(
            f"{found[0].key} belongs to experts in a layout that only their model has, which cannot be converted"
        )
    if any(one.role.part for one in found):
        dtype, weights = read_packed(names, target, layout, entries)
        return PackedCheckpointStack(target, layout, names, found, weights, dtype, latest)
    stored = {one.key: one.stored for one in found}
    count, shape = target.shape[0], target.matrix_shape
    if layout == "fused":
        if target.transposed:
            shape = target.shape[2], target.shape[1]
        (whole,) = (_checked(one.key, one.stored, target.dense_shape) for one in found)
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
    return DenseCheckpointStack(target, layout, tuple(tuple(row) for row in matrices))


def _checked(key: str, stored: Stored, shape: tuple[int, ...]) -> Stored:
    if stored.dtype not in FLOATS:
        raise ValueError(f"{key} must be bfloat16, float16 or float32, or have an absmax, got {stored.dtype} without")
    if stored.shape != shape:
        raise ValueError(f"{key} must have shape {shape}, got {stored.shape}")
    return stored


def dense_outputs(
    target: Target,
    names: Names,
    layout: str,
    dtype: str,
    chunks: Callable[[int, int], Chunks],
) -> dict[str, Output]:
    """Makes the tensors of a dense stack in ``layout``. ``chunks`` returns the bytes of an expert's projection."""
    everything = [(expert, part) for expert in range(target.shape[0]) for part in range(target.projections)]

    def output(shape: tuple[int, ...], matrices: list[tuple[int, int]]) -> Output:
        nbytes = prod(shape) * DTYPES[dtype].itemsize
        return Output(dtype, shape, nbytes, lambda: (chunk for matrix in matrices for chunk in chunks(*matrix)))

    if layout == "fused":
        return {target.name: output(target.dense_shape, everything)}
    if layout == "per-expert":
        return {
            name: output(target.matrix_shape, [(expert, part)]) for expert, part, name in matrix_names(names, target)
        }
    return {
        name: output((target.shape[0], *target.matrix_shape), [one for one in everything if one[1] == part])
        for part, name in enumerate(_stack_names(target))
    }


def matrix_names(names: Names, target: Target) -> Iterator[tuple[int, int, str]]:
    """Yields expert, projection and name of each matrix."""
    patterns = names.per_expert(target)
    if patterns is None:
        raise ValueError(
            f"{target.name} cannot be written per expert: Transformers knows no such layout of this "
            "model; give --to fused"
        )
    for expert in range(target.shape[0]):
        for projection, pattern in enumerate(patterns):
            yield expert, projection, pattern.replace("*", str(expert))


def _stack_names(target: Target) -> list[str]:
    names = stacked_names(target)
    if names is None:
        raise ValueError(f"{target.name} cannot be written in the original project's layout, which has no name for it")
    return names
