"""The statistics under a clock that the tests turn, and the check that stands before every timing."""

from __future__ import annotations

import pytest
import torch

from moe_fused.benchmark import harness
from moe_fused.benchmark.harness import CpuClock, MismatchError, Timing, compare, time_interleaved


class FakeClock:
    """Time passes only where a call says so; each mark and each wait is recorded."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def synchronize(self) -> None:
        self.log.append("wait")

    def mark(self) -> float:
        return self.now

    def milliseconds(self, start: float, end: float) -> float:
        return end - start

    def call(self, name: str, *milliseconds: float):
        """A call that takes these times in turn, the last of them from then on, and notes its set's index."""
        times = list(milliseconds)

        def run(i: int) -> None:
            self.log.append(f"{name}{i}")
            self.now += times.pop(0) if len(times) > 1 else times[0]

        return run


def test_time_of_a_call():
    clock = FakeClock()
    timings = time_interleaved({"a": clock.call("a", 2.0), "b": clock.call("b", 0.5)}, clock, seconds=0.05, batches=5)
    assert timings == {"a": Timing(2.0, 0.0), "b": Timing(0.5, 0.0)}


def test_slow_first_calls_do_not_count():
    clock = FakeClock()
    calls = {"a": clock.call("a", 500.0, 100.0, 2.0)}  # compiles, then warms up
    assert time_interleaved(calls, clock, seconds=0.02, batches=5)["a"] == Timing(2.0, 0.0)


def test_median_is_over_batches():
    clock = FakeClock()
    warm_up = [1.0] * (harness.WARMUP_CALLS + harness.ESTIMATE_CALLS)
    # Too little time for more than a call a batch: the first turn is discarded, then come three.
    calls = {"a": clock.call("a", *warm_up, 77.0, 3.0, 90.0, 4.0)}
    timing = time_interleaved(calls, clock, seconds=0.001, batches=3)["a"]
    assert timing is not None
    assert timing.ms == 4.0


def test_implementations_take_turns_from_an_idle_device_and_change_neighbours():
    clock = FakeClock()
    time_interleaved({name: clock.call(name, 10.0) for name in "abc"}, clock, seconds=0.06, batches=6)
    warm = harness.WARMUP_CALLS + harness.ESTIMATE_CALLS
    measured = [entry for entry in clock.log if entry != "wait"][3 * warm :]
    # One call a batch; each goes on with its next input set.
    turns = [measured[i : i + 3] for i in range(0, len(measured), 3)]
    assert [sorted(turn) for turn in turns] == [[f"{name}{warm + i}" for name in "abc"] for i in range(7)]
    before = {measured[i - 1][0] for i in range(1, len(measured)) if measured[i][0] == "b"}
    assert {"a", "c"} <= before
    log = clock.log
    assert all(log[i - 1] == log[i + 1] == "wait" for i, entry in enumerate(log) if entry in measured)


def test_batches_fill_the_time_given():
    clock = FakeClock()
    time_interleaved({"a": clock.call("a", 0.1)}, clock, seconds=0.7, batches=7)
    calls = sum(entry != "wait" for entry in clock.log) - harness.WARMUP_CALLS - harness.ESTIMATE_CALLS
    assert calls == 8 * 1000  # 100 ms a batch, and the discarded turn


def test_out_of_memory_is_no_time_and_stops_nobody_else():
    def hungry(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    clock = FakeClock()
    timings = time_interleaved({"hungry": hungry, "a": clock.call("a", 1.0)}, clock, seconds=0.01)
    assert timings == {"hungry": None, "a": Timing(1.0, 0.0)}
    assert time_interleaved({"hungry": hungry}, clock) == {"hungry": None}


def test_other_errors_are_not_hidden():
    def broken(_: int) -> None:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        time_interleaved({"broken": broken}, FakeClock())


@pytest.mark.parametrize("bad", [{"seconds": 0.0}, {"seconds": -1.0}, {"batches": 0}], ids=str)
def test_bad_budget(bad):
    with pytest.raises(ValueError, match="seconds must be positive"):
        time_interleaved({}, FakeClock(), **bad)


def test_statistics():
    assert Timing.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Timing(3.0, pytest.approx(2 / 3))
    assert Timing.of([2.0]) == Timing(2.0, 0.0)
    assert Timing.of([8.0, 8.0]).divided(4) == Timing(2.0, 0.0)
    with pytest.raises(ValueError, match="at least one time"):
        Timing.of([])


def test_wall_clock():
    clock = CpuClock()
    start = clock.mark()
    sum(range(1000))
    assert 0 < clock.milliseconds(start, clock.mark()) < 1000


def test_ceilings_on_a_cpu():
    ceilings = harness.measure_ceilings(torch.device("cpu"), copy_bytes=2**16, matmul_size=32, seconds=0.01)
    assert 1e6 < ceilings.bytes_per_second < 1e13
    assert 1e5 < ceilings.flops_per_second < 1e14


def test_input_sets_exceed_the_cache(monkeypatch):
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    device = torch.device("cuda", 0)
    small, large = 10 * 2**20, 2**31
    assert harness.input_sets(small, device) * small >= harness.CACHE_MULTIPLE * Properties.L2_cache_size
    assert harness.input_sets(large, device) == 4
    assert harness.input_sets(1, device) == 64
    assert harness.input_sets(small, torch.device("cpu")) == 4


def test_memory_that_an_implementation_keeps(monkeypatch):
    """A tensor that outlives the call counts; the results, and what the call let go of, do not."""
    held: list[torch.Tensor] = []
    results = {"y": torch.empty(1000), "view of y": torch.empty(0), "grad": torch.empty(1, requires_grad=True)}
    results["view of y"] = results["y"][10:]
    allocated = 7 * 2**20

    def call(_: int) -> dict[str, torch.Tensor]:
        nonlocal allocated
        if not held:
            held.append(torch.empty(3 * 2**18))
            allocated += held[0].nbytes
        allocated += 4096 + 512  # y and grad, rounded up as torch does
        return results

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated)
    device = torch.device("cuda", 0)
    got, kept = harness.run_and_weigh(call, device)
    assert kept == 3.0
    assert not got["grad"].requires_grad
    assert harness.run_and_weigh(call, device)[1] == 0.0, "it is kept once"
    assert harness.run_and_weigh(call, torch.device("cpu"))[1] == 0.0


class TestCompare:
    def test_equal_and_rounded(self):
        want = torch.randn(64, 32)
        compare("a", {"y": want}, {"y": want})
        compare("a", {"y": want.bfloat16()}, {"y": want})

    def test_one_wrong_row_among_many(self):
        want = torch.randn(4096, 32)
        got = want.clone()
        got[1234] = got[1235]
        with pytest.raises(MismatchError, match="y of a is off by"):
            compare("a", {"y": got}, {"y": want})

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value):
        want = torch.randn(8, 4)
        got = want.clone()
        got[3, 1] = value
        for pair in ((got, want), (want, got), (got, got)):
            with pytest.raises(MismatchError, match="off by"):
                compare("a", {"y": pair[0]}, {"y": pair[1]})

    def test_all_off_by_a_little(self):
        want = torch.randn(64, 32)
        compare("a", {"y": want * 1.01}, {"y": want})
        with pytest.raises(MismatchError, match=r"y of a is off by 0.05 of its norm"):
            compare("a", {"y": want * 1.05}, {"y": want})

    def test_rows_that_should_be_zero(self):
        """Most are, as in the gradients of experts that nobody chose: they must not make the others look wrong."""
        want = torch.zeros(512, 4)
        want[5:9] = torch.tensor([1.0, 2.0, 3.0, 0.05])[:, None]
        got = want.clone()
        got[8] += 0.05
        compare("a", {"y": got}, {"y": want})
        got[400] = 0.5
        with pytest.raises(MismatchError, match="off by"):
            compare("a", {"y": got}, {"y": want})
        with pytest.raises(MismatchError, match="off by"):
            compare("a", {"y": got}, {"y": torch.zeros(512, 4)})

    def test_all_zero_and_empty(self):
        compare("a", {"y": torch.zeros(3, 2)}, {"y": torch.zeros(3, 2)})
        compare("a", {"y": torch.zeros(0, 2)}, {"y": torch.zeros(0, 2)})

    def test_chunks(self, monkeypatch):
        monkeypatch.setattr(harness, "CHECK_CHUNK", 8)
        want = torch.randn(2, 5, 4)
        compare("a", {"y": want}, {"y": want})
        got = want.clone()
        got[1, 4] += 1
        with pytest.raises(MismatchError, match="off by"):
            compare("a", {"y": got}, {"y": want})

    def test_shape_and_names(self):
        with pytest.raises(MismatchError, match=r"y of a has shape \(2, 3\), expected \(3, 2\)"):
            compare("a", {"y": torch.ones(2, 3)}, {"y": torch.ones(3, 2)})
        with pytest.raises(MismatchError, match="a returned x, expected y"):
            compare("a", {"x": torch.ones(1)}, {"y": torch.ones(1)})
