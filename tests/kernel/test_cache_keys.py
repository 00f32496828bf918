"""A second start of the same work finds all kernels in Triton's cache: no key depends on the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.kernel.machine import HAS_TRITON
from tests.support import REPOSITORY

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="nothing to compile without triton")


def keys(seed: str) -> list[list[str]]:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernel.cache_keys"]
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: list[list[str]] = json.loads(ended.stdout)
    return found


@pytest.mark.host
def test_keys_are_those_of_every_process() -> None:
    """Constants are records whose ``str`` is part of a key. Sets and addresses in it would differ from start to start."""
    first, second = keys("1"), keys("2")
    assert first == second
    assert len(first) > 20
    assert len({name for name, _ in first}) > 8
    assert not any(" at 0x" in key for _, key in first)
