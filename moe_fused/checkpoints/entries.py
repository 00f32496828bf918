"""Joins the tensors of a checkpoint that belong to one experts parameter, in whatever layout they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from moe_fused.hub import get_kernel

from .finite import broken_scales, fault_of
from .fused import read_fused
from .names import ACTIVATION_SCALE, MATRIX_PARTS, STACK_PARTS, Names, Target, TensorRole, rename_expert
from .quant_state import MatrixFormat, read_matrix
from .share import Share

if TYPE_CHECKING:
    from qwen3_moe_fused import Format4bit, Packed4bitWeights, Piece


# Layouts with a tensor, or several, for each matrix of an expert.
BY_EXPERT = ("per expert", "published per expert")
# Layouts of formats that are kept as they are published.
PUBLISHED = ("published", "published per expert")


class Entry(NamedTuple):
    """A tensor of the checkpoint that has not been read yet."""

    key: str
    role: TensorRole
    load: Callable[[], Tensor]


def layout_of(name: str, entries: list[Entry]) -> str:
    """Returns the layout that all entries of the parameter ``name`` share.

    Raises:
        ValueError: the entries are in several layouts, or two are the same part of the same matrix.
    """
    seen: dict[tuple[str, int, int, str], str] = {}
    for entry in entries:
        role = entry.role
        part = (role.layout, role.expert, role.projection, role.part)
        # A checkpoint may name the same tensor with and without the prefix of the base model. In the layout "other", only
        # Transformers knows how many tensors make up a stack.
        if (other := seen.setdefault(part, entry.key)) != entry.key and role.layout != "other":
            raise ValueError(f"{name} must have each tensor once, got {other} and {entry.key}, which are the same")
    keys = {entry.role.layout: entry.key for entry in reversed(entries)}
    # The same name can mean dense weights, to a converter of Transformers, and packed weights, in our layout.
    if keys.keys() == {"fused", "other"} and all(not e.role.part for e in entries if e.role.layout == "other"):
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


def load_rows(share: Share, entry: Entry, first: int, count: int) -> Tensor:
    """Reads rows ``first`` to ``first + count`` of a tensor."""
    if entry.key in share.files:
        return share.rows(entry.key, first, count)
    return entry.load()[first : first + count].clone()


def load_dense_rows(share: Share, entry: Entry, first: int, count: int) -> Tensor:
    """As ``load_rows``, in the dtype that dense weights get before they are quantized."""
    part = load_rows(share, entry, first, count)
    return part.to(share.dtype) if part.is_floating_point() else part


def load_matrix(entry: Entry, target: Target) -> Tensor:
    value = load_dense(entry)
    if tuple(value.shape) != target.matrix_shape:
        raise ValueError(f"{entry.key} must have shape {target.matrix_shape}, got {tuple(value.shape)}")
    return value


def by_matrix(names: Names, target: Target, entries: list[Entry], main: str = "") -> list[dict[str, Entry]]:
    """Returns, for each matrix, its entries by part. The projections of expert 0 come first.

    Args:
        main: the part that every matrix must have.

    Raises:
        ValueError: a matrix is missing, or there is one too many.
    """
    table: dict[tuple[int, int], dict[str, Entry]] = {}
    for entry in entries:
        role = entry.role
        if role.expert >= target.shape[0]:
            raise ValueError(
                f"{entry.key} belongs to expert {role.expert}, but {target.name} has {target.shape[0]} experts"
            )
        table.setdefault((role.expert, role.projection), {})[role.part] = entry
    matrices = [(expert, projection) for expert in range(target.shape[0]) for projection in range(target.projections)]
    for expert, projection in matrices:
        if main in table.get((expert, projection), {}):
            continue
        for entry in entries:
            if entry.role.projection == projection and entry.role.part == main:
                key = rename_expert(entry.key, entry.role.expert, expert)
                break
        else:
            key = (names.per_expert(target) or [target.name])[projection].replace("*", str(expert))
            key = key.removesuffix("weight") + main if main else key
        raise ValueError(f"{key} is missing from the checkpoint")
    return [table[matrix] for matrix in matrices]


def by_published_matrix(names: Names, target: Target, entries: list[Entry]) -> list[dict[str, Entry]]:
    """As ``by_matrix``, for the matrices of compressed-tensors, without the scales of activations."""
    weights = [entry for entry in entries if entry.role.part != ACTIVATION_SCALE]
    return by_matrix(names, target, weights, MATRIX_PARTS[0])


def by_projection(names: Names, target: Target, entries: list[Entry]) -> list[Entry]:
    """Returns the packed or dense stack of each projection, in the original project's layout.

    Raises:
        ValueError: a stack is missing.
    """
    stacks = {entry.role.projection: entry for entry in entries if not entry.role.part}
    for projection in range(target.projections):
        if projection not in stacks:
            raise ValueError(
                f"the {('gate', 'up')[projection]} projection of {target.name} is missing from the checkpoint"
            )
    return [stacks[projection] for projection in range(target.projections)]


def _read_per_expert(names: Names, target: Target, entries: list[Entry]) -> tuple[torch.dtype, Packed4bitWeights]:
    table = by_matrix(names, target, entries)
    kernel = get_kernel()

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

    stack = kernel.Format4bit(
        target.shape, form.quant_type, form.blocksize, form.double_quant, target.projections, form.dtype
    )
    return form.dtype, kernel.interchange.stack_of_pieces(pieces(), stack)


def _read_stacked(names: Names, target: Target, entries: list[Entry]) -> tuple[torch.dtype, Packed4bitWeights]:
    kernel = get_kernel()
    forms, pieces = [], []
    shape = (target.shape[0], *target.matrix_shape)
    stacks = by_projection(names, target, entries)
    for projection, stack in enumerate(stacks):
        parts = {entry.role.part: entry.load() for entry in entries if entry.role.projection == projection}
        form, piece = read_matrix(stack.key, parts, shape)
        forms.append(form)
        pieces.append(piece)
        if form != forms[0]:
            raise ValueError(f"{stack.key} must be quantized like {stacks[0].key}, {forms[0]}, got {form}")
    form = forms[0]
    whole = kernel.Format4bit(
        target.shape, form.quant_type, form.blocksize, form.double_quant, target.projections, form.dtype
    )
    return form.dtype, kernel.interchange.stack_of_fused_pieces(pieces, whole)


def _read_fused(names: Names, target: Target, entries: list[Entry]) -> tuple[torch.dtype, Packed4bitWeights]:
    parts = {entry.role.part: entry.load() for entry in entries}
    return read_fused(target.name, parts, target.shape, target.projections)


def _read_share_of_fused(share: Share, target: Target, entries: list[Entry]) -> tuple[torch.dtype, Packed4bitWeights]:
    first, count = share.of(target.shape[0])
    parts = {
        entry.role.part: entry.load() if entry.role.part == "format" else load_rows(share, entry, first, count)
        for entry in entries
    }
    return read_fused(target.name, parts, target.shape, target.projections, count)


def share_of_matrices(
    names: Names, share: Share, target: Target, entries: list[Entry], main: str = ""
) -> tuple[Target, list[Entry]]:
    """Returns what a process loads of experts with tensors for each matrix: a smaller stack, and its entries.

    Args:
        main: the part that every matrix must have.

    Raises:
        ValueError: a matrix is missing, or there is one too many, of any expert.
    """
    by_matrix(names, target, entries, main)
    first, count = share.of(target.shape[0])
    held = [
        entry._replace(role=entry.role._replace(expert=entry.role.expert - first))
        for entry in entries
        if share.holds(entry.role.expert, target.shape[0])
    ]
    return replace(target, shape=(count, *target.shape[1:])), held


def read_published(
    names: Names, target: Target, layout: str, entries: list[Entry], share: Share | None, form: Format4bit
) -> tuple[Packed4bitWeights, Tensor | None]:
    """Reads weights in a format that is kept as it is published.

    Args:
        layout: one of ``PUBLISHED``.
        share: the process whose experts alone are wanted; None if all are.
        form: the format of the whole stack.

    Returns:
        The weights, and the scales of activations (E, projections) fp32 on the CPU, with NaN for a matrix that has none, or
        None if no matrix has one.

    Raises:
        ValueError: a tensor is missing, superfluous or does not fit. The message names it.
    """
    main, wanted = _published_layout(layout, entries, form)
    interchange = get_kernel().interchange
    weights: Packed4bitWeights
    if layout == "published":
        load = None
        if share is not None:
            first, count = share.of(form.shape[0])
            load = partial(load_rows, share, first=first, count=count)
            form = replace(form, shape=(count, *target.shape[1:]))
        tensors = _load_parts({entry.role.part: entry for entry in entries}, wanted, form, load, stacked=True)
        weights = interchange.stack_of_published(tensors, form)
        keys = {entry.role.part: entry.key for entry in entries}
        check_scales(weights, wanted, lambda part, *_: keys[part])
        return weights, None
    if share is not None:
        target, entries = share_of_matrices(names, share, target, entries, main)
        form = replace(form, shape=target.shape)
    scales = [entry for entry in entries if entry.role.part == ACTIVATION_SCALE]
    table = by_published_matrix(names, target, entries)
    weights = interchange.stack_of_published_matrices((_load_parts(parts, wanted, form) for parts in table), form)
    check_scales(
        weights,
        wanted,
        lambda part, expert, projection: table[expert * target.projections + projection][part].key,
    )
    if not scales:
        return weights, None
    activations = torch.full((target.shape[0], target.projections), torch.nan)
    for entry in scales:
        activations[entry.role.expert, entry.role.projection] = _load(entry, torch.float32, (1,))[0]
    return weights, activations


def check_published(names: Names, target: Target, layout: str, entries: list[Entry], form: Format4bit) -> None:
    """Checks weights as ``read_published`` does, and makes nothing of them. The entries may be on meta.

    Raises:
        ValueError: a tensor is missing, superfluous or does not fit. The message names it.
    """
    _, wanted = _published_layout(layout, entries, form)
    if layout == "published":
        _load_parts({entry.role.part: entry for entry in entries}, wanted, form, stacked=True)
        return
    for parts in by_published_matrix(names, target, entries):
        _load_parts(parts, wanted, form)
    for entry in entries:
        if entry.role.part == ACTIVATION_SCALE:
            _load(entry, torch.float32, (1,))


def check_published_matrix(module: str, entries: list[Entry], form: Format4bit) -> None:
    """As ``check_published``, for a matrix of compressed-tensors that stands alone.

    Args:
        module: the name of the layer that it belongs to.
        form: that of a stack of this matrix alone.
    """
    check_published(Names(()), Target(f"{module}.weight", form.shape, 1), "published per expert", entries, form)


# The dtype and the shape of each tensor of a matrix, by the part of its name.
PublishedTensors: TypeAlias = "Mapping[str, tuple[torch.dtype, tuple[int, ...]]]"


def published_as(form: Format4bit, main: str) -> PublishedTensors | None:
    """Returns the tensors of a matrix in the way of publishing that has one called ``main``, or None if there is none."""
    layouts: Iterable[PublishedTensors] = form.weight_format.published(form)
    return next((layout for layout in layouts if main in layout), None)


def check_scales(weights: Packed4bitWeights, published: Iterable[str], key_of: Callable[[str, int, int], str]) -> None:
    """Checks the scales of weights that were read.

    Args:
        published: the names of the tensors of a matrix in the checkpoint, in the order of the format's storage.
        key_of: from one of them, an expert and a projection to its name in the checkpoint.

    Raises:
        ValueError: a scale makes weights NaN or infinite. The message names the tensor that holds it.
    """
    if (broken := broken_scales(weights)) is not None:
        stored, expert, projection = broken
        part = dict(zip(weights.tensors(), published, strict=True))[stored]
        key = key_of(part, expert, projection)
        raise ValueError(f"{key} {fault_of(key)}")


def _published_layout(layout: str, entries: list[Entry], form: Format4bit) -> tuple[str, PublishedTensors]:
    """Returns the part that every stack or matrix must have, and what each part of a matrix must be."""
    main = STACK_PARTS[0] if layout == "published" else MATRIX_PARTS[0]
    wanted = published_as(form, main)
    if wanted is not None:
        return main, wanted
    raise ValueError(
        f"{entries[0].key} is not a tensor of {form.quant_type} weights, which the config of the checkpoint names"
    )


def _load_parts(
    parts: dict[str, Entry],
    wanted: PublishedTensors,
    form: Format4bit,
    load: Callable[[Entry], Tensor] | None = None,
    *,
    stacked: bool = False,
) -> dict[str, Tensor]:
    """Loads the tensors of a matrix, or of a stack of the experts and projections of ``form``.

    Args:
        parts: the entries by part.
        wanted: the dtype and the shape of each part of a matrix.
        load: what loads an entry, if not all of it is wanted.
        stacked: whether a tensor is for a stack.
    """
    entry = next(iter(parts.values()))
    base = entry.key.removesuffix(entry.role.part)
    for part in parts:
        if part not in wanted:
            raise ValueError(f"{base}{part} is not a tensor of {form.quant_type} weights")
    tensors = {}
    for part, (dtype, shape) in wanted.items():
        if part not in parts:
            raise ValueError(f"{base}{part} is missing, without which {form.quant_type} weights cannot be read")
        whole = (form.shape[0], form.projections * shape[0], *shape[1:]) if stacked else shape
        tensors[part] = _load(parts[part], dtype, whole, load)
    return tensors


def _load(
    entry: Entry, dtype: torch.dtype, shape: tuple[int, ...], load: Callable[[Entry], Tensor] | None = None
) -> Tensor:
    value = load(entry) if load else entry.load()
    if value.dtype != dtype or tuple(value.shape) != shape:
        wanted, got = (str(each).removeprefix("torch.") for each in (dtype, value.dtype))
        raise ValueError(f"{entry.key} must be {wanted} of shape {shape}, got {got} of shape {tuple(value.shape)}")
    return value


def _read_other(names: Names, target: Target, entries: list[Entry]) -> tuple[torch.dtype, Packed4bitWeights]:
    key = next(entry.key for entry in entries if entry.role.part)
    raise ValueError(f"{key} belongs to 4-bit weights in an unknown layout: {target.name} cannot be loaded from it")


_READERS: dict[str, Callable[[Names, Target, list[Entry]], tuple[torch.dtype, Packed4bitWeights]]] = {
    "per expert": _read_per_expert,
    "stacked": _read_stacked,
    "fused": _read_fused,
    "other": _read_other,
}


def read_packed(
    names: Names, target: Target, layout: str, entries: list[Entry], share: Share | None = None
) -> tuple[torch.dtype, Packed4bitWeights]:
    """Reads the 4-bit weights that ``entries`` make up, and returns their former dtype and the weights.

    Args:
        share: the process whose experts alone are wanted; None if all are.

    Raises:
        ValueError: a tensor is missing, superfluous or does not fit. The message names it.
    """
    if share is not None and layout == "per expert":
        target, entries = share_of_matrices(names, share, target, entries)
    elif share is not None and layout == "fused":
        return _read_share_of_fused(share, target, entries)
    elif share is not None:  # groups of scales run over experts, so the whole stack is read
        dtype, weights = _READERS[layout](names, target, entries)
        held = weights.narrow(*share.of(target.shape[0]))
        return dtype, held.replaced(**{name: value.clone() for name, value in held.tensors().items()})
    return _READERS[layout](names, target, entries)
