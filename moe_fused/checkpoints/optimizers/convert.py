"""Conversion of an optimizer's state: reads it, finds out what each parameter is, converts it, writes it."""

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
from moe_fused.checkpoints.adapters.config import CONFIG as ADAPTER_CONFIG
from moe_fused.checkpoints.adapters.saved import SavedAdapter
from moe_fused.checkpoints.architecture import CONFIG, Architecture, read_config, read_model
from moe_fused.checkpoints.stacks import LAYOUTS
from moe_fused.staging import staged_files

from . import adapters
from .models import ModelParameters
from .parameters import Side, arrange, identify, read_names
from .rearrange import Unit, aligned, rearrange
from .state import FILES, OptimizerState, ParameterState, pack

if TYPE_CHECKING:
    from typing_extensions import Buffer

Progress = Callable[[str, int, int], None]
# What Trainer and accelerate need besides to resume, and what depends on no layout.
_COMPANIONS = (
    "scheduler.pt",
    "scheduler.bin",
    "scaler.pt",
    "trainer_state.json",
    "rng_state*.pth",
    "random_states_*.pkl",
)


@dataclass(frozen=True)
class Plan:
    """What a conversion does, found out by doing all of it but the writing.

    Attributes:
        source: the file that was read.
        target: the file to be written.
        layouts: of the parameters, before and after.
        parameters: how many there are, before and after.
        groups: how many of them are in each group afterwards.
        nbytes: of the moments, afterwards.
        requantized: parameters whose 8-bit moments could not move block by block.
        files: others that are copied, because the target lacks them.
        notes: what is not as it was, a sentence each.
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
        """Does what was planned; the files appear once all of them are complete.

        Args:
            progress: called with the step's name, the bytes written and all bytes.

        Raises:
            FileExistsError: the target exists by now.
            OSError: there is not enough space.
        """
        check = partial(_check_replaceable, self.target, self.overwrite)
        with staged_files(self.target.parent, "TARGET", check, self.nbytes) as staging:
            for name in self.files:
                shutil.copyfile(self.source.parent / name, staging / name)
            with _Watched(staging / self.target.name, self.nbytes, progress) as file:
                torch.save(self._content, file)


class _Watched(io.BufferedWriter):
    """A new file that tells how far it is written."""

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


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if target.exists() and not (overwrite and target.is_file()):
        hint = ": give --overwrite" if target.is_file() else " and is not a file"
        raise FileExistsError(f"TARGET has an {target.name}, {target}{hint}")


def _find_file(source: Path) -> Path:
    if not source.is_dir():
        raise FileNotFoundError(f"SOURCE {source} is not a directory")
    for name in FILES:
        if (source / name).is_file():
            return source / name
    raise FileNotFoundError(f"SOURCE {source} has no {' or '.join(FILES)}")


@dataclass(frozen=True)
class _Kind:
    """What an optimizer's parameters may be, and what they become.

    Attributes:
        sides: what they may be.
        after: what they become.
        units: gives the experts' for the side that they are.
        model: with the order of the parameters, on meta.
    """

    sides: Sequence[Side]
    after: Side
    units: Callable[[Side], Iterable[Unit]]
    model: Callable[[], nn.Module]


def _of_adapter(source: Path, target: Path, to: str | None, given: str | None) -> _Kind:
    names = [layout.value for layout in Layout]
    for option, value in (("--from", given), ("--to", to)):
        if value not in (None, *names):
            raise ValueError(f"{option} {value} is no layout of an adapter, which are {', '.join(names)}")
    if not (target / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"TARGET {target} has no {ADAPTER_CONFIG}: first `moe-fused convert adapter SOURCE TARGET --scaling keep`"
        )
    before = SavedAdapter(source, "SOURCE", Layout(given) if given else None)
    after = SavedAdapter(target, "TARGET", Layout(to) if to else None)

    @cache
    def model() -> nn.Module:
        base = before.config.content.get("base_model_name_or_path")
        try:
            return read_model(str(base))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the base model {base} does not tell the order of the parameters, --parameters and "
                f"--target-parameters must: {error}"
            ) from error

    return _Kind([adapters.side(before)], adapters.side(after), lambda _: adapters.units(before, after), model)


def _of_model(source: Path, target: Path, to: str | None, given: str | None) -> _Kind:
    names = list(LAYOUTS.values())
    for option, value in (("--from", given), ("--to", to)):
        if value not in (None, *names):
            raise ValueError(f"{option} {value} is no layout of a model, which are {', '.join(names)}")
    if to is None:
        raise ValueError(f"--to must say how the run to be resumed has its experts: {', '.join(names)}")
    if not target.is_dir():
        raise FileNotFoundError(f"TARGET {target} is not a directory, it must be that of the model to be resumed")
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
) -> Plan:
    """The state of AdamW in ``source`` for parameters in another layout, to be written to ``target``.

    Takes memory for the resulting state and for the largest layer's experts.

    Args:
        source: a checkpoint of Trainer or accelerate: ``optimizer.pt`` or ``optimizer.bin`` with the adapter, or the model's
            ``config.json``, that it belongs to.
        target: the directory to resume from, which exists. If ``source`` has an adapter, so has this, the same one in
            another layout, with the same scaling.
        to: layout of the parameters in the run to be resumed: of a model ``"per-expert"``, ``"fused"`` or ``"original"``,
            of an adapter that of ``target``, if it does not tell.
        given: layout of the parameters in ``source``, if they do not tell.
        parameters, target_parameters: files with the names of the parameters in the optimizers' order, in ``source`` and
            in the run to be resumed, where the models do not tell.
        overwrite: allows for an optimizer's state in ``target``, which is replaced.
        progress: called with the step's name, the parameters done and all.

    Raises:
        FileNotFoundError: a file or directory is missing.
        FileExistsError: ``target`` has a state.
        ValueError: the state is damaged, not AdamW's, does not fit the parameters, or cannot be converted exactly: which
            parameter, and why.
    """
    source, target = Path(source), Path(target)
    path = _find_file(source)
    _check_replaceable(target / path.name, overwrite)
    if (source / ADAPTER_CONFIG).is_file():
        kind = _of_adapter(source, target, to, given)
    elif (source / CONFIG).is_file():
        kind = _of_model(source, target, to, given)
    else:
        raise FileNotFoundError(f"SOURCE {source} has neither {ADAPTER_CONFIG} nor {CONFIG}, what it belongs to")
    state = OptimizerState(path)
    before, names = identify(state, kind.sides, kind.model, read_names(parameters) if parameters else None)
    if before.layout == kind.after.layout:
        raise ValueError(f"the parameters of {path} are in layout {before.layout} already")
    conversion = _Conversion(state, before, names, kind, align_steps)
    conversion.run(progress)
    order = list(
        arrange(conversion.states, kind.after, kind.model, read_names(target_parameters) if target_parameters else None)
    )
    groups = [[name for name, called in order if conversion.groups[called] == own] for own in range(len(state.groups))]
    states = {name: conversion.states[called] for name, called in order}
    return Plan(
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
    """The states of all parameters on their way to another layout.

    Attributes:
        states, groups: by the name that files have for a parameter afterwards.
        requantized: names of parameters.
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
        if not there:  # frozen
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
        for name, own in after.items():
            self._put(name, own, self.slots[there[0]].group)
            if own and own.bits == 32 and any(one and one.bits == 8 for one in before.values()):
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
                f"the 8-bit moments of {len(self.requantized)} parameters are quantized anew, as of {self.requantized[0]}: "
                "their blocks are not those of the other layout"
            )
        if self.aligned:
            notes.append(
                f"the moments of {len(self.aligned)} parameters, as of {self.aligned[0]}, are scaled to the number of steps "
                "of the others that they become one with"
            )
        if self.widened:
            notes.append(f"the moments of {self.widened} small parameters go from 8 to 32 bits, exactly")
        return notes


def _companions(source: Path, target: Path) -> list[str]:
    """Files for a run to resume that ``target`` lacks."""
    found = {path.name for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}
    return sorted(name for name in found if not (target / name).exists())


def convert_optimizer(
    source: Path, target: Path, *, dry_run: bool = False, progress: Progress | None = None, **options: Any
) -> Plan:
    """Writes the state of AdamW in ``source`` to ``target``, for parameters in another layout, and warns of what is lost.

    Args:
        dry_run: only makes the plan.
        progress: as in ``plan_optimizer`` and ``Plan.write``.
        options: as in ``plan_optimizer``, which tells about ``source`` and ``target``, too.

    Returns:
        The plan.

    Raises:
        ValueError, FileExistsError, FileNotFoundError, OSError: as ``plan_optimizer`` and ``Plan.write``.
    """
    plan = plan_optimizer(source, target, progress=progress, **options)
    if not dry_run:
        for note in plan.notes:
            warnings.warn(note, stacklevel=2)
        plan.write(progress)
    return plan
