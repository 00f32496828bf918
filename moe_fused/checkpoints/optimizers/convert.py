"""Converts an optimizer's state: reads it, identifies its parameters, moves their moments, and writes it."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_fused.checkpoints.adapters import Layout
from moe_fused.checkpoints.adapters.saved import SavedAdapter
from moe_fused.checkpoints.architecture import Architecture, read_config, read_model
from moe_fused.checkpoints.places import check_optimizer, check_state_replaceable
from moe_fused.staging import staged_files

from . import adapters
from .models import ModelParameters
from .parameters import Side, arrange, identify, read_names
from .rearrange import Unit, aligned, rearrange
from .state import OptimizerState, ParameterState, pack

if TYPE_CHECKING:
    from typing_extensions import Buffer

Progress = Callable[[str, int, int], None]
# The other files that Trainer and accelerate need to resume. They depend on no layout.
_COMPANIONS = (
    "scheduler.pt",
    "scheduler.bin",
    "scaler.pt",
    "trainer_state.json",
    "rng_state*.pth",
    "random_states_*.pkl",
)


@dataclass(frozen=True)
class OptimizerConversionPlan:
    """What the conversion of an optimizer's state will do. It is made by converting everything without writing it.

    Attributes:
        source: the file that was read.
        target: the file to be written.
        layouts: the layouts of the parameters before and after.
        parameters: the number of parameters before and after.
        groups: the number of parameters in each group afterwards.
        nbytes: the size of the moments afterwards, in bytes.
        requantized: the parameters whose 8-bit moments could not move block by block.
        files: the other files that are copied because the target lacks them.
        notes: what changes, one sentence each.
        overwrite: whether ``target`` may be replaced.
    """

    source: Path
    target: Path
    layouts: tuple[str, str]
    parameters: tuple[int, int]
    groups: tuple[int, ...]
    nbytes: int
    requantized: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]
    overwrite: bool
    _content: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        lines = [
            f"from {self.source}: {self.parameters[0]} parameters, {self.layouts[0]}",
            f"to   {self.target}: {self.parameters[1]} parameters, {self.layouts[1]}",
            f"     in groups of {', '.join(map(str, self.groups))}",
            f"     moments of {self.nbytes / 2**20:.1f} MiB; copied: {', '.join(self.files) or 'nothing else'}",
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def write(self, progress: Progress | None = None) -> None:
        """Writes the files, which appear once all of them are complete.

        Args:
            progress: called with the name of the step, the number of bytes written, and the number in total.

        Raises:
            FileExistsError: the target has been made by something else meanwhile.
            OSError: there is not enough space.
        """
        check = partial(check_state_replaceable, self.target, self.overwrite)
        with staged_files(self.target.parent, "TARGET", check, self.nbytes) as staging:
            for name in self.files:
                shutil.copyfile(self.source.parent / name, staging / name)
            with _Watched(staging / self.target.name, self.nbytes, progress) as file:
                torch.save(self._content, file)


class _Watched(io.BufferedWriter):
    """A new file that reports how many bytes of it are written."""

    def __init__(self, path: Path, total: int, progress: Progress | None) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.total, self.progress = total, progress
        self.done = 0

    def write(self, data: Buffer) -> int:
        count = super().write(data)
        self.done = min(self.total, self.done + count)
        if self.progress is not None:
            self.progress("writing", self.done, self.total)
        return count


@dataclass(frozen=True)
class _Kind:
    """What the parameters of an optimizer may be, and what they become.

    Attributes:
        sides: the layouts in which they may be.
        after: the layout that they get.
        units: returns how the experts' parameters move from a given layout.
        model: makes the model on meta, which shows the order of the parameters.
    """

    sides: Sequence[Side]
    after: Side
    units: Callable[[Side], Iterable[Unit]]
    model: Callable[[], nn.Module]


def _of_adapter(source: Path, target: Path, to: str | None, given: str | None) -> _Kind:
    before = SavedAdapter(source, "SOURCE", Layout(given) if given else None)
    after = SavedAdapter(target, "TARGET", Layout(to) if to else None)

    @cache
    def model() -> nn.Module:
        base = before.config.content.get("base_model_name_or_path")
        try:
            return read_model(str(base))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the base model {base} does not show the order of the parameters, so --parameters and "
                f"--target-parameters must give it: {error}"
            ) from error

    return _Kind([adapters.side(before)], adapters.side(after), lambda _: adapters.units(before, after), model)


def _of_model(source: Path, to: str, given: str | None) -> _Kind:
    model = ModelParameters(Architecture.read(source, read_config(source)))
    sides = [side for side in model.sides() if given in (None, side.layout)]
    after = model.side(to)
    if not sides or after is None:
        raise ValueError(f"the experts of {source} cannot be in layout {to if sides else given}")
    return _Kind(sides, after, lambda side: model.units(side.layout, to), lambda: model.architecture.model)


def plan_optimizer(
    source: Path,
    target: Path,
    *,
    to: str | None = None,
    given: str | None = None,
    parameters: Path | None = None,
    target_parameters: Path | None = None,
    align_steps: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> OptimizerConversionPlan:
    """Plans the conversion of the state of AdamW in ``source`` to another layout of the parameters in ``target``.

    It needs memory for the resulting state and for the experts of the largest layer.

    Args:
        source: a checkpoint of Trainer or accelerate: ``optimizer.pt`` or ``optimizer.bin`` with the adapter, or the model's
            ``config.json``, that it belongs to.
        target: the directory to resume from, which must exist. If ``source`` has an adapter, ``target`` has the same one
            in another layout, with the same scaling.
        to: the layout of the parameters in the run to be resumed. For a model it is ``"per-expert"``, ``"fused"`` or
            ``"original"``. For an adapter it is the layout of ``target``, if that does not show it.
        given: the layout of the parameters in ``source``, if that does not show it.
        parameters, target_parameters: files with the names of the parameters in the optimizer's order, in ``source`` and
            in the run to be resumed. They are needed if the models do not show the order.
        align_steps: whether experts that were updated in different numbers of steps may become one parameter. Their moments
            are scaled to the largest number of steps.
        overwrite: whether an optimizer's state in ``target`` may be replaced.
        progress: called with the name of the step, the number of parameters done, and the number of all parameters.

    Raises:
        FileNotFoundError: a file or directory is missing.
        FileExistsError: ``target`` has a state already.
        ValueError: the state is damaged, is not AdamW's, does not fit the parameters, or cannot be converted exactly. The
            message names the parameter and says why.
    """
    source, target = Path(source), Path(target)
    path, of_adapter = check_optimizer(source, target, to, given, overwrite)
    kind = _of_adapter(source, target, to, given) if of_adapter else _of_model(source, str(to), given)
    state = OptimizerState(path)
    before, names = identify(state, kind.sides, kind.model, read_names(parameters) if parameters else None)
    if before.layout == kind.after.layout:
        raise ValueError(f"the parameters of {path} are in layout {before.layout} already")
    conversion = _Conversion(state, before, names, kind, align_steps)
    conversion.run(progress)
    order = list(
        arrange(conversion.states, kind.after, kind.model, read_names(target_parameters) if target_parameters else None)
    )
    groups = [
        [name for name, called in order if conversion.groups[called] == number] for number in range(len(state.groups))
    ]
    states = {name: conversion.states[called] for name, called in order}
    return OptimizerConversionPlan(
        path,
        target / path.name,
        (before.layout, kind.after.layout),
        (len(names), len(order)),
        tuple(map(len, groups)),
        sum(one.nbytes for one in states.values() if one),
        tuple(conversion.requantized),
        tuple(_companions(source, target)),
        tuple(conversion.notes),
        overwrite,
        pack(state, groups, states),
    )


class _Conversion:
    """The conversion of the states of all parameters to another layout.

    Attributes:
        states, groups: the state and the group of each parameter, by its name in files afterwards.
        requantized: the names of the parameters whose 8-bit moments were quantized again.
    """

    def __init__(self, state: OptimizerState, before: Side, names: list[str], kind: _Kind, align_steps: bool) -> None:
        self.source = state
        self.align_steps = align_steps
        self.kind = kind
        self.slots = {before.called(name): slot for name, slot in zip(names, state.slots, strict=True)}
        self.units = list(kind.units(before))
        self.states: dict[str, ParameterState | None] = {}
        self.groups: dict[str, int] = {}
        self.requantized: list[str] = []
        self.aligned: list[str] = []
        self.widened = 0

    def run(self, progress: Progress | None) -> None:
        done = 0
        experts = {name for unit in self.units for name in unit.sources}
        for name, slot in self.slots.items():
            if name not in experts:
                self._put(name, ParameterState.read(name, slot.entry), slot.group)
                done += 1
        for unit in self.units:
            if progress is not None:
                progress("converting", done, len(self.slots))
            self._convert(unit)
            done += len(unit.sources)
        if progress is not None:
            progress("converting", len(self.slots), len(self.slots))

    def _convert(self, unit: Unit) -> None:
        there = [name for name in unit.sources if name in self.slots]
        if not there:  # the parameters are frozen
            return
        for name in unit.sources:
            if name not in self.slots:
                raise ValueError(f"{name} is missing from the parameters, which have {there[0]}")
            group, first = self.slots[name].group, self.slots[there[0]].group
            if self.source.groups[group] != self.source.groups[first]:
                raise ValueError(
                    f"{name} is in group {group}, {there[0]} in group {first}, whose hyper-parameters differ: they cannot "
                    "become one"
                )
        before = {name: ParameterState.read(name, self.slots[name].entry) for name in unit.sources}
        if self.align_steps:
            before, changed = aligned(unit, before, self.source.groups[self.slots[there[0]].group]["betas"])
            self.aligned += changed
        after, requantized = rearrange(unit, before)
        self.requantized += requantized
        for name, state in after.items():
            self._put(name, state, self.slots[there[0]].group)
            if state and state.bits == 32 and any(one and one.bits == 8 for one in before.values()):
                self.widened += 1

    def _put(self, name: str, state: ParameterState | None, group: int) -> None:
        shapes = self.kind.after.shapes
        if name not in shapes or (state and state.shape != shapes[name]):
            raise ValueError(
                f"{name} has shape {shapes.get(name)} in layout {self.kind.after.layout}, its state {state and state.shape}"
            )
        self.states[name], self.groups[name] = state, group

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.requantized:
            notes.append(
                f"the 8-bit moments of {len(self.requantized)} parameters are quantized again, for example of "
                f"{self.requantized[0]}: their blocks differ from those of the other layout"
            )
        if self.aligned:
            notes.append(
                f"the moments of {len(self.aligned)} parameters, for example of {self.aligned[0]}, are scaled to the number "
                "of steps of the parameters that they are joined with"
            )
        if self.widened:
            notes.append(f"the moments of {self.widened} small parameters go from 8 to 32 bits, exactly")
        return notes


def _companions(source: Path, target: Path) -> list[str]:
    """Returns the names of files that a run needs to resume and ``target`` lacks."""
    found = {path.name for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}
    return sorted(name for name in found if not (target / name).exists())


def convert_optimizer(
    source: Path, target: Path, *, dry_run: bool = False, progress: Progress | None = None, **options: Any
) -> OptimizerConversionPlan:
    """Writes the state of AdamW in ``source`` to ``target``, for parameters in another layout, and warns of what is lost.

    Args:
        dry_run: whether to make the plan only.
        progress: as for ``plan_optimizer`` and ``OptimizerConversionPlan.write``.
        options: the other arguments of ``plan_optimizer``. ``source`` and ``target`` are explained there, too.

    Returns:
        The plan.

    Raises:
        ValueError, FileExistsError, FileNotFoundError, OSError: as for ``plan_optimizer`` and
            ``OptimizerConversionPlan.write``.
    """
    plan = plan_optimizer(source, target, progress=progress, **options)
    if not dry_run:
        for note in plan.notes:
            warnings.warn(note, stacklevel=2)
        plan.write(progress)
    return plan
