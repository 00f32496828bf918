"""Measures time, peak memory and the ceilings of a GPU, and checks that results agree.

What is timed: a batch of calls back to back between two events, divided by their number, from an idle GPU. In the steady
state this is the larger of the CPU's time to launch a call and the GPU's time to run it, which is what each layer of a
model costs. The alternative, events around every call (as ``triton.testing.do_bench`` has it), was rejected because its
result depends on what the GPU did before. If the GPU is kept busy, say by flushing its cache, the CPU launches ahead, and a
launch-bound implementation looks faster than it ever is in use. If the GPU is idle, every launch of a chain of kernels
is seen.

What keeps the result honest: calls rotate through input sets that together exceed the L2 cache several times, so a call
finds there at most the few percent of its weights that it happens to share with the call before. The implementations of
one point take turns, a batch each, so that they see the same clocks, temperature and neighbours. The time is the median of
the batches. Before anything is timed, results are compared (``compare``). They are computed in memory poisoned with NaN
(``poison``), so that nothing passes by reading what an earlier call left behind.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Protocol

import torch
from torch import Tensor

from .layers import Ceilings

MIB = 2**20
ALLOCATION = 512  # torch rounds the size of a tensor's memory on a GPU up to a multiple of this
BATCHES = 7
WARMUP_CALLS = 2
ESTIMATE_CALLS = 3
MAX_CALLS = 2000
CACHE_MULTIPLE = 6  # the rotated inputs and weights exceed the L2 this many times
TOLERANCE = 0.02  # half-precision sums in another order differ by 0.005 of the whole
CHECK_CHUNK = 2**24  # elements compared at a time, so that the check needs little memory

Call = Callable[[int], Any]
"""``call(i)`` runs what is timed once; ``i`` counts the calls so far and chooses the input set."""


class Clock(Protocol):
    """A stopwatch for work that may run asynchronously."""

    def synchronize(self) -> None:
        """Waits until all work has ended."""

    def mark(self) -> Any:
        """Returns a mark at this moment in the stream of work."""

    def milliseconds(self, start: Any, end: Any) -> float:
        """Returns the time between two marks that the work has passed."""


class CudaClock:
    """CUDA events on the current stream."""

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end))


class CpuClock:
    """The wall clock, for smoke tests of a benchmark on a machine without a GPU."""

    def synchronize(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def milliseconds(self, start: float, end: float) -> float:
        return 1e3 * (end - start)


def clock_for(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Timing:
    """The time of one call in milliseconds: the median over batches, and the interquartile range as a share of it."""

    ms: float
    spread: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Makes the statistics of ``samples``, one for each batch.

        Raises:
            ValueError: there are no samples.
        """
        if not samples:
            raise ValueError("samples must hold at least one time, got none")
        median = statistics.median(samples)
        if len(samples) == 1 or median == 0:
            return cls(median, 0.0)
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, (high - low) / median)

    def divided(self, by: int) -> Timing:
        """Returns the time of one call, if ``by`` calls were timed as one."""
        return Timing(self.ms / by, self.spread)


class _Lane:
    """One implementation, and how far it has come through the input sets."""

    def __init__(self, call: Call, clock: Clock) -> None:
        self._call = call
        self._clock = clock
        self._calls = 0
        self.batch_size = 1
        self.samples: list[float] = []

    def batch(self, calls: int) -> float:
        """Runs ``calls`` calls back to back and returns the milliseconds of one."""
        # The GPU must be idle: otherwise the launches of this batch would hide behind the work of the batch before.
        self._clock.synchronize()
        start = self._clock.mark()
        for i in range(self._calls, self._calls + calls):
            self._call(i)
        end = self._clock.mark()
        self._clock.synchronize()
        self._calls += calls
        return self._clock.milliseconds(start, end) / calls


def time_interleaved(
    calls: Mapping[str, Call], clock: Clock, *, seconds: float = 0.4, batches: int = BATCHES
) -> dict[str, Timing | None]:
    """Times each of ``calls`` for about ``seconds``, in ``batches`` batches that take turns.

    Returns:
        A ``Timing`` by name, None for a call that ran out of memory.

    Raises:
        ValueError: ``seconds`` or ``batches`` is not positive.
    """
    if seconds <= 0 or batches < 1:
        raise ValueError(f"seconds must be positive and batches at least 1, got {seconds} and {batches}")
    lanes: dict[str, _Lane] = {}
    for name, call in calls.items():
        lane = _Lane(call, clock)
        try:
            lane.batch(WARMUP_CALLS)
            estimate = lane.batch(ESTIMATE_CALLS)
        except torch.OutOfMemoryError:
            continue
        budget = 1e3 * seconds / batches
        lane.batch_size = max(1, min(MAX_CALLS, round(budget / max(estimate, 1e-6))))
        lanes[name] = lane
    names = list(lanes)
    order = random.Random(0)
    for turn in range(batches + 1):
        # The order changes in every turn. In a fixed order, each would run at the clocks that the same neighbour left.
        for name in order.sample(names, len(names)):
            lane = lanes[name]
            sample = lane.batch(lane.batch_size)
            if turn > 0:  # the first turn only settles the clocks for this mixture of work
                lane.samples.append(sample)
    return {name: Timing.of(lanes[name].samples) if name in lanes else None for name in calls}


def release_memory(device: torch.device) -> None:
    """Hands cached memory back to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocated_mib(device: torch.device) -> float:
    """Returns the memory (MiB) that tensors hold. On a CPU, where torch does not count it, this is 0."""
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else 0.0


def run_and_weigh(call: Call, device: torch.device) -> tuple[dict[str, Tensor], float]:
    """Returns the detached results of ``call(0)``, and the memory (MiB) that it keeps beside them.

    This memory is a workspace that the implementation keeps between calls. ``peak_mib`` of a later call cannot see it.
    """
    before = allocated_mib(device)
    results = {name: value.detach() for name, value in call(0).items()}
    if device.type != "cuda":
        return results, 0.0
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in results.values()}
    returned = sum(math.ceil(size / ALLOCATION) * ALLOCATION for size in storages.values())
    return results, allocated_mib(device) - before - returned / MIB


def peak_mib(call: Call, device: torch.device) -> float | None:
    """Returns the peak memory (MiB) of one call, results included, on top of what was held before. None on a CPU.

    The call should have run before, because compilation and libraries allocate on a first call. Memory that an
    implementation keeps between calls is not included; ``run_and_weigh`` finds that.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call(0)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated(device) - before) / MIB
    del result
    return peak


def poison(device: torch.device, num_bytes: int) -> None:
    """Fills the memory that the next allocations will get, up to ``num_bytes``, with NaN; does nothing on a CPU.

    It fills at most half of the free memory, so that an implementation that needs much memory does not fail because of it.
    """
    if device.type != "cuda":
        return
    release_memory(device)
    free, _ = torch.cuda.mem_get_info(device)
    size = min(num_bytes, free // 2)
    # The allocator serves requests below 1 MiB from a pool of their own.
    small = [torch.full((MIB // 8,), math.nan, device=device) for _ in range(16)]
    large = torch.full((size // 4,), math.nan, device=device)
    del small, large


class MismatchError(RuntimeError):
    """The results of an implementation differ from those of the others."""


class UnavailableError(RuntimeError):
    """An implementation cannot run here. The message is short, because it goes into a table."""


def _relative_errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Returns the error of the whole tensor and the largest error of a row (the last dimension), relative to their norms.

    The norm of a row is its own norm plus the mean norm of the rows that are not zero. So rows near zero stay meaningful,
    and the rows of experts that no token chose do not count. The result is nan if anything is not finite.
    """
    if not want.numel():
        return 0.0, 0.0
    width = want.shape[-1]
    rows = max(1, CHECK_CHUNK // width)
    chunks = list(zip(got.reshape(-1, width).split(rows), want.reshape(-1, width).split(rows), strict=True))
    errors = torch.cat([(g.float() - w.float()).norm(dim=-1) for g, w in chunks])
    norms = torch.cat([w.float().norm(dim=-1) for _, w in chunks])
    if not errors.any():  # nan counts as an error here
        return 0.0, 0.0
    typical = norms.sum() / norms.count_nonzero()
    # Sums and max() propagate nan. If all wanted rows are zero, an error makes both infinite or nan.
    return float(errors.norm() / norms.norm()), float((errors / (norms + typical)).max())


def compare(
    name: str,
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    *,
    tolerance: float = TOLERANCE,
    row_tolerance: float = 0.25,
) -> None:
    """Checks the results ``got`` of the implementation ``name`` against ``want``, those of another.

    The defaults allow for half-precision sums in another order (0.005 of the whole, and several times that in the worst of
    200 000 rows) and for no wrong row. This is no test of accuracy; those are in ``tests/``.

    Raises:
        MismatchError: a result is missing, has another shape or is not finite, or it is off by more than ``tolerance`` of
            its norm or, in some row, by more than ``row_tolerance`` of the row's norm.
    """
    if set(got) != set(want):
        raise MismatchError(f"{name} returned {', '.join(sorted(got))}, expected {', '.join(sorted(want))}")
    for key, wanted in want.items():
        value = got[key]
        if value.shape != wanted.shape:
            raise MismatchError(f"{key} of {name} has shape {tuple(value.shape)}, expected {tuple(wanted.shape)}")
        whole, row = _relative_errors(value.detach(), wanted.detach())
        # The comparison is written so that nan fails.
        if not (whole <= tolerance and row <= row_tolerance):
            raise MismatchError(
                f"{key} of {name} is off by {whole:.2g} of its norm and up to {row:.2g} in a row, "
                f"at most {tolerance:.2g} and {row_tolerance:.2g} are allowed"
            )


def input_sets(bytes_touched: float, device: torch.device, *, least: int = 4, most: int = 64) -> int:
    """Returns how many input sets to rotate through if a call touches ``bytes_touched`` of weights and activations."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(most, max(least, math.ceil(CACHE_MULTIPLE * cache / max(1.0, bytes_touched))))


def graph_of(call: Call, calls: int) -> tuple[Call, Any]:
    """Captures ``calls`` calls, each on an input set of its own, in one CUDA graph, like the layers of a model's step.

    Returns:
        A call that replays the graph, and what ``call(0)`` returned in it (new content with every replay).

    Raises:
        RuntimeError: the call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture needs a call before it, on another stream than the default one
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = call(0)
        for i in range(1, calls):
            call(i)
    return lambda _: graph.replay(), first


def _copy_call(num_bytes: int, device: torch.device) -> Call:
    source = torch.empty(num_bytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    return lambda _: target.copy_(source)


def _matmul_call(size: int, device: torch.device) -> Call:
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out)


def measure_ceilings(
    device: torch.device, *, copy_bytes: int = 2**30, matmul_size: int = 8192, seconds: float = 0.3
) -> Ceilings:
    """Measures what a large copy (bytes read plus written) and a square bf16 product of random matrices reach.

    Raises:
        torch.OutOfMemoryError: the device has no room for ``2 * copy_bytes`` and three matrices.
    """
    clock = clock_for(device)

    def ms(call: Call) -> float:
        timing = time_interleaved({"ceiling": call}, clock, seconds=seconds)["ceiling"]
        if timing is None:
            raise torch.OutOfMemoryError(f"no memory to measure the ceilings of {device}")
        return timing.ms

    copy = ms(_copy_call(copy_bytes, device))
    matmul = ms(_matmul_call(matmul_size, device))
    release_memory(device)
    return Ceilings(bytes_per_second=2e3 * copy_bytes / copy, flops_per_second=2e3 * matmul_size**3 / matmul)


@dataclass(frozen=True)
class Environment:
    """Where and when a benchmark ran."""

    gpu: str
    date: str
    torch: str
    triton: str


def current_environment(device: torch.device) -> Environment:
    """Returns the environment of a run on ``device``, with today's date in UTC. A CPU is reported as the GPU ``cpu``."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Environment(gpu, datetime.now(timezone.utc).date().isoformat(), torch.__version__, triton)
