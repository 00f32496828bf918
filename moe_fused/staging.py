"""Writes directories and files so that each appears whole or not at all.

A result is made in a hidden directory beside its target and renamed once it is complete.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from .locks import InUse, locked_directory
from .signals import check_interrupted, signals_ignored

_SUFFIX, _ASIDE = ".partial", ".old"
# For each target that this process has claimed, the directory in which it makes the result.
_claims: dict[Path, Path] = {}


def is_partial(path: Path) -> bool:
    """Whether ``path`` is something that a killed process left: an unfinished result, or what the result was to replace."""
    return path.name.startswith(".") and path.name.endswith((_SUFFIX, _ASIDE))


def remove_partial(path: Path) -> None:
    """Removes something for which ``is_partial`` is true, unless a process is still writing it."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    with locked_directory(path) as ours:
        if ours is not False:
            shutil.rmtree(path, ignore_errors=True)


def _publish(staging: Path, target: Path, check_replaceable: Callable[[Path], None]) -> None:
    """Renames ``staging`` to ``target``. An existing target is moved aside first, and moved back if the renaming fails."""
    check_replaceable(target)  # checked again, because minutes may have passed since the first check
    if not target.exists():
        staging.rename(target)
        return
    aside = staging.with_suffix(_ASIDE)
    target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _check_free(staging: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(staging).free
    if free < needed_bytes:
        raise OSError(f"{needed_bytes >> 20} MiB are needed at {staging.parent}, only {free >> 20} MiB are free")


@contextlib.contextmanager
def _staging(parent: Path, stem: str, name: str, target: Path) -> Iterator[Path]:
    """Makes a new empty directory in ``parent``, locked so that other processes see that it is in use, and removes it.

    A process that is killed leaves the directory, and with it whatever it had moved aside. The next process with the same
    ``stem`` removes the directory. It also puts back what was moved aside, if nothing has taken its place.

    Raises:
        InUse: another process is writing a directory with the same ``stem``.
        OSError: ``parent`` is missing or not writable.
    """
    # Older versions, which had no locks, made names without the number of a process.
    pattern = re.compile(rf"\.{re.escape(stem)}(?:(?P<pid>\d+)-)?[0-9a-f]{{8}}\.(?:partial|old)")
    with contextlib.ExitStack() as stack:
        for attempt in range(3):
            _clear(parent, pattern, name, target, None)
            staging = parent / f".{stem}{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
            # tempfile.mkdtemp is not used, because the published directory would keep its mode 0700.
            try:
                staging.mkdir()
            except OSError as error:
                raise OSError(error.errno, f"cannot create {name}: {error.strerror}", str(target)) from error
            cleanup = stack.enter_context(contextlib.ExitStack())
            ours = cleanup.enter_context(locked_directory(staging))
            cleanup.callback(_remove, staging)  # runs while the directory is still locked
            # Before it was locked, another process may have taken the directory for one that was left behind and removed it,
            # or may have begun to write the same target.
            if ours is not False and staging.is_dir():
                try:
                    _clear(parent, pattern, name, target, staging)
                    break
                except InUse:
                    if attempt == 2:
                        raise
            cleanup.close()
            time.sleep(random.uniform(0.05, 0.2))
        else:
            raise InUse(f"{name} {target} is being written by another process")
        yield staging


def _remove(staging: Path) -> None:
    with signals_ignored():
        shutil.rmtree(staging, ignore_errors=True)


def _clear(parent: Path, pattern: re.Pattern[str], name: str, target: Path, held: Path | None) -> None:
    """Removes or puts back what killed processes left. Raises InUse if one of these processes is still alive."""
    try:
        matches = {path: pattern.fullmatch(path.name) for path in sorted(parent.iterdir())}
    except OSError:  # creating something in that directory will fail with a better message
        return
    found = {path: match["pid"] for path, match in matches.items() if match and path.is_dir()}
    kept = {held}
    for path, pid in found.items():
        if path.suffix != _SUFFIX or path == held:
            continue
        writer = "another process" if pid is None else f"process {pid}"
        with locked_directory(path) as ours:
            if ours:
                shutil.rmtree(path, ignore_errors=True)
            elif ours is None and path.exists():
                kept.add(path)
                _warn(f"{path} is left by {writer}, or still being written: remove it if that has ended")
        if ours is False:
            raise InUse(f"{name} {target} is being written by {writer}: wait until it ends")
    asides = [path for path in found if path.suffix == _ASIDE and path.with_suffix(_SUFFIX) not in kept]
    for path in sorted(asides, key=_changed, reverse=True):
        if found[path] is None:  # a stem that ends with a number could make this the directory of another target
            _warn(f"{path} is left by a process that was killed: remove it, or put it back where it was")
        elif os.path.lexists(target):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, target)
            _warn(f"{target} is back, which a process that was killed had moved to {path.name}")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


@contextlib.contextmanager
def claimed(target: Path, name: str, check_replaceable: Callable[[Path], None]) -> Iterator[None]:
    """Makes sure that within the block only this process writes ``target`` through ``staged_directory``.

    Enter it before work that takes minutes, and before anything is imported for the work, so that an error about the target
    comes at once. It removes what killed processes left of an earlier attempt.

    Args:
        target, name, check_replaceable: as for ``staged_directory``.

    Raises:
        InUse: another process is writing ``target``.
        OSError: the parent directory is missing or not writable.
    """
    target = target.resolve()
    check_replaceable(target)
    with _staging(target.parent, f"{target.name}-", name, target) as staging:
        check_replaceable(target)  # checked again, because something may have been put back
        _claims[target] = staging
        try:
            yield
        finally:
            del _claims[target]


def check_writable(target: Path, name: str, needed_bytes: int) -> None:
    """Checks before the work that ``target`` can be written, by making an empty directory beside it and removing it again.

    Args:
        target: where the result will be.
        name: the argument that gave ``target``, for messages.
        needed_bytes: how much must be free beside ``target``.

    Raises:
        OSError: the parent directory is missing or not writable, or has less than ``needed_bytes`` free.
    """
    target = target.resolve()
    if target in _claims:  # the claim has already made a directory there
        _check_free(_claims[target], needed_bytes)
        return
    probe = target.with_name(f".{target.name}-{secrets.token_hex(4)}{_SUFFIX}")
    try:
        probe.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"cannot create {name}: {error.strerror}", str(target)) from error
    try:
        _check_free(probe, needed_bytes)
    finally:
        with contextlib.suppress(OSError):
            probe.rmdir()


@contextlib.contextmanager
def staged_directory(
    target: Path, name: str, check_replaceable: Callable[[Path], None], needed_bytes: int
) -> Iterator[Path]:
    """Yields a new empty directory beside ``target``, which becomes ``target`` if the block ends without an error.

    It fails before the block runs if the result could not be kept, so that no work of minutes is lost to a wrong path. It
    removes what killed processes left of an earlier attempt.

    Args:
        target: where the result will be.
        name: the argument that gave ``target``, for messages.
        check_replaceable: called with a path; raises if what is there must not be replaced.
        needed_bytes: how much must be free beside ``target``.

    Raises:
        InUse: another process is writing ``target``.
        OSError: the parent directory is missing or not writable, or has less than ``needed_bytes`` free.
    """
    target = target.resolve()
    with contextlib.ExitStack() as stack:
        if target not in _claims:
            stack.enter_context(claimed(target, name, check_replaceable))
        staging = _claims[target]
        _check_free(staging, needed_bytes)
        yield staging
        check_interrupted()
        with signals_ignored():
            _publish(staging, target, check_replaceable)


@contextlib.contextmanager
def staged_files(
    directory: Path, name: str, check_replaceable: Callable[[], None], needed_bytes: int
) -> Iterator[Path]:
    """Yields a new empty directory within ``directory``, whose files move up into it if the block ends without an error.

    The files appear whole, one after the other in the order of their names, and replace files of the same names.

    Args:
        directory: where the files will be; it must exist.
        name: the argument that gave ``directory``, for messages.
        check_replaceable: raises if files that are there must not be replaced.
        needed_bytes: how much must be free in ``directory``.

    Raises:
        InUse: another process is writing such files.
        OSError: ``directory`` is missing or not writable, or has less than ``needed_bytes`` free.
    """
    directory = directory.resolve()
    check_replaceable()
    with _staging(directory, "", name, directory) as staging:
        _check_free(staging, needed_bytes)
        yield staging
        check_interrupted()
        with signals_ignored():
            check_replaceable()  # checked again, because minutes may have passed since the first check
            for path in sorted(staging.iterdir()):
                path.replace(directory / path.name)


def replace_file(path: Path, content: bytes) -> None:
    """Writes ``content`` beside ``path`` and renames it to ``path``, so that an interruption leaves the old file whole."""
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
