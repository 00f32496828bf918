"""The benchmark of whole models on a CPU: what it builds, what it counts, and that time goes where it is said to go."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import typer
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

import moe_fused
from benchmarks import finetune_30b, full_model, step_trace
from benchmarks.finetune_30b import QWEN3_30B, TINY
from benchmarks.rows import read_rows, row_from_json, write_rows
from benchmarks.table import render
from benchmarks.training import Loop, Meter, Recipe, measure, set_up_loop, trained
from moe_fused.benchmark.harness import compare
from moe_fused.benchmark.layers import Ceilings
from moe_fused.integrations.quantizer.packed_experts import PackedConfig, get_packed
from tests.support import unboxed

CPU = torch.device("cpu")
SMOKE = ("--device", "cpu", "--quick", "--tokens", "16", "--steps", "1")


@pytest.fixture(autouse=True)
def _leave_transformers_as_it_was():
    yield
    moe_fused.disable()


def run(*options: str):
    app = typer.Typer()
    app.command()(finetune_30b.main)
    return CliRunner().invoke(app, list(options))


def tiny_training(recipe: Recipe = finetune_30b.PLAIN) -> Loop:
    training = set_up_loop(full_model.build(TINY, CPU), recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(training.model):  # new adapters add nothing
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return training


def loss_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    tokens = torch.arange(32)[None] * 7 % TINY.vocabulary
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    gradients = torch.autograd.grad(loss, trained(model))
    return {"loss": loss.detach()[None], "gradients": torch.cat([gradient.flatten() for gradient in gradients])}


# What is built.


def test_what_is_built_is_what_would_be_loaded(tmp_path):
    torch.manual_seed(0)
    Qwen3MoeForCausalLM._from_config(TINY.config(), dtype=torch.bfloat16).save_pretrained(tmp_path)
    moe_fused.enable()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map={"": CPU}
    )
    built = full_model.build(TINY, CPU)

    def described(model: nn.Module) -> dict[str, tuple]:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {
            name: (type(tensor), tensor.shape, tensor.dtype, tensor.device.type, tensor.requires_grad)
            for name, tensor in tensors.items()
        }

    assert described(built) == described(loaded)
    assert [type(module) for module in built.modules()] == [type(module) for module in loaded.modules()]
    for name in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
        assert getattr(built, name) == getattr(loaded, name)
    assert type(built.hf_quantizer) is type(loaded.hf_quantizer)
    experts, others = (model.model.layers[1].mlp.experts for model in (built, loaded))
    assert type(experts.config) is type(others.config) is PackedConfig
    assert experts.gate_up_proj_format == others.gate_up_proj_format
    assert experts.gate_up_proj_source_dtype == others.gate_up_proj_source_dtype
    assert torch.equal(built.model.rotary_emb.inv_freq, loaded.model.rotary_emb.inv_freq)


def test_bitsandbytes_reads_the_same_bytes():
    experts = full_model.build(TINY, CPU).model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        weights = get_packed(experts, name)
        stack = full_model.as_bitsandbytes(weights)
        assert stack.packed.data_ptr() == weights.packed.data_ptr()
        assert torch.equal(stack.dequantize(), weights.dequantize())
        assert 0.9 * full_model.STD < float(weights.dequantize().float().std()) < 1.1 * full_model.STD


def test_experts_with_scales_of_their_own_are_refused():
    experts = full_model.build(TINY, CPU).model.layers[0].mlp.experts
    weights = get_packed(experts, "down_proj")
    weights.nested_offset.view(torch.float32)[1] += 1
    with pytest.raises(ValueError, match="an offset for each expert"):
        full_model.as_bitsandbytes(weights)


def test_plain_torch_trains_the_same_model():
    ours = loss_and_gradients(tiny_training().model)
    composed = tiny_training()
    full_model.run_composed(composed.model)
    others = loss_and_gradients(composed.model)
    compare("composed", others, ours, row_tolerance=0.05, tolerance=0.05)
    assert not torch.equal(others["gradients"], ours["gradients"]), "both ran in the kernel"


@pytest.mark.parametrize("recompute", ["layers", "selective"])
def test_recomputation_changes_no_gradient(recompute):
    training = tiny_training(Recipe(recompute=recompute))
    full_model.run_fused(recompute=recompute == "selective")
    got = loss_and_gradients(training.model)
    plain = tiny_training()
    plain.model.gradient_checkpointing_disable()
    want = loss_and_gradients(plain.model)
    assert torch.equal(got["loss"], want["loss"])
    compare(recompute, got, want)


# What is counted.


def test_parameters_of_the_real_model():
    # 3.35 B of Qwen3-30B-A3B are active, of which the embedding, 0.31 B, multiplies nothing.
    assert QWEN3_30B.multiplied_parameters / 1e9 == pytest.approx(3.35 - 0.311, abs=0.01)
    operations = finetune_30b.model_flops(QWEN3_30B, 4096)
    assert operations > 4 * 3.03e9 * 4096
    whole, ours = (finetune_30b.recomputed_flops(QWEN3_30B, 4096, down=down) for down in (True, False))
    assert whole < operations / 2
    assert (whole - ours) / (2 * 4096) / 1e9 == pytest.approx(0.604, abs=0.001)  # a third of the chosen experts' 1.81 B


def test_flops_of_attention():
    heads, features, tokens = TINY.heads, TINY.head_dim, 10
    pairs = sum(range(1, tokens + 1))
    assert TINY.attention_flops(tokens) == TINY.layers * heads * pairs * 2 * (2 * features)


def test_multiplied_parameters_are_those_of_the_modules():
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(TINY.config())
    idle = 1 - TINY.experts.top_k / TINY.experts.experts
    counted = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            counted += parameter.numel()
        elif parameter.dim() == 3:
            counted += parameter.numel() * (1 - idle)
    assert counted == TINY.multiplied_parameters


# Where the time goes.


def event(category: str, name: str, start: float, duration: float, thread: int = 1, correlation: int | None = None):
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"cat": category, "name": name, "ts": start, "dur": duration, "tid": thread, "args": arguments}


def test_kernels_count_for_the_range_that_launched_them():
    events = [
        event("user_annotation", "step: other", 0, 100),
        event("user_annotation", "step: experts", 10, 20),
        event("user_annotation", "step: attention", 15, 5),
        event("user_annotation", "somebody else's", 11, 80),
        # A range of another thread, at the same time.
        event("user_annotation", "step: loss", 0, 100, thread=2),
        event("cuda_runtime", "cudaLaunchKernel", 12, 1, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 17, 1, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 25, 1, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 17, 1, thread=2, correlation=4),
        event("cuda_runtime", "cudaLaunchKernel", 50, 1, correlation=5),
        event("cuda_runtime", "cudaLaunchKernel", 150, 1, correlation=6),
        event("kernel", "a", 1000, 1000, thread=7, correlation=1),
        event("kernel", "b", 2000, 2000, thread=7, correlation=2),
        event("kernel", "a", 4000, 4000, thread=7, correlation=3),
        event("gpu_memset", "c", 9000, 8000, thread=7, correlation=4),
        event("kernel", "d", 16000, 16000, thread=7, correlation=5),  # for 1000 µs beside the one before
        event("kernel", "d", 40000, 32000, thread=7, correlation=6),
    ]
    times = step_trace.time_by_part(events)
    assert times == {"experts": 5.0, "attention": 2.0, "loss": 8.0, "optimizer": 0.0, "other": 48.0}
    assert step_trace.busy_ms(events) == 7 + 23 + 32
    assert step_trace.wall_ms(events) == 72.0 - 0.012
    assert next(iter(step_trace.time_by_kernel(events).items())) == ("d", (48.0, 2))


def test_ranges_hold_what_a_part_does_in_every_pass():
    """Every pass of a part is inside its range.

    Operators tell the parts apart: only the composed experts, attention and the loss use theirs.
    """
    loop = tiny_training()
    full_model.run_composed(loop.model)
    tokens = torch.arange(32)[None] * 7 % TINY.vocabulary
    with step_trace.parts(loop.model, loop.optimizer), step_trace.tracing(CPU, ranges=True) as events:
        loop.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        loop.optimizer.step()
    annotations = [
        event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith("step: ")
    ]
    counts = {
        part: sum(annotation["name"] == f"step: {part}" for annotation in annotations) for part in step_trace.PARTS
    }
    # Forward, recomputation, backward.
    assert (counts["experts"], counts["attention"]) == (3 * TINY.layers, 3 * TINY.layers)
    assert (counts["loss"], counts["optimizer"]) == (2, 1)
    ranges = sorted(
        (annotation["ts"], annotation["ts"] + annotation["dur"], annotation["name"].removeprefix("step: "))
        for annotation in annotations
    )
    found: dict[str, set[str]] = {}
    runs: dict[str, int] = {}
    for event in events:
        for name, part in (("_grouped_mm", "experts"), ("scaled_dot_product", "attention"), ("log_softmax", "loss")):
            if event.get("cat") == "cpu_op" and event["name"].startswith(f"aten::{name}"):
                found.setdefault(part, set()).add(step_trace._innermost(ranges, event["ts"]))
                runs[part] = runs.get(part, 0) + 1
    assert found == {"experts": {"experts"}, "attention": {"attention"}, "loss": {"loss"}}
    # There are two stacks and two pairs of factors, so six products in the forward and six in its recomputation. The
    # backward has six for the gradient of the rows and four for the factors.
    assert runs["experts"] == TINY.layers * (6 + 6 + 6 + 4)
    assert min(step_trace.time_by_part(events).values()) > 0
    for module in (loop.model, loop.model.model, *loop.model.model.layers):
        assert "forward" not in vars(module)
    assert "step" not in vars(loop.optimizer)


def test_ranges_change_no_gradient():
    loop = tiny_training()
    want = loss_and_gradients(loop.model)
    with step_trace.parts(loop.model, loop.optimizer):
        got = loss_and_gradients(loop.model)
    assert torch.equal(got["gradients"], want["gradients"])


# What is measured.


def test_a_loss_that_is_not_finite_is_an_error(monkeypatch):
    loop = tiny_training()
    monkeypatch.setattr(loop, "_backward", lambda tokens: torch.tensor(float("nan")))
    loop.has_parts = False
    monkeypatch.setattr(step_trace, "wall_ms", lambda events: 1.0)
    with pytest.raises(FloatingPointError, match="losses must be finite"):
        measure(loop, 8, TINY.vocabulary, 0, steps=1, seed=0)


def test_a_broken_off_step_leaves_no_ranges():
    loop = tiny_training()

    def fail(tokens):
        raise torch.OutOfMemoryError("no memory")

    meter = Meter(CPU, 0, steps=0, has_parts=True)
    loop.train(torch.zeros(2, 8, dtype=torch.int64), meter)
    loop._backward = fail
    with pytest.raises(torch.OutOfMemoryError):
        loop.train(torch.zeros(1, 8, dtype=torch.int64), meter)
    meter.close()
    assert "forward" not in vars(loop.model)


@pytest.mark.parametrize("trainer", finetune_30b.TRAINERS)
def test_whole_run(tmp_path, trainer):
    if trainer == "finetune":
        pytest.importorskip("trl")
    output = tmp_path / "rows.json"
    result = run(*SMOKE, "--trainer", trainer, "--output", str(output))
    assert result.exit_code == 0, result.output
    rows = read_rows(output)
    assert [(row.implementation, row.tokens, row.phase, row.weights) for row in rows] == [
        ("moe_fused", 16, "train_step", "nf4"),
        ("moe_fused_eager", 16, "train_step", "nf4"),
        ("composed", 16, "train_step", "nf4"),
    ]
    assert "| a training step, ms | T=16 |" in render(rows)
    for row in rows:
        assert row.point == rows[0].point
        assert row.lora_rank == 8
        assert row.details["tokens_per_second"] == pytest.approx(16e3 / row.ms, rel=1e-3)
        assert row.details["hfu"] > row.details["mfu"]
        assert all(row.details[f"{part}_ms"] > 0 for part in step_trace.PARTS)
        assert 5.5 < row.details["loss"] < 7.5  # the logarithm of 512 is 6.2
    assert ("predicted_mib" in rows[0].details) == (trainer == "finetune")
    assert "2 layers built" in result.stdout


def test_models_that_differ_are_noticed(monkeypatch):
    right = full_model.composed_forward

    def wrong(*arguments):
        forward = right(*arguments)
        return lambda *inputs, **adapters: 30 * forward(*inputs, **adapters)

    monkeypatch.setattr(full_model, "composed_forward", wrong)
    result = run(*SMOKE, "--trainer", "loop")
    assert result.exit_code == 1
    assert "Implementations disagree: 16 tokens: loss" in result.stderr


def test_the_eager_run_records_no_graphs():
    """It is ours in everything else, so the two differ in who launches the kernels."""
    recipes = {}
    bench = finetune_30b.Bench(
        finetune_30b.TINY, CPU, Ceilings(1e12, 1e12), Recipe(cuda_graphs=True), 0.0, 1, 0,
        lambda model, recipe: recipes.setdefault(len(recipes), recipe), Console(quiet=True),
    )  # fmt: skip
    for name in ("moe_fused", "moe_fused_eager"):
        bench.run(name, (), lambda row: None)
    assert [recipe.cuda_graphs for recipe in recipes.values()] == [True, False]
    assert dataclasses.replace(recipes[1], cuda_graphs=True) == recipes[0]


def test_no_memory_is_a_row(monkeypatch, tmp_path):
    def measure(training, length, *_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(finetune_30b, "measure", measure)
    output = tmp_path / "rows.json"
    assert run(*SMOKE, "--trainer", "loop", "--output", str(output)).exit_code == 0
    assert [(row.ms, row.tflops, row.peak_mib, row.details) for row in read_rows(output)] == [
        (None, None, None, {})
    ] * len(finetune_30b.DEFAULT_IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cpu"), "give --quick"),
        (("--implementation", "nobody"), "is none of moe_fused, moe_fused_eager, composed, peft"),
        (("--recompute", "selective"), "needs loop"),
        (("--trainer", "nobody"), "is none of finetune, loop"),
    ],
)
def test_wrong_options(options, message):
    result = run(*options)
    assert result.exit_code == 2
    assert message in unboxed(result.stderr)


def test_no_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--trainer", "loop")
    assert result.exit_code == 2
    assert "`--device cpu --quick` smoke-tests" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_details_of_rows(tmp_path, make_row):
    row = make_row(details={"mfu": 0.4, "steps": 3})
    path = tmp_path / "rows.json"
    write_rows(path, [row, make_row()])
    assert read_rows(path) == [row, make_row()]
    assert path.read_text().count("details") == 1
    with pytest.raises(ValueError, match="details of a benchmark row must be an object of numbers"):
        row_from_json({**dataclasses.asdict(make_row()), "details": {"mfu": "much"}})
