"""Puts the repository's root on the path, as ``python -m benchmarks.…`` does, and makes rows for the tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.rows import Row  # noqa: E402


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """A row of our forward at 512 tokens, with whatever is given in place of the defaults."""

    def make(**changes: Any) -> Row:
        values: dict[str, Any] = {
            "benchmark": "experts",
            "gpu": "NVIDIA H100 80GB HBM3",
            "date": "2026-11-23",
            "torch": "2.11.0+cu130",
            "triton": "3.6.0",
            "layer": "qwen3-30b-a3b",
            "tokens": 512,
            "implementation": "moe_fused",
            "phase": "forward",
            "weights": "bf16",
            "lora_rank": 0,
            "ms": 0.5,
            "tflops": 77.3,
            "peak_mib": 12.5,
        }
        return Row(**{**values, **changes})

    return make
