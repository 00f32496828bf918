"""The names of an optimizer's parameters in its order, which its state does not tell.

The order is that of the model's ``named_parameters()``, which the safetensors beside the state have lost: they are sorted.
Names come from the first of these that there is:

1. a file that lists them in the optimizer's order: JSON, a list or a list for each group, or text with a name a line;
2. ``param_names`` in the state, of an optimizer that was given ``model.named_parameters()``;
3. the model that the config describes, as Transformers builds it, with the experts in each layout that it may have had; in
   two groups, that Trainer has for parameters with and without weight decay. Transformers 4 had the experts of some models
   before the router that are behind it now, or the other way around, so that both are tried. The shapes in the state must
   leave exactly one. In the run to be resumed there is no state yet: what Transformers has in memory today is taken to have
   the order that it has today, of other layouts both orders must be the same. The order in Transformers 4.57.1 was found so
   for Qwen3-MoE, which is the one that had it the other way around, Qwen2-MoE, Mixtral, OLMoE, DeepSeek-V3 and GLM-4-MoE.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import transformers
from torch import nn

from .state import OptimizerState, Shape

# The name of the child that routes tokens to the experts beside it.
_ROUTERS = ("gate", "router")
Key = tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """The parameters of a model in one layout of its experts.

    Attributes:
        layout: its name.
        shapes: of the parameters, by the name that files have for them.
        called: the name that files have for a parameter that the model calls as given.
        module: of the model, that holds a parameter, and where it comes among that module's own.
        current: whether Transformers has the experts in this layout.
        decays: whether Trainer lets the weight of a parameter decay; None if that is not known.
    """

    layout: str
    shapes: Mapping[str, Shape]
    called: Callable[[str], str]
    module: Callable[[str], tuple[str, Key]]
    current: bool
    decays: Callable[[str], bool] | None = field(default=None)

    def shape(self, name: str) -> Shape:
        return self.shapes[self.called(name)]


def read_names(path: Path) -> list[str]:
    """The names in a file that lists them.

    Raises:
        OSError, ValueError: it cannot be read, or has something else in it.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(content, list) and all(isinstance(part, list) for part in content):
        content = [name for part in content for name in part]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} must hold a list of names, or one for each group")
    return content


def orders(side: Side, model: nn.Module) -> list[list[str]]:
    """The orders that ``model`` may have the parameters of ``side`` in, without regard to groups; its own comes first.

    Raises:
        ValueError: it has no module for one of them.
    """
    modules = [path for path, _ in model.named_modules()]
    result: list[list[str]] = []
    for moved in (False, True):
        positions = _positions(modules, moved)
        keys = {}
        for name in side.shapes:
            module, key = side.module(name)
            if module not in positions:
                raise ValueError(f"{name} is of {module}, which a {type(model).__name__} does not have")
            keys[name] = (positions[module], key)
        order = sorted(keys, key=keys.__getitem__)
        if order not in result:
            result.append(order)
    return result


def _positions(modules: Sequence[str], moved: bool) -> dict[str, float]:
    """Where each module comes in ``named_parameters()``; if ``moved``, experts on the other side of their router."""
    positions: dict[str, float] = {path: place for place, path in enumerate(modules)}
    if not moved:
        return positions
    for path in modules:
        parent, _, name = path.rpartition(".")
        router = next((f"{parent}.{other}" for other in _ROUTERS if f"{parent}.{other}" in positions), None)
        if name != "experts" or router is None:
            continue
        inside = [positions[other] for other in modules if other == router or other.startswith(f"{router}.")]
        positions[path] = max(inside) + 0.5 if positions[path] < min(inside) else min(inside) - 0.5
    return positions


def decaying(model: nn.Module) -> Callable[[str], bool]:
    """Whether Trainer lets a parameter of ``model`` decay, by its name."""
    names = set(transformers.Trainer.get_decay_parameter_names(cast(Any, None), cast(Any, model)))
    return names.__contains__


def _grouped(order: list[str], side: Side, state: OptimizerState) -> list[str] | None:
    """``order`` as the groups of ``state`` have it; None if that is not known."""
    filled = {slot.group for slot in state.slots}
    if len(filled) < 2:
        return order
    if len(filled) > 2 or side.decays is None:
        return None
    return [name for decays in (True, False) for name in order if side.decays(name) is decays]


def identify(
    state: OptimizerState, sides: Sequence[Side], model: Callable[[], nn.Module], given: list[str] | None
) -> tuple[Side, list[str]]:
    """The layout of an optimizer's parameters, and their names in its order, as the model calls them.

    Args:
        sides: what may be.
        model: makes the model, on meta.
        given: the names, if the user says them.

    Raises:
        ValueError: none of ``sides`` fits ``state``, or several do.
    """
    names = given if given is not None else state.names
    if names is not None:
        side = max(sides, key=lambda side: sum(side.called(name) in side.shapes for name in names))
        _check_names(names, side)
        if problem := state.mismatch(names, side.shape):
            raise ValueError(f"{state.path}: {problem}")
        return side, names
    found: list[tuple[Side, list[str]]] = []
    problems = []
    for side in sides:
        for order in orders(side, model()):
            arranged = _grouped(order, side, state)
            if arranged is None:
                raise ValueError(
                    f"{state.path} has several groups, and not those of Trainer: --parameters must say the names"
                )
            if problem := state.mismatch(arranged, side.shape):
                problems.append(f"{side.layout}: {problem}")
            else:
                found.append((side, arranged))
    if not found:
        raise ValueError(f"{state.path} fits no order of the parameters: {'; '.join(dict.fromkeys(problems))}")
    if len(found) > 1:
        one, other = found[:2]
        name = next((name for name, second in zip(one[1], other[1], strict=True) if name != second), one[1][0])
        raise ValueError(f"{state.path} fits several orders of the parameters, with {name} in two places: --parameters")
    return found[0]


def _check_names(names: Sequence[str], side: Side) -> None:
    seen = set()
    for name in names:
        called = side.called(name)
        if called not in side.shapes:
            raise ValueError(f"{name} is no parameter in layout {side.layout}, as {min(side.shapes)} is")
        if called in seen:
            raise ValueError(f"{name} is listed twice")
        seen.add(called)


def arrange(
    made: Mapping[str, Any], side: Side, model: Callable[[], nn.Module], given: list[str] | None
) -> Iterator[tuple[str, str]]:
    """The parameters ``made``, by their names in files, in the order of the optimizer to be resumed.

    Args:
        side: of that optimizer.
        given: the names, if the user says them.

    Yields:
        The name that the model has for a parameter, and the one that files have.

    Raises:
        ValueError: the order is not known, or another one of parameters.
    """
    if given is None:
        possible = [[name for name in order if name in made] for order in orders(side, model())]
        if not side.current and any(order != possible[0] for order in possible):
            raise ValueError(
                f"experts come before their router in some versions of the model and after it in others: "
                f"--target-parameters must say the names in layout {side.layout}"
            )
        given = possible[0]
    else:
        _check_names(given, side)
    named = {side.called(name): name for name in given}
    if (wrong := min(made.keys() ^ named.keys(), default=None)) is not None:
        raise ValueError(f"{wrong} is {'listed, but has no' if wrong in named else 'not listed, but has a'} state")
    for called, name in named.items():
        yield name, called
