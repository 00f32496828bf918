"""An output directory that appears whole or not at all, and replaces only what an earlier run wrote."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .signals import check_interrupted, signals_ignored

RESULTS = "results.json"
_WRITER = "moe_fused.demo"
_NEEDED_BYTES = 64 << 20  # twice the larger of the two models, with room for a copy in 4 bits


def _files(directory: Path) -> set[str]:
    paths = directory.rglob("*")
    return {path.relative_to(directory).as_posix() for path in paths if path.is_symlink() or not path.is_dir()}


def _check_replaceable(target: Path) -> None:
    """Raises FileExistsError unless ``target`` is absent, an empty directory, or exactly what an earlier run wrote."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"--output {target} exists and is not a directory: choose another path")
    if not any(target.iterdir()):
        return
    try:
        results = json.loads((target / RESULTS).read_text(encoding="utf-8"))
        written = set(results["files"]) if results["written_by"] == _WRITER else set()
    except (OSError, ValueError, KeyError, TypeError):
        written = set()
    if not written:
        raise FileExistsError(f"--output {target} exists and was not written by this demo: choose another path")
    if foreign := sorted(_files(target) - written):
        raise FileExistsError(f"--output {target} holds a file this demo did not write ({foreign[0]}): move it away")


def write_results(directory: Path, results: dict[str, object]) -> None:
    """Writes ``results`` as JSON, with the list of files by which a later run knows that it may replace them."""
    content = {"written_by": _WRITER, "files": sorted(_files(directory) | {RESULTS}), **results}
    (directory / RESULTS).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _publish(staging: Path, target: Path) -> None:
    """Moves ``staging`` to ``target``; an earlier output is moved aside first, and back if that fails."""
    _check_replaceable(target)  # again: a run takes minutes
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
def staged_output(target: Path, needed_bytes: int = _NEEDED_BYTES) -> Iterator[Path]:
    """Gives a new empty directory beside ``target``, which becomes ``target`` if the block ends without an error.

    Fails before any work is done if the result could not be kept: nothing that the block may take minutes to make
    should be lost to a path that was wrong from the start.

    Raises:
        FileExistsError: ``target`` exists and is not the output of an earlier run.
        OSError: the parent directory is missing or not writable, or has less than ``needed_bytes`` free.
    """
    target = target.resolve()
    _check_replaceable(target)
    # Not tempfile.mkdtemp: its mode 0700 would stay with the published directory.
    staging = target.with_name(f".{target.name}-{secrets.token_hex(4)}.partial")
    try:
        staging.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"cannot create --output: {error.strerror}", str(target)) from error
    try:
        free = shutil.disk_usage(staging).free
        if free < needed_bytes:
            raise OSError(f"{needed_bytes >> 20} MiB are needed at {target.parent}, only {free >> 20} MiB are free")
        yield staging
        check_interrupted()
        with signals_ignored():
            _publish(staging, target)
    finally:
        with signals_ignored():
            shutil.rmtree(staging, ignore_errors=True)
