"""The benchmark of experts apart runs on a CPU, and counts the tokens of all processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("peft")
pytest.importorskip("trl")  # as for the server from which processes are forked

from benchmarks import experts_apart, loading
from benchmarks.experts_apart import APART, FORWARD, TRAIN
from benchmarks.finetune_gpus import ONE, SHARDED
from benchmarks.rows import read_rows
from tests.benchmarks.forked import in_processes
from tests.integration.finetuning import warm_context
from tests.support import unboxed


def run(*options: str) -> object:
    app = typer.Typer()
    app.command()(experts_apart.main)
    return CliRunner().invoke(app, list(options))


@pytest.mark.slow
def test_a_run_writes_rows_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes start as those of ``finetune_gpus``, whose test has torchrun start some."""
    monkeypatch.setattr(loading, "get_context", lambda _: warm_context())
    if not torch.cuda.is_available():
        monkeypatch.setattr(experts_apart.runner, "in_processes", in_processes)
    path = tmp_path / "rows.json"
    result = run("--device", "cpu", "--quick", "--layers", "1", "--repeats", "1", "--output", str(path))
    assert result.exit_code == 0, result.output
    rows = {(row.implementation, row.phase): row for row in read_rows(path)}
    assert set(rows) == {(name, phase) for name in (ONE, APART, SHARDED) for phase in (FORWARD, TRAIN)}
    for (name, _), row in rows.items():
        assert row.ms is not None
        assert row.details["gpus"] == (1 if name == ONE else 2)
        together = row.tokens * (2 if name == SHARDED else 1)
        assert row.details["tokens_per_second"] == pytest.approx(1e3 * together / row.ms, rel=1e-3)


def test_wrong_options() -> None:
    result = run("--device", "cpu")
    assert result.exit_code == 2
    assert "a CPU is only for smoke tests: give --quick" in unboxed(result.output)
