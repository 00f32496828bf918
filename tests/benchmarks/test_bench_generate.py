"""The benchmark of generating: that it runs, and that times which cannot be are no rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("bitsandbytes")

from benchmarks import generate
from benchmarks.rows import read_rows
from tests.support import unboxed


def run(*options: str) -> Any:
    app = typer.Typer()
    app.command()(generate.main)
    return CliRunner().invoke(app, ["--device", "cpu", "--quick", *options])


def test_a_run_writes_rows(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    names = ("generate", "static", "moe_fused")
    options = [option for name in names for option in ("--contender", name)]
    result = run("--sequences", "2", "--output", str(path), *options)
    assert result.exit_code == 0, result.output
    rows = read_rows(path)
    assert [(row.implementation, row.tokens) for row in rows] == [(name, 2) for name in names]
    for row in rows:
        assert row.ms is not None
        assert row.details["tokens_per_second"] == pytest.approx(2e3 / row.ms, rel=1e-3)
    assert rows[0].details["same_tokens"] == rows[2].details["same_tokens"] == 1


def test_a_long_answer_that_takes_no_longer_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative time of a step would be a row like any other."""
    seconds: dict[str, float] = {"now": 0.0}

    def answer(prompts: torch.Tensor, count: int) -> torch.Tensor:
        seconds["now"] += {4: 0.5, 20: took}[count]
        return torch.cat([prompts, prompts.new_zeros(len(prompts), count)], dim=1)

    monkeypatch.setattr(generate.time, "perf_counter", lambda: seconds["now"])
    prompts, took = torch.zeros(2, 3, dtype=torch.long), 0.5
    with pytest.raises(ValueError, match=r"20 tokens take 0\.500 s and 4 take 0\.500 s, which gives no time of a step"):
        generate.measure(answer, prompts, generate.QUICK_ANSWERS)
    took = 0.9
    found: Any = generate.measure(answer, prompts, generate.QUICK_ANSWERS)
    assert found.ms == pytest.approx(1e3 * 0.4 / 16)
    assert found.first == pytest.approx(0.9)
    assert found.tokens.shape == (2, 23)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "foo"), "'foo' is none of qwen3-30b-a3b"),
        (("--contender", "foo"), "'foo' is none of generate, static"),
        (("--sequences", "0"), "--sequences"),
        (("--device", "tpu"), "'tpu' is none of cuda, cpu"),
        (("--output", "{tmp_path}"), "is a directory"),
        (("--output", "{tmp_path}/rows/rows.json"), "is no directory"),
    ],
)
def test_wrong_options(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("a file")
    given = [option.format(tmp_path=tmp_path) for option in options]
    result = run(*given)
    assert result.exit_code == 2
    assert words in unboxed(result.output), result.output


def test_a_file_of_something_else(tmp_path: Path) -> None:
    """It is found before the model is made."""
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}')
    result = run("--output", str(path))
    assert result.exit_code == 1
    assert "a list of rows is needed, got dict" in result.output
