"""What surrounds ``triton_kernels`` in the benchmarks. The package itself needs a GPU, where its results are compared."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import experts, experts_4bit, runner, triton_experts
from benchmarks.runner import Forward
from benchmarks.triton_experts import GROUP, Mxfp4Stack, Routing, interleaved
from moe_fused.benchmark.layers import FORWARD, LAYERS, Ceilings

SMOKE = ("--device", "cpu", "--layer", "tiny", "--seconds", "0.001", "--tokens", "4", "--phase", "forward")
# The values that four bits of MXFP4 stand for: sign, two bits of exponent, one of mantissa.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.mark.parametrize(("experts_", "top_k", "tokens"), [(8, 2, 5), (7, 3, 1), (64, 6, 33)])
def test_rows_are_sorted_by_expert(experts_: int, top_k: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    index = torch.rand(tokens, experts_, generator=generator).topk(top_k).indices
    routing = Routing.of(index, experts_)
    assert torch.equal(routing.counts, index.flatten().bincount(minlength=experts_).int())
    by_row = index.flatten()[routing.slot_of_row]
    assert torch.equal(by_row, torch.repeat_interleave(torch.arange(experts_), routing.counts))
    assert torch.equal(routing.slot_of_row[routing.row_of_slot], torch.arange(tokens * top_k, dtype=torch.int32))
    assert {routing.counts.dtype, routing.slot_of_row.dtype, routing.row_of_slot.dtype} == {torch.int32}


def test_gate_and_up_take_turns() -> None:
    gate, up = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    turned = interleaved(torch.cat([gate, up], dim=1))
    assert torch.equal(turned[:, 0::2], gate)
    assert torch.equal(turned[:, 1::2], up)
    assert turned.is_contiguous()


def test_mxfp4_is_dequantized() -> None:
    """By the definition of the format, one weight at a time."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 6, GROUP), generator=generator, dtype=torch.uint8)  # two groups a row
    scales = torch.randint(120, 131, (2, 6, 2), generator=generator, dtype=torch.uint8)
    stack = Mxfp4Stack(blocks, scales)
    dense = stack.dequantize()
    assert stack.shape == dense.shape == (2, 6, 2 * GROUP)
    nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    exponents = scales.double().repeat_interleave(GROUP, dim=-1) - 127
    assert torch.equal(dense.double(), E2M1[nibbles.long()].double() * 2**exponents)
    # Rows in turns before or after dequantizing: the stack that the kernels read holds the same weights.
    turned = Mxfp4Stack(interleaved(blocks), interleaved(scales))
    assert torch.equal(turned.dequantize(), interleaved(dense))


def run(benchmark: ModuleType, *options: str) -> Any:
    app = typer.Typer()
    app.command()(benchmark.main)
    return CliRunner().invoke(app, [*SMOKE, *options])


@pytest.mark.parametrize("benchmark", [experts, experts_4bit])
def test_it_is_refused_where_it_cannot_compete(benchmark: ModuleType) -> None:
    result = run(benchmark, "--implementation", "triton_kernels")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "triton_kernels cannot compete: it needs a GPU; `--implementation` chooses others"
    ]


def test_it_is_left_out_with_a_reason(kernel: SimpleNamespace) -> None:
    result = run(experts)
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "triton_kernels" in line]
    assert lines == ["triton_kernels does not compete: it needs a GPU"]
    assert "grouped_mm" in result.stdout


@pytest.mark.parametrize("right", [True, False])
def test_it_is_compared_over_its_own_weights(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """MXFP4 weights give other results than nf4 weights, so the baseline's results are not what they must agree with."""

    def quantize(weight: Tensor) -> Mxfp4Stack:
        experts_, rows, columns = weight.shape
        blocks = torch.randint(256, (experts_, rows, columns // 2), dtype=torch.uint8)
        return Mxfp4Stack(blocks, torch.full((experts_, rows, columns // GROUP), 124, dtype=torch.uint8))

    def mxfp4_forward(gate_up: Mxfp4Stack, down: Mxfp4Stack) -> Forward:
        if not right:
            down = Mxfp4Stack(down.blocks, down.scales + 1)
        return lambda x, index, weights: experts_4bit.composed(x, index, weights, gate_up, down)

    monkeypatch.setattr(Mxfp4Stack, "quantize", quantize)
    monkeypatch.setattr(triton_experts, "mxfp4_forward", mxfp4_forward)
    contenders = experts_4bit.setup(["composed", "triton_kernels"])(LAYERS["tiny"], torch.Generator().manual_seed(0))
    bench = runner.Bench(experts_4bit.BENCHMARK, torch.device("cpu"), Ceilings(1e9, 1e9), 0.001)
    names = ["composed", "triton_kernels"]
    rows, outcomes = bench.measure(runner.Point(LAYERS["tiny"], 8, FORWARD), contenders, names)
    timed = [(row.implementation, row.weights) for row in rows]
    if right:
        assert timed == [("composed", "nf4"), ("triton_kernels", "mxfp4"), ("roofline", "nf4")]
    else:
        assert timed == [("composed", "nf4"), ("roofline", "nf4")]
        assert outcomes["triton_kernels"].wrong


def test_reasons_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that has the name and is another one, as on the package index, does not end the benchmark."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(triton_experts, "NAME", "triton_kernels_of_a_test")
    assert triton_experts.unavailable(gpu) == "it is not installed"
    (tmp_path / "triton_kernels_of_a_test").mkdir()
    (tmp_path / "triton_kernels_of_a_test" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    reason = triton_experts.unavailable(gpu)
    assert reason is not None
    assert reason.startswith("the installed package is not the version that this benchmark calls: No module")


def test_it_has_no_backward() -> None:
    competitor = experts.BENCHMARK.named("triton_kernels")
    assert [competitor.competes(512, phase) for phase in experts.BENCHMARK.phases] == [True, False, True]
