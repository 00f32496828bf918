"""The command ``finetune``. This module imports nothing heavy, so that an error in an option appears at once."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
import typer.core

from moe_fused.commands.options import check_weights, require
from moe_fused.signals import interrupted_afterwards
from moe_fused.staging import replace_file

from .checkpoints import DROP_BROKEN, checkpoints_of, resumable
from .fingerprint import ALLOW_CHANGED, ALLOW_OTHER_BASE, recorded_processes
from .handed_through import parse
from .launch import check_gpus, launch
from .mixture import Datasets, parts_of
from .options import DEFAULTS, GROUPS, HELP, MAPPINGS, TYPES, Options, flag, read_yaml, shown_default, template
from .output import CONFIG, check_not_ended, check_output, check_unused, locked_output
from .precheck import (
    Process,
    check_adapter,
    check_automatic_device,
    check_said,
    check_used,
    notes,
    precheck,
    shared_again,
)
from .upload import check_upload
from .words import as_yaml

# The packages of the extra that every run needs, the one for the picture at its end included.
_NEEDED = ("accelerate", "datasets", "matplotlib", "peft", "trl", "yaml")


# The options that have a parameter of their own.
_TYPED = tuple(name for name in DEFAULTS if name not in MAPPINGS)
# The group of the switches, which are no options of a run.
_RUNNING = "Running"


class GroupedCommand(typer.core.TyperCommand):
    """A command whose help shows its options in groups, those that most runs need first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        most_used, *others = GROUPS
        parameters: dict[str, Any] = {str(parameter.name): parameter for parameter in self.get_params(ctx)}
        switches = [name for name in parameters if name not in DEFAULTS]
        for group in (most_used, _RUNNING, *others):
            names = switches if group == _RUNNING else [name for name in GROUPS[group] if name in _TYPED]
            with formatter.section(group):
                formatter.write_dl([parameters[name].get_help_record(ctx) for name in names])


def _parameter(name: str) -> inspect.Parameter:
    """The command line's parameter for an option. It is None unless given, so that no default overrules a file."""
    kind = TYPES[name]
    declared = flag(name) + (f"/--no-{flag(name)[2:]}" if kind in (bool, bool | None) else "")
    if kind == Datasets:
        kind = list[str]
    # Not by typer's show_default, which puts words in parentheses.
    info = typer.Option(declared, help=f"{HELP[name].text}  [default: {shown_default(name)}]")
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[kind], info],  # noqa: UP045
    )


def _switch(name: str, text: str, kind: Any = bool, default: Any = False) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(f"--{name.replace('_', '-')}", help=text)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_FILE = Optional[Path]  # noqa: UP045
_SWITCHES = [
    _switch("config", "YAML file with any of these options. The command line overrides it.", _FILE, None),
    _switch(
        "set",
        "A field of TRL's SFTConfig or of PEFT's LoraConfig: trainer.NAME=VALUE or lora.NAME=VALUE; repeat the option.",
        Optional[list[str]],  # noqa: UP045
        None,
    ),
    _switch("init", "Write a YAML file with every option and its description, for --config, and end.", _FILE, None),
    _switch("resume", "Go on from the last checkpoint in --output, with the options in its finetune.yaml."),
    _switch("overwrite", "Replace the run in --output."),
    _switch("allow_changed_data", "With --resume, go on although the rows or the chat template have changed."),
    _switch(
        "allow_other_base",
        "With --resume, go on although the weights or the config of the model have changed. With --adapter, accept one "
        "that was made for another model of the same shapes.",
    ),
    _switch(
        "drop_broken_checkpoints",
        "With --resume, remove damaged checkpoints and go on from the last one that is whole.",
    ),
    _switch("dry_run", "Check options, data and memory, and print what would be done and how long it would take."),
    _switch(
        "show_rows",
        "Print this many rows of each data set as they will be trained on, and as many sequences, and end.",
        Optional[int],  # noqa: UP045
        None,
    ),
    _switch(
        "gpus",
        "Train on this many GPUs of this machine, each with a share of every step. --batch-size and "
        "--gradient-accumulation are those of one GPU.",
        Optional[int],  # noqa: UP045
        None,
    ),
    _switch("traceback", "Show where an error came from."),
]


def finetune(
    config: Path | None,
    init: Path | None,
    resume: bool,
    overwrite: bool,
    allow_changed_data: bool,
    allow_other_base: bool,
    drop_broken_checkpoints: bool,
    dry_run: bool,
    show_rows: int | None,
    gpus: int | None,
    traceback: bool,
    **given: Any,
) -> None:
    """Fine-tune a mixture-of-experts model in 4 bits, with adapters on attention and experts.

    Ctrl-C saves a checkpoint. The same command with --resume goes on from there.
    """
    del traceback  # console.run, which prints errors, reads it from the command line
    if init is not None:
        for name, is_set in (
            ("resume", resume),
            ("overwrite", overwrite),
            ("dry-run", dry_run),
            ("show-rows", show_rows),
            ("gpus", gpus),
        ):
            if is_set:
                raise ValueError(f"--init and --{name} exclude each other")
        said = _said(config, given)
        options = Options(**said)  # raises if a value is wrong
        _write_template(init, {name: getattr(options, name) for name in said})
        return
    require("finetune", *_NEEDED, extra="train")
    of_resuming = {ALLOW_CHANGED: allow_changed_data, DROP_BROKEN: drop_broken_checkpoints}
    _check_switches(resume, overwrite, show_rows, of_resuming)
    options = _options(config, given, resume)
    if options.adapter is None:
        _check_switches(resume, overwrite, show_rows, {ALLOW_OTHER_BASE: allow_other_base})
    options.require(output=show_rows is None)
    process = Process.of_environment(os.environ)
    if show_rows is not None and not (process.is_alone and gpus in (None, 1)):
        raise ValueError("--show-rows is for one process: start it without torchrun, accelerate launch and --gpus")
    if options.shard and process.is_alone and gpus in (None, 1) and show_rows is None:
        raise ValueError(
            "--shard divides a model among several GPUs: add --gpus with their number, or --no-shard to train on one"
        )
    only_plans = dry_run and options.memory_limit is not None
    if gpus is not None:
        with interrupted_afterwards():
            check_gpus(gpus, options, process, only_plans=only_plans)
    planned = process  # or, before --gpus starts them, the first of the processes to come
    if gpus is not None and process.is_alone:
        planned = dataclasses.replace(process, world_size=gpus, local_world_size=gpus)
    if show_rows is not None:
        process = _precheck(options)
        check_adapter(options)
        with interrupted_afterwards():
            from .run import show
        show(options, process, show_rows, allow_other_base=allow_other_base)
        return
    output = options.output_directory
    if resume:
        options = shared_again(options, recorded_processes(output / CONFIG), planned)
    if process.is_main:  # which alone writes there
        if not dry_run:
            check_unused(output)
        check_output(output, resume, overwrite)
    _precheck(options)
    if not (resume and checkpoints_of(output)):
        _check_adapter(options, resume)
    if options.repository is not None:
        check_upload("--push-to-hub", options.repository, private=options.private)
    with interrupted_afterwards():
        check_automatic_device(options)
    if process.is_alone and not planned.is_alone and not only_plans:
        launch(planned.world_size, sys.argv[1:])
    with contextlib.ExitStack() as stack:
        if not dry_run:
            check_weights("--model", options.model)
        if not dry_run and process.is_main:
            if not stack.enter_context(locked_output(output)):
                print(f"--output {output}: no locks on this file system, start no other run there", file=sys.stderr)
            check_output(output, resume, overwrite)  # again: another run may have begun and ended
        checkpoint = None
        if resume and process.is_main:
            checkpoint = resumable(output, drop_broken=drop_broken_checkpoints, dry_run=dry_run)
            if checkpoint is None:
                check_not_ended(output)
        with interrupted_afterwards():
            from .run import run
        run(
            options,
            process,
            resume=resume,
            checkpoint=checkpoint,
            overwrite=overwrite,
            allow_changed_data=allow_changed_data,
            allow_other_base=allow_other_base,
            dry_run=dry_run,
            planned=planned,
        )


def _write_template(path: Path, said: dict[str, Any]) -> None:
    """Writes the file of ``--init``, which must not exist, with the options that were given."""
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"--init {path} exists: give another name, or remove the file first")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--init {path}: there is no directory {path.parent}")
    replace_file(path, template(said).encode())
    missing = [name for name in ("model", "dataset", "output") if not said.get(name)]
    fill = f"fill in {', '.join(missing)}, then " if missing else ""
    print(f"wrote {path}; next: {fill}moe-fused finetune --config {shlex.quote(str(path))}")


def _check_switches(resume: bool, overwrite: bool, show_rows: int | None, of_resuming: dict[str, bool]) -> None:
    """Raises ValueError for switches that exclude each other, or that have no effect without --resume."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    for name, is_set in of_resuming.items():
        if is_set and not resume:
            raise ValueError(f"{name} is for a run that goes on: give --resume, too")
    if show_rows is not None and show_rows < 1:
        raise ValueError(f"--show-rows must be at least 1, got {show_rows}")


def _options(config: Path | None, given: dict[str, Any], resume: bool) -> Options:
    """The options from the command line, from ``--config`` and, for a run that goes on, from its finetune.yaml."""
    said = _said(config, given)
    check_said(said)
    if not resume:
        options = Options(**said)
        check_used(options, said)
        return options
    if not said.get("output"):
        raise ValueError("--resume needs --output, the directory of the run to go on with")
    # The run decided what is left open now, and keeps to that.
    said = {name: value for name, value in said.items() if value not in (None, "auto")}
    options = Options(**(_started(Path(said["output"]), said) | said))
    check_used(options, said)
    return options


def _said(config: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """The options from the command line and from ``--config``."""
    if config is not None and not config.is_file():
        raise FileNotFoundError(f"--config {config} {'is not a file' if config.exists() else 'is missing'}")
    said: dict[str, Any] = {} if config is None else read_yaml(config, [switch.name for switch in _SWITCHES])
    said |= {name: value for name, value in given.items() if name != "set" and value not in (None, [])}
    fields: dict[str, dict[str, Any]] = {}
    for text in given["set"] or []:
        mapping, field, value = parse(text)
        if field in fields.setdefault(mapping, {}):
            raise ValueError(f"--set {mapping}.{field} is given twice")
        fields[mapping][field] = value
    for name, values in fields.items():
        said[name] = {**(said.get(name) or {}), **values}
    return said


def _check_adapter(options: Options, resume: bool) -> None:
    """Checks the adapter of ``--adapter``, which a run needs until it has a checkpoint."""
    try:
        check_adapter(options)
    except FileNotFoundError as error:
        needed = "; the run has no checkpoint yet, with which it could go on without it" if resume else ""
        raise FileNotFoundError(f"{error}{needed}") from error


def _precheck(options: Options) -> Process:
    process = precheck(options)
    for note in notes(options) if process.is_main else ():
        print(f"note: {note}", file=sys.stderr)
    return process


def _started(output: Path, said: dict[str, Any]) -> dict[str, Any]:
    """The options that a run began with.

    Args:
        output: The directory of the run.
        said: The options that are given now.

    Raises:
        FileNotFoundError: There is no run.
        ValueError: ``said`` has another value for an option that cannot change while a run goes on.
    """
    path = output / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path} is missing, there is no run to go on with")
    started = read_yaml(path)
    if missing := [name for name in ("model", "dataset") if not started.get(name)]:
        raise ValueError(f"{path} is not whole, it does not name the {missing[0]}: start again with --overwrite")
    for name, given in said.items():
        value, before = given, started.get(name, DEFAULTS[name])
        if TYPES[name] == Datasets:
            value, before = (", ".join(map(str, parts_of(each))) for each in (value, before))
        if HELP[name].shapes_run and value != before:
            what, before, value = _difference(name, before, value)
            was, now = ("not set" if each is None else _words(each) for each in (before, value))
            raise ValueError(f"{what} is {was} in {path} and cannot become {now} while the run goes on")
    return started


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """How an option is called whose value differs, and both values. Of a mapping, they are those of a field."""
    if name not in MAPPINGS:
        return flag(name), before, now
    before, now = before or {}, now or {}
    field = next(key for key in (*now, *before) if before.get(key) != now.get(key) or (key in before) != (key in now))
    return f"{name}.{field}", before.get(field), now.get(field)


def _words(value: Any) -> str:
    """A value as the command line and YAML files have it."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return " ".join(value)
    return value if isinstance(value, str) and value else as_yaml(value)


finetune.__signature__ = inspect.Signature([*map(_parameter, _TYPED), *_SWITCHES])  # type: ignore[attr-defined]
finetune.__annotations__ = {
    parameter.name: parameter.annotation for parameter in inspect.signature(finetune).parameters.values()
}
