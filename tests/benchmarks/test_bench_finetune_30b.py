"""The benchmark of whole models on a CPU: what it builds, what it counts, and that time goes where it is said to go."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM
from typer.testing import CliRunner

import moe_fused
from benchmarks import finetune_30b, full_model, step_trace
from benchmarks.finetune_30b import QWEN3_30B, TINY
from benchmarks.model import Model, composed_refusal
from benchmarks.models import BY_NAME, DIRECTORY, MODELS
from benchmarks.rows import read_rows, row_from_json, write_rows
from benchmarks.table import render
from benchmarks.training import Loop, Meter, Recipe, measure, set_up_loop, trained
from moe_fused.benchmark.harness import compare
from moe_fused.benchmark.layers import Ceilings
from moe_fused.integrations.quantizer.configs import config_for
from moe_fused.integrations.quantizer.packed_experts import PackedConfig, get_packed, packed_modules
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


# The first model of each.
ARCHITECTURES = tuple({model.config().model_type: model.name for model in reversed(MODELS)}.values())


def described(model: nn.Module) -> dict[str, tuple]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: (type(tensor), tensor.shape, tensor.dtype, tensor.device.type, tensor.requires_grad)
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("name", "quant_type"),
    [*((name, "nf4") for name in ARCHITECTURES), ("gpt-oss-20b", "mxfp4"), ("qwen3-30b-a3b", "nvfp4")],
)
def test_what_is_built_is_what_would_be_loaded(tmp_path, name, quant_type):
    """Models of all architectures have their biases, buffers and tied weights; what is not drawn has the same values."""
    model = Model(name, BY_NAME[name].config()).tiny()
    torch.manual_seed(0)
    with torch.no_grad():
        made = AutoModelForCausalLM.from_config(model.config(), dtype=torch.bfloat16)
    made.save_pretrained(tmp_path)
    moe_fused.enable()
    config = config_for(quant_type, made, torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map={"": CPU}
    )
    built = full_model.build(model, CPU, quant_type=quant_type)
    assert described(built) == described(loaded)
    assert [type(module) for module in built.modules()] == [type(module) for module in loaded.modules()]
    for attribute in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
        assert getattr(built, attribute, None) == getattr(loaded, attribute, None)
    assert type(built.hf_quantizer) is type(loaded.hf_quantizer)
    assert built.config._attn_implementation == loaded.config._attn_implementation
    others, ids = dict(packed_modules(loaded)), set()
    for path, experts in packed_modules(built):
        assert type(experts.config) is type(others[path].config) is PackedConfig
        assert experts.is_transposed == others[path].is_transposed
        for stack in ("gate_up_proj", "down_proj"):
            for kind in ("format", "source_dtype"):
                assert getattr(experts, f"{stack}_{kind}") == getattr(others[path], f"{stack}_{kind}")
            ids.add(getattr(experts, stack).data_ptr())
    assert len(ids) == 2 * len(others) > 0
    values = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    for path, value in [*built.named_parameters(), *built.named_buffers()]:
        if value.dim() == 1 and not path.endswith(("A_log", "sinks", "gate.bias", "router.bias")):  # these are random
            assert torch.equal(value, values[path]), path
    head, embedding = built.get_output_embeddings().weight, built.get_input_embeddings().weight
    assert (head is embedding) == bool(model.published.get_text_config().tie_word_embeddings)


def test_stacks_that_are_no_single_matrix(tmp_path):
    """Scales of gpt-oss's experts are apart only if its matrices are quantized one by one."""
    config = Model("m", BY_NAME["gpt-oss-20b"].config()).tiny().config()
    config.hidden_size, config.intermediate_size = 64, 96
    model = Model("m", config)
    experts = full_model.build(model, CPU).model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        weights = get_packed(experts, name)
        offsets = weights.nested_offset.view(torch.float32).flatten()
        assert len(offsets.unique()) == 4
        assert 0.9 * full_model.STD < float(weights.dequantize().float().std()) < 1.1 * full_model.STD
        with pytest.raises(ValueError, match="an offset for each expert"):
            full_model.as_bitsandbytes(weights)


def test_published_formats_are_trained(tmp_path):
    """A step over mxfp4 experts in the kernel has about the loss of one over stock experts in bf16."""
    output = tmp_path / "rows.json"
    options = (
        "--model",
        "gpt-oss-20b",
        "--weights",
        "mxfp4",
        "--implementation",
        "moe_fused",
        "--implementation",
        "peft",
    )
    result = run(*SMOKE, *options, "--output", str(output))
    assert result.exit_code == 0, unboxed(result.output)
    rows = {row.implementation: row for row in read_rows(output)}
    assert {name: row.weights for name, row in rows.items()} == {"moe_fused": "mxfp4", "peft": "bf16"}
    losses = [row.details["loss"] for row in rows.values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_experts_that_plain_torch_has():
    said = {name: composed_refusal(Model(name, BY_NAME[name].config())) for name in ARCHITECTURES}
    assert [name for name, reason in said.items() if reason is not None] == ["gpt-oss-20b"]
    huge = composed_refusal(Model("m", BY_NAME["qwen3.5-397b-a17b"].config()))
    assert huge == "a stack of Qwen3_5MoeExperts cannot be one matrix of bitsandbytes"


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
    heads, features, tokens = 4, 32, 10
    pairs = sum(range(1, tokens + 1))
    assert TINY.attention_flops(tokens) == TINY.layers * heads * pairs * 2 * (2 * features)


def test_multiplied_parameters_are_those_of_the_modules():
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(TINY.config())
    idle = 1 - 2 / 4
    counted = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            counted += parameter.numel()
        elif parameter.dim() == 3:
            counted += parameter.numel() * (1 - idle)
    assert counted == TINY.multiplied_parameters


def test_flops_of_sliding_windows_and_recurrent_layers():
    gpt_oss = Model("m", BY_NAME["gpt-oss-20b"].config()).tiny()
    pairs = [min(i, 16) for i in range(1, 41)]  # one layer has a window of 16 tokens, one sees all
    assert gpt_oss.attention_flops(40) == 4 * 2 * 2 * 32 * (sum(pairs) + sum(range(1, 41)))
    qwen = Model("m", BY_NAME["qwen3.5-35b-a3b"].config()).tiny()
    assert qwen.attention_flops(40) == 4 * 2 * 2 * 32 * sum(range(1, 41)) + 3 * 2 * 4 * 32 * 32 * 40
    granite = Model("m", BY_NAME["granite-4.0-h-tiny"].config()).tiny()
    assert granite.attention_flops(40) == 4 * 2 * 2 * 32 * sum(range(1, 41)) + 2 * 2 * 4 * 64 * 16 * 40
    latent = Model("m", BY_NAME["deepseek-v2-lite"].config()).tiny()
    assert latent.attention_flops(40) == 2 * 4 * 2 * (16 + 16 + 16) * sum(range(1, 41))
    text = granite.published
    text.layer_types = ["conv", "full_attention"]
    with pytest.raises(ValueError, match="layers of type conv, whose operations are not counted"):
        granite.attention_flops(40)


def test_short_models_have_the_first_layers():
    model = Model("gpt-oss-20b", BY_NAME["gpt-oss-20b"].config())
    short = model.shortened(3)
    assert (short.name, short.layers) == ("gpt-oss-20b-3-layers", 3)
    assert short.published.layer_types == model.published.layer_types[:3]
    assert len(short.skeleton.model.layers) == 3
    assert model.layers == 24


def units(number: str) -> float:
    """One unit of the last digit of a number."""
    return 10.0 ** -len(number.partition(".")[2])


@pytest.mark.parametrize("published", MODELS, ids=lambda published: published.name)
def test_parameters_are_those_that_were_published(published):
    """Publishers round down or to the nearest, and count the embedding as active or not."""
    model = Model(published.name, published.config())
    total = sum(parameter.numel() for parameter in model.skeleton.parameters()) / 1e9
    assert abs(total - float(published.parameters)) < units(published.parameters)
    active = model.multiplied_parameters / 1e9
    embedding = model.skeleton.get_input_embeddings().weight.numel() / 1e9
    assert min(abs(active + more - float(published.active)) for more in (0, embedding)) < units(published.active)
    assert set(DIRECTORY.glob("*.json")) == {DIRECTORY / f"{other.name}.json" for other in MODELS}


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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name != "qwen3-30b-a3b"]
)
def test_whole_run_of_each_architecture(tmp_path, name):
    """With finetune's trainer and adapters, in all implementations that the model can have."""
    pytest.importorskip("trl")
    output = tmp_path / "rows.json"
    result = run(*SMOKE, "--model", name, "--output", str(output))
    assert result.exit_code == 0, result.output
    expected = ["moe_fused", "moe_fused_eager", "composed"]
    if "gpt-oss" in name:
        expected.remove("composed")
        assert "composed is left out: GptOssExperts has biases" in result.stdout
    rows = read_rows(output)
    assert [row.implementation for row in rows] == expected
    for row in rows:
        assert (row.layer, row.tokens) == (f"{name}-tiny", 16)
        assert all(row.details[f"{part}_ms"] > 0 for part in step_trace.PARTS)
        assert 5.5 < row.details["loss"] < 7.5


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.startswith("granite")])
def test_graphs_are_refused_where_a_run_on_a_gpu_has_none(name):
    """Asked on the architecture alone, for a GPU that is not there."""
    reasons = finetune_30b.refusals(
        Model(name, BY_NAME[name].config()).tiny(), torch.device("cuda"), Recipe(cuda_graphs=True), "finetune"
    )
    without = ("qwen3-next", "qwen3.5")
    assert ("moe_fused_eager" in reasons) == name.startswith(without)


def test_lengths_beyond_the_positions_are_not_run(tmp_path, monkeypatch):
    config = BY_NAME["qwen3-30b-a3b"].config()
    config.max_position_embeddings = 16
    monkeypatch.setattr(finetune_30b, "BY_NAME", {"qwen3-30b-a3b": SimpleNamespace(config=lambda: config)})
    output = tmp_path / "rows.json"
    options = ("--trainer", "loop", "--implementation", "moe_fused")
    result = run(*SMOKE, *options, "--tokens", "32", "--output", str(output))
    assert result.exit_code == 0, result.output
    assert "has positions for 16 tokens: not run are [32]" in result.stdout
    assert [row.tokens for row in read_rows(output)] == [16]


def test_weights_that_do_not_fit_are_rows(tmp_path, monkeypatch):
    def build(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(full_model, "build", build)
    output = tmp_path / "rows.json"
    result = run(*SMOKE, "--trainer", "loop", "--output", str(output))
    assert result.exit_code == 0, result.output
    assert "moe_fused: the weights alone do not fit" in result.stdout
    assert [row.ms for row in read_rows(output)] == [None] * 3


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
        finetune_30b.TINY, CPU, Ceilings(1e12, 1e12), Recipe(cuda_graphs=True), "nf4", 0.0, 1, 0,
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
        (("--model", "gpt-4"), "is none of qwen3-30b-a3b, "),
        (("--model", "gpt-oss-20b", "--trainer", "loop"), "gpt-oss-20b needs finetune"),
        ((*SMOKE, "--model", "gpt-oss-20b", "--implementation", "composed"), "composed: GptOssExperts has biases"),
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
