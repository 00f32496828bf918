"""Directories, and files in them, that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .signals import check_interrupted, signals_ignored

_SUFFIX = ".partial"


def is_partial(path: Path) -> bool:
    """Whether ``path`` is what a killed process left of something that was to appear whole."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


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
def _staging(staging: Path, name: str, target: Path, needed_bytes: int) -> Iterator[None]:
    """``staging`` as a new empty directory, gone after the block, with ``needed_bytes`` free for what becomes ``target``."""
    # Not tempfile.mkdtemp: its mode 0700 would stay with the published directory.
    try:
        staging.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"cannot create {name}: {error.strerror}", str(target)) from error
    try:
        free = shutil.disk_usage(staging).free
        if free < needed_bytes:
            raise OSError(f"{needed_bytes >> 20} MiB are needed at {staging.parent}, only {free >> 20} MiB are free")
        yield
    finally:
        with signals_ignored():
            shutil.rmtree(staging, ignore_errors=True)


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
    staging = target.with_name(f".{target.name}-{secrets.token_hex(4)}{_SUFFIX}")
    with _staging(staging, name, target, needed_bytes):
        yield staging
        check_interrupted()
        with signals_ignored():
            _publish(staging, target, check_replaceable)


@contextlib.contextmanager
def staged_files(
    directory: Path, name: str, check_replaceable: Callable[[], None], needed_bytes: int
) -> Iterator[Path]:
    """Gives a new empty directory within ``directory``, whose files move up to it if the block ends without an error.

    Each of them appears whole, in the order of their names, and replaces one that is there.

    Args:
        directory: where the files will be; must exist.
        name: of the argument that gave ``directory``, for messages.
        check_replaceable: raises if files that are there must not be replaced.
        needed_bytes: to be free in ``directory``.

    Raises:
        OSError: ``directory`` is missing or not writable, or has less than ``needed_bytes`` free.
    """
    directory = directory.resolve()
    check_replaceable()
    staging = directory / f".{secrets.token_hex(4)}{_SUFFIX}"
    with _staging(staging, name, directory, needed_bytes):
        yield staging
        check_interrupted()
        with signals_ignored():
            check_replaceable()  # again: the work takes minutes
            for path in sorted(staging.iterdir()):
                path.replace(directory / path.name)


def replace_file(path: Path, content: bytes) -> None:
    """Writes ``content`` beside ``path`` and moves it into place: an interrupted run leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
