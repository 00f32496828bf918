"""What a process does with signals that its user or its launcher sends. Each test has a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support import REPOSITORY, python_path

_PROGRAM = """
import os, signal, time
from moe_fused.signals import Interrupted, ignore_next_signal, raise_on_signals

raise_on_signals()
ignore_next_signal()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0)
print("goes on")
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
except Interrupted as error:
    print(error)
"""


def test_one_signal_is_ignored() -> None:
    environment = {**os.environ, "PYTHONPATH": python_path(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.stdout == "goes on\ninterrupted by SIGINT\n", ended
