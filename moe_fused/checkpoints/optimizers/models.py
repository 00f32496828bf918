"""The weights of experts as an optimizer's parameters: what becomes of each matrix in another layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from moe_fused.checkpoints.architecture import Architecture
from moe_fused.checkpoints.names import Target, stacked_names
from moe_fused.checkpoints.stacks import LAYOUTS

from .parameters import Key, Side, decaying
from .rearrange import Load, Unit
from .state import Shape

# The order of an expert's layers in the models of Transformers 4 and of the original project.
_LEAVES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class ModelParameters:
    """The parameters of a model in every layout of its experts.

    A checkpoint does not tell in which one it was trained: Transformers 5 writes its stacks expert by expert.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.parameters: dict[str, Shape] = {
            name: tuple(parameter.shape) for name, parameter in architecture.model.named_parameters()
        }
        self.places = {name: place for place, name in enumerate(self.parameters)}

    @cached_property
    def decays(self) -> Callable[[str], bool]:
        """Whether Trainer lets a parameter decay. Importing it takes seconds, which one group does not need."""
        return decaying(self.architecture.model)

    def names(self, target: Target, layout: str) -> list[str] | None:
        """Of the tensors of ``target``, expert by expert or all in one; None if ``layout`` has no such."""
        if layout == "fused":
            return [target.name]
        if layout == "original":
            return stacked_names(target)
        patterns = self.architecture.names.per_expert(target)
        return patterns and [
            pattern.replace("*", str(expert)) for expert in range(target.shape[0]) for pattern in patterns
        ]

    def side(self, layout: str) -> Side | None:
        """The parameters in ``layout``; None if this model's experts cannot be in it."""
        targets = self.architecture.names.targets
        shapes, owners = {}, {}
        for name, shape in self.parameters.items():
            target = targets.get(name)
            names = [name] if target is None else self.names(target, layout)
            if names is None:
                return None
            for own in names:
                shapes[own] = shape if target is None else _shape(target, layout)
                owners[own] = name

        def called(name: str) -> str:
            return self.architecture.in_model(name)

        def module(name: str) -> tuple[str, Key]:
            owner = owners[name]
            key: Key = (self.places[owner],)
            if owner in targets and layout != "fused":
                place = self.architecture.names.locate(name)
                leaf = next((part for part in reversed(name.split(".")) if part in _LEAVES), None)
                if place is None or leaf is None:
                    raise ValueError(f"{name} is of experts whose order is not known: the names must be given")
                key = (place.expert, _LEAVES.index(leaf))
            return owner.rpartition(".")[0], key

        return Side(layout, shapes, called, module, layout == "fused", lambda name: self.decays(owners[name]))

    def sides(self) -> Iterator[Side]:
        for layout in LAYOUTS.values():
            if (side := self.side(layout)) is not None:
                yield side

    def units(self, source: str, to: str) -> Iterator[Unit]:
        """What becomes of the experts' weights between the layouts ``source`` and ``to``; all others stay as they are."""
        for target in self.architecture.names.targets.values():
            names, others = self.names(target, source), self.names(target, to)
            if names is None or others is None:
                raise ValueError(f"{target.name} has no names in layout {to if names else source}")
            shapes = dict.fromkeys(names, _shape(target, source))
            yield Unit(shapes, partial(_convert, target, source, names, to, others))


def _shape(target: Target, layout: str) -> Shape:
    """Of each tensor of ``target``."""
    return {
        "fused": target.shape,
        "original": (target.shape[0], *target.matrix_shape),
        "per-expert": target.matrix_shape,
    }[layout]


def _convert(
    target: Target, source: str, names: list[str], to: str, others: list[str], load: Load
) -> Iterator[tuple[str, Tensor]]:
    matrices = (target.shape[0], target.projections, *target.matrix_shape)
    tensors = [load(name) for name in names]
    stack = tensors[0] if source == "fused" else torch.stack(tensors, 1 if source == "original" else 0)
    stack = stack.reshape(matrices)
    if to == "fused":
        yield others[0], stack.reshape(target.shape)
    else:
        parts = stack.unbind(1) if to == "original" else stack.flatten(0, 1).unbind()
        yield from zip(others, parts, strict=True)
