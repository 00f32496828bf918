"""The benchmark of the optimizer's step, on a CPU: what it measures, and that other results are an error."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")

from benchmarks import optimizer
from benchmarks.model import Model
from benchmarks.models import BY_NAME
from benchmarks.optimizer import IMPLEMENTATIONS, OPTIMIZERS, OptimizerRow, adapters_of, bytes_of
from benchmarks.rows import OURS, read_rows
from benchmarks.runner import ROOT
from moe_fused.finetune.host import queued
from tests.support import unboxed

CPU = torch.device("cpu")
SMOKE = ("--device", "cpu", "--quick", "--seconds", "0.001")
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def run(*options: str) -> Any:
    app = typer.Typer()
    app.command()(optimizer.main)
    return CliRunner().invoke(app, list(options))


def test_a_run_writes_a_row_of_each(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    result = run(*SMOKE, "--output", str(path))
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["optimizer"], row["implementation"]) for row in rows] == [
        (kind, name) for kind in OPTIMIZERS for name in IMPLEMENTATIONS
    ]
    for row in rows:
        assert row.keys() == {field.name for field in fields(OptimizerRow)}
        assert all(row[name] > 0 for name in ("ms", "kernel_ms", "launches", "host_ms", "gb_per_second"))
        assert row["stream_ms"] is row["step_mib"] is None
        assert row["implementation"] in result.stdout


def test_adapters_are_those_of_finetune() -> None:
    """Qwen3-30B-A3B has four factors of experts and eight of attention in each of 48 layers."""
    name = "qwen3-30b-a3b"
    numels = adapters_of(Model(name, BY_NAME[name].config()), CPU)
    assert len(numels) == 12 * 48
    assert sum(numels) == 327_942_144
    # Bytes of parameters and gradients are 6 for each, and those of states 4 beside the scales of blocks.
    assert bytes_of(numels) == sum(numels) * (6 + 4 + 16 / 256)
    assert bytes_of([100]) == 100 * (6 + 16)


def test_a_step_takes_what_the_documentation_says() -> None:
    """The time of the optimizer in the rows of a whole step is one for each tensor and one for each element."""
    sizes, times = [], []
    for path in (ROOT / "results").glob("finetune-*.json"):
        rows = [row for row in read_rows(path) if row.benchmark == "finetune_30b" and row.tokens == 1024]
        for row in rows:
            if row.implementation == OURS:
                numels = adapters_of(Model(row.layer, BY_NAME[row.layer].config()), CPU)
                sizes.append([len(numels) * 1e-3, sum(numels) * 1e-9])
                times.append(row.details["optimizer_ms"])
    assert len(times) == 4
    of_sizes, measured = (torch.tensor(values, dtype=torch.float64) for values in (sizes, times))
    found = torch.linalg.lstsq(of_sizes, measured[:, None]).solution
    assert found.flatten().tolist() == pytest.approx([3.5, 27.0], rel=0.03)
    assert (of_sizes @ found).flatten().tolist() == pytest.approx(times, rel=0.005)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("queued", {"lr": 1.001}, "of queued is not that of bitsandbytes"),
        ("moe_fused", {"lr": 1.00001}, None),
        ("moe_fused", {"lr": 2.0}, "parameter 0 of moe_fused is not that of bitsandbytes"),
        ("moe_fused", {"beta1": 0.98}, "the state of moe_fused is not that of bitsandbytes"),
    ],
)
def test_other_results_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, float], error: str | None
) -> None:
    """Those of ``queued`` must be bitsandbytes' bits, those of ``moe_fused`` may differ by roundings."""

    def off(stock: Any) -> Any:
        kind = queued(stock)

        class Off(kind):
            name = "queued"

            def allocate(self) -> None:
                super().allocate()
                self.name = "moe_fused"

            def update_step(self, group: Any, *rest: Any) -> None:
                if self.name == name:
                    beta1, beta2 = group["betas"]
                    betas = beta1 * change.get("beta1", 1), beta2
                    group = group | {"lr": group["lr"] * change.get("lr", 1), "betas": betas}
                super().update_step(group, *rest)

        return Off

    monkeypatch.setattr(optimizer, "queued", off)
    path = tmp_path / "rows.json"
    result = run(*SMOKE, "--output", str(path))
    assert (result.exit_code, path.exists()) == ((0, True) if error is None else (1, False))
    assert error is None or error in unboxed(result.output)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "cpu"), "a CPU is only for smoke tests: give --quick"),
        (("--model", "gpt-5"), "gpt-5"),
        ((*SMOKE, "--optimizer", "sgd"), "'sgd' is none of adamw_8bit, paged_adamw_8bit"),
    ],
)
def test_wrong_options(options: tuple[str, ...], words: str) -> None:
    result = run(*options)
    assert result.exit_code == 2
    assert words in unboxed(result.output)
