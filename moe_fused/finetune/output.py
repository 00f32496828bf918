"""Checks, locks and cleans the output directory of a run.

This module imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import get_args

from moe_fused.locks import check_unlocked, locked_file
from moe_fused.staging import is_partial, remove_partial

from .checkpoints import CHECKPOINTS, checkpoints_of
from .options import Export
from .trackers import TRACKED

CONFIG, LOG, ADAPTER_CONFIG = "finetune.yaml", "log.jsonl", "adapter_config.json"
LOCK = ".finetune.lock"


def has_begun(output: Path) -> bool:
    """Whether the run in ``output`` has made a step or an adapter, which starting again would lose."""
    log = output / LOG
    logged = log.is_file() and log.stat().st_size > 0
    return logged or bool(checkpoints_of(output)) or (output / ADAPTER_CONFIG).is_file()


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Checks that a run may begin, or go on, in ``output``.

    Leftovers of a killed process do not count, and neither does a run that has made no step.

    Raises:
        FileExistsError: ``output`` holds a run, and neither ``resume`` nor ``overwrite`` is set. Or it holds other
            files.
        FileNotFoundError: The parent directory is missing.
    """
    try:
        output.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that is too long, or that has a file for a directory
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"--output {output} cannot be created: {reason}") from None
    if (output / CONFIG).is_file():
        if not resume and not overwrite and has_begun(output):
            raise FileExistsError(f"--output {output} holds a run: --resume goes on with it, --overwrite replaces it")
    elif output.is_symlink() and not output.exists():
        raise FileExistsError(f"--output {output} is a link to a file that does not exist")
    elif output.exists() and (not output.is_dir() or any(not _is_leftover(path) for path in output.iterdir())):
        raise FileExistsError(f"--output {output} exists and is not the directory of a run")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output {output}: there is no directory {output.parent}")
    _check_writable(output)


def _check_writable(output: Path) -> None:
    """Raises OSError unless ``output`` can be created, or written if it exists. Nothing is left of the attempt."""
    place = output if output.is_dir() else output.parent
    try:
        # Made and removed, because permissions alone do not tell it of all file systems.
        probe = Path(tempfile.mkdtemp(prefix=".try-", suffix=".partial", dir=place))
        probe.rmdir()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(f"--output {output} cannot be {'written' if place == output else 'created'}: {reason}") from None


def check_not_ended(output: Path) -> None:
    """Raises FileExistsError if there is an adapter in ``output``. It is called for runs without a checkpoint."""
    if (output / ADAPTER_CONFIG).is_file():
        raise FileExistsError(
            f"--output {output} has an adapter and no checkpoint to go on from: that run has ended, --overwrite begins again"
        )


def _is_leftover(path: Path) -> bool:
    return is_partial(path) or path.name == LOCK


def locked_output(output: Path) -> contextlib.AbstractContextManager[bool]:
    """Locks ``output`` against other runs until the block or the process ends. It creates a directory that is missing.

    Yields:
        Whether the directory is locked. It is not if the file system has no locks.

    Raises:
        InUse: Another process trains there. The error names that process.
        OSError: Nothing can be written there.
    """
    return locked_file(output / LOCK, _name(output))


def check_unused(output: Path) -> None:
    """Raises InUse if another process trains in ``output``."""
    check_unlocked(output / LOCK, _name(output))


def _name(output: Path) -> str:
    return f"--output {output}"


def remove_leftovers(output: Path) -> None:
    """Removes the files that a killed process was writing in ``output``."""
    for path in filter(is_partial, list(output.iterdir())):
        remove_partial(path)


def remove_run(output: Path) -> None:
    """Removes the adapter, the checkpoints, the log and what trackers wrote in ``output``, for a run that replaces it."""
    # This file is removed first, because a directory without it does not count as an adapter.
    (output / ADAPTER_CONFIG).unlink(missing_ok=True)
    for layout in get_args(Export):
        if layout != "none":
            shutil.rmtree(output / layout, ignore_errors=True)
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    _remove_tracked(output)
    (output / LOG).unlink(missing_ok=True)


def _remove_tracked(output: Path) -> None:
    """Removes what trackers have written in ``output``."""
    for path in (output / name for name in TRACKED):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def take_back(output: Path) -> None:
    """Removes the files that a run writes before its first step, and nothing else."""
    for name in (CONFIG, LOG):
        (output / name).unlink(missing_ok=True)
    _remove_tracked(output)
    with contextlib.suppress(OSError):  # the directory is missing, or it is not empty
        (output / CHECKPOINTS).rmdir()
