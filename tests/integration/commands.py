"""The command ``moe-fused convert`` in a process of its own, and what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support import REPOSITORY, python_path


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str


def python(*arguments: str | Path, cwd: Path) -> Ended:
    """A Python that finds ``moe_fused``."""
    ended = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": python_path(REPOSITORY), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def command(*options: str | Path, cwd: Path) -> Ended:
    """``moe-fused convert`` with ``options``, the first of which is what to convert."""
    return python("-m", "moe_fused", "convert", *options, cwd=cwd)


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
