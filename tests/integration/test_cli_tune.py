"""``moe-fused tune`` with a clock of its own, and the table it writes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import moe_fused
from moe_fused import hub
from moe_fused.benchmark import harness
from moe_fused.benchmark.layers import LAYERS, Layer
from moe_fused.benchmark.shapes import layer_of
from moe_fused.commands import tune as command_module
from moe_fused.locks import locked_file
from moe_fused.quantized import compressed_content
from moe_fused.reports import read_report
from moe_fused.signals import Interrupted
from moe_fused.tuner import thresholds as thresholds_module
from moe_fused.tuner.search import climb, crossover, neighbours
from moe_fused.tuner.table import TableFile, table_path
from moe_fused.tuner.thresholds import Threshold, places, threshold_at
from moe_fused.tuner.workload import GraphMeasure, Workload

from .cli import Command
from .models import EXPERTS, HIDDEN, INTERMEDIATE, MODELS, QWEN3_MOE, TOP_K

tuning: Any = hub.submodule(moe_fused.get_kernel(), "tuning")
H100, A100 = tuning.TARGETS[90], tuning.TARGETS[80]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test sets ``MOE_FUSED_CONFIGS`` to, the next one starts without."""
    monkeypatch.delenv("MOE_FUSED_CONFIGS", raising=False)
    tuning.forget_tables()
    yield
    tuning.forget_tables()


# The search.


@dataclass
class FakeMeasure:
    """Milliseconds by a formula; None for what does not run."""

    milliseconds: Any
    timed: int = 0
    prepared: int = 0

    def prepare(self, configs: Sequence[Any]) -> None:
        self.prepared += len(configs)

    def speedup(self, config: Any, over: Any) -> float | None:
        self.timed += 1
        candidate, other = self.milliseconds(config), self.milliseconds(over)
        return None if candidate is None else other / candidate


@pytest.mark.parametrize("target", [A100, H100], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("block_m", tuning.BUCKETS)
@pytest.mark.parametrize("kernel", [*tuning.KERNELS, *tuning.KERNELS_FEW])
def test_neighbours_are_a_step_away_and_valid(kernel: str, block_m: int, target: Any) -> None:
    start = tuning.launch_config(kernel, block_m, target, 2)
    found = neighbours(tuning, kernel, block_m, start, target, 2)
    assert 2 <= len(found) <= 16
    assert len(set(found)) == len(found)
    for config in found:
        tuning.check(kernel, config, target, 2)
        tuning.check_bucket(kernel, block_m, config, 2)
        changed = [name for name in vars(start) if getattr(start, name) != getattr(config, name)]
        assert len(changed) == 1


def test_climbs_to_the_top_over_several_fields() -> None:
    start = tuning.default_config("gemm", 64, A100, 2)
    goal = replace(start, block_n=256, num_warps=8, num_stages=3)

    def milliseconds(config: Any) -> float:
        return 1.0 + sum(getattr(config, name) != getattr(goal, name) for name in vars(goal))

    measure = FakeMeasure(milliseconds)
    steps = list(climb(start, lambda config: neighbours(tuning, "gemm", 64, config, A100, 2), measure, lambda: False))
    assert [config for config, _ in steps][-1] == goal
    assert len(steps) == 3
    assert steps[-1][1] == pytest.approx(4.0)
    assert measure.prepared == measure.timed < 40


def test_noise_is_no_gain_and_what_does_not_run_is_left_out() -> None:
    start = tuning.default_config("gemm", 64, A100, 2)
    around = [replace(start, num_warps=8), replace(start, num_stages=3), replace(start, block_n=64)]
    times = dict(zip([start, *around], [1.0, 0.99, None, 1.3], strict=True))
    measure = FakeMeasure(times.get)
    assert list(climb(start, lambda _: around, measure, lambda: False)) == []
    assert measure.timed == 3


def test_time_is_up() -> None:
    start = tuning.default_config("gemm", 64, A100, 2)
    around = [replace(start, num_stages=stages) for stages in (2, 3)]
    measure = FakeMeasure(lambda config: float(config.num_stages))
    asked = iter([False, False, True, True])
    ((config, gain),) = climb(start, lambda _: around, measure, lambda: next(asked))
    assert (config, measure.timed) == (around[0], 1)  # the one that was timed counts
    assert gain == pytest.approx(2.0)
    assert list(climb(start, lambda _: around, measure, lambda: True)) == []


class Crossing:
    """Two ways of computing a call, the one for small calls faster below size ``at``; gives the speed-up at a size."""

    def __init__(self, at: float, broken_from: int | None = None) -> None:
        self.at, self.broken_from = at, broken_from
        self.timed: list[int] = []

    def __call__(self, size: int) -> float | None:
        self.timed.append(size)
        if self.broken_from is not None and size >= self.broken_from:
            return None
        return (self.at / size) ** 0.5 if self.at else 0.1


def moved(start: int, crossing: Crossing, least: int = 1, most: int = 1024) -> list[tuple[int, float]]:
    return list(crossover(start, least, most, crossing, lambda: False))


@pytest.mark.parametrize("start", [1, 16, 192, 300, 1000])
@pytest.mark.parametrize("at", [3, 40, 200, 900])
def test_thresholds_move_to_where_both_ways_are_as_fast(start: int, at: int) -> None:
    crossing = Crossing(at)
    steps = moved(start, crossing)
    found = steps[-1][0] if steps else start
    # Within what the search looks at closely, and within what two timings of the same thing differ by.
    assert at / 1.15 - 1 <= found <= at * 1.05 + 1
    assert len(crossing.timed) == len(set(crossing.timed)) <= 22
    assert all(gain > 1.02 for _, gain in steps)
    sizes = [size for size, _ in steps]
    assert sizes == sorted(sizes), "each step is better than the one before"


def test_a_threshold_that_is_right_is_timed_once() -> None:
    for at in (100, 102, 98):
        crossing = Crossing(at)
        assert moved(100, crossing) == []
        assert crossing.timed == [100]


def test_thresholds_at_the_ends_of_what_can_be_timed() -> None:
    assert moved(64, Crossing(0), least=17)[-1] == (16, pytest.approx(10.0)), "the way for small calls never serves"
    assert moved(64, Crossing(10**6), most=256)[-1][0] == 256
    assert moved(10**5, Crossing(10**6), most=256) == []
    assert moved(10**5, Crossing(100), most=256)[-1][0] == pytest.approx(100, rel=0.15)
    # One that serves nothing so far: from the least size on.
    crossing = Crossing(40)
    assert moved(0, crossing, least=8)[-1][0] == pytest.approx(40, rel=0.15)
    assert min(crossing.timed) == 8
    assert moved(0, Crossing(4), least=8) == []
    # No room between the neighbours.
    assert moved(16, Crossing(100), least=17, most=16) == []


def test_sizes_that_cannot_be_timed() -> None:
    assert moved(64, Crossing(500, broken_from=64)) == []
    assert moved(64, Crossing(500, broken_from=200))[-1][0] == pytest.approx(190, rel=0.1)


def test_time_for_a_threshold_is_up() -> None:
    asked = iter([False, False, True])
    assert list(crossover(64, 1, 1024, Crossing(1000), lambda: next(asked))) == [
        (96, pytest.approx((1000 / 96) ** 0.5))
    ]
    assert list(crossover(64, 1, 1024, Crossing(1000), lambda: True)) == []


# The table.


def test_a_table_reads_back_and_replaces_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned" / "sm_80.json"
    table = TableFile(path, tuning)
    one = replace(tuning.default_config("gemm", 64, A100, 2), num_stages=3)
    other = replace(tuning.default_config("up", 16, A100, 2), num_warps=2)
    for kernel, block_m, config in (("gemm", 64, one), ("up", 16, other), ("gemm", 64, one)):
        table.add(kernel, 2, block_m, config)
    assert table.entries == 2
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(path.parent))
    tuning.forget_tables()
    assert tuning.launch_config("gemm", 64, A100, 2) == one
    assert tuning.launch_config("up", 16, A100, 2) == other
    assert tuning.launch_config("up", 32, A100, 2) == tuning.default_config("up", 32, A100, 2)
    assert list(json.loads(path.read_text())) == ["up", "gemm"]  # as the shipped ones
    assert list(path.parent.iterdir()) == [path]


def test_a_table_keeps_what_it_does_not_measure(tmp_path: Path) -> None:
    path = tmp_path / "sm_90.json"
    shipped = Path(str(tuning.__file__)).parent / "configs" / "sm_90.json"
    path.write_bytes(shipped.read_bytes())
    config = replace(tuning.launch_config("gemm", 128, H100, 2), num_stages=3)
    TableFile(path, tuning).add("gemm", 2, 128, config)
    before, after = json.loads(shipped.read_text()), json.loads(path.read_text())
    assert after["gemm"]["2"].pop("128")["num_stages"] == 3
    before["gemm"]["2"].pop("128")
    assert after == before


def test_the_shipped_table_is_as_one_would_be_written() -> None:
    shipped = Path(str(tuning.__file__)).parent / "configs" / "sm_90.json"
    assert TableFile(shipped, tuning)._text() == shipped.read_text(encoding="utf-8")


def test_thresholds_in_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read back; a reason for other numbers goes, and all heights of a kind go together."""
    path = tmp_path / "sm_80.json"
    path.write_text('{"why": {"buckets": "a guess", "gemv_slots": "another"}, "buckets": {"packed": {"64": 99}}}')
    usual = tuning.DEFAULT_THRESHOLDS
    table = TableFile(path, tuning)
    table.add_threshold(("buckets", "dense", "16"), replace(usual, dense={**usual.dense, 16: 7}))
    rows = {**usual.dequantize_rows, "up_4bit": 300}
    table.add_threshold(("dequantize_rows", "up_4bit"), replace(usual, dequantize_rows=rows))
    table.add_threshold(("dequantize_rows", "up_4bit"), replace(usual, dequantize_rows=rows))
    assert (table.entries, table.thresholds) == (0, 2)
    assert tuning.read_table(path) == {
        "why": {"gemv_slots": "another"},
        "dequantize_rows": {"up_4bit": 300},
        "buckets": {"dense": {"16": 7, "32": 16, "64": 48}, "packed": {"64": 99}},
    }
    table.add_threshold(("gemv_slots",), replace(usual, gemv_slots=0))
    assert "why" not in tuning.read_table(path)
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(tmp_path))
    tuning.forget_tables()
    found = tuning.thresholds_of(A100)
    assert (found.dense[16], found.packed[64], found.dequantize_rows["up_4bit"], found.gemv_slots) == (7, 99, 300, 0)
    assert found.dequantize_rows["gemm_4bit"] == usual.dequantize_rows["gemm_4bit"]


def test_no_table_is_built_on_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "sm_90.json").write_text("{")
    with pytest.raises(ValueError, match=r"sm_90\.json is not JSON"):
        TableFile(tmp_path / "sm_90.json", tuning)


def test_where_a_table_goes(tmp_path: Path) -> None:
    assert table_path(tmp_path, "sm_90.json") == tmp_path / "sm_90.json"
    assert table_path(tmp_path / "new", "sm_90.json") == tmp_path / "new" / "sm_90.json"
    assert table_path(tmp_path / "sm_90.json", "sm_90.json") == tmp_path / "sm_90.json"
    with pytest.raises(ValueError, match=r"--output must be a directory or end in sm_90\.json"):
        table_path(tmp_path / "mine.json", "sm_90.json")


# What is timed.


def test_layers_of_models() -> None:
    """``layer_of`` reads the sizes of every layout of configs, without making a weight."""
    for case in MODELS:
        model = case.build()
        layer = layer_of(case.id, model.config)
        wide = case.id.startswith(("mixtral", "olmoe", "granitemoe", "hunyuan", "minimax", "flex_olmo", "phimoe"))
        wanted = (HIDDEN, 24 if wide else INTERMEDIATE, EXPERTS, 2 if case.id == "phimoe" else TOP_K)
        assert (layer.hidden, layer.intermediate, layer.experts, layer.top_k) == wanted, case.id
    with pytest.raises(ValueError, match="no layer of experts"):
        layer_of("llama", __import__("transformers").LlamaConfig(num_hidden_layers=1))


@pytest.fixture
def workload(monkeypatch: pytest.MonkeyPatch) -> Workload:
    """A small layer on a CPU, with plain torch in the place of the launches."""
    kernel = moe_fused.get_kernel()
    reference = hub.submodule(kernel, "stages.reference")
    monkeypatch.setitem(sys.modules, f"{kernel.__name__}.stages.triton", reference)
    monkeypatch.setitem(
        sys.modules, f"{kernel.__name__}.stages.triton.bound_kernel", SimpleNamespace(compiling_only=None)
    )
    return Workload(kernel, replace(LAYERS["tiny"], experts=4, intermediate=64), torch.device("cpu"))


def test_every_kernel_has_calls_that_compute(workload: Workload) -> None:
    """Two configurations of these are compared."""
    tiled = [name for name in tuning.KERNELS if name != "gemm"]
    assert workload.kernels() == [*tiled, *tuning.KERNELS_FEW]
    for name in tiled:
        packed = name in tuning.KERNELS_4BIT
        assert tuple(workload.heights(name)) == tuning.BUCKETS
        for block_m in tuning.BUCKETS:
            tokens = workload.tokens(name, block_m)
            assert tuning.bucket(tokens * 2, 4, packed, workload.target) == block_m
        measure = workload.measure(name, 16)
        one, again, other = measure._call(0), measure._call(4), measure._call(1)
        harness.compare(name, one, again, tolerance=0)
        with pytest.raises(harness.MismatchError):
            harness.compare(name, one, other)


@pytest.mark.parametrize("name", tuning.KERNELS_FEW)
def test_few_rows_have_calls_that_compute(name: str, workload: Workload) -> None:
    """Buckets are numbers of slots, two for a token, or of rows. The four experts have 8 rows each at 32 slots."""
    tokens = {bucket: workload.tokens(name, bucket) for bucket in workload.heights(name)}
    assert tokens == ({16: 16, 32: 32, 64: 64} if name == "few_linear_4bit" else {16: 8, 32: 16})
    measure = workload.measure(name, 16)
    one, again, other = measure._call(0), measure._call(4), measure._call(1)
    harness.compare(name, one, again, tolerance=0)
    with pytest.raises(harness.MismatchError):
        harness.compare(name, one, other)


def test_more_tokens_of_few_rows(workload: Workload) -> None:
    workload.layer = replace(workload.layer, experts=128, top_k=8)
    usual = tuning.thresholds_of(workload.target)
    for limit, tokens in (
        (256, {16: 2, 32: 4, 64: 8, 128: 32}),
        (128, {16: 2, 32: 4, 64: 8, 128: 16}),
        (40, {16: 2, 32: 4, 64: 5}),
        (0, {16: 2, 32: 4, 64: 8, 128: 16}),  # what was not measured
    ):
        with tuning.trying_thresholds(replace(usual, few_slots=limit)):
            found = {bucket: workload.tokens("few_up_4bit", bucket) for bucket in workload.heights("few_up_4bit")}
            assert found == tokens


def test_heights_without_rows_are_not_tuned(workload: Workload) -> None:
    usual = tuning.thresholds_of(workload.target)
    fewer = {**usual.dequantize_rows, "up_4bit": 100, "gemm_4bit": 14}
    changed = replace(usual, dense={16: 4, 32: 4, 64: 48}, packed={16: 0, 32: 14, 64: 128}, dequantize_rows=fewer)
    with tuning.trying_thresholds(changed):
        heights = {name: workload.heights(name) for name in ("up", "up_4bit", "gemm_4bit", "transposed_4bit")}
        assert heights == {
            "up": [16, 64, 128],
            "up_4bit": [32, 64],
            "gemm_4bit": [32],
            "transposed_4bit": [32, 64, 128],
        }
        for name, of_kernel in heights.items():
            packed = name in tuning.KERNELS_4BIT
            for block_m in of_kernel:
                rows = 2 * workload.tokens(name, block_m)
                assert tuning.bucket(rows, 4, packed, workload.target) == block_m
                assert not packed or tuning.dequantizes_in_product(name, rows, 4, workload.target)


def test_a_wider_layer_has_long_products_only() -> None:
    kernel = moe_fused.get_kernel()
    workload = object.__new__(Workload)
    workload.tuning, workload.target, workload.layer = tuning, A100, Layer("wide", 64, 1408, 2, 1)
    assert "gemm_short" not in workload.kernels()
    workload.layer = Layer("odd", 40, 12, 2, 1)
    assert not {*tuning.KERNELS_4BIT, *tuning.KERNELS_FEW} & set(workload.kernels())
    workload.layer = Layer("thin", 64, 32, 2, 1)  # whose down projection has no rows of whole 64s
    assert set(tuning.KERNELS_4BIT) & set(workload.kernels()) == {"up_4bit", "transposed_4bit"}
    assert kernel.moe_experts


class Thresholds:
    """A stand-in clock: two ways of computing a call, that for few rows faster up to ``at`` rows or tokens.

    ``few`` says whether thresholds choose that way.
    """

    def __init__(self, workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.size, self.tokens = 0, 0, 0
        self.count: Callable[[], int] = lambda: self.size
        self.few: Any = None
        self.results: list[dict[str, torch.Tensor]] = []
        self.ways: list[bool] = []
        self._workload = workload
        tokens_of_rows, inputs = workload.tokens_of_rows, workload.inputs

        def noting_rows(rows: int) -> int:
            self.size = rows
            return tokens_of_rows(rows)

        def noting_tokens(tokens: int) -> Any:
            self.tokens = tokens
            return inputs(tokens)

        monkeypatch.setattr(workload, "tokens_of_rows", noting_rows)
        monkeypatch.setattr(workload, "inputs", noting_tokens)
        monkeypatch.setattr(harness, "graph_of", self.graph_of)
        monkeypatch.setattr(harness, "time_interleaved", self.time_interleaved)

    def size_of_tokens(self) -> None:
        """Calls are as large as they have tokens."""
        self.count = lambda: self.tokens

    def way(self) -> bool:
        return bool(self.few(tuning.thresholds_of(self._workload.target)))

    def graph_of(self, call: Any, calls: int) -> Any:
        results, few = call(0), self.way()
        self.results.append(results)
        self.ways.append(few)
        return (lambda _: few), results

    def time_interleaved(self, calls: dict[str, Any], clock: object, seconds: float) -> dict[str, Any]:
        times = {True: float(self.count()), False: float(self.at)}
        return {name: harness.Timing(times[call(0)], 0.0) for name, call in calls.items()}


@pytest.fixture
def ways(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> Thresholds:
    pytest.importorskip("triton")
    return Thresholds(workload, monkeypatch)


def search(threshold: Threshold) -> int:
    steps = list(crossover(threshold.start, threshold.least, threshold.most, threshold.speedup, lambda: False))
    return steps[-1][0] if steps else threshold.start


def test_which_thresholds_a_layer_has(workload: Workload) -> None:
    heights = ("16", "32", "64")
    assert places(workload) == [
        *(("buckets", kind, height) for kind in ("dense", "packed") for height in heights),
        *(("dequantize_rows", kernel) for kernel in tuning.KERNELS_4BIT),
        ("gemv_slots",),
        ("few_slots",),
    ]
    assert places(workload, ("gemv_slots",)) == [("gemv_slots",)]
    workload.layer = replace(workload.layer, hidden=40, intermediate=12)
    assert places(workload) == [*(("buckets", "dense", height) for height in heights), ("gemv_slots",)]


@pytest.mark.parametrize("kind, products", [("dense", 3), ("packed", 4)])
@pytest.mark.parametrize("height, at", [(16, 2), (32, 13), (64, 100)])
def test_borders_of_buckets_are_timed(
    kind: str, products: int, height: int, at: int, workload: Workload, ways: Thresholds
) -> None:
    """All products that share the map of tiles, with the map, in tiles of this height against the next."""
    packed, taller = kind == "packed", 2 * height
    threshold = threshold_at(workload, ("buckets", kind, str(height)))
    assert threshold.start == getattr(tuning.DEFAULT_THRESHOLDS, kind)[height]

    def few(thresholds: Any) -> bool:
        rows = ways.size * workload.layer.experts
        chosen = tuning.bucket(rows, workload.layer.experts, packed, workload.target)
        assert chosen in (height, taller)
        return bool(chosen == height)

    ways.few, ways.at = few, at
    found = search(threshold)
    low = {16: 0, 32: 4, 64: 16} if kind == "dense" else {16: 0, 32: 11, 64: 14}
    high = {16: 16, 32: 48, 64: 256} if kind == "dense" else {16: 14, 32: 128, 64: 256}
    assert found == pytest.approx(min(max(at, low[height]), high[height]), rel=0.15, abs=1)
    assert set(ways.ways) == {True, False}
    names = {"h", "gate_up", "down", "up transposed", "grad_gate_up", "weighted_h", "grad_weights"}
    assert all(set(results) == names for results in ways.results)
    usual = tuning.thresholds_of(workload.target)
    assert getattr(threshold.laid_over(usual, 5), kind) == {**getattr(usual, kind), height: 5}


@pytest.mark.parametrize("kernel", tuning.KERNELS_4BIT)
@pytest.mark.parametrize("at", [90, 700])
def test_dequantizing_is_timed_both_ways(kernel: str, at: int, workload: Workload, ways: Thresholds) -> None:
    threshold = threshold_at(workload, ("dequantize_rows", kernel))
    others = {name: 192 for name in tuning.KERNELS_4BIT if name != kernel}

    def few(thresholds: Any) -> bool:
        assert others.items() <= thresholds.dequantize_rows.items()
        return bool(tuning.dequantizes_in_product(kernel, ways.size * 4, 4, workload.target))

    ways.few, ways.at = few, at
    assert search(threshold) == pytest.approx(at, rel=0.15)
    assert set(ways.ways) == {True, False}
    usual = tuning.thresholds_of(workload.target)
    assert threshold.laid_over(usual, 5) == replace(usual, dequantize_rows={**others, kernel: 5})


@pytest.mark.parametrize("at", [5, 40])
def test_the_few_row_path_is_timed_both_ways(
    at: int, workload: Workload, ways: Thresholds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without graphs, over dense and packed weights, in tokens of top_k slots."""
    ways.at = at
    exact = workload.kernel.moe_experts
    packed_ones: list[bool] = []

    def moe_experts(x: Any, index: Any, weights: Any, up: Any, down: Any) -> Any:
        assert not torch.is_grad_enabled()
        packed_ones.append(not isinstance(up, torch.Tensor))
        ways.ways.append(tuning.gemv_slots(workload.target) >= index.numel())
        return exact(x, index, weights, up, down)

    def timed(calls: dict[str, Any], clock: object, seconds: float) -> dict[str, Any]:
        found = {}
        for name, call in calls.items():
            call(0)
            found[name] = harness.Timing(float(ways.tokens if ways.ways[-1] else ways.at), 0.0)
        return found

    monkeypatch.setattr(workload, "kernel", SimpleNamespace(**vars(workload.kernel) | {"moe_experts": moe_experts}))
    monkeypatch.setattr(harness, "time_interleaved", timed)
    threshold = threshold_at(workload, ("gemv_slots",))
    assert (threshold.start, threshold.factor) == (32, 2)
    found = search(threshold)
    assert found == pytest.approx(at, rel=0.15, abs=1)
    assert set(packed_ones) == set(ways.ways) == {True, False}
    assert threshold.laid_over(tuning.thresholds_of(workload.target), found).gemv_slots == 2 * found


@pytest.mark.parametrize("at", [5, 12])
def test_few_slots_are_timed_both_ways(at: int, workload: Workload, ways: Thresholds) -> None:
    threshold = threshold_at(workload, ("few_slots",))
    assert (threshold.start, threshold.most, threshold.factor) == (64, 64, 2)

    def few(thresholds: Any) -> bool:
        return bool(thresholds.few_slots >= 2 * ways.tokens)

    ways.few, ways.at = few, at
    ways.size_of_tokens()
    assert search(threshold) == pytest.approx(at, rel=0.15, abs=1)
    assert set(ways.ways) == {True, False}
    assert all(set(results) == {"packed"} for results in ways.results)
    usual = tuning.thresholds_of(workload.target)
    assert threshold.laid_over(usual, 5) == replace(usual, few_slots=10)


def test_a_size_that_does_not_fit_is_not_timed(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(workload, "inputs", full)
    for place in places(workload):
        assert threshold_at(workload, place).speedup(8) is None


class Graphs:
    """``harness.graph_of`` without a GPU: remembers under which configuration a call was captured."""

    def __init__(self) -> None:
        self.current: Any = None
        self.milliseconds = {"slow": 2.0, "fast": 1.0}

    @contextlib.contextmanager
    def trying(self, config: Any) -> Iterator[None]:
        self.current = config
        yield
        self.current = None

    def graph_of(self, call: Any, calls: int) -> Any:
        if self.current == "broken":
            raise RuntimeError("out of resources")
        value = torch.ones(4) * (2 if self.current == "wrong" else 1)
        return (lambda _, config=self.current: config), {"y": value}


def test_speedups_are_of_graphs_whose_results_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    graphs = Graphs()

    def timed(calls: dict[str, Any], clock: object, seconds: float) -> dict[str, Any]:
        return {name: harness.Timing(graphs.milliseconds[call(0)], 0.0) for name, call in calls.items()}

    monkeypatch.setattr(harness, "graph_of", graphs.graph_of)
    monkeypatch.setattr(harness, "time_interleaved", timed)
    measure = GraphMeasure(lambda i: {}, graphs.trying, contextlib.nullcontext, torch.device("cpu"))
    assert measure.speedup("fast", "slow") == 2.0
    assert measure.speedup("slow", "fast") == 0.5
    assert measure.speedup("broken", "slow") is None
    assert measure.speedup("wrong", "slow") is None
    with pytest.raises(RuntimeError, match="out of resources"):
        measure.speedup("fast", "broken")  # what is in use must run


def test_candidates_are_compiled_side_by_side() -> None:
    triton = pytest.importorskip("triton")
    if not hasattr(triton, "AsyncCompileMode"):
        pytest.skip("before Triton 3.5")
    graphs, seen = Graphs(), []
    compiling: list[bool] = []

    @contextlib.contextmanager
    def compiling_only() -> Iterator[None]:
        compiling.append(True)
        yield
        compiling.clear()

    def call(_: int) -> dict[str, torch.Tensor]:
        if graphs.current == "broken":
            raise RuntimeError("does not compile")
        seen.append((graphs.current, bool(compiling)))
        return {}

    GraphMeasure(call, graphs.trying, compiling_only, torch.device("cpu")).prepare(["slow", "broken", "fast"])
    assert seen == [("slow", True), ("fast", True)]


# The command.


class FakeWorkload:
    """A GPU on which fewer stages are always faster, and thresholds are right unless ``gpu`` says otherwise."""

    def __init__(self, layer: Layer, interrupt_after: int | None = None) -> None:
        self.tuning, self.target, self.layer = tuning, A100, layer
        self.device = torch.device("cpu")
        self._left = interrupt_after

    def kernels(self) -> list[str]:
        return ["up", "gemm"]

    def heights(self, kernel: str) -> tuple[int, ...]:
        return tuning.BUCKETS

    def measure(self, kernel: str, block_m: int) -> FakeMeasure:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Interrupted(2)
        return FakeMeasure(lambda config: float(config.num_stages))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A fake one; what ``tune`` measured on it, and when it is interrupted."""
    state: dict[str, Any] = {"after": None, "crossings": {}}

    def open_workload(kernel: object, layer: Layer) -> FakeWorkload:
        state["layer"] = layer
        return FakeWorkload(layer, state["after"])

    def fake_threshold(workload: FakeWorkload, place: tuple[str, ...]) -> Threshold:
        thresholds = tuning.thresholds_of(A100)
        start = thresholds.gemv_slots // 8 if place == ("gemv_slots",) else thresholds.dense[int(place[2])]
        at = state["crossings"].get("/".join(place), start)
        factor = 8 if place == ("gemv_slots",) else 1
        if isinstance(at, BaseException):
            raise at
        return Threshold(place, "rows", start, 1, 256, Crossing(at), factor)

    monkeypatch.setattr(command_module, "open_workload", open_workload)
    monkeypatch.setattr(thresholds_module, "threshold_at", fake_threshold)
    return state


def test_tunes(gpu: dict[str, Any], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = command("tune", "--output", tmp_path / "out")
    assert ended.status == 0, ended
    path = tmp_path / "out" / "sm_80.json"
    assert f"8 faster configurations in {path}: export MOE_FUSED_CONFIGS={path.parent}" in ended.stdout
    assert "up, tiles of 16 rows: 4.00 times as fast" in ended.stderr
    assert gpu["layer"] == LAYERS["qwen3-30b-a3b"]
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(path.parent))
    tuning.forget_tables()
    assert {tuning.launch_config("up", block_m, A100, 2).num_stages for block_m in tuning.BUCKETS} == {1}
    assert tuning.launch_config("wgrad", 64, A100, 2) == tuning.default_config("wgrad", 64, A100, 2)
    assert "exists: choose another path, or give --overwrite" in command("tune", "--output", tmp_path / "out").error
    again = command("tune", "--output", path, "--overwrite", "--kernels", "gemm")
    assert "nothing faster than what is in use" in again.stdout


def test_tune_writes_a_report(gpu: dict[str, Any], tmp_path: Path, command: Command) -> None:
    """Every run writes one, also a run that finds nothing, in a place where no table is looked for."""
    gpu["crossings"] = {"buckets/dense/16": 8.5}
    ended = command("tune", "--output", tmp_path / "out", "--kernels", "up", "--thresholds", "buckets")
    assert ended.status == 0, ended
    written = read_report(tmp_path / "out" / "reports" / "sm_80.json")
    assert written["command"] == "tune"
    assert written["layer"]["name"] == "qwen3-30b-a3b"
    configurations = [row for row in written["rows"] if "kernel" in row]
    assert [(row["kernel"], row["block_m"]) for row in configurations] == [("up", height) for height in tuning.BUCKETS]
    assert configurations[0]["config"]["num_stages"] == 1
    assert configurations[0]["speedup"] == pytest.approx(4.0)
    assert {"threshold": "buckets dense 16", "size": 8, "before": 4}.items() <= written["rows"][-1].items()
    again = command("tune", "--output", tmp_path / "out", "--overwrite", "--kernels", "up", "--report", tmp_path / "r")
    assert again.status == 0, again
    assert len(read_report(tmp_path / "r")["rows"]) == 4
    refused = command("tune", "--output", tmp_path / "other", "--report", tmp_path / "r")
    assert "--report" in refused.error
    assert "exists: choose another path" in refused.error


def test_an_interruption_keeps_what_was_found(gpu: dict[str, Any], tmp_path: Path, command: Command) -> None:
    gpu["after"] = 3
    ended = command("tune", "--output", tmp_path)
    assert ended.status == 130
    assert ended.error == "error: interrupted by SIGINT"
    assert "3 faster configurations in" in ended.stdout
    assert len(read_report(tmp_path / "reports" / "sm_80.json")["rows"]) == 3
    assert list(tuning.read_table(tmp_path / "sm_80.json")["up"]["2"]) == ["16", "32", "64"]


def test_tunes_thresholds(
    gpu: dict[str, Any], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with those that were found before it, and with the configurations that were found."""
    gpu["crossings"] = {"buckets/dense/16": 8.5, "gemv_slots": 3}
    ended = command("tune", "--output", tmp_path)
    assert ended.status == 0, ended
    path = tmp_path / "sm_80.json"
    assert f"8 faster configurations and 2 better thresholds in {path}: export MOE_FUSED_CONFIGS=" in ended.stdout
    lines = " ".join(ended.stderr.split())
    assert "buckets/dense/16: 8 rows, not 4; calls between are up to 1.19 times as fast" in lines
    table = tuning.read_table(path)
    assert list(table) == ["gemv_slots", "buckets", "up", "gemm"]
    assert table["gemv_slots"] == 3 * 8
    assert table["buckets"] == {"dense": {"16": 8, "32": 16, "64": 48}}
    assert tuning.thresholds_of(A100) == tuning.DEFAULT_THRESHOLDS, "nothing stays in force"
    assert tuning.launch_config("up", 16, A100, 2) == tuning.default_config("up", 16, A100, 2)
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(tmp_path))
    tuning.forget_tables()
    assert (tuning.gemv_slots(A100), tuning.bucket(8, 1, False, A100)) == (24, 16)
    again = command("tune", "--output", path, "--overwrite", "--thresholds", "buckets,gemv_slots")
    assert "nothing faster than what is in use" in again.stdout, again


def test_thresholds_alone(gpu: dict[str, Any], tmp_path: Path, command: Command) -> None:
    gpu["crossings"] = {"buckets/dense/16": 9, "gemv_slots": 3}
    ended = command("tune", "--output", tmp_path, "--thresholds", "gemv_slots")
    assert ended.status == 0, ended
    assert "1 better thresholds in" in ended.stdout
    assert tuning.read_table(tmp_path / "sm_80.json") == {"gemv_slots": 24}


def test_an_interruption_keeps_thresholds(gpu: dict[str, Any], tmp_path: Path, command: Command) -> None:
    gpu["crossings"] = {"buckets/dense/16": 8.5, "buckets/dense/32": Interrupted(2)}
    ended = command("tune", "--output", tmp_path, "--thresholds", "buckets")
    assert ended.status == 130
    assert "1 better thresholds in" in ended.stdout
    assert tuning.read_table(tmp_path / "sm_80.json")["buckets"]["dense"]["16"] == 8
    assert tuning.thresholds_of(A100) == tuning.DEFAULT_THRESHOLDS


def test_two_do_not_write_one_table(gpu: dict[str, Any], tmp_path: Path, command: Command) -> None:
    """Each would leave out what the other has found."""
    with locked_file(tmp_path / "out" / ".sm_80.json.lock", "the table"):
        ended = command("tune", "--output", tmp_path / "out")
        assert f"sm_80.json is in use by process {os.getpid()} on " in ended.error
    assert command("tune", "--output", tmp_path / "deep" / "out").status == 0
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == ["reports", "sm_80.json"]


def test_sizes_of_the_layer(gpu: dict[str, Any], tmp_path: Path, command: Command) -> None:
    sizes = ("--hidden", 64, "--intermediate", 32, "--experts", 4, "--top-k", 2)
    assert command("tune", *sizes, "--kernels", "gemm", "--output", tmp_path / "a").status == 0
    assert gpu["layer"] == Layer("as given", 64, 32, 4, 2)
    QWEN3_MOE.build().config.save_pretrained(tmp_path / "model")
    ended = command("tune", "--model", tmp_path / "model", "--kernels", " up , up", "--output", tmp_path / "b")
    assert ended.status == 0, ended
    assert (gpu["layer"].hidden, gpu["layer"].experts) == (HIDDEN, EXPERTS)
    assert list(json.loads((tmp_path / "b" / "sm_80.json").read_text())) == ["up"]


def test_another_format_of_the_model_is_noted(gpu: dict[str, Any], tmp_path: Path, command: Command) -> None:
    config = QWEN3_MOE.build().config
    for content, says in (
        (compressed_content("mxfp4"), "note: 4-bit weights are measured in nf4, not in mxfp4 as --model has them"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}, None),
    ):
        config.quantization_config = content
        config.save_pretrained(tmp_path / "model")
        ended = command("tune", "--model", tmp_path / "model", "--kernels", "up", "--output", tmp_path, "--overwrite")
        assert ended.status == 0, ended
        assert says in ended.stdout if says else "note" not in ended.stdout


@pytest.mark.parametrize(
    "options, words",
    [
        (["--hidden", "64"], "--hidden does not make a layer alone: give --intermediate, --experts, --top-k too"),
        (["--hidden", "64", "--model", "org/m"], "--model has sizes of its own: leave --hidden out"),
        (["--hidden", "64", "--intermediate", "32", "--experts", "2", "--top-k", "3"], "--top-k must be at most"),
        (["--hidden", "0"], "--hidden"),
        (["--model", "no/such/model"], "--model no/such/model is neither"),
        (["--kernels", "up,gem"], "--kernels must be of those that this layer uses, up, gemm, got 'gem'"),
        (
            ["--thresholds", "bucket"],
            "--thresholds must be of those that there are, buckets, dequantize_rows, gemv_slots",
        ),
        (["--output", "table.json"], "--output must be a directory or end in sm_80.json"),
        (["--seconds", "0"], "--seconds"),
    ],
    ids=" ".join,
)
def test_tune_refuses(
    options: list[str], words: str, gpu: dict[str, Any], tmp_path: Path, command: Command, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command("tune", *options)
    assert ended.status in (1, 2)
    assert words in ended.error
    assert list(tmp_path.iterdir()) == []


def test_tune_needs_a_gpu(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = command("tune", "--output", tmp_path / "out")
    assert ended.status == 1
    assert "tune needs the CUDA or ROCm GPU that is to be tuned for" in ended.error
    assert not (tmp_path / "out").exists()
