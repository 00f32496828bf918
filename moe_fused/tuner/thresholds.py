"""What is timed for each threshold of the kernel, at which another way to compute a call becomes faster.

- ``buckets``: the rows per expert up to which a height of row tiles serves. All products of a step that share the map of
  tiles are timed with it, at this height and at the next.
- ``dequantize_rows``: the rows per expert up to which a product over packed weights dequantizes them itself. The product is
  timed that way and by way of the workspace.
- ``gemv_slots``: the slots up to which the few-row path serves. The whole of ``moe_experts``, without gradients, is timed
  over dense and over packed weights. It runs eagerly, not as a CUDA graph: the few-row path is there because it takes
  fewer launches, and a call must not depend on being captured. Packed weights are multiplied on the FMA units here.
- ``few_slots``: the slots up to which tensor cores multiply packed weights without sorting rows. ``moe_experts`` is timed as
  a CUDA graph, which is how a decoding step runs, against the way that would serve it otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_fused.benchmark import harness

from .workload import INPUT_SETS, ROWS_OF_FEW, Workload, time_in_turns

# The most that is timed: rows per expert for the borders of buckets and for dequantizing, and tokens for the few-row path.
MOST_BUCKET_ROWS = 256
MOST_DEQUANTIZE_ROWS = 1024
MOST_GEMV_TOKENS = 64
# A limit that no call comes near, and one that no call is below.
ALWAYS, NEVER = 2**31, 0

SECTIONS = ("buckets", "dequantize_rows", "gemv_slots", "few_slots")


@dataclass(frozen=True)
class Threshold:
    """One threshold of a layer on a GPU.

    Attributes:
        place: its section in a table, and the keys in that.
        unit: what its sizes count. factor: how many of the table's units one of these is.
        start: the threshold in use. least, most: the sizes that can be timed.
        speedup: how many times as fast the way for small calls is at a size; None where that cannot be timed.
    """

    place: tuple[str, ...]
    unit: str
    start: int
    least: int
    most: int
    speedup: Callable[[int], float | None]
    factor: int = 1

    @property
    def name(self) -> str:
        return "/".join(self.place)

    def laid_over(self, thresholds: Any, size: int) -> Any:
        """``thresholds`` of the kernel with this one at ``size``."""
        section, *keys = self.place
        if section == "gemv_slots":
            return replace(thresholds, gemv_slots=size * self.factor)
        if section == "few_slots":
            return replace(thresholds, few_slots=size * self.factor)
        if section == "dequantize_rows":
            return replace(thresholds, dequantize_rows={**thresholds.dequantize_rows, keys[0]: size})
        kind, height = keys
        return replace(thresholds, **{kind: {**getattr(thresholds, kind), int(height): size}})


def places(workload: Workload, sections: tuple[str, ...] = SECTIONS) -> list[tuple[str, ...]]:
    """The thresholds of ``sections`` that concern the layer, in the order in which they are measured."""
    tuning = workload.tuning
    packed = [kernel for kernel in workload.kernels() if kernel in tuning.KERNELS_4BIT]
    kinds = ["dense", *(["packed"] if packed else [])]
    found: dict[str, list[tuple[str, ...]]] = {
        "buckets": [("buckets", kind, str(height)) for kind in kinds for height in tuning.BUCKETS[:-1]],
        "dequantize_rows": [("dequantize_rows", kernel) for kernel in packed],
        "gemv_slots": [("gemv_slots",)],
        "few_slots": [("few_slots",)] if "few_up_4bit" in workload.kernels() else [],
    }
    return [place for section in SECTIONS if section in sections for place in found[section]]


def threshold_at(workload: Workload, place: tuple[str, ...]) -> Threshold:
    """The threshold at ``place``, between what holds now for its neighbours."""
    section, *keys = place
    if section == "gemv_slots":
        return _gemv(workload)
    if section == "few_slots":
        return _few(workload)
    if section == "dequantize_rows":
        return _dequantizing(workload, keys[0])
    return _border(workload, keys[0], int(keys[1]))


def _in_use(workload: Workload) -> Any:
    return workload.tuning.thresholds_of(workload.target)


def _border(workload: Workload, kind: str, height: int) -> Threshold:
    """Where tiles of ``height`` rows end and the next taller ones begin."""
    tuning = workload.tuning
    limits: dict[int, int] = dict(getattr(_in_use(workload), kind))
    position = tuning.BUCKETS.index(height)
    taller = tuning.BUCKETS[position + 1]
    below = limits[tuning.BUCKETS[position - 1]] if position else 0
    above = limits.get(taller, max(MOST_BUCKET_ROWS, limits[height]))

    def trying(chosen: int) -> Any:
        only = {tile: ALWAYS if tile >= chosen else NEVER for tile in limits}
        return tuning.trying_thresholds(replace(_in_use(workload), **{kind: only}))

    def speedup(rows: int) -> float | None:
        steps = workload.steps(kind == "packed", workload.tokens_of_rows(rows))
        return workload.measure_calls(steps, trying).speedup(height, taller)

    return Threshold(
        ("buckets", kind, str(height)), "rows per expert", limits[height], below + 1, above, _unless_full(speedup)
    )


def _dequantizing(workload: Workload, kernel: str) -> Threshold:
    """Where ``kernel`` stops to dequantize packed weights itself."""
    tuning = workload.tuning
    start = tuning.dequantize_rows(kernel, workload.target)

    def trying(limit: int) -> Any:
        in_use = _in_use(workload)
        limits = {**in_use.dequantize_rows, kernel: limit}
        return tuning.trying_thresholds(replace(in_use, dequantize_rows=limits))

    def speedup(rows: int) -> float | None:
        calls = workload.calls(kernel, workload.tokens_of_rows(rows))
        return workload.measure_calls(calls, trying).speedup(ALWAYS, NEVER)

    most = max(start, MOST_DEQUANTIZE_ROWS)
    return Threshold(("dequantize_rows", kernel), "rows per expert", start, 1, most, _unless_full(speedup))


def _gemv(workload: Workload) -> Threshold:
    """Where the few-row path ends, in tokens: a call has top_k slots for each."""
    tuning, layer = workload.tuning, workload.layer
    start = tuning.gemv_slots(workload.target) // layer.top_k

    def speedup(tokens: int) -> float | None:
        call = _experts_call(workload, tokens)
        few, many = (_under(workload, limit, call) for limit in (ALWAYS, NEVER))
        harness.compare("the few-row path", few(0), many(0))
        return time_in_turns(few, many, workload.device)

    most = max(start, MOST_GEMV_TOKENS)
    return Threshold(("gemv_slots",), "tokens", start, 1, most, _unless_full(speedup), factor=layer.top_k)


def _few(workload: Workload) -> Threshold:
    """Where tensor cores stop to multiply packed weights without sorting rows, in tokens."""
    tuning, layer = workload.tuning, workload.layer
    start = (tuning.few_slots(workload.target) or tuning.FEW_SLOTS) // layer.top_k

    def trying(limit: int) -> Any:
        return tuning.trying_thresholds(replace(_in_use(workload), few_slots=limit))

    def speedup(tokens: int) -> float | None:
        call = _experts_call(workload, tokens, ("packed",))
        calls = [lambda i=i: call(i) for i in range(INPUT_SETS)]
        return workload.measure_calls(calls, trying).speedup(ALWAYS, NEVER)

    most = max(start, ROWS_OF_FEW * layer.experts // layer.top_k)
    return Threshold(("few_slots",), "tokens", start, 1, most, _unless_full(speedup), factor=layer.top_k)


def _under(workload: Workload, limit: int, call: harness.Call) -> harness.Call:
    """``call`` with the few-row path up to ``limit`` slots. What changes the limit costs both ways the same."""
    tuning = workload.tuning
    thresholds = replace(_in_use(workload), gemv_slots=limit, few_slots=0)

    def run(i: int) -> dict[str, Tensor]:
        with tuning.trying_thresholds(thresholds):
            results: dict[str, Tensor] = call(i)
            return results

    return run


def _experts_call(workload: Workload, tokens: int, kinds: tuple[str, ...] = ("dense", "packed")) -> harness.Call:
    """The experts of a layer without gradients, over dense and, where the layer can be packed, over packed weights.

    Args:
        kinds: those of both that are computed.
    """
    unit, layer = workload.tuning.ROW_UNIT, workload.layer
    weights = {"dense": (workload.up, workload.down)}
    if layer.hidden % unit == 0 and layer.intermediate % unit == 0:
        weights["packed"] = workload.packed_weights()
    weights = {kind: of_layer for kind, of_layer in weights.items() if kind in kinds}
    inputs = [workload.inputs(tokens) for _ in range(INPUT_SETS)]

    def call(i: int) -> dict[str, Tensor]:
        one = inputs[i % INPUT_SETS]
        with torch.no_grad():
            return {
                name: workload.kernel.moe_experts(one.hidden_states, one.top_k_index, one.top_k_weights, *of_layer)
                for name, of_layer in weights.items()
            }

    return call


def _unless_full(speedup: Callable[[int], float | None]) -> Callable[[int], float | None]:
    """``speedup``, or None for a size whose tensors do not fit the GPU or whose result is wrong."""

    def guarded(size: int) -> float | None:
        try:
            return speedup(size)
        except (torch.OutOfMemoryError, harness.MismatchError):
            return None

    return guarded
