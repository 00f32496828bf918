"""The factors of LoRA on experts as parameters of an optimizer, and how each moves to another layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from moe_fused.checkpoints.adapters.factors import GATE, GATE_UP, PROJECTIONS, UP, Block
from moe_fused.checkpoints.adapters.layouts import ExpertLayout, Grouped, unprefixed
from moe_fused.checkpoints.adapters.saved import SavedAdapter

from .parameters import Key, Side
from .rearrange import Load, Unit

_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
# The adapter's name within the name of a parameter. PEFT leaves it out of files.
_NAMED = re.compile(r"\.(lora_[AB])\.[^.]+(?=\.weight$)|\.(lora_embedding_[AB])\.[^.]+$|\.modules_to_save\.[^.]+(?=\.)")


def called(name: str) -> str:
    """Returns the name that files have for the parameter ``name`` of a model with an adapter."""
    return _NAMED.sub(lambda match: f".{match[1] or match[2]}" if match[1] or match[2] else "", name)


def side(adapter: SavedAdapter) -> Side:
    """Describes the parameters of ``adapter``, all of which are trained."""

    def module(key: str) -> tuple[str, Key]:
        if role := adapter.roles.get(key):
            order = PROJECTIONS.index(role.projection), "AB".index(role.factor)
            return unprefixed(role.block), (role.expert, *order)
        factor = next((index for index, name in enumerate(_FACTORS) if f".{name}" in key), 0)
        return adapter.others[key] or unprefixed(key).rpartition(".")[0], (factor,)

    return Side(adapter.layout.layout.value, adapter.shapes, called, module, adapter.layout.fused)


def _shapes(adapter: SavedAdapter, group: Grouped) -> Block:
    """Reads ``group`` with arbitrary bytes for values. Stacking meta tensors would take ten times as long."""
    return adapter.layout.read(group, adapter.config, lambda key: torch.empty(adapter.shapes[key], dtype=torch.uint8))


def _check_alike(source: SavedAdapter, target: SavedAdapter) -> None:
    """Raises ValueError unless both adapters compute the same from the same elements."""
    targets = {group.name: group for group in target.groups()}
    for group in source.groups():
        if group.name not in targets:
            raise ValueError(f"{next(iter(group.keys.values()))} belongs to {group.name}, which has no LoRA in TARGET")
        other = targets[group.name]
        present = set(group.projections) | set(other.projections)
        if GATE_UP in present and present & {GATE, UP}:
            fused, separate = (group, other) if GATE_UP in group.projections else (other, group)
            common = next(key for role, key in fused.keys.items() if role[1:3] == (GATE_UP, "A"))
            single = next(key for role, key in separate.keys.items() if role[1] in (GATE, UP) and role.factor == "A")
            raise ValueError(
                f"{common} is one lora_A for gate_proj and up_proj, {single} is for one of them: the moments of one "
                "factor for both do not follow from those of two factors, nor the other way round"
            )
        blocks = _shapes(source, group), _shapes(target, other)
        for projection, factors in blocks[0].projections.items():
            if projection not in blocks[1].projections:
                raise ValueError(f"{group.name}: {projection}_proj is adapted in SOURCE only")
            after = blocks[1].projections[projection]
            name = f"{group.name}: {projection}_proj"
            _check_equal(name, "rank", factors.rank, after.rank)
            _check_equal(name, "scaling", factors.scaling.value(factors.rank), after.scaling.value(after.rank))
    for key, module in source.others.items():
        if target.shapes.get(key) != source.shapes[key]:
            raise ValueError(f"{key} has shape {source.shapes[key]} in SOURCE, {target.shapes.get(key)} in TARGET")
        if module:
            configs = (source.config, target.config)
            scalings = [config.scaling_of(module).value(config.rank_of(module)) for config in configs]
            _check_equal(module, "scaling", *scalings)


def _check_equal(what: str, kind: str, one: float, other: float) -> None:
    if one != other:
        raise ValueError(
            f"{what} has {kind} {one} in SOURCE, {other} in TARGET: the moments are for {one} "
            "(moe-fused convert adapter --scaling keep leaves it)"
        )


def units(source: SavedAdapter, target: SavedAdapter) -> Iterator[Unit]:
    """Yields how the factors of experts move. All other parameters stay as they are.

    Raises:
        ValueError: the adapters differ in more than the order of their elements. The message says where.
    """
    _check_alike(source, target)
    for group in source.groups():
        for projection in group.projections:
            for factor in "AB":
                keys = [key for role, key in group.keys.items() if role[1:3] == (projection, factor)]
                shapes = {key: source.shapes[key] for key in keys}
                yield Unit(shapes, partial(_convert, source, target.layout, group, frozenset(keys)))


def _convert(
    source: SavedAdapter, to: ExpertLayout, group: Grouped, keys: frozenset[str], load: Load
) -> Iterator[tuple[str, Tensor]]:
    """Converts the factors ``keys``. All others are filled with -1 and dropped; they are needed for the names alone."""

    def one(key: str) -> Tensor:
        return load(key) if key in keys else torch.full(source.shapes[key], -1)

    for name, tensor in to.write(source.layout.read(group, source.config, one)):
        if tensor.flatten()[0] >= 0:
            yield name, tensor
