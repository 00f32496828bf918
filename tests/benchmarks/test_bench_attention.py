"""The benchmarks of attention and of packed steps, on a CPU: what they measure, and what becomes of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import attention
from benchmarks.attention import EACH, MASKED, Batch, Point, Shape, batch_of, check, each
from benchmarks.documents import MEDIAN, boundaries_of, packed_lengths, pairs_of
from benchmarks.rows import read_rows, write_rows
from moe_fused.benchmark.harness import MismatchError
from moe_fused.finetune import varlen
from scripts.speeds import ATTENTION_SPEEDS, RESULTS, attention_speeds

CPU = torch.device("cpu")
SMALL = Shape(4, 2, 16)


def run(main: Any, *options: str) -> Any:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(options))


def test_the_mix_of_documents() -> None:
    """Sequences are full, and the lengths before any is cut off have the median and the spread that is said."""
    for lengths in packed_lengths(4096, 20):
        assert sum(lengths) == 4096
        assert min(lengths) > 0
    assert packed_lengths(4096, 3) == packed_lengths(4096, 3) != packed_lengths(4096, 3, seed=1)
    long = np.array(packed_lengths(2_000_000, 1)[0][:-1])
    assert np.median(long) == pytest.approx(MEDIAN, rel=0.05)
    assert long.mean() == pytest.approx(660, rel=0.05)
    assert (long**2).sum() / long.sum() == pytest.approx(1790, rel=0.15)
    assert (long < 150).mean() == pytest.approx(1 / 6, rel=0.1)
    assert (long > 1090).mean() == pytest.approx(1 / 6, rel=0.1)


def test_counts() -> None:
    assert boundaries_of([3, 1, 4]) == [0, 3, 4, 8]
    assert pairs_of([3, 1, 4]) == 6 + 1 + 10
    batch = batch_of([3, 1, 4], 7, 4, CPU)
    assert batch.boundaries.tolist() == [0, 3, 4, 8, 8, 8, 8]
    assert batch.documents.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    assert int(batch.mask.sum()) == pairs_of([3, 1, 4])
    point = Point(512, SMALL, CPU, packed=True)
    assert point.operations(backward=True) == 3 * point.operations(backward=False)
    assert point.operations(backward=False) == 4 * 4 * 16 * pairs_of(point.batch.lengths)


def test_a_contender_that_is_wrong_is_an_error() -> None:
    """A mask that lets documents see each other is found."""
    point = Point(1024, SMALL, CPU, packed=True)
    assert len(point.batch.lengths) > 1
    check(MASKED, point, attention.masked)
    with pytest.raises(MismatchError, match="sdpa is off"):
        check("sdpa", point, attention.sdpa)

    def wrong_backward(query: Any, key: Any, value: Any, batch: Batch) -> Any:
        return each(query.detach() + 0 * query, key, value, batch)

    with pytest.raises(MismatchError, match="query of"):
        check("without a gradient", point, wrong_backward)


def test_a_run_writes_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    options = ("--device", "cpu", "--quick", "--seconds", "0.001", "--tokens", "1024", "--output", str(path))
    result = run(attention.main, *options)
    assert result.exit_code == 0, result.output
    assert "cudnn is left out: needs a GPU" in result.output
    rows = read_rows(path)
    assert {(row.phase, row.implementation) for row in rows} == {
        *((phase, "sdpa") for phase in ("whole", "whole_forward")),
        *((phase, name) for phase in ("packed", "packed_forward") for name in (MASKED, EACH)),
    }
    assert all(row.ms and row.details["documents"] >= 1 for row in rows)
    unknown = run(attention.main, *options, "--kernel", "flash2")
    assert unknown.exit_code == 2
    assert "flash2 is none of torch, cudnn" in unknown.output


def test_a_kernel_that_refuses_a_call_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of all others are kept."""

    def refuses(*args: Any) -> Any:
        raise RuntimeError("no plan for 64 features")

    contender = attention.contender
    monkeypatch.setattr(
        attention, "contender", lambda name, device: refuses if name == MASKED else contender(name, device)
    )
    notes: list[str] = []
    rows = attention.measure(Point(1024, SMALL, CPU, packed=True), (MASKED, EACH), (), 0.001, notes.append)
    assert {row.implementation for row in rows} == {EACH}
    assert notes == [f"  {MASKED} is left out: no plan for 64 features"]


def test_packed_steps(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    from benchmarks import finetune_packed

    path = tmp_path / "rows.json"
    options = ("--device", "cpu", "--quick", "--steps", "1", "--turns", "1", "--tokens", "2048", "--output", str(path))
    result = run(finetune_packed.main, *options)
    assert result.exit_code == 0, result.output
    whole, joined, packed = read_rows(path)
    assert [row.implementation for row in (whole, joined, packed)] == ["whole", "whole_joined", "packed_sdpa"]
    assert joined.details["loss"] == pytest.approx(whole.details["loss"], rel=1e-3)
    assert packed.details["over_whole"] == pytest.approx(packed.ms / whole.ms, rel=1e-4)  # type: ignore[operator]
    assert whole.details["attention_ms"] > 0
    assert packed.details["loss"] != whole.details["loss"]  # the documents do not see each other
    assert packed.details["loss"] == pytest.approx(whole.details["loss"], rel=0.05)


# What finetune chooses by.


def test_what_ships_is_what_was_measured() -> None:
    """``python scripts/speeds.py`` makes it so."""
    there = ATTENTION_SPEEDS.iterdir() if ATTENTION_SPEEDS.is_dir() else ()
    shipped = {path.name: path.read_text(encoding="utf-8") for path in there}
    assert shipped == attention_speeds(RESULTS)
    assert len(varlen.speeds()) == len(shipped)


def test_rows_become_speeds(tmp_path: Path, make_row: Any) -> None:
    """Forward counts twice. A kernel that lacks a size or was not in a graph is left out."""

    def row(name: str, tokens: int, phase: str, ms: float, graph: float = 1.0) -> Any:
        details = {"graph": graph, "capability": 9.0, "features": 128.0}
        return make_row(
            benchmark="attention", gpu="NVIDIA H200", torch="2.11.0+cu130", tokens=tokens, implementation=name, phase=phase,
            ms=ms, details=details,
        )  # fmt: skip

    rows = [
        row(name, tokens, phase, ms * scale)
        for name, scale in (("torch", 1.0), ("cudnn", 0.5), (EACH, 0.1))
        for tokens, ms in ((4096, 2.0), (8192, 4.0))
        for phase in ("packed", "packed_forward")
    ]
    write_rows(tmp_path / "attention_h200.json", rows)
    ((name, text),) = attention_speeds(tmp_path).items()
    assert name == "h200.json"
    entry = json.loads(text)
    assert entry == {
        "gpu": "NVIDIA H200", "capability": [9, 0], "torch": "2.11", "features": 128, "tokens": [4096, 8192],
        "ms": {"torch": [4.0, 8.0], "cudnn": [2.0, 4.0]},
    }  # fmt: skip
    found = varlen.Speeds(**{**entry, "capability": tuple(entry["capability"])})
    assert found.best(5000, lambda _: True) == "cudnn"
    assert found.best(5000, lambda name: name == "torch") == "torch"
    write_rows(
        tmp_path / "attention_h200.json", [row for row in rows if (row.implementation, row.tokens) != ("cudnn", 4096)]
    )
    assert "cudnn" not in attention_speeds(tmp_path)["h200.json"]
    write_rows(tmp_path / "attention_h200.json", [row for row in rows if row.implementation != "torch"])
    assert attention_speeds(tmp_path) == {}
