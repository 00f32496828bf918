"""The benchmark of a start, on a CPU: its phases, what it counts, and that a warm start that compiles is an error."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import first_step
from benchmarks.first_step import Phase, Watch, counting, in_a_process


def run(*options: str) -> Any:
    app = typer.Typer()
    app.command()(first_step.main)
    return CliRunner().invoke(app, ["--device", "cpu", "--quick", *options])


def test_a_start_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    phases = in_a_process(["--device", "cpu", "--tokens", "16", "--quick"], tmp_path)
    assert [phase.name for phase in phases] == [
        "start Python", "import torch", "import transformers", "import peft", "import finetune", "make the model", "adapt",
        "to the first step", "step 1", "to step 2", "step 2", "to step 3", "step 3",
    ]  # fmt: skip
    assert all(phase.seconds > 0 for phase in phases if not phase.name.startswith("to step"))
    assert any(phase.functions for phase in phases)


def slow_on_purpose(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_time_is_where_it_is_spent() -> None:
    """In whichever thread. A thread that waits is not where time goes."""
    watch = Watch()
    watch.phase("before")
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait)
    thread.start()
    slow_on_purpose(0.5)
    watch.phase("slow")
    waiting.set()
    thread.join()
    watch.close()
    slow = watch.phases[1]
    assert slow.seconds == pytest.approx(0.5, rel=0.5)
    # A process of pytest-xdist has a thread that reads.
    functions = {name: seconds for name, seconds in slow.functions.items() if "execnet" not in name}
    assert next(iter(functions)).endswith("test_bench_first_step.py:slow_on_purpose")
    assert max(functions.values()) >= 0.5 * slow.seconds
    assert not any(name.endswith(":wait") for name in functions)


def test_kernels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton tells its listeners, and by what it calls to load and to build."""
    triton = pytest.importorskip("triton")
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import build

    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda kernel: setattr(kernel, "module", 1))
    monkeypatch.setattr(build, "_build", lambda *_: None)
    before = triton.knobs.compilation.listener
    watch = Watch()
    watch.phase("before")
    with counting(watch):
        for cache_hit in (False, True, True):
            triton.knobs.compilation.listener(
                src=None, metadata={}, metadata_group={}, times=SimpleNamespace(total=500_000), cache_hit=cache_hit
            )
        kernel: Any = SimpleNamespace(module=None)
        for _ in range(3):
            CompiledKernel._init_handles(kernel)
        build._build()
    watch.phase("counted")
    watch.close()
    assert triton.knobs.compilation.listener is before
    counted = watch.phases[1]
    assert counted.counts == {"compiled": 1, "found": 2, "loaded": 1, "built": 1}
    assert (counted.seconds_of["compiled"], counted.seconds_of["found"]) == (0.5, 1.0)


@pytest.mark.parametrize("warm_compiles", [False, True])
def test_a_warm_start_compiles_nothing(warm_compiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[Path] = []

    def stand_in(arguments: list[str], caches: Path) -> list[Phase]:
        starts.append(caches)
        counts = {"compiled": 3} if len(starts) == 1 or warm_compiles else {"found": 3}
        step = Phase("step 1", 2.0 / len(starts), counts, dict.fromkeys(counts, 1.0), {"torch/x.py:f": 0.4})
        return [Phase("import torch", 1.0), step]

    monkeypatch.setattr(first_step, "in_a_process", stand_in)
    result = run("--output", str(tmp_path / "out.json"), "--warm", "1")
    assert result.exit_code == (1 if warm_compiles else 0)
    assert ("warm, step 1: 3 compiled" in result.output) == warm_compiles
    assert "3 compiled 1.0" in result.output
    assert len(set(starts)) == 1  # they share the caches
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [phase["seconds"] for phase in written["warm"]] == [1.0, 1.0]


def test_a_short_wait_between_steps_is_a_row_if_it_is_long_in_another_start() -> None:
    """All starts have the same phases, whatever their times are."""

    def starts(cold: float, warm: float) -> dict[str, list[Phase]]:
        return {name: [Phase("to step 2", seconds)] for name, seconds in {"cold": cold, "warm": warm}.items()}

    assert first_step.tables(starts(0.02, 0.001), 0)[0].row_count == 2
    assert first_step.tables(starts(0.002, 0.001), 0)[0].row_count == 1  # the sum alone
