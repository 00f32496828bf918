"""``moe-fused tune`` with a clock of its own, the table it writes, and ``moe-fused bench`` on a tiny layer."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
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
from moe_fused.signals import Interrupted
from moe_fused.tuner.search import climb, neighbours
from moe_fused.tuner.table import TableFile, table_path
from moe_fused.tuner.workload import GraphMeasure, Workload

from .cli import Command
from .models import EXPERTS, HIDDEN, INTERMEDIATE, MODELS, QWEN3_MOE, TOP_K

tuning: Any = hub.submodule(moe_fused.get_kernel(), "tuning")
H100, A100 = tuning.TARGETS[90], tuning.TARGETS[80]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test sets ``MOE_FUSED_CONFIGS`` to, the next one starts without."""
    monkeypatch.delenv("MOE_FUSED_CONFIGS", raising=False)
    tuning._overrides.cache_clear()
    tuning.launch_config.cache_clear()
    yield
    tuning._overrides.cache_clear()
    tuning.launch_config.cache_clear()


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
        own, other = self.milliseconds(config), self.milliseconds(over)
        return None if own is None else other / own


@pytest.mark.parametrize("target", [A100, H100], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("block_m", tuning.BUCKETS)
@pytest.mark.parametrize("kernel", tuning.KERNELS)
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


# The table.


def test_a_table_reads_back_and_replaces_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own" / "sm_80.json"
    table = TableFile(path, tuning)
    one = replace(tuning.default_config("gemm", 64, A100, 2), num_stages=3)
    other = replace(tuning.default_config("up", 16, A100, 2), num_warps=2)
    for kernel, block_m, config in (("gemm", 64, one), ("up", 16, other), ("gemm", 64, one)):
        table.add(kernel, 2, block_m, config)
    assert table.entries == 2
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(path.parent))
    tuning._overrides.cache_clear()
    tuning.launch_config.cache_clear()
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
    """Of every layout, and without a weight being made."""
    for case in MODELS:
        config = case.build().config
        layer = layer_of(case.id, config)
        wanted = (HIDDEN, 24 if case.id in ("mixtral", "olmoe", "granitemoe", "granitemoehybrid") else INTERMEDIATE)
        assert (layer.hidden, layer.intermediate, layer.experts, layer.top_k) == (*wanted, EXPERTS, TOP_K), case.id
    with pytest.raises(ValueError, match="no layer of experts"):
        layer_of("llama", __import__("transformers").LlamaConfig(num_hidden_layers=1))


def test_every_kernel_has_calls_that_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, with plain torch in the place of the launches: two configurations of these are compared."""
    kernel = moe_fused.get_kernel()
    reference = hub.submodule(kernel, "reference")
    monkeypatch.setitem(sys.modules, f"{kernel.__name__}.launch", reference)
    monkeypatch.setitem(sys.modules, f"{kernel.__name__}.plan", SimpleNamespace(compiling_only=None))
    workload = Workload(kernel, replace(LAYERS["tiny"], experts=4, intermediate=64), torch.device("cpu"))
    assert workload.kernels() == [name for name in tuning.KERNELS if name != "gemm"]
    for name in workload.kernels():
        packed = name in tuning.KERNELS_4BIT
        for block_m in tuning.BUCKETS:
            tokens = workload.tokens(name, block_m)
            assert tuning.bucket(tokens * 2, 4, packed) == block_m
        measure = workload.measure(name, 16)
        one, again, other = measure._call(0), measure._call(4), measure._call(1)
        harness.compare(name, one, again, tolerance=0)
        with pytest.raises(harness.MismatchError):
            harness.compare(name, one, other)


def test_a_wider_layer_has_long_products_only() -> None:
    kernel = moe_fused.get_kernel()
    workload = object.__new__(Workload)
    workload.tuning, workload.layer = tuning, Layer("wide", 64, 1408, 2, 1)
    assert "gemm_short" not in workload.kernels()
    workload.layer = Layer("odd", 40, 12, 2, 1)
    assert not set(tuning.KERNELS_4BIT) & set(workload.kernels())
    workload.layer = Layer("thin", 64, 32, 2, 1)  # whose down projection has no rows of whole 64s
    assert set(tuning.KERNELS_4BIT) & set(workload.kernels()) == {"up_4bit", "transposed_4bit"}
    assert kernel.moe_experts


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
    """A GPU on which fewer stages are always faster."""

    def __init__(self, layer: Layer, interrupt_after: int | None = None) -> None:
        self.tuning, self.target, self.layer = tuning, A100, layer
        self._left = interrupt_after

    def kernels(self) -> list[str]:
        return ["up", "gemm"]

    def measure(self, kernel: str, block_m: int) -> FakeMeasure:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Interrupted(2)
        return FakeMeasure(lambda config: float(config.num_stages))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A fake one; what ``tune`` measured on it, and when it is interrupted."""
    state: dict[str, Any] = {"after": None}

    def open_workload(kernel: object, layer: Layer) -> FakeWorkload:
        state["layer"] = layer
        return FakeWorkload(layer, state["after"])

    monkeypatch.setattr(command_module, "open_workload", open_workload)
    return state


def test_tunes(gpu: dict[str, Any], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = command("tune", "--output", tmp_path / "out")
    assert ended.status == 0, ended
    path = tmp_path / "out" / "sm_80.json"
    assert f"8 faster configurations in {path}: export MOE_FUSED_CONFIGS={path.parent}" in ended.stdout
    assert "up, tiles of 16 rows: 4.00 times as fast" in ended.stderr
    assert gpu["layer"] == LAYERS["qwen3-30b-a3b"]
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(path.parent))
    tuning._overrides.cache_clear()
    tuning.launch_config.cache_clear()
    assert {tuning.launch_config("up", block_m, A100, 2).num_stages for block_m in tuning.BUCKETS} == {1}
    assert tuning.launch_config("gram", 64, A100, 2) == tuning.default_config("gram", 64, A100, 2)
    assert "exists: choose another path, or give --overwrite" in command("tune", "--output", tmp_path / "out").error
    again = command("tune", "--output", path, "--overwrite", "--kernels", "gemm")
    assert "nothing faster than what is in use" in again.stdout


def test_an_interruption_keeps_what_was_found(gpu: dict[str, Any], tmp_path: Path, command: Command) -> None:
    gpu["after"] = 3
    ended = command("tune", "--output", tmp_path)
    assert ended.status == 130
    assert ended.error == "error: interrupted by SIGINT"
    assert "3 faster configurations in" in ended.stdout
    assert list(tuning.read_table(tmp_path / "sm_80.json")["up"]["2"]) == ["16", "32", "64"]


def test_sizes_of_the_layer(gpu: dict[str, Any], tmp_path: Path, command: Command) -> None:
    sizes = ("--hidden", 64, "--intermediate", 32, "--experts", 4, "--top-k", 2)
    assert command("tune", *sizes, "--kernels", "gemm", "--output", tmp_path / "a").status == 0
    assert gpu["layer"] == Layer("as given", 64, 32, 4, 2)
    QWEN3_MOE.build().config.save_pretrained(tmp_path / "model")
    ended = command("tune", "--model", tmp_path / "model", "--kernels", " up , up", "--output", tmp_path / "b")
    assert ended.status == 0, ended
    assert (gpu["layer"].hidden, gpu["layer"].experts) == (HIDDEN, EXPERTS)
    assert list(json.loads((tmp_path / "b" / "sm_80.json").read_text())) == ["up"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--hidden", "64"], "--hidden alone do not make a layer: give --intermediate, --experts, --top-k too"),
        (["--hidden", "64", "--model", "org/m"], "--model has sizes of its own: leave --hidden out"),
        (["--hidden", "64", "--intermediate", "32", "--experts", "2", "--top-k", "3"], "--top-k must be at most"),
        (["--hidden", "0"], "--hidden"),
        (["--model", "no/such/model"], "MODEL no/such/model is neither"),
        (["--kernels", "up,gem"], "--kernels must be of those that this layer uses, up, gemm, got 'gem'"),
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


# bench


def test_bench(command: Command) -> None:
    ended = command("bench", "--layer", "tiny", "--tokens", 3, "--seconds", 0.001, "--device", "cpu")
    assert ended.status == 0, ended
    for words in ("tiny: H64 I32 E8 k2", "moe_fused, nf4", "grouped_mm", "forward_backward", "floor: what"):
        assert words in ended.stdout
    rows = [line for line in ended.stdout.splitlines() if line.startswith("│      3 ")]
    assert len(rows) == 6


def test_bench_of_a_model(command: Command, tmp_path: Path) -> None:
    """Whose odd sizes neither fit 4-bit blocks nor torch's grouped product."""
    QWEN3_MOE.build().config.save_pretrained(tmp_path / "model")
    options = ("--tokens", 2, "--seconds", 0.001, "--device", "cpu")
    ended = command("bench", "--model", tmp_path / "model", *options)
    assert ended.status == 0, ended
    assert f"H{HIDDEN} I{INTERMEDIATE} E{EXPERTS} k{TOP_K}" in ended.stdout
    assert "moe_fused, nf4" not in ended.stdout
    ours, theirs = (line for line in ended.stdout.splitlines() if "│ forward  " in line)
    assert "│ moe_fused " in ours
    assert "cannot run" in theirs


def test_bench_does_not_report_wrong_results(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = moe_fused.get_kernel()
    exact = kernel.moe_experts
    monkeypatch.setattr(kernel, "moe_experts", lambda *args: exact(*args) * 1.1)
    ended = command("bench", "--layer", "tiny", "--tokens", 3, "--seconds", 0.001, "--device", "cpu")
    assert ended.status == 1
    assert "output of moe_fused is off by" in ended.error


@pytest.mark.parametrize(
    "options, words",
    [
        (["--layer", "huge"], "--layer must be one of qwen3-30b-a3b,"),
        (["--device", "cpu"], "--device cpu takes minutes for qwen3-30b-a3b"),
        (["--device", "tpu"], "--device tpu cannot be used here"),
        (["--tokens", "0", "--layer", "tiny"], "--tokens"),
        (["--model", "nowhere"], "MODEL nowhere is neither"),
    ],
    ids=" ".join,
)
def test_bench_refuses(options: list[str], words: str, command: Command) -> None:
    ended = command("bench", *options)
    assert ended.status in (1, 2)
    assert words in ended.error
