"""The benchmark of few rows: what a sweep tries, and that it runs, on a CPU in place of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import few_rows
from moe_fused.benchmark import harness
from moe_fused.benchmark.layers import Layer
from moe_fused.hub import get_kernel, submodule
from tests.support import unboxed

tuning = submodule(get_kernel(), "tuning")
H200 = tuning.TARGETS[90]


@pytest.mark.parametrize("kernel", tuning.KERNELS_FEW)
def test_what_a_sweep_tries(kernel: str) -> None:
    tried = few_rows.candidates(tuning, kernel, 8, H200)
    assert len(tried) == len(set(map(str, tried))) > 20
    for config in tried:
        tuning.check(kernel, config, H200, 2)
    around = few_rows.variants(tuning, kernel, tried[0], H200)
    assert {config.registers for config in around} == set(few_rows.REGISTERS)
    assert all(replace(config, num_stages=3, registers=168, prefetch=True) == tried[0] for config in around)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> few_rows.Bench:
    """Small sizes on a CPU, where calls run once and each takes as long as there are before it."""
    monkeypatch.setattr(few_rows, "LAYER", Layer("small", hidden=128, intermediate=64, experts=4, top_k=2))
    monkeypatch.setattr(few_rows, "LINEAR", {"qkv": (128, (64, 32, 32)), "o": (64, (128,))})
    monkeypatch.setattr(few_rows, "CALLS", 2)
    monkeypatch.setattr(harness, "measure_ceilings", lambda _: SimpleNamespace(bytes_per_second=1e12))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "target_of", lambda _: H200)
    usual = torch.device
    monkeypatch.setattr(torch, "device", lambda *_: usual("cpu"))
    made = few_rows.Bench()
    monkeypatch.setattr(torch, "device", usual)
    monkeypatch.setattr(few_rows.GraphMeasure, "prepare", lambda *_: None)
    taken: list[str] = []

    def us(calls: dict[str, Callable[[int], Any]]) -> dict[str, float]:
        for name, call in calls.items():
            call(0)
            call(1)
            taken.append(name)
        return {name: float(len(taken)) for name in calls}

    monkeypatch.setattr(made, "us", us)
    return made


def test_ways_are_compared(bench: few_rows.Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.compare_experts([1, 3])
    bench.compare_linear([2], sweep=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tokens", "experts", "bytes", "few", "gemv", "sorted", "difference"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "3", "qkv", "o"]
    assert all(float(line.split()[-1]) < 2e-2 for line in lines[1:])


def test_a_sweep_shows_the_fastest_first(
    bench: few_rows.Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def slots(kernel: str, a: Any, ids: Any, *_: Any) -> None:
        assert tuning.few_config(kernel, ids.numel(), H200, 2).split_k >= 1
        asked.append(kernel)

    monkeypatch.setattr(bench.few, "few_slots", slots)
    monkeypatch.setattr(few_rows, "SHAPES", few_rows.SHAPES[:2])
    bench.sweep_experts([1])
    bench.compare_linear([2], sweep=True)
    assert set(asked) == {"few_up_4bit", "few_down_4bit"}
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line.endswith("now")]
    assert [title.partition(",")[0] for title in titles] == [*tuning.KERNELS_FEW, "few_linear_4bit"]
    first, second = (float(line.split()[0]) for line in lines[1:3])
    assert first <= second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--only", "foo"), "'foo' is none of experts, linear"),
        (("--sizes", "x"), "numbers above 0 with commas, such as 1,8, got x"),
        (("--sizes", "1,,8"), "numbers above 0 with commas"),
        (("--sizes", "0"), "numbers above 0 with commas"),
        (("--sizes", "1, 8"), "needs a CUDA GPU"),
        ((), "needs a CUDA GPU"),
    ],
)
def test_wrong_options(options: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(few_rows.main)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert words in unboxed(result.output), result.output
