"""``moe-fused bench`` on a tiny layer."""

from __future__ import annotations

import getpass
import platform
from pathlib import Path

import pytest

import moe_fused
from moe_fused.reports import read_report

from .cli import Command
from .models import EXPERTS, HIDDEN, INTERMEDIATE, QWEN3_MOE, TOP_K

# bench


def test_bench(command: Command) -> None:
    ended = command("bench", "--layer", "tiny", "--tokens", 3, "--seconds", 0.001, "--device", "cpu")
    assert ended.status == 0, ended
    for words in ("tiny: H64 I32 E8 k2", "moe_fused, nf4", "grouped_mm", "forward_backward", "roofline: what"):
        assert words in ended.stdout
    rows = [line for line in ended.stdout.splitlines() if line.startswith("│      3 ")]
    assert len(rows) == 6


def test_bench_writes_a_report(command: Command, tmp_path: Path) -> None:
    """Which passes its own check, and has room for neither paths nor names."""
    path = tmp_path / "report.json"
    options = ("--layer", "tiny", "--tokens", 3, "--seconds", 0.001, "--device", "cpu", "--report", path)
    ended = command("bench", *options)
    assert ended.status == 0, ended
    written = read_report(path)
    assert (written["command"], written["layer"]["name"], written["environment"]["gpu"]) == ("bench", "tiny", "cpu")
    implementations = {row["implementation"] for row in written["rows"]}
    assert implementations == {"moe_fused", "moe_fused, nf4", "grouped_mm"}
    assert all(row["ms"] > 0 for row in written["rows"])
    assert written["ceilings"]["flops_per_second"] > 0
    text = path.read_text(encoding="utf-8")
    for private in (str(tmp_path), str(Path.home()), platform.node(), getpass.getuser()):
        assert f'"{private}' not in text
        assert f"{private}/" not in text
    assert "exists: choose another path" in command("bench", *options).error


def test_bench_of_a_model(command: Command, tmp_path: Path) -> None:
    """Whose odd sizes neither fit 4-bit blocks nor torch's grouped product."""
    QWEN3_MOE.build().config.save_pretrained(tmp_path / "model")
    options = ("--tokens", 2, "--seconds", 0.001, "--device", "cpu")
    ended = command("bench", "--model", tmp_path / "model", *options, "--report", tmp_path / "report.json")
    assert ended.status == 0, ended
    assert read_report(tmp_path / "report.json")["layer"]["name"] == "another", "the path of a model is private"
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
        (["--model", "nowhere"], "--model nowhere is neither"),
    ],
    ids=" ".join,
)
def test_bench_refuses(options: list[str], words: str, command: Command) -> None:
    ended = command("bench", *options)
    assert ended.status in (1, 2)
    assert words in ended.error
