"""The weights of experts as parameters of an optimizer, and how each matrix moves to another layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from moe_fused.checkpoints.architecture import Architecture
from moe_fused.checkpoints.names import Target, stacked_names
from moe_fused.checkpoints.places import MODEL_LAYOUTS

from .parameters import Key, Side, decaying
from .rearrange import Load, Unit
from .state import Shape

# The order of an expert's layers in the models of Transformers 4 and of the original project.
_LEAVES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class ModelParameters:
    """The parameters of a model in every layout of its experts.

    A checkpoint does not show in which layout it was trained, because Transformers 5 writes its stacks expert by expert.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.parameters: dict[str, Shape] = {
            name: tuple(parameter.shape) for name, parameter in architecture.model.named_parameters()
        }
        self.numbers = {name: number for number, name in enumerate(self.parameters)}

    @cached_property
    def decays(self) -> Callable[[str], bool]:
        """Says whether Trainer applies weight decay to a parameter. Cached, because importing Trainer takes seconds."""
        return decaying(self.architecture.model)

    def names(self, target: Target, layout: str) -> list[str] | None:
        """Returns the names of the tensors of ``target`` in ``layout``, or None if the layout cannot hold it."""
        if layout == "fused":
            return [target.name]
        if layout == "original":
            return stacked_names(target)
        patterns = self.architecture.names.per_expert(target)
        return patterns and [
            pattern.replace("*", str(expert)) for expert in range(target.shape[0]) for pattern in patterns
        ]

    def side(self, layout: str) -> Side | None:
        """Describes the parameters in ``layout``, or returns None if this model's experts cannot be in it."""
        targets = self.architecture.names.targets
        shapes, owners = {}, {}
        for name, shape in self.parameters.items():
            target = targets.get(name)
            names = [name] if target is None else self.names(target, layout)
            if names is None:
                return None
            for key in names:
                shapes[key] = shape if target is None else _shape(target, layout)
                owners[key] = name

        def called(name: str) -> str:
            return self.architecture.in_model(name)

        def module(name: str) -> tuple[str, Key]:
            owner = owners[name]
            key: Key = (self.numbers[owner],)
            if owner in targets and layout != "fused":
                role = self.architecture.names.locate(name)
                leaf = next((part for part in reversed(name.split(".")) if part in _LEAVES), None)
                if role is None or leaf is None:
                    raise ValueError(f"{name} belongs to experts whose order is not known: give the names")
                key = (role.expert, _LEAVES.index(leaf))
            return owner.rpartition(".")[0], key

        return Side(layout, shapes, called, module, layout == "fused", lambda name: self.decays(owners[name]))

    def sides(self) -> Iterator[Side]:
        for layout in MODEL_LAYOUTS:
            if (side := self.side(layout)) is not None:
                yield side

    def units(self, source: str, to: str) -> Iterator[Unit]:
        """Yields how the experts' weights move from layout ``source`` to ``to``. All other parameters stay as they are."""
        for target in self.architecture.names.targets.values():
            names, others = self.names(target, source), self.names(target, to)
            if names is None or others is None:
                raise ValueError(f"{target.name} has no names in layout {to if names else source}")
            shapes = dict.fromkeys(names, _shape(target, source))
            yield Unit(shapes, partial(_convert, target, source, names, to, others))


def _shape(target: Target, layout: str) -> Shape:
    """Returns the shape of each tensor of ``target`` in ``layout``."""
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
