"""The command ``finetune``. Imports nothing heavy, so that a wrong option is answered at once."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from moe_fused.commands.options import require

from .options import DEFAULTS, HELP, TYPES, Options, flag, read_yaml

CONFIG = "finetune.yaml"
# What every run takes of the extra, the picture at its end included.
_NEEDED = ("accelerate", "datasets", "matplotlib", "peft", "trl", "yaml")


def _shown(name: str) -> str:
    words, default = HELP[name].shown, DEFAULTS[name]
    if words is not None:
        return str(words)
    return ("on" if default else "off") if isinstance(default, bool) else "none" if default is None else str(default)


def _parameter(name: str) -> inspect.Parameter:
    """An option that is None unless given, so that what is in a file is not overruled by a default."""
    kind = TYPES[name]
    declared = flag(name) + (f"/--no-{flag(name)[2:]}" if kind in (bool, bool | None) else "")
    # Not as show_default, which puts words in parentheses.
    info = typer.Option(declared, help=f"{HELP[name].text}  [default: {_shown(name)}]")
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[kind], info],  # noqa: UP045
    )


def _switch(name: str, text: str, kind: Any = bool, default: Any = False) -> inspect.Parameter:
    annotation = Annotated[kind, typer.Option(f"--{name.replace('_', '-')}", help=text)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_SWITCHES = [
    _switch("config", "YAML file with any of these options; what the command line says wins.", Optional[Path], None),  # noqa: UP045
    _switch("resume", "Go on from the last checkpoint in --output, with the options in its finetune.yaml."),
    _switch("overwrite", "Replace the run at --output."),
    _switch("dry_run", "Check options, data and memory, say what would be done."),
    _switch("traceback", "Show where an error came from."),
]


def finetune(config: Path | None, resume: bool, overwrite: bool, dry_run: bool, traceback: bool, **given: Any) -> None:
    """Fine-tune a mixture-of-experts model: 4-bit weights, adapters on attention and experts.

    Ctrl-C saves a checkpoint; the same command with --resume goes on from there.
    """
    del traceback  # read by console.run, which prints errors
    require("finetune", *_NEEDED, extra="train")
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    said: dict[str, Any] = {} if config is None else read_yaml(config)
    said |= {name: value for name, value in given.items() if value not in (None, [])}
    started: dict[str, Any] = {}
    if resume:
        if not said.get("output"):
            raise ValueError("--resume needs --output, the directory of the run to go on with")
        # What the run chose for itself stands, if it is left open again.
        said = {name: value for name, value in said.items() if value not in (None, "auto")}
        started = _started(Path(said["output"]), said)
    options = Options(**(started | said))
    options.require()
    from .run import run

    run(options, resume=resume, overwrite=overwrite, dry_run=dry_run)


def _started(output: Path, said: dict[str, Any]) -> dict[str, Any]:
    """The options a run began with; raises ValueError if ``said`` has another value for one that cannot change."""
    path = output / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path} is missing, there is no run to go on with")
    started = read_yaml(path)
    for name, value in said.items():
        before = started.get(name, DEFAULTS[name])
        if HELP[name].shapes_run and value != before:
            raise ValueError(f"{flag(name)} is {before} in {path} and cannot become {value} while the run goes on")
    return started


finetune.__signature__ = inspect.Signature([*map(_parameter, DEFAULTS), *_SWITCHES])  # type: ignore[attr-defined]
finetune.__annotations__ = {
    parameter.name: parameter.annotation for parameter in inspect.signature(finetune).parameters.values()
}
