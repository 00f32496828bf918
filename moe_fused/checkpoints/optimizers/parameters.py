"""Finds the names of an optimizer's parameters in its order, which its state does not contain.

The order is that of the model's ``named_parameters()``. The safetensors beside the state do not show it, because they are
sorted. Names come from the first of these sources that exists:

1. a file that lists them in the optimizer's order, either JSON (a list, or a list for each group) or text with a name on
   each line;
2. ``param_names`` in the state, of an optimizer that was given ``model.named_parameters()``;
3. the model that the config describes, as Transformers builds it, with the experts in each layout that they may have
   had. Two groups are taken for Trainer's, of parameters with and without weight decay. In some models, Transformers 4
   had the experts before the router and Transformers 5 has them after it, or the other way round, so both orders are
   tried. Exactly one must fit the shapes in the state. The run to be resumed has no state yet. The layout that
   Transformers has in memory today is taken to have today's order; for other layouts, both orders must be the same. In
   Transformers 4.57.1 the order was checked for Qwen3-MoE (the only one with the other order), Qwen2-MoE, Mixtral,
   OLMoE, DeepSeek-V3 and GLM-4-MoE.
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

# The names of the module that routes tokens to the experts beside it.
_ROUTERS = ("gate", "router")
Key = tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """The parameters of a model in one layout of its experts.

    Attributes:
        layout: the name of the layout.
        shapes: the shapes of the parameters, by their names in files.
        called: turns the model's name for a parameter into the name in files.
        module: returns the module that holds a parameter, and the parameter's position among those of the module.
        current: whether Transformers has the experts in this layout today.
        decays: says whether Trainer applies weight decay to a parameter; None if that is not known.
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
    """Reads a file that lists names.

    Raises:
        OSError, ValueError: the file cannot be read, or holds something else.
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
    """Returns the orders in which ``model`` may have the parameters of ``side``, ignoring groups; today's comes first.

    Raises:
        ValueError: the model has no module for one of the parameters.
    """
    modules = [path for path, _ in model.named_modules()]
    result: list[list[str]] = []
    for moved in (False, True):
        positions = _positions(modules, moved)
        keys = {}
        for name in side.shapes:
            module, key = side.module(name)
            if module not in positions:
                raise ValueError(f"{name} belongs to {module}, which a {type(model).__name__} does not have")
            keys[name] = (positions[module], key)
        order = sorted(keys, key=keys.__getitem__)
        if order not in result:
            result.append(order)
    return result


def _positions(modules: Sequence[str], moved: bool) -> dict[str, float]:
    """Returns the position of each module in ``named_parameters()``.

    If ``moved``, experts come on the other side of their router.
    """
    positions: dict[str, float] = {path: position for position, path in enumerate(modules)}
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
    """Returns a function that says whether Trainer applies weight decay to the parameter of a name."""
    names = set(transformers.Trainer.get_decay_parameter_names(cast(Any, None), cast(Any, model)))
    return names.__contains__


def _grouped(order: list[str], side: Side, state: OptimizerState) -> list[str] | None:
    """Brings ``order`` into the order of the groups of ``state``, or returns None if that is not known."""
    filled = {slot.group for slot in state.slots}
    if len(filled) < 2:
        return order
    if len(filled) > 2 or side.decays is None:
        return None
    return [name for decays in (True, False) for name in order if side.decays(name) is decays]


def identify(
    state: OptimizerState, sides: Sequence[Side], model: Callable[[], nn.Module], given: list[str] | None
) -> tuple[Side, list[str]]:
    """Finds the layout of an optimizer's parameters, and the model's names for them in the optimizer's order.

    Args:
        sides: the layouts that are possible.
        model: makes the model, on meta.
        given: the names, if the user gave them.

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
    """Yields the parameters ``made`` in the order of the optimizer to be resumed.

    Args:
        made: the parameters, by their names in files.
        side: the parameters of that optimizer.
        given: the names, if the user gave them.

    Yields:
        The model's name for a parameter, and the name in files.

    Raises:
        ValueError: the order is not known, or is an order of other parameters.
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
