"""The LoRA benchmark on a CPU: its peers compute the adapted experts and their gradients; whoever does not is refused."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import experts_lora, runner
from benchmarks.experts_lora import SCALING, Adapters, Trained, composed
from benchmarks.rows import read_rows
from moe_fused.benchmark import harness
from moe_fused.benchmark.inputs import DTYPE, random_weights
from moe_fused.benchmark.layers import FORWARD_BACKWARD, LAYERS, RECOMPUTE, Layer
from tests.support import load_kernel, unboxed

SMOKE = ("--device", "cpu", "--layer", "tiny", "--seconds", "0.001")
NAMES = ["moe_fused", "composed", "peft", "attention_only", "moe_fused_bf16"]
PHASES = (FORWARD_BACKWARD, RECOMPUTE)
GRADIENTS = ["hidden_states", "top_k_weights", "gate_up.a", "gate_up.b", "down.a", "down.b"]
LAYER = Layer("small", hidden=32, intermediate=16, experts=6, top_k=3, lora_rank=8)


def run(*options: str):
    app = typer.Typer()
    app.command()(experts_lora.main)
    return CliRunner().invoke(app, list(options))


class Dense:
    """Dense matrices in the place of a 4-bit stack; counts how often they are asked for."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.asked = 0

    def dequantize(self) -> Tensor:
        self.asked += 1
        return self.weight


def loop(inputs: runner.Inputs, gate_up: Tensor, down: Tensor, adapters: Adapters) -> tuple[Tensor, dict[str, Tensor]]:
    """A loop over slots in float64: the output and all gradients."""
    x = inputs.hidden_states.detach().double().requires_grad_()
    weights = inputs.top_k_weights.detach().double().requires_grad_()
    factors = {name: value.detach().double().requires_grad_() for name, value in adapters.tensors.items()}
    gate_up = gate_up.double() + SCALING * factors["gate_up.b"] @ factors["gate_up.a"]
    down = down.double() + SCALING * factors["down.b"] @ factors["down.a"]
    outputs = []
    for t, chosen in enumerate(inputs.top_k_index.tolist()):
        y = x.new_zeros(x.shape[1])
        for k, expert in enumerate(chosen):
            gate, up = (gate_up[expert] @ x[t]).chunk(2)
            y = y + weights[t, k] * (down[expert] @ (torch.nn.functional.silu(gate) * up))
        outputs.append(y)
    output = torch.stack(outputs)
    grads = torch.autograd.grad(output, (x, weights, *factors.values()), inputs.grad_output.double())
    return output, dict(zip(GRADIENTS, grads, strict=True))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_composed(tokens, phase):
    """``composed`` computes what the loop does, also for one token, when most experts have no row."""
    generator = torch.Generator().manual_seed(tokens)
    gate_up, down = map(Dense, random_weights(LAYER, generator))
    adapters = Adapters.random(LAYER, generator)
    input_set = runner.Inputs.random(LAYER, tokens, generator)

    def forward(*inputs):
        return composed(*inputs, gate_up, down, adapters, LAYER.experts)

    got = Trained(forward, adapters.tensors).make_call([input_set], phase)(0)
    output, grads = loop(input_set, gate_up.weight, down.weight, adapters)
    want = {"output": output, **{f"{name}.grad": grad for name, grad in grads.items()}}
    harness.compare("composed", got, want, tolerance=0.02)
    # Forward and backward, and once more where the forward is replayed: no dense stack is kept in between.
    assert gate_up.asked == down.asked == (3 if phase == RECOMPUTE else 2)


def test_composed_keeps_no_weights():
    generator = torch.Generator().manual_seed(0)
    stacks = [Dense(weight.requires_grad_()) for weight in random_weights(LAYER, generator)]
    inputs = runner.Inputs.random(LAYER, 8, generator)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        composed(
            inputs.hidden_states,
            inputs.top_k_index,
            inputs.top_k_weights,
            False,
            *stacks,
            Adapters.random(LAYER, generator),
            LAYER.experts,
        )
    assert saved
    assert not {stack.weight.shape for stack in stacks} & set(saved)


@pytest.mark.parametrize("phase", PHASES)
def test_all_implementations_agree(phase):
    layer = dataclasses.replace(LAYERS["tiny"], lora_rank=16)
    generator = torch.Generator().manual_seed(0)
    contenders = experts_lora.make_contenders(load_kernel(), NAMES, layer, generator)
    inputs = [runner.Inputs.random(layer, 64, generator) for _ in range(2)]
    results = {name: make_call(inputs, phase)(1) for name, make_call in contenders.make_call.items()}
    assert list(results) == NAMES
    tolerance = experts_lora.BENCHMARK.tolerance
    for name in NAMES:
        if name == "attention_only":
            expected = contenders.expected[name](inputs, phase)(1)
            assert list(expected) == ["output", "hidden_states.grad", "top_k_weights.grad"]
            harness.compare(name, results[name], expected, tolerance=tolerance)
            continue
        assert list(results[name]) == ["output", *(f"{gradient}.grad" for gradient in GRADIENTS)]
        harness.compare(name, results[name], results["composed"], tolerance=tolerance)
    # The adapters are so large that leaving one out is an error above the tolerance.
    with pytest.raises(harness.MismatchError, match="output of"):
        harness.compare(
            "without",
            {"output": results["attention_only"]["output"]},
            {"output": results["composed"]["output"]},
            tolerance=tolerance,
        )


def test_recomputing_keeps_less():
    """The checkpointing of ``composed`` and PEFT works: they keep the input until the backward, and not the rows."""
    layer = dataclasses.replace(LAYERS["tiny"], lora_rank=16)
    generator = torch.Generator().manual_seed(0)
    names = ["composed", "peft"]
    contenders = experts_lora.make_contenders(load_kernel(), names, layer, generator)
    inputs = [runner.Inputs.random(layer, 64, generator)]

    def saved_bytes(name: str, phase: str) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            contenders.make_call[name](inputs, phase)(0)
        return sum(sizes)

    rows = 64 * layer.top_k * layer.hidden * DTYPE.itemsize
    for name in names:
        assert saved_bytes(name, RECOMPUTE) < rows < saved_bytes(name, FORWARD_BACKWARD)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_results_are_not_timed(tmp_path, name, monkeypatch):
    """An implementation with wrong results gets no row; if the baseline is wrong, those compared with it get none."""
    make = experts_lora.make_contenders

    def make_contenders(*arguments):
        contenders = make(*arguments)
        right = contenders.make_call[name]

        def make_call(inputs, phase):
            call = right(inputs, phase)
            return lambda i: {key: 1.1 * value for key, value in call(i).items()}

        return dataclasses.replace(contenders, make_call={**contenders.make_call, name: make_call})

    monkeypatch.setattr(experts_lora, "make_contenders", make_contenders)
    output = tmp_path / "rows.json"
    options = ("--tokens", "16", "--lora-rank", "16", "--phase", RECOMPUTE, "--output", str(output))
    result = run(*SMOKE, *options)
    assert result.exit_code == 1
    wrong = {"moe_fused", "peft", "moe_fused_bf16"} if name == "composed" else {name}
    timed = [row.implementation for row in read_rows(output)]
    assert timed == [*(other for other in NAMES if other not in wrong), "roofline"]
    for other in wrong:
        assert f"output of {other} is off" in result.stderr


@pytest.mark.slow
def test_whole_run_with_the_real_kernel(run_with_kernel):
    rows, printed = run_with_kernel("experts_lora", *SMOKE, "--lora-rank", "16", tokens=(16, 40, 65))
    for phase in PHASES:
        for tokens in (16, 40, 65):
            measured = [(row.implementation, row.weights) for row in rows if (row.phase, row.tokens) == (phase, tokens)]
            dense = ("peft", "moe_fused_bf16")
            assert measured == [(name, "bf16" if name in dense else "nf4") for name in [*NAMES, "roofline"]]
    assert {row.lora_rank for row in rows} == {16}
    assert "nf4, LoRA rank 16), recompute" in printed


def test_every_rank_has_adapters_of_its_own(tmp_path):
    output = tmp_path / "rows.json"
    options = ("--tokens", "4", "--implementation", "composed", "--phase", FORWARD_BACKWARD, "--output", str(output))
    assert run(*SMOKE, *options).exit_code == 0
    rows = {(row.lora_rank, row.implementation): row for row in read_rows(output)}
    assert set(rows) == {(rank, name) for rank in (16, 64) for name in ("composed", "roofline")}
    # Adapters are the larger part of a tiny layer's roofline.
    assert rows[64, "roofline"].ms > 1.5 * rows[16, "roofline"].ms


@pytest.mark.parametrize(
    ("package", "code", "message"),
    [
        pytest.param("bitsandbytes", 2, "composed needs bitsandbytes, which is not installed", id="baseline"),
        pytest.param("peft", 0, "peft is not installed", id="peer"),
    ],
)
def test_missing_package(tmp_path, monkeypatch, package, code, message):
    """Without the baseline's package the benchmark ends; without PEFT, PEFT's row has no time."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    output = tmp_path / "rows.json"
    result = run(*SMOKE, "--tokens", "4", "--lora-rank", "16", "--phase", RECOMPUTE, "--output", str(output))
    assert result.exit_code == code
    assert message in (result.stderr if code else result.stdout)
    if code == 0:
        times = {row.implementation: row.ms for row in read_rows(output)}
        assert times.pop("peft") is None
        assert all(times.values())


def test_unknown_rank():
    result = run(*SMOKE, "--lora-rank", "8")
    assert result.exit_code == 2
    assert "8 is none of 16, 64" in unboxed(result.stderr)
