"""The experts benchmark itself, on a CPU and tiny shapes: what it times, what it refuses and what it survives."""

from __future__ import annotations

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import experts, runner
from benchmarks.rows import read_rows
from moe_fused.benchmark.inputs import Inputs
from moe_fused.benchmark.layers import FORWARD, FORWARD_BACKWARD, LAYERS

SMOKE = ("--device", "cpu", "--layer", "tiny", "--seconds", "0.001")


def run(*options: str):
    app = typer.Typer()
    app.command()(experts.main)
    return CliRunner().invoke(app, list(options))


def test_whole_run_with_the_real_kernel(run_with_kernel):
    rows, _ = run_with_kernel("experts", *SMOKE, tokens=(1, 8, 65))
    assert {row.phase for row in rows} == {FORWARD, FORWARD_BACKWARD}
    for phase in (FORWARD, FORWARD_BACKWARD):
        names = {t: [row.implementation for row in rows if (row.phase, row.tokens) == (phase, t)] for t in (1, 8, 65)}
        few = ["moe_fused", "grouped_mm", "batched_mm", "eager", "roofline"]
        assert names == {1: few, 8: few, 65: [name for name in few if name != "batched_mm"]}
    assert {row.weights for row in rows} == {"bf16"}


def test_out_of_memory_is_a_row_without_a_time(tmp_path, kernel):
    def hungry(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    kernel.moe_experts = hungry
    result = run(*SMOKE, "--tokens", "4", "--phase", "forward", "--output", str(tmp_path / "rows.json"))
    assert result.exit_code == 0
    assert "out of memory" in result.stdout
    rows = {row.implementation: row for row in read_rows(tmp_path / "rows.json")}
    assert (rows["moe_fused"].ms, rows["moe_fused"].tflops, rows["moe_fused"].peak_mib) == (None, None, None)
    assert all(row.ms for name, row in rows.items() if name != "moe_fused")


@pytest.mark.parametrize("phase", [FORWARD, FORWARD_BACKWARD])
@pytest.mark.parametrize("wrong", ["scaled", "nan", "one token", "one gradient"])
def test_wrong_results_are_not_timed(tmp_path, kernel, phase, wrong):
    right = kernel.moe_experts

    def moe_experts(x, index, weights, gate_up, down):
        y = right(x, index, weights, gate_up, down)
        if wrong == "scaled":
            return y * 1.1
        if wrong == "nan":
            return y * float("nan")
        if wrong == "one token":
            return torch.cat([y[:-1], y[:1]])
        return right(x, index, weights, gate_up, down.detach() + 0 * down)

    kernel.moe_experts = moe_experts
    result = run(*SMOKE, "--tokens", "8", "--phase", phase, "--output", str(tmp_path / "rows.json"))
    names = [row.implementation for row in read_rows(tmp_path / "rows.json")]
    if wrong == "one gradient" and phase == FORWARD:
        assert result.exit_code == 0, "the forward is right"
        return
    assert result.exit_code == 1
    assert f"Wrong result, not timed: tiny {phase} 8 tokens:" in result.stderr
    assert "moe_fused" not in names
    assert "grouped_mm" in names


def test_implementations_share_weights_and_agree():
    generator = torch.Generator().manual_seed(0)
    layer = LAYERS["tiny"]
    modules = experts.make_experts(layer, ("grouped_mm", "batched_mm", "eager"), generator)
    assert len({id(module.gate_up_proj) for module in modules.values()}) == 1
    assert modules["eager"].gate_up_proj.shape == (8, 64, 64)
    inputs = [Inputs.random(layer, 5, generator) for _ in range(2)]
    for input_set in inputs:
        assert all(len(set(chosen)) == layer.top_k for chosen in input_set.top_k_index.tolist())
        torch.testing.assert_close(input_set.top_k_weights.float().sum(-1), torch.ones(5), atol=1e-2, rtol=0)
    calls = {name: experts.make_call(module, inputs, FORWARD_BACKWARD) for name, module in modules.items()}
    assert set(calls["eager"](0)) == {"output", "hidden_states.grad", "top_k_weights.grad", "gate_up.grad", "down.grad"}
    assert torch.equal(calls["eager"](1)["output"], calls["eager"](3)["output"]), "sets are taken in rotation"
    assert not torch.equal(calls["eager"](0)["output"], calls["eager"](1)["output"])
    assert not experts.make_call(modules["eager"], inputs, FORWARD)(0)["output"].requires_grad


def test_no_gpu_is_one_line_and_exit_code_2(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run()
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "need a CUDA or ROCm GPU" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(("--layer", "gpt-2"), "'gpt-2' is none of qwen3-30b-a3b", id="layer"),
        pytest.param(("--implementation", "fast"), "'fast' is none of moe_fused", id="implementation"),
        pytest.param(("--phase", "backward"), "'backward' is none of forward", id="phase"),
        pytest.param(("--tokens", "0"), "0 is not a positive number of tokens", id="no tokens"),
        pytest.param(("--tokens", "many"), "Invalid value for '--tokens'", id="tokens"),
        pytest.param(("--seconds", "0"), "Invalid value for '--seconds'", id="seconds"),
        pytest.param(("--device", "tpu"), "'tpu' is none of cuda, cpu", id="device"),
        pytest.param(("--device", "cpu"), "give --layer tiny", id="large layers on a CPU"),
    ],
)
def test_bad_options(monkeypatch, options, message):
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    result = run(*options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_file_that_is_no_rows_is_left_alone(tmp_path, kernel):
    output = tmp_path / "rows.json"
    output.write_text("my notes", encoding="utf-8")
    result = run(*SMOKE, "--tokens", "1", "--output", str(output))
    assert result.exit_code == 1
    assert "rows.json" in result.stderr
    assert output.read_text(encoding="utf-8") == "my notes"


def test_partial_runs_write_nothing_unasked(tmp_path, kernel, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    assert run(*SMOKE, "--tokens", "1", "--phase", "forward").exit_code == 0
    assert not list(tmp_path.iterdir())
