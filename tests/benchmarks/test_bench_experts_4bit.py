"""The 4-bit benchmark on a CPU: its peers compute the experts, and what it stores and writes is what it says."""

from __future__ import annotations

import importlib.util
import math
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import experts_4bit, runner
from benchmarks.experts_4bit import BitsandbytesStack, composed
from benchmarks.rows import read_rows
from moe_fused.benchmark import harness
from moe_fused.benchmark.inputs import Inputs, random_weights
from moe_fused.benchmark.layers import DEFAULT_LAYERS, LAYERS, Layer
from tests.support import load_kernel, unboxed

SMOKE = ("--device", "cpu", "--layer", "tiny", "--seconds", "0.001")
NAMES = ["moe_fused", "composed", "dequantize_first", "dequantize_whole", "moe_fused_bf16"]


def run(*options: str):
    app = typer.Typer()
    app.command()(experts_4bit.main)
    return CliRunner().invoke(app, list(options))


@pytest.fixture
def kernel():
    return load_kernel()


def test_bitsandbytes_stack():
    weight = torch.randn(3, 32, 64, dtype=torch.bfloat16)
    stack = BitsandbytesStack.quantize(weight)
    assert (stack.packed.dtype, stack.packed.numel()) == (torch.uint8, weight.numel() // 2)
    assert stack.state.nested, "absmaxes are quantized too"
    got = stack.dequantize()
    assert (got.shape, got.dtype) == (weight.shape, weight.dtype)
    assert 0.02 < (got - weight).norm() / weight.norm() < 0.15


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_composed(tokens):
    """``composed`` computes what a loop over tokens does, also for one token, when most experts have no row."""
    layer = Layer("small", hidden=32, intermediate=16, experts=6, top_k=3)
    generator = torch.Generator().manual_seed(tokens)
    stacks = [BitsandbytesStack.quantize(weight) for weight in random_weights(layer, generator)]
    gate_up, down = (stack.dequantize() for stack in stacks)
    inputs = Inputs.random(layer, tokens, generator)
    want = torch.zeros(tokens, layer.hidden)
    for t, (chosen, weights) in enumerate(zip(inputs.top_k_index, inputs.top_k_weights.detach().float(), strict=True)):
        x = inputs.hidden_states[t].detach().float()
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            gate, up = (gate_up[expert].float() @ x).chunk(2)
            want[t] += weight * (down[expert].float() @ (torch.nn.functional.silu(gate) * up))
    with torch.no_grad():
        got = composed(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights, *stacks)
    harness.compare("composed", {"y": got}, {"y": want})


def test_all_implementations_agree_whoever_quantized(kernel):
    """All implementations agree, although ours quantizes experts one by one and bitsandbytes quantizes whole stacks."""
    generator = torch.Generator().manual_seed(0)
    layer = LAYERS["tiny"]
    contenders = experts_4bit.setup(NAMES)(layer, generator)
    inputs = [Inputs.random(layer, 64, generator) for _ in range(2)]
    results = {name: make_call(inputs, "forward")(1) for name, make_call in contenders.make_call.items()}
    assert list(results) == NAMES
    assert not results["moe_fused"]["output"].requires_grad
    for name, got in results.items():
        harness.compare(name, got, results["composed"])
    for name in ("dequantize_first", "moe_fused_bf16"):
        assert torch.equal(results[name]["output"], results["moe_fused"]["output"])
    assert not torch.equal(results["composed"]["output"], results["moe_fused"]["output"])


@pytest.mark.parametrize("name", NAMES)
def test_wrong_weights_are_not_timed(tmp_path, kernel, name, monkeypatch):
    """An implementation with wrong results gets no row; if the baseline is wrong, all the others get none."""
    forwards = experts_4bit.make_forwards

    def make_forwards(*arguments):
        made, stored = forwards(*arguments)
        right = made[name]
        return {**made, name: lambda *inputs: 1.1 * right(*inputs)}, stored

    monkeypatch.setattr(experts_4bit, "make_forwards", make_forwards)
    result = run(*SMOKE, "--tokens", "8", "--output", str(tmp_path / "rows.json"))
    assert result.exit_code == 1
    timed = [row.implementation for row in read_rows(tmp_path / "rows.json")]
    wrong = [other for other in NAMES if (other == name) != (name == "composed")]
    assert timed == [*(other for other in NAMES if other not in wrong), "roofline"]
    for other in wrong:
        assert f"output of {other} is off" in result.stderr


@pytest.mark.slow
def test_whole_run_with_the_real_kernel(run_with_kernel):
    rows, printed = run_with_kernel("experts_4bit", *SMOKE, tokens=(1, 8, 65))
    for tokens in (1, 8, 65):
        measured = [(row.implementation, row.weights) for row in rows if row.tokens == tokens]
        expected = [(name, "bf16" if name == "moe_fused_bf16" else "nf4") for name in NAMES]
        assert measured == [*expected, ("roofline", "nf4")]
    assert {row.phase for row in rows} == {"forward"}, "there are no CUDA graphs on a CPU"
    stored = re.search(r"tiny: moe_fused stores (\S+) bytes per parameter", printed)
    assert stored
    assert 0.5 < float(stored[1]) <= 0.53


@pytest.mark.parametrize("name", DEFAULT_LAYERS)
def test_stored_bytes_of_real_layers(name):
    layer = LAYERS[name]
    packed = load_kernel().Format4bit
    gate_up = packed((layer.experts, 2 * layer.intermediate, layer.hidden), projections=2)
    down = packed((layer.experts, layer.hidden, layer.intermediate))
    stored = sum(math.prod(shape) for stack_format in (gate_up, down) for shape in stack_format.storage().values())
    # Half a byte, a byte for 64 weights and a float for 256 of those; offsets hardly count.
    assert stored / layer.parameters == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=1e-4)
    assert stored / layer.parameters <= 0.53


def test_roofline_counts_what_is_stored(tmp_path, kernel, monkeypatch):
    """The roofline grows with the bytes that are stored, as long as memory bandwidth is the limit."""
    rooflines = []
    for nbytes in (10**6, 2 * 10**6):
        monkeypatch.setattr(kernel.Packed4bitWeights, "nbytes", nbytes)
        monkeypatch.setattr(harness, "measure_ceilings", lambda *_, **__: runner.Ceilings(1e9, 1e15))
        output = tmp_path / f"{nbytes}.json"
        assert run(*SMOKE, "--tokens", "64", "--output", str(output)).exit_code == 0
        rooflines += [row.ms for row in read_rows(output) if row.implementation == "roofline"]
    # With 64 tokens to 2 of 8 experts, every expert is chosen. Two stacks of 10**6 bytes take 2 ms at 1 GB/s, and two
    # stacks of twice the size take 4 ms.
    assert rooflines[1] - rooflines[0] == pytest.approx(2.0, rel=1e-3)


def test_without_bitsandbytes(tmp_path, kernel, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    result = run(*SMOKE, "--tokens", "4")
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines() == [
        "composed needs bitsandbytes, which is not installed; `--implementation` chooses others"
    ]
    assert not result.stdout


def test_backward_is_no_phase():
    result = run(*SMOKE, "--phase", "forward_backward")
    assert result.exit_code == 2
    assert "is none of forward, forward_cuda_graph" in unboxed(result.stderr)
