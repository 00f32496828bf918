"""The benchmark of loading, on a CPU: what it measures with, and that it measures what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import loading
from moe_fused.benchmark.layers import LAYERS, Layer
from tests.support import unboxed

CPU = torch.device("cpu")
app = typer.Typer()
app.command()(loading.main)


@pytest.fixture
def libraries():
    for module in loading.NEEDED:
        pytest.importorskip(module)


def run(*options):
    return CliRunner().invoke(app, options)


def run_in_new_processes(output, options):
    """As a user runs it: what it prints."""
    command = [sys.executable, "-m", "benchmarks.loading", *options, "--output", str(output)]
    root = loading.runner.ROOT.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_in_forked_processes(output, options):
    """The same in this process, whose processes are forked from one that has imported all: what it prints."""
    pytest.importorskip("trl")
    from tests.integration.finetuning import warm_context

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "get_context", lambda _: warm_context())
        result = run(*options, "--output", str(output))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "start"),
    [([], run_in_new_processes), (["--cold"], run_in_forked_processes)],
    ids=["page cache", "disk"],
)
def test_whole_run(options, start, tmp_path, libraries):
    output = tmp_path / "rows.json"
    printed = start(output, ["--quick", "--device", "cpu", "--layers", "2", *options])
    rows = json.loads(output.read_text(encoding="utf-8"))
    wanted = [("moe_fused", "nf4"), ("transformers", "bf16"), (loading.WITHOUT_READAHEAD, "nf4")]
    assert [(row["implementation"], row["weights"]) for row in rows] == wanted[: 3 if options else 2]
    for row in rows:
        assert row.keys() == {field.name for field in fields(loading.LoadingRow)}
        assert (row["benchmark"], row["gpu"], row["layer"], row["layers"]) == ("loading", "cpu", "tiny", 2)
        assert row["device_mib"] is row["device_peak_mib"] is None
        assert row["seconds"] > 0
        speeds = (row["gb_per_second"], row["disk_gb_per_second"])
        assert all(speed > 0 for speed in speeds) if options else speeds == (None, None)
        line = next(line for line in printed.splitlines() if row["implementation"] in line)
        assert re.search(rf"{row['weights']} .* {row['seconds']:.1f} .* {row['footprint_mib']:.0f} ", line)
    packed, dense = (row["footprint_mib"] for row in rows[:2])
    parameters = 2 * LAYERS["tiny"].parameters
    assert (dense - packed) * 2**20 > 1.4 * parameters, "of 2 bytes a parameter some 0.56 are left"


def test_what_stays_dense_is_no_result(tmp_path, libraries):
    import moe_fused

    loading.save_model(tmp_path, Layer("odd", hidden=24, intermediate=4, experts=2, top_k=1), 1, CPU)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    try:
        with pytest.raises(RuntimeError, match=r"moe_fused must load experts in nf4, got torch\.bfloat16"):
            loading.load_model(tmp_path, "moe_fused", CPU)
    finally:
        moe_fused.disable()


@pytest.mark.skipif(not loading.readahead.is_possible(), reason="only Linux lets a program do that")
def test_files_are_forgotten(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(2**22))
    with path.open("rb") as file:
        assert loading._cached_share(file.fileno()) == 1
    assert loading.forget(tmp_path) == 2**22
    with path.open("rb") as file:
        assert loading._cached_share(file.fileno()) <= loading.REMEMBERED
        file.read()
        assert loading._cached_share(file.fileno()) == 1
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: None)
    with pytest.raises(RuntimeError, match="the page cache still has 100% of"):
        loading.forget(tmp_path)


@pytest.mark.skipif(loading.anonymous_mib() is None, reason="this system does not tell")
def test_memory_that_is_given_back_counts():
    size = 64 * 2**20
    with loading.anonymous_growth() as growth:
        block = bytearray(os.urandom(2**20) * 64)
        time.sleep(20 * loading.SAMPLE_SECONDS)
        del block
    assert size / 2**20 - 1 <= growth() < 2 * size / 2**20 + 16


def test_a_killed_process_is_one_error():
    with pytest.raises(RuntimeError, match="the process of _exit was killed"):
        loading.in_new_process(os._exit, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cpu"), "a CPU is only for smoke tests: give --quick"),
        (("--layer", "huge"), "'huge' is none of qwen3-30b-a3b"),
        (("--device", "tpu"), "'tpu' is none of cuda, cpu"),
    ],
)
def test_options(options, message):
    result = run(*options)
    assert result.exit_code == 2
    assert message in unboxed(result.stderr)


def test_without_bitsandbytes(monkeypatch, libraries):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    result = run("--quick", "--device", "cpu")
    assert result.exit_code == 2
    assert result.stderr == "Loading in 4 bits needs bitsandbytes, not installed here\n"
