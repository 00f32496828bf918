"""The benchmark of several GPUs, in processes on a CPU: which rows it writes, and what its ratios are of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("trl")

from benchmarks import finetune_gpus
from benchmarks.finetune_gpus import EAGER, ONE, REPLICATED, SHARDED, Job, job_of, row_of
from benchmarks.rows import read_rows
from benchmarks.table import render
from tests.benchmarks.forked import in_processes
from tests.support import unboxed


def run(*options: str) -> object:
    app = typer.Typer()
    app.command()(finetune_gpus.main)
    return CliRunner().invoke(app, list(options))


@pytest.mark.slow
def test_a_run_writes_a_row_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun starts the processes of one contender. Those of the others are forked where no GPU forbids it."""
    torchrun, started = finetune_gpus.runner.in_processes, []

    def start(module: str, contender: str, job: Job, number: int) -> Any:
        started.append((contender, number))
        with_torchrun = contender == SHARDED or torch.cuda.is_available()
        return (torchrun if with_torchrun else in_processes)(module, contender, job, number)

    monkeypatch.setattr(finetune_gpus.runner, "in_processes", start)
    path = tmp_path / "rows.json"
    options = ("--device", "cpu", "--quick", "--tokens", "16", "--steps", "2", "--accumulation", "1")
    result = run(*options, "--output", str(path))
    assert result.exit_code == 0, result.output
    rows = {row.implementation: row for row in read_rows(path)}
    assert list(rows) == [ONE, REPLICATED, SHARDED, EAGER]
    assert started == [(ONE, 1), (REPLICATED, 2), (SHARDED, 2), (EAGER, 2)]
    assert {name: row.details["gpus"] for name, row in rows.items()} == {ONE: 1, REPLICATED: 2, SHARDED: 2, EAGER: 2}
    for name in (REPLICATED, SHARDED):
        ratio = rows[name].details["tokens_per_second"] / rows[ONE].details["tokens_per_second"]
        assert rows[name].details["over_one_gpu"] == pytest.approx(ratio, rel=1e-4)
    assert rows[REPLICATED].details["weights_mib"] == rows[ONE].details["weights_mib"]
    assert rows[SHARDED].details["weights_mib"] < rows[ONE].details["weights_mib"]
    assert all(name in render(list(rows.values())) for name in rows)


def test_ratios_are_of_tokens_of_all_gpus() -> None:
    job = Job(REPLICATED, "qwen3-30b-a3b", True, None, 64, 4, 8, "cpu")
    found = {"ms": 100.0, "peak": 10.0, "gpus": 2, "accumulation": 4, "tokens_per_second": 64 * 4 * 2 / 0.1}
    row = row_of(job, found, torch.device("cpu"), 64 * 4 / 0.11)
    assert row.details["over_one_gpu"] == pytest.approx(2 * 0.11 / 0.1, rel=1e-5)
    assert row.phase == "train_step_of_4"
    one = row_of(Job(ONE, "qwen3-30b-a3b", True, None, 64, 4, 8, "cpu"), {**found, "gpus": 1}, torch.device("cpu"), 1.0)
    assert "over_one_gpu" not in one.details
    assert row.tflops == pytest.approx(2 * one.tflops, rel=1e-3)


def test_a_contender_that_fails_says_why() -> None:
    job = Job(SHARDED, "no model", True, None, 16, 1, 1, "cpu")
    with pytest.raises(RuntimeError, match=r"(?s)^sharded failed: .*no model"):
        finetune_gpus.launch(job, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "cpu"), "a CPU is only for smoke tests: give --quick"),
        (("--contender", "two"), "'two' is none of one_gpu, replicated, sharded"),
        (("--model", "gpt-5"), "gpt-5"),
    ],
)
def test_wrong_options(options: tuple[str, ...], words: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert words in unboxed(result.output)


def test_a_row_names_its_job() -> None:
    job = Job(SHARDED, "qwen3-235b-a22b", False, 8, 4096, 4, 1, "cuda")
    found = {"ms": 100.0, "peak": 10.0, "gpus": 2, "accumulation": 4, "tokens_per_second": 1.0}
    assert job_of(row_of(job, found, torch.device("cpu"), None)) == (job, 2)
    whole = dataclasses.replace(job, layers=None, accumulation=1)
    assert job_of(row_of(whole, {**found, "accumulation": 1}, torch.device("cpu"), None)) == (whole, 2)
