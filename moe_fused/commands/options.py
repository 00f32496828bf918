"""What several commands share: options, checks of them, a progress bar for each step. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done.")]
ShardSize = Annotated[str, typer.Option(help="Of a file, as 500MB or 5GB.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a model, or its name on the Hub.")]


class Dtype(str, Enum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def require(what: str, *packages: str, extra: str) -> None:
    """Raises RuntimeError if one of ``packages``, which ``what`` needs and an extra of ours brings, is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"{what} needs {package}, which is not installed: pip install 'moe-fused[{extra}]'")


def require_4bit(what: str) -> None:
    require(what, "bitsandbytes", "accelerate", extra="bnb")


def require_peft(what: str) -> None:
    require(what, "peft", "accelerate", extra="train")


def check_source(argument: str, name: str, file: str) -> None:
    """Fails at once on what is neither a directory with ``file`` in it nor could be a name on the Hub.

    Raises:
        FileNotFoundError: says which.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / file).is_file():
            raise FileNotFoundError(f"{argument} {name} has no {file}")
    elif path.exists() or path.is_absolute() or name.startswith(".") or len(path.parts) != 2:
        raise FileNotFoundError(f"{argument} {name} is neither a directory nor a name on the Hub as org/name")


@contextlib.contextmanager
def progress_of_steps() -> Iterator[Callable[[str, int, int], None]]:
    """Gives ``progress(step, done, total)``, which shows a bar for each step; on a terminal only."""
    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done)

        yield progress
