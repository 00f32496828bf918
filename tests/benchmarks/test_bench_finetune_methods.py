"""The benchmark of evaluations and preferences, on a CPU: which rows it writes, and what its ratios are of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import moe_fused

pytest.importorskip("trl")

from benchmarks import finetune_methods
from benchmarks.finetune_30b import TINY
from benchmarks.finetune_methods import BESIDE, DPO, EVALUATION, SFT, Timed, rows_of
from benchmarks.rows import read_rows
from benchmarks.table import render
from tests.support import unboxed


@pytest.fixture(autouse=True)
def _leave_transformers_as_it_was() -> Iterator[None]:
    yield
    moe_fused.disable()


def run(*options: str) -> object:
    app = typer.Typer()
    app.command()(finetune_methods.main)
    return CliRunner().invoke(app, list(options))


def test_a_run_writes_a_row_of_each(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    options = ("--device", "cpu", "--quick", "--tokens", "16", "--steps", "4", "--turns", "1", "--output", str(path))
    result = run(*options)
    assert result.exit_code == 0, result.output
    rows = {row.implementation: row for row in read_rows(path)}
    assert list(rows) == [SFT, BESIDE, EVALUATION, DPO]
    assert all(row.ms > 0 and row.tokens == 16 for row in rows.values())
    assert len({row.point for row in rows.values()}) == 1
    table = render(list(rows.values()))
    assert all(name in table for name in rows)


def test_ratios_are_of_what_they_say() -> None:
    timed = Timed([1.0], [1.0], 100.0, 99.0)
    found = {name: (ms, timed) for name, ms in ((SFT, 100.0), (BESIDE, 101.0), (EVALUATION, 30.0), (DPO, 143.0))}
    rows = {row.implementation: row for row in rows_of(found, TINY, torch.device("cpu"), 64, 8)}
    assert rows[BESIDE].details["over_sft"] == pytest.approx(1.01)
    assert rows[DPO].details["over_sft_and_evaluation"] == pytest.approx(1.1)
    assert rows[EVALUATION].details["tokens_per_second"] == pytest.approx(64 / 0.03, rel=1e-5)
    assert rows[SFT].details["predicted_mib"] == 99.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "cpu"), "a CPU is only for smoke tests: give --quick"),
        (("--device", "tpu"), "'tpu' is none of cuda, cpu"),
        (("--model", "gpt-5"), "gpt-5"),
    ],
)
def test_wrong_options(options: tuple[str, ...], words: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert words in unboxed(result.output)
