"""A directory or a file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from .signals import check_interrupted, signals_ignored

_SUFFIX = ".partial"


def is_partial(path: Path) -> bool:
    """Whether ``path`` is what a killed process left of something that was to appear whole."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


@contextlib.contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Gives the path of a file to write, which becomes ``target`` if the block ends without an error."""
    staging = target.with_name(f".{target.name}-{secrets.token_hex(4)}{_SUFFIX}")
    try:
        yield staging
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)


def _publish(staging: Path, target: Path, check_replaceable: Callable[[Path], None]) -> None:
    """Moves ``staging`` to ``target``; what is there is moved aside first, and back if that fails."""
    check_replaceable(target)  # again: the work takes minutes
    if not target.exists():
        staging.rename(target)
        return
    aside = staging.with_suffix(".old")
    target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def staged_directory(
    target: Path, name: str, check_replaceable: Callable[[Path], None], needed_bytes: int
) -> Iterator[Path]:
    """Gives a new empty directory beside ``target``, which becomes ``target`` if the block ends without an error.

    Fails before any work is done if the result could not be kept: nothing that the block may take minutes to make
    should be lost to a path that was wrong from the start.

    Args:
        target: where the result will be.
        name: of the argument that gave ``target``, for messages.
        check_replaceable: raises if what is at the path it gets must not be replaced.
        needed_bytes: to be free beside ``target``.

    Raises:
        OSError: the parent directory is missing or not writable, or has less than ``needed_bytes`` free.
    """
    target = target.resolve()
    check_replaceable(target)
    # Not tempfile.mkdtemp: its mode 0700 would stay with the published directory.
    staging = target.with_name(f".{target.name}-{secrets.token_hex(4)}{_SUFFIX}")
    try:
        staging.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"cannot create {name}: {error.strerror}", str(target)) from error
    try:
        free = shutil.disk_usage(staging).free
        if free < needed_bytes:
            raise OSError(f"{needed_bytes >> 20} MiB are needed at {target.parent}, only {free >> 20} MiB are free")
        yield staging
        check_interrupted()
        with signals_ignored():
            _publish(staging, target, check_replaceable)
    finally:
        with signals_ignored():
            shutil.rmtree(staging, ignore_errors=True)
