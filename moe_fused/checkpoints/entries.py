"""Tensors of a checkpoint that belong to one experts parameter: which layout they are in, and what they make up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_fused.hub import get_kernel

from .fused import read_fused
from .names import Names, Place, Target, rename_expert
from .quant_state import MatrixFormat, read_matrix

if TYPE_CHECKING:
    from qwen3_moe_fused.quantization import Packed4bitWeights, Piece


class Entry(NamedTuple):
    """A tensor of the checkpoint that was not read yet."""

    key: str
    place: Place
    load: Callable[[], Tensor]


def layout_of(name: str, entries: list[Entry]) -> str:
    """The layout that all entries of the parameter ``name`` share.

    Raises:
        ValueError: they are of several, or two are the same part of the same matrix.
    """
    seen: dict[tuple[str, int, int, str], str] = {}
    for entry in entries:
        place = entry.place
        part = (place.layout, place.expert, place.projection, place.part)
        # A checkpoint may name a tensor with the prefix of the base model and without. How many make up a stack that only
        # Transformers can put together, it alone knows.
        if (other := seen.setdefault(part, entry.key)) != entry.key and place.layout != "other":
            raise ValueError(f"{name} must have each tensor once, got {other} and {entry.key}, which are the same")
    keys = {entry.place.layout: entry.key for entry in reversed(entries)}
    # The same name is that of dense weights for a converter of Transformers, and of packed ones in our layout.
    if keys.keys() == {"fused", "other"} and all(not e.place.part for e in entries if e.place.layout == "other"):
        return "fused"
    if len(keys) > 1:
        raise ValueError(f"{name} must be in one layout, got {' and '.join(sorted(keys.values()))}")
    return next(iter(keys))


def load_dense(entry: Entry) -> Tensor:
    value = entry.load()
    if not value.is_floating_point():
        raise ValueError(
            f"{entry.key} must be a floating-point tensor or have an absmax, got "
            f"{str(value.dtype).removeprefix('torch.')} without"
        )
    return value


def load_matrix(entry: Entry, target: Target) -> Tensor:
    value = load_dense(entry)
    if tuple(value.shape) != target.matrix_shape:
        raise ValueError(f"{entry.key} must have shape {target.matrix_shape}, got {tuple(value.shape)}")
    return value


def by_matrix(names: Names, target: Target, entries: list[Entry]) -> list[dict[str, Entry]]:
    """The entries by part, for each matrix, the projections of expert 0 first.

    Raises:
        ValueError: a matrix is missing, or one too many.
    """
    table: dict[tuple[int, int], dict[str, Entry]] = {}
    for entry in entries:
        place = entry.place
        if place.expert >= target.shape[0]:
            raise ValueError(f"{entry.key} is of expert {place.expert}, but {target.name} has {target.shape[0]}")
        table.setdefault((place.expert, place.projection), {})[place.part] = entry
    matrices = [(expert, projection) for expert in range(target.shape[0]) for projection in range(target.projections)]
    for expert, projection in matrices:
        if "" in table.get((expert, projection), {}):
            continue
        for entry in entries:
            if entry.place.projection == projection and not entry.place.part:
                key = rename_expert(entry.key, entry.place.expert, expert)
                break
        else:
            key = (names.per_expert(target) or [target.name])[projection].replace("*", str(expert))
        raise ValueError(f"{key} is missing from the checkpoint")
    return [table[matrix] for matrix in matrices]


def by_projection(names: Names, target: Target, entries: list[Entry]) -> list[Entry]:
    """The packed or dense stack of each projection, in the original project's layout.

    Raises:
        ValueError: one is missing.
    """
    stacks = {entry.place.projection: entry for entry in entries if not entry.place.part}
    for projection in range(target.projections):
        if projection not in stacks:
            raise ValueError(
                f"the {('gate', 'up')[projection]} projection of {target.name} is missing from the checkpoint"
            )
    return [stacks[projection] for projection in range(target.projections)]


def _read_per_expert(names: Names, target: Target, entries: list[Entry]) -> tuple[torch.dtype, Packed4bitWeights]:
    table = by_matrix(names, target, entries)
    quantization = get_kernel().quantization

    def read(parts: dict[str, Entry]) -> tuple[MatrixFormat, Piece]:
        return read_matrix(parts[""].key, {part: entry.load() for part, entry in parts.items()}, target.matrix_shape)

    form, first = read(table[0])

    def pieces() -> Iterator[Piece]:
        yield first
        for parts in table[1:]:
            other, piece = read(parts)
            if other != form:
                raise ValueError(f"{parts[''].key} must be quantized like {table[0][''].key}, {form}, got {other}")
            yield piece

    stack = quantization.Format4bit(
        target.shape, form.quant_type, form.blocksize, form.double_quant, target.projections, form.dtype
    )
    return form.dtype, quantization.Packed4bitWeights.from_pieces(pieces(), stack)


def _read_stacked(names: Names, target: Target, entries: list[Entry]) -> tuple[torch.dtype, Packed4bitWeights]:
    quantization = get_kernel().quantization
    forms, pieces = [], []
    shape = (target.shape[0], *target.matrix_shape)
    stacks = by_projection(names, target, entries)
    for projection, stack in enumerate(stacks):
        parts = {entry.place.part: entry.load() for entry in entries if entry.place.projection == projection}
        form, piece = read_matrix(stack.key, parts, shape)
        forms.append(form)
        pieces.append(piece)
        if form != forms[0]:
            raise ValueError(f"{stack.key} must be quantized like {stacks[0].key}, {forms[0]}, got {form}")
    form = forms[0]
    whole = quantization.Format4bit(
        target.shape, form.quant_type, form.blocksize, form.double_quant, target.projections, form.dtype
    )
    return form.dtype, quantization.Packed4bitWeights.from_fused(pieces, whole)


def _read_fused(names: Names, target: Target, entries: list[Entry]) -> tuple[torch.dtype, Packed4bitWeights]:
    parts = {entry.place.part: entry.load() for entry in entries}
    return read_fused(target.name, parts, target.shape, target.projections)


def _read_other(names: Names, target: Target, entries: list[Entry]) -> tuple[torch.dtype, Packed4bitWeights]:
    key = next(entry.key for entry in entries if entry.place.part)
    raise ValueError(f"{key} is of 4-bit weights in a layout that is not known: {target.name} cannot be loaded from it")


_READERS: dict[str, Callable[[Names, Target, list[Entry]], tuple[torch.dtype, Packed4bitWeights]]] = {
    "per expert": _read_per_expert,
    "stacked": _read_stacked,
    "fused": _read_fused,
    "other": _read_other,
}


def read_packed(
    names: Names, target: Target, layout: str, entries: list[Entry]
) -> tuple[torch.dtype, Packed4bitWeights]:
    """The 4-bit weights that ``entries`` make up, and their dtype before they were quantized.

    Raises:
        ValueError: names the tensor that is missing, superfluous, or does not fit.
    """
    return _READERS[layout](names, target, entries)
