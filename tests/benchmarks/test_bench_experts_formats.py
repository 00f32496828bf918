"""The benchmark of 4-bit formats on a CPU: each format is compared with plain torch over the same bytes."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import experts_formats, runner
from benchmarks.experts_formats import PUBLISHED, ours, plain
from benchmarks.rows import read_rows
from moe_fused.benchmark.inputs import Inputs
from moe_fused.benchmark.layers import FORWARD, RECOMPUTE, Layer
from tests.support import load_kernel, unboxed

NAMES = ["moe_fused", "moe_fused_mxfp4", "moe_fused_nvfp4", "composed_mxfp4", "composed_nvfp4"]
LAYER = Layer("small", hidden=64, intermediate=32, experts=4, top_k=2, lora_rank=8)


def test_rows_of_all_formats(tmp_path):
    app = typer.Typer()
    app.command()(experts_formats.main)
    output = tmp_path / "rows.json"
    options = ["--device", "cpu", "--layer", "tiny", "--seconds", "0.001", "--tokens", "8", "--output", str(output)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, unboxed(result.output)
    rows = [row for row in read_rows(output) if row.implementation != "roofline"]
    assert {row.implementation for row in rows} == set(NAMES)
    assert {(row.implementation, row.weights) for row in rows} == set(zip(NAMES, ["nf4", *PUBLISHED * 2], strict=True))
    assert all(row.ms is not None for row in rows)
    assert len(rows) == 2 * len(NAMES)


@pytest.mark.parametrize("phase", [FORWARD, RECOMPUTE])
def test_formats_have_weights_of_their_own(phase):
    """The results are those of plain torch over the same bytes, and not those of another format."""
    generator = torch.Generator().manual_seed(0)
    contenders = experts_formats.make_contenders(load_kernel(), NAMES, LAYER, generator)
    inputs = [Inputs.random(LAYER, 12, generator)]
    outputs = {name: make(inputs, phase)(0) for name, make in contenders.make_call.items()}
    for quant_type in PUBLISHED:
        got, want = outputs[ours(quant_type)], outputs[plain(quant_type)]
        assert got.keys() == want.keys()
        runner.harness.compare(quant_type, got, want, tolerance=experts_formats.BENCHMARK.tolerance)
    apart = [outputs[name]["output"].float() for name in NAMES[:3]]
    assert all((apart[0] - other).norm() > 0.05 * apart[0].norm() for other in apart[1:])
