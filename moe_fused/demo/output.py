"""Writes the output directory as a whole or not at all, and replaces only what an earlier run wrote."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from moe_fused.staging import staged_directory

RESULTS = "results.json"
# Directories of the output. stock.py is copied beside them and imports nothing of moe_fused, so it names them again.
DENSE, PACKED, DEQUANTIZED = "model", "model-4bit", "model-dequantized"
ADAPTER, EXPORTED = "adapter", "adapter/per-expert"
_WRITER = "moe_fused.demo"
_NEEDED_BYTES = 128 << 20  # twice what the demo writes on a GPU, where the model is larger


def _files(directory: Path) -> set[str]:
    paths = directory.rglob("*")
    return {path.relative_to(directory).as_posix() for path in paths if path.is_symlink() or not path.is_dir()}


def _check_replaceable(target: Path) -> None:
    """Raises FileExistsError unless ``target`` does not exist, is empty, or holds only what an earlier run wrote."""
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
    """Writes ``results`` as JSON, with a list of all files, by which a later run knows which ones it may replace."""
    content = {"written_by": _WRITER, "files": sorted(_files(directory) | {RESULTS}), **results}
    (directory / RESULTS).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def staged_output(target: Path, needed_bytes: int = _NEEDED_BYTES) -> contextlib.AbstractContextManager[Path]:
    """Yields a new empty directory beside ``target``, which becomes ``target`` if the block ends without an error.

    Raises:
        FileExistsError: ``target`` exists and is not the output of an earlier run.
        OSError: the parent directory is missing or not writable, or has less than ``needed_bytes`` free.
    """
    return staged_directory(target, "--output", _check_replaceable, needed_bytes)
