"""Decides, once per process, how tests/kernel runs the Triton kernels.

With a GPU they run there. Without one they run in Triton's interpreter, which has to be switched on before anything
imports triton: that is why ``make test`` gives this directory a process of its own. ``TRITON_INTERPRET`` in the
environment wins. If triton is missing, the CPU variant is tested as its users get it, in plain torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TOO_LATE = False

if _HAS_TRITON and not torch.accelerator.is_available() and "TRITON_INTERPRET" not in os.environ:
    _TOO_LATE = "triton" in sys.modules
    if not _TOO_LATE:
        os.environ["TRITON_INTERPRET"] = "1"

if _HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernel.interpreter import make_faster, mend

    mend()
    make_faster()


@pytest.fixture(autouse=True)
def _kernels_can_run() -> None:
    if _TOO_LATE:
        pytest.skip("triton was imported before its interpreter could be chosen: run tests/kernel in its own process")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the calls of every stage from now on, but for those that a stage makes itself."""
    from tests.kernel.machine import stages  # which imports triton

    counted: dict[str, int] = {}
    module, inside = stages(torch.float32), []

    def count(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            if not inside:
                counted[name] = counted.get(name, 0) + 1
            inside.append(name)
            try:
                return stage(*args, **kwargs)
            finally:
                inside.pop()

        return counting

    names = (
        "route", "shrink", "grouped_up", "grouped_gemm", "combine", "down_backward", "grouped_wgrad", "grouped_row_sum"
    )  # fmt: skip
    for name in names:
        monkeypatch.setattr(module, name, count(name, getattr(module, name)))
    return counted


def pytest_report_header(config: pytest.Config) -> str:
    if torch.accelerator.is_available():
        return "tests/kernel: Triton on the accelerator"
    if os.environ.get("TRITON_INTERPRET") == "1" and _HAS_TRITON:
        return "tests/kernel: Triton's interpreter"
    return "tests/kernel: plain torch only, no Triton kernel runs"
