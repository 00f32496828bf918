"""``moe-fused bench`` on a tiny layer."""

from __future__ import annotations

import getpass
import platform
from pathlib import Path

import pytest
from transformers import BitsAndBytesConfig

import moe_fused
from moe_fused.quantized import PUBLISHED, QUANT_TYPES, QuantType, compressed_content
from moe_fused.reports import read_report

from .cli import Command
from .four_bit import build
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
    assert "4-bit weights are left out, because nf4 cannot hold these experts: an expert's " in ended.stdout
    ours, theirs = (line for line in ended.stdout.splitlines() if "│ forward  " in line)
    assert "│ moe_fused " in ours
    assert "cannot run" in theirs


@pytest.mark.parametrize("quant_type", ["fp4", *PUBLISHED])
def test_bench_times_the_format_of_the_checkpoint(quant_type: QuantType, command: Command, tmp_path: Path) -> None:
    """Which the table, the report and a sentence below the table name. Another format is refused."""
    model, report = tmp_path / "model", tmp_path / "report.json"
    config = build(QWEN3_MOE).config
    config.quantization_config = (
        compressed_content(quant_type)
        if quant_type in PUBLISHED
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type).to_dict()
    )
    config.save_pretrained(model)
    options = ("--model", model, "--tokens", 2, "--seconds", 0.001, "--device", "cpu")
    other = next(name for name in QUANT_TYPES if name != quant_type)
    ended = command("bench", *options, "--format", other)
    assert f"--format {other} is not possible: --model {model} is in 4 bits already, as {quant_type};" in ended.error
    ended = command("bench", *options, "--report", report)
    assert ended.status == 0, ended
    assert f"4-bit weights are in {quant_type}, as in the checkpoint" in ended.stdout
    implementations = {row["implementation"] for row in read_report(report)["rows"]}
    assert implementations == {"moe_fused", f"moe_fused, {quant_type}", "grouped_mm"}


def test_bench_times_the_format_that_is_asked_for(command: Command, tmp_path: Path) -> None:
    options = ("--tokens", 2, "--seconds", 0.001, "--device", "cpu")
    ended = command("bench", "--layer", "tiny", *options, "--format", "nvfp4")
    assert ended.status == 0, ended
    assert "moe_fused, nvfp4" in ended.stdout
    assert "4-bit weights are in nvfp4, and frozen" in ended.stdout
    QWEN3_MOE.build().config.save_pretrained(tmp_path)
    says = (
        f"--format mxfp4 cannot hold the experts of {tmp_path}: the in features must be a multiple of the blocksize 32"
    )
    assert says in command("bench", "--model", tmp_path, *options, "--format", "mxfp4").error


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
        (["--format", "int4"], "--format must be one of nf4, fp4, mxfp4, nvfp4, got int4"),
    ],
    ids=" ".join,
)
def test_bench_refuses(options: list[str], words: str, command: Command) -> None:
    ended = command("bench", *options)
    assert ended.status in (1, 2)
    assert words in ended.error
