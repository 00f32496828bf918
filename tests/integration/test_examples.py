"""The examples run as their docstrings say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY, python_path


@pytest.mark.parametrize("example", sorted((REPOSITORY / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example_runs(example: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": python_path(REPOSITORY)}
    run = subprocess.run(
        [sys.executable, example], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "difference" in run.stdout
