"""The two searches: for a faster launch configuration, and for the size of call at which another way becomes faster.

``climb`` goes from the configuration in use to a neighbour that is faster, until none is or the time is up. A neighbour
differs in one field, by a factor of two or one step, and passes ``tuning.check``: a dozen of them, where all valid
configurations are thousands. What one field gains mostly stays when another changes, which is what a climb counts on; it can
end short of the best.

``crossover`` starts at the threshold in use. There two ways of computing the same are equally fast if the threshold is
right; otherwise it moves towards where they are, in steps of a half, and then halves the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

# How much faster a neighbour must be. Two timings of the same configuration differ by less than this.
MARGIN = 0.02

# Limits of registers with which two, three and four programs of four warps fit a multiprocessor.
_REGISTERS = (0, 168, 128)
# The kernel families that read ``half_tiles``.
_HALVES = ("up", "gemm", "gemm_short", "down_backward", "shrink")


class Measure(Protocol):
    """Times configurations of one kernel in one bucket."""

    def prepare(self, configs: Sequence[Any]) -> None:
        """Compiles, in parallel, the configurations that will be timed."""

    def speedup(self, config: Any, over: Any) -> float | None:
        """Returns how much faster ``config`` is than ``over``, timed in turns, or None if it fails or is wrong."""


def neighbours(tuning: Any, kernel: str, block_m: int, config: Any, target: Any, itemsize: int) -> list[Any]:
    """Returns the configurations that are one step away from ``config`` and can be launched.

    Args:
        tuning: the kernel's module ``tuning``.
    """
    steps: list[dict[str, Any]] = []
    for field in ("block_m", "block_n", "block_k", "num_warps", "slices"):
        value = getattr(config, field)
        steps += [{field: 2 * value}, {field: value // 2}]
    if kernel in tuning.KERNELS_FEW:
        steps += [{"split_k": 2 * config.split_k}, {"split_k": config.split_k // 2}]
        steps += [{"prefetch": not config.prefetch}]
        steps += [{"registers": registers} for registers in _REGISTERS if registers != config.registers]
    steps += [{"num_stages": config.num_stages + step} for step in (1, -1)]
    steps += [{field: not getattr(config, field)} for field in ("descriptor", "half_tiles")]
    found = []
    for step in steps:
        (field,) = step
        if (
            (field == "slices" and kernel not in tuning.DOWN_BACKWARDS)
            or (field == "half_tiles" and kernel not in _HALVES)
            or (field == "descriptor" and kernel in (*tuning.KERNELS_4BIT, *tuning.KERNELS_FEW))
            or (field == "num_warps" and not (1 if kernel in tuning.KERNELS_FEW else 2) <= step[field] <= 8)
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
    """Yields each better configuration as soon as it is found, and how much faster than ``start`` it is.

    Args:
        around: returns the neighbours of a configuration.
        expired: called before every timing; says whether to stop.
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


# A step of ``crossover``, and the ratio of sizes between which it stops to look.
_STEP = 1.5
_CLOSE = 1.1


def crossover(
    start: int, least: int, most: int, speedup: Callable[[int], float | None], expired: Callable[[], bool]
) -> Iterator[tuple[int, float]]:
    """Each better threshold as it is found, and how much faster calls between ``start`` and it become at most.

    A threshold is the size up to which the way for small calls serves; it is ``least - 1`` if that way never does.

    Args:
        start: the threshold in use.
        least, most: the sizes that can be timed.
        speedup: how many times as fast the way for small calls is at a size, both ways timed in turns; None if one of them
            does not run.
        expired: asked before every timing.
    """
    served = start >= least  # whether the way for small calls serves any size that can be timed
    size = max(least, min(start, most))
    if size > most or expired():
        return
    first = speedup(size)
    if first is None or abs(first - 1) <= MARGIN:
        return
    if first > 1:
        if not served:
            yield size, first
        yield from _move_up(size, most, 1.0 if served else first, speedup, expired)
    elif served:
        yield from _move_down(size, least, 1 / max(first, MARGIN), speedup, expired)


def _move_up(
    good: int, most: int, gain: float, speedup: Callable[[int], float | None], expired: Callable[[], bool]
) -> Iterator[tuple[int, float]]:
    """``crossover`` where the way for small calls is faster at the threshold in use, so that more calls gain from it."""
    bad, stepping = most + 1, True
    while bad - good > 1 and (stepping or bad > good * _CLOSE) and not expired():
        size = min(bad - 1, max(good + 1, round(good * _STEP))) if stepping else (good + bad) // 2
        found = speedup(size)
        if found is not None and found > 1 + MARGIN:
            good, gain = size, max(gain, found)
            yield good, gain
        else:
            bad, stepping = size, False


def _move_down(
    bad: int, least: int, gain: float, speedup: Callable[[int], float | None], expired: Callable[[], bool]
) -> Iterator[tuple[int, float]]:
    """``crossover`` where the way for small calls is slower at the threshold in use."""
    good: int | None = None
    while not expired():
        if good is None:
            if bad == least:
                yield least - 1, gain
                return
            size = max(least, min(bad - 1, round(bad / _STEP)))
        elif bad - good > 1 and bad > good * _CLOSE:
            size = (good + bad) // 2
        else:
            return
        found = speedup(size)
        if found is not None and found >= 1:
            good = size
            yield good, gain
        else:
            bad = size
