"""What several commands share: options, their checks, claiming a directory to write, and progress bars.

Nothing heavy is imported when this file is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from moe_fused.checkpoints.places import (
    ADAPTER_CONFIG,
    CONFIG,
    check_apart,
    check_replaceable,
    read_config,
    read_object,
)
from moe_fused.quantized import check_quantization, converted
from moe_fused.signals import interrupted_afterwards
from moe_fused.staging import check_writable, claimed


def _size(text: str) -> str:
    """Checks ``--max-shard-size`` as Transformers does, which would refuse a wrong one only after all the work."""
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B", text.strip(), re.IGNORECASE) or not float(text.strip()[:-2]):
        raise typer.BadParameter(f"must be a number and KB, MB, GB or TB, such as 500MB or 5GB, got {text}")
    return text


Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and say what would be done, but write nothing.")
]
ShardSize = Annotated[str, typer.Option(help="Largest size of a weights file, such as 500MB or 5GB.", callback=_size)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a model, or its name on the Hub.")]
AllowOtherBase = Annotated[
    bool,
    typer.Option("--allow-other-base", help="Accept an adapter that was made for another model of the same shapes."),
]


class Dtype(str, Enum):
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def check_finite_options(**options: float | None) -> None:
    """Raises ValueError for an option that is NaN or infinite, which typer's limits on options do not catch."""
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"--{name.replace('_', '-')} must be a finite number, got {value}")


def check_report(path: Path | None) -> None:
    """Checks before the work that ``--report`` can be written.

    Raises:
        FileExistsError: There is something at ``path``.
        OSError: Its directory is missing or not writable.
    """
    if path is None:
        return
    if path.exists():
        raise FileExistsError(f"--report {path} exists: choose another path")
    check_writable(path, "--report", 0)


def require(what: str, *packages: str, extra: str) -> None:
    """Raises RuntimeError if one of ``packages`` is missing. ``what`` needs it, and our extra ``extra`` installs it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"{what} needs {package}, which is not installed: pip install 'moe-fused[{extra}]'")


def require_4bit(what: str) -> None:
    require(what, "bitsandbytes", "accelerate", extra="bnb")


def require_peft(what: str) -> None:
    require(what, "peft", "accelerate", extra="train")


def check_source(argument: str, name: str, file: str) -> None:
    """Checks that ``name`` is a directory that contains ``file``, or could be a name on the Hub.

    Raises:
        FileNotFoundError: it is neither.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / file).is_file():
            unfinished = file == ADAPTER_CONFIG and (path / "finetune.yaml").is_file()
            hint = ": its run has not ended, only its checkpoints can be used" if unfinished else ""
            raise FileNotFoundError(f"{argument} {name} has no {file}{hint}")
    elif path.exists() or path.is_absolute() or name.startswith(".") or len(path.parts) != 2:
        raise FileNotFoundError(f"{argument} {name} is neither a directory nor a name on the Hub as org/name")


def read_source(argument: str, name: str, file: str) -> dict[str, Any] | None:
    """Returns the content of the JSON ``file`` in a directory, or None if ``name`` is a name on the Hub.

    Raises:
        FileNotFoundError: as for ``check_source``.
        ValueError: the file does not hold what it must.
        NotImplementedError: the model is quantized to something else than bitsandbytes' 4 bits.
    """
    check_source(argument, name, file)
    if not Path(name).is_dir():
        return None
    if file == CONFIG:
        config = read_config(Path(name))
        check_quantization(argument, name, config)
        return config
    content = read_object(Path(name) / file)
    if file == ADAPTER_CONFIG and "peft_type" not in content:
        raise ValueError(f"{Path(name) / file} must hold a peft_type, which says what kind of adapter it is")
    return content


def has_weights(name: str) -> bool:
    """Whether a directory has a file of weights, of which an index alone is none. A name on the Hub may have them."""
    path = Path(name)
    return not path.is_dir() or any(found for pattern in ("*.safetensors", "*.bin") for found in path.glob(pattern))


def from_4bit(model: str, revision: str = "main") -> str:
    """Says for errors how a model in 4 bits comes into another format."""
    made = converted(model, "DENSE --to fused --dequantize", revision)
    return f"for another format, make it dense by {made}, and quantize that"


def check_weights(
    argument: str, name: str, patterns: tuple[str, ...] = ("*.safetensors", "*.bin", "*.index.json")
) -> None:
    """Raises FileNotFoundError for a directory without a weights file. A name on the Hub is not checked."""
    path = Path(name)
    if path.is_dir() and not any(found for pattern in patterns for found in path.glob(pattern)):
        raise FileNotFoundError(f"{argument} {name} has no weights, no file named {' or '.join(patterns)}")


def check_vocabulary(tokenizer: Any, argument: str, name: str) -> None:
    """Raises FileNotFoundError for the empty tokenizer that Transformers makes if the files of a tokenizer are missing."""
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise FileNotFoundError(f"{argument} {name} has no tokenizer: tokenizer.json and the like are missing")


def check_output(model: str, output: Path, overwrite: bool) -> None:
    """Raises FileExistsError or ValueError unless a model that is made from ``model`` may be written to ``output``."""
    if Path(model).is_dir():
        check_apart(Path(model), output)
    check_replaceable(output, overwrite)


@contextlib.contextmanager
def writing(argument: str, target: Path, overwrite: bool, dry_run: bool) -> Iterator[None]:
    """Claims the directory ``target`` for this process, unless in a dry run, and imports torch.

    The claim comes first, so that an error about the target need not wait for the import.

    Args:
        argument: the argument that gave ``target``, for messages.

    Raises:
        FileExistsError: ``target`` exists and must not be replaced.
        InUse: another process is writing ``target``.
        OSError: the parent directory is missing or not writable.
    """
    claim: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if not dry_run:
        claim = claimed(target, argument, partial(check_replaceable, overwrite=overwrite))
    with claim:
        with interrupted_afterwards():
            import torch  # noqa: F401
        yield


def check_device(name: str) -> None:
    """Raises ValueError unless ``name`` can be a device that the kernels support. The device may still be missing."""
    if re.fullmatch(r"auto|cpu|(cuda|xpu)(:\d+)?", name):
        return
    # Devices of torch that the kernels do not support.
    if re.fullmatch(r"(cpu|hip|hpu|ipu|meta|mkldnn|mps|mtia|npu|vulkan|xla)(:\d+)?", name):
        raise ValueError(f"--device {name} is not served by the kernels: use auto, cpu, cuda or xpu")
    raise ValueError(f"--device {name} cannot be used here: it must be auto, cpu, cuda, cuda:1, xpu ...")


@contextlib.contextmanager
def progress_of_steps() -> Iterator[Callable[[str, int, int], None]]:
    """Yields ``progress(step, done, total)``, which shows a bar for each step if stderr is a terminal."""
    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done)

        yield progress
