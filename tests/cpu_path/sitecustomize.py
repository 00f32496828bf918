"""Makes bitsandbytes take, or not take, its CPU path for avx512_bf16, whatever the processor has.

``MOE_FUSED_TEST_CPU_BF16`` is ``on`` or ``off``. Python imports this module at start where its directory is in PYTHONPATH,
so that a test reaches the processes that it starts, too.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

VARIABLE = "MOE_FUSED_TEST_CPU_BF16"


def force() -> None:
    """Answers for the processor from the first import of bitsandbytes on, as the variable says."""
    answer = os.environ.get(VARIABLE)
    if answer is None:
        return
    if answer not in ("on", "off"):
        raise ValueError(f"{VARIABLE} must be on or off, got {answer!r}")
    if importlib.util.find_spec("moe_fused") is None:  # a process that shows what works without us
        return
    from moe_fused.imports import OnImport

    OnImport("bitsandbytes.functional", lambda execute: _forced(execute, answer == "on")).wait()


def _forced(execute: Callable[[], None], has: bool) -> None:
    execute()
    from bitsandbytes import functional

    # The backend for CPUs and the linear layers, which are imported later, take this function from here.
    lacks = has and not functional.has_avx512bf16()
    functional.has_avx512bf16 = lambda: has
    if lacks:
        _multiply_in_plain_torch(functional)


def _multiply_in_plain_torch(functional: Any) -> None:
    """Replaces the product with repacked weights, whose instructions this processor does not have."""
    from torch.nn.functional import linear

    def gemv_4bit(A: Any, B: Any, out: Any = None, transposed_A: bool = False, state: Any = None, **_: Any) -> Any:
        weight = functional.dequantize_4bit(*_usual_layout(functional, B, state))
        return linear(A.to(weight.dtype), weight).to(A.dtype)

    functional.gemv_4bit = gemv_4bit


def _usual_layout(functional: Any, weight: Any, state: Any) -> tuple[Any, Any]:
    import copy

    from moe_fused.integrations.quantizer.bitsandbytes_cpu import unpacked

    state_copy = copy.copy(state)
    return unpacked(weight, state_copy), state_copy


force()
