"""The benchmark of losses in all 4-bit formats, on a CPU."""

from __future__ import annotations

from dataclasses import replace

import typer
from typer.testing import CliRunner

from benchmarks import format_parity, loss_parity
from benchmarks.format_parity import MODELS, WEIGHTS
from tests.support import unboxed


def run(*options: str):
    app = typer.Typer()
    app.command()(format_parity.main)
    return CliRunner().invoke(app, ["--device", "cpu", "--quick", *options])


def test_whole_run(tmp_path):
    """All formats start with about the loss of bf16, and a format over which training loses ground is a failure."""
    output = tmp_path / "rows.json"
    result = run("--steps", "2", "--output", str(output))
    assert result.exit_code == 0, unboxed(result.output)
    assert output.with_suffix(".png").stat().st_size > 10_000
    rows = loss_parity.read(output)
    found = format_parity.by_model(rows)
    assert list(found) == list(MODELS)
    for model, implementations in found.items():
        assert {name: row.weights for name, row in implementations.items()} == WEIGHTS
        first = [row.losses[0] for row in implementations.values()]
        assert max(first) - min(first) < 0.02, model
        assert len({tuple(row.losses) for row in implementations.values()}) == len(WEIGHTS), "each has its own weights"
    assert format_parity.disagreements(rows) == []
    worse = [
        replace(row, held_out={step: loss + 0.1 * (step > 0) for step, loss in row.held_out.items()})
        if row.weights == "nvfp4" and row.model == "gpt-oss"
        else row
        for row in rows
    ]
    (problem,) = format_parity.disagreements(worse)
    assert problem.startswith("moe_fused_nvfp4 of gpt-oss is 0.")


def test_wrong_options():
    result = run("--model", "llama")
    assert result.exit_code == 2
    assert "llama" in result.output
