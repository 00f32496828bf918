"""The search: from the configuration in use to a neighbour that is faster, until none is or the time is up.

A neighbour differs in one field, by a factor of two or one step, and passes ``tuning.check``: a dozen of them, where all
valid configurations are thousands. What one field gains mostly stays when another changes, which is what a climb counts on;
it can end short of the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

# What a neighbour must gain: less is within what two timings of the same thing differ by.
MARGIN = 0.02

# Families whose row tiles may be halved, as their kernels read it.
_HALVES = ("up", "gemm", "gemm_short", "down_backward", "shrink")


class Measure(Protocol):
    """Times configurations of one kernel in one bucket."""

    def prepare(self, configs: Sequence[Any]) -> None:
        """Compiles, side by side, what will be timed."""

    def speedup(self, config: Any, over: Any) -> float | None:
        """How much faster ``config`` is than ``over``, both timed in turns; None if it does not run or is wrong."""


def neighbours(tuning: Any, kernel: str, block_m: int, config: Any, target: Any, itemsize: int) -> list[Any]:
    """The configurations one step from ``config`` that can be launched.

    Args:
        tuning: the kernel's module of that name.
    """
    steps: list[dict[str, Any]] = []
    for field in ("block_m", "block_n", "block_k", "num_warps", "slices"):
        value = getattr(config, field)
        steps += [{field: 2 * value}, {field: value // 2}]
    steps += [{"num_stages": config.num_stages + step} for step in (1, -1)]
    steps += [{field: not getattr(config, field)} for field in ("descriptor", "half_tiles")]
    found = []
    for step in steps:
        (field,) = step
        if (
            (field == "slices" and kernel not in tuning.DOWN_BACKWARDS)
            or (field == "half_tiles" and kernel not in _HALVES)
            or (field == "descriptor" and kernel in tuning.KERNELS_4BIT)
            or (field == "num_warps" and not 2 <= step[field] <= 8)
        ):
            continue
        candidate = replace(config, **step)
        try:
            tuning.check_bucket(kernel, block_m, candidate, itemsize)
            tuning.check(kernel, candidate, target, itemsize)
        except ValueError:
            continue
        found.append(candidate)
    return found


def climb(
    start: Any, around: Callable[[Any], list[Any]], measure: Measure, expired: Callable[[], bool]
) -> Iterator[tuple[Any, float]]:
    """Each better configuration as it is found, and how much faster than ``start`` it is.

    Args:
        around: the neighbours of a configuration.
        expired: asked before every timing.
    """
    best, gain, seen = start, 1.0, {start}
    while True:
        candidates = [config for config in around(best) if config not in seen]
        if not candidates or expired():
            return
        measure.prepare(candidates)
        faster: dict[Any, float] = {}
        for candidate in candidates:
            if expired():
                break
            seen.add(candidate)
            speedup = measure.speedup(candidate, best)
            if speedup is not None and speedup > 1 + MARGIN:
                faster[candidate] = speedup
        if not faster:
            return
        best = max(faster, key=lambda config: faster[config])
        gain *= faster[best]
        yield best, gain
