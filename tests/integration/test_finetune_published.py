"""Commands over experts in mxfp4 and nvfp4: fine-tuning, generating, merging, quantizing, and what the plan counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Mxfp4Config

pytest.importorskip("trl")
pytest.importorskip("datasets")

import moe_fused
from moe_fused import memory
from moe_fused.memory import Workload, predict, sizes_of
from moe_fused.quantized import PUBLISHED

from .cli import Command, save_tokenizer
from .four_bit import build, packed, same_bits
from .models import QWEN3_MOE
from .published import GPT_OSS, compressed_checkpoint, gpt_oss_checkpoint, tensors_of

STEPS = ("--max-steps", "2", "--learning-rate", "0.01", "--dtype", "float32", "--packing", "none")
E8M0 = torch.float8_e8m0fnu
WORDS = {"vocab_size": 64, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"w7 w{8 + row} w9 w10 w11"}) + "\n" for row in range(6)))
    return path


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = gpt_oss_checkpoint(tmp_path_factory.mktemp("gpt_oss"), **WORDS)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = compressed_checkpoint(tmp_path_factory.mktemp("nvfp4"), "nvfp4", QWEN3_MOE, activations=True, **WORDS)
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    build(QWEN3_MOE, **WORDS).save_pretrained(path)
    save_tokenizer(path)
    return path


def dequantized(path: Path, target: Path) -> Path:
    """Saves what ``moe_fused`` dequantizes a checkpoint to."""
    moe_fused.enable()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).dequantize()
    model.save_pretrained(target)
    save_tokenizer(target)
    return target


@pytest.mark.parametrize("name", ["gpt_oss", "nvfp4"])
def test_trains_as_the_dequantized_model_does(
    name: str, request: pytest.FixtureRequest, command: Command, rows: Path, tmp_path: Path
) -> None:
    """The adapters are those of the dense model, generate reads them, and merge gives the same weights."""
    model: Path = request.getfixturevalue(name)
    base = dequantized(model, tmp_path / "base")
    adapters = []
    for source, options in ((model, ()), (base, ("--quantization", "none"))):
        output = tmp_path / f"adapter-{len(adapters)}"
        ended = command("finetune", "--model", source, "--dataset", rows, "--output", output, *STEPS, *options)
        assert ended.status == 0, ended
        adapters.append(tensors_of(output, "adapter_model.safetensors"))
    assert adapters[0].keys() == adapters[1].keys()
    for key in adapters[0]:
        torch.testing.assert_close(adapters[0][key], adapters[1][key], rtol=1e-2, atol=2e-4)
    adapter = tmp_path / "adapter-0"
    options = ("--adapter", adapter, "--prompt", "w7 w8", "--max-new-tokens", "2", "--device", "cpu")
    assert command("generate", model, *options).status == 0
    merged = []
    for source, more in ((model, ()), (base, ("--allow-other-base",))):
        target = tmp_path / f"merged-{len(merged)}"
        ended = command("merge", source, adapter, target, "--dtype", "float32", *more)
        assert ended.status == 0, ended
        assert "quantization_config" not in json.loads((target / "config.json").read_text(encoding="utf-8"))
        merged.append(tensors_of(target))
    assert merged[0].keys() == merged[1].keys()
    for key in merged[0]:
        if ".experts." in key:
            assert same_bits(merged[0][key], merged[1][key]), key
        else:  # linear layers are dequantized to the dtype of the model, bf16, first
            torch.testing.assert_close(merged[0][key], merged[1][key], rtol=5e-3, atol=5e-4)


def test_a_dense_checkpoint_is_trained_in_mxfp4(command: Command, dense: Path, rows: Path, tmp_path: Path) -> None:
    """It trains as the checkpoint does that quantize makes, and the card says how to load the model."""
    made = tmp_path / "mxfp4"
    assert command("quantize", dense, made, "--format", "mxfp4", "--dtype", "float32", "--device", "cpu").status == 0
    adapters = []
    for source, options in ((dense, ("--quantization", "mxfp4")), (made, ())):
        output = tmp_path / f"adapter-{len(adapters)}"
        ended = command("finetune", "--model", source, "--dataset", rows, "--output", output, *STEPS, *options)
        assert ended.status == 0, ended
        adapters.append(tensors_of(output, "adapter_model.safetensors"))
    assert all(same_bits(adapters[0][key], adapters[1][key]) for key in adapters[0])
    cards = [(tmp_path / f"adapter-{index}" / "README.md").read_text(encoding="utf-8") for index in range(2)]
    assert 'quantization = moe_fused.quantization_config("mxfp4")' in cards[0]
    assert "quantization" not in cards[1].partition("from_pretrained(")[2].partition(")")[0]


@pytest.mark.parametrize("quant_type", PUBLISHED)
def test_quantize_writes_what_loads(quant_type: str, command: Command, dense: Path, tmp_path: Path) -> None:
    made = tmp_path / quant_type
    ended = command("quantize", dense, made, "--format", quant_type, "--dtype", "bfloat16", "--device", "cpu")
    assert ended.status == 0, ended
    moe_fused.enable()
    model = AutoModelForCausalLM.from_pretrained(made)
    expected = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.bfloat16, quantization_config=moe_fused.quantization_config(quant_type)
    )
    assert {weights.format.quant_type for weights in packed(model).values()} == {quant_type}
    state, other = model.state_dict(), expected.state_dict()
    assert all(same_bits(state[key], other[key]) for key in other)


def test_quantize_writes_gpt_oss_as_it_is_published(command: Command, gpt_oss: Path, tmp_path: Path) -> None:
    """What was mxfp4 before it was dequantized gets the same bytes again."""
    base = dequantized(gpt_oss, tmp_path / "base")
    ended = command("quantize", base, tmp_path / "again", "--format", "mxfp4", "--device", "cpu")
    assert ended.status == 0, ended
    before, after = tensors_of(gpt_oss), tensors_of(tmp_path / "again")
    for key in before:
        if key.endswith("_blocks"):
            ours, theirs = (_dense(tensors, key) for tensors in (after, before))
            assert torch.equal(ours, theirs), key
    ended = command("quantize", base, tmp_path / "other", "--format", "nvfp4", "--device", "cpu")
    assert ended.error.endswith(
        "cannot be saved in nvfp4: its checkpoints have no matrix for each expert; use --format mxfp4"
    )


def test_what_gpt_oss_has_no_names_for(command: Command, gpt_oss: Path, rows: Path, tmp_path: Path) -> None:
    """finetune refuses a format in which the base could not be written, and quantize names the layout that it writes."""
    base = dequantized(gpt_oss, tmp_path / "base")
    arguments = (
        "finetune",
        "--model",
        base,
        "--dataset",
        rows,
        "--output",
        tmp_path / "new",
        "--quantization",
        "nvfp4",
    )
    for options in ((), ("--dry-run",)):
        ended = command(*arguments, *options)
        assert ended.status != 0
        assert "--quantization nvfp4 is not possible" in ended.error
        assert ended.error.endswith("no matrix for each expert; use --quantization mxfp4")
    assert not (tmp_path / "new").exists()
    for options in ((), ("--layout", "per-expert")):
        ended = command("quantize", base, tmp_path / "nf4", "--device", "cpu", "--dry-run", *options)
        assert ended.status == 0, ended
        assert "in nf4, experts fused" in ended.stdout


def _dense(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weight: torch.Tensor = convert_moe_packed_tensors(tensors[key], tensors[key.replace("_blocks", "_scales")])
    return weight


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--quantization", "nf4"), "--quantization has no effect: --model {} is in 4 bits already, as mxfp4"),
        (("--quantization", "none"), "--quantization has no effect: --model {} is in 4 bits already, as mxfp4"),
    ],
    ids=" ".join,
)
def test_another_format_than_the_checkpoints_is_refused(
    options: tuple[str, ...], says: str, command: Command, gpt_oss: Path, rows: Path, tmp_path: Path
) -> None:
    ended = command("finetune", "--model", gpt_oss, "--dataset", rows, "--output", tmp_path / "new", *options)
    assert says.format(gpt_oss) in ended.error
    assert f"`moe-fused convert model {gpt_oss} DENSE --to fused --dequantize`, and quantize that" in ended.error
    assert not (tmp_path / "new").exists()


def test_quantize_names_what_changes_the_format(command: Command, gpt_oss: Path, tmp_path: Path) -> None:
    ended = command("quantize", gpt_oss, tmp_path / "new", "--format", "nf4")
    assert "is quantized already; `moe-fused convert model` changes its layout; for another format" in ended.error
    assert f"`moe-fused convert model {gpt_oss} DENSE --to fused --dequantize`, and quantize that" in ended.error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--format", "mxfp4", "--layout", "fused"),
            "--layout has no effect on mxfp4: leave it out; stacks are made by",
        ),
        (("--format", "nvfp4", "--no-double-quant"), "--double-quant has no effect on nvfp4: leave it out"),
        (("--format", "nf4", "--quant-type", "fp4"), "--format must be given once, got nf4 and fp4"),
        (("--format", "fused", "--layout", "per-expert"), "--layout must be given once, got fused and per-expert"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_of_quantize_that_do_not_fit(
    arguments: tuple[str, ...], says: str, command: Command, dense: Path, tmp_path: Path
) -> None:
    assert says in command("quantize", dense, tmp_path / "new", *arguments).error


def test_a_broken_checkpoint_is_refused_before_it_is_loaded(
    command: Command, nvfp4: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    from .broken import refuse_loading

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in nvfp4.iterdir():
        if path.is_file():
            (broken / path.name).write_bytes(path.read_bytes())
    refuse_loading(monkeypatch)
    for key, change in (
        ("model.layers.1.mlp.experts.3.up_proj.weight_scale", None),
        ("model.layers.0.self_attn.k_proj.weight_global_scale", None),
        ("model.layers.0.mlp.experts.0.down_proj.weight_packed", lambda value: value[:, 1:].clone()),
        ("model.layers.0.self_attn.q_proj.weight_scale", lambda value: value.float()),
        ("model.layers.0.mlp.experts.1.up_proj.weight_scale", lambda value: value.view(torch.uint8).view(E8M0)),
    ):
        tensors = tensors_of(nvfp4)
        value = tensors.pop(key)
        if change is not None:
            tensors[key] = change(value)
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        ended = command("finetune", "--model", broken, "--dataset", rows, "--output", tmp_path / "new", *STEPS)
        assert f"{key} " in ended.error, ended
        assert ("is missing" if change is None else "must be") in ended.error


def test_the_plan_counts_the_bytes_of_the_checkpoint() -> None:
    """0.53 bytes a weight in mxfp4, 0.56 in nvfp4, and linear layers as they are."""
    with torch.device("meta"):
        model = build(GPT_OSS, hidden_size=256, intermediate_size=256)
    sizes = sizes_of(model)
    weights = sum(stack.numel for stack in sizes.stacks)
    parts = {
        quant_type: predict(sizes, Workload(quant_type=quant_type, length=64, gpu=True)).parts
        for quant_type in ("nf4", *PUBLISHED)
    }
    assert parts["mxfp4"]["experts"] / weights == pytest.approx(0.5 + 1 / 32)
    assert parts["nvfp4"]["experts"] / weights == pytest.approx(0.5 + 1 / 16, rel=1e-3)
    assert parts["mxfp4"]["other weights"] == parts["nvfp4"]["other weights"] > parts["nf4"]["other weights"]
    # Its stacks are transposed in bitsandbytes' formats alone, which then need the workspace for any number of rows.
    workspaces = {
        quant_type: memory._experts(sizes, Workload(quant_type=quant_type, length=64, gpu=True))[2]
        for quant_type in parts
    }
    assert workspaces["nf4"] > 0 == workspaces["mxfp4"] == workspaces["nvfp4"]
    dense = predict(sizes, Workload(quantized=False, length=64)).parts
    assert dense["other weights"] == parts["mxfp4"]["other weights"]
    held = replace(sizes, stacks=tuple(replace(stack, in_rows=()) for stack in sizes.stacks))
    assert predict(held, Workload(quant_type="mxfp4", length=64)).parts["experts"] == dense["experts"]


@pytest.mark.parametrize("quant_type", PUBLISHED)
def test_the_plan_is_what_the_model_holds(quant_type: str, tmp_path: Path) -> None:
    model = build(QWEN3_MOE)
    model.save_pretrained(tmp_path)
    moe_fused.enable()
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=moe_fused.quantization_config(quant_type)
    )
    parts = predict(sizes_of(model), Workload(quant_type=quant_type, length=16, gpu=False)).parts
    held = sum(value.nbytes for weights in packed(loaded).values() for value in weights.tensors().values())
    assert parts["experts"] == held
    assert parts["other weights"] == sum(value.nbytes for value in loaded.parameters()) - held


def test_stock_transformers_dequantizes_what_quantize_writes(command: Command, gpt_oss: Path, tmp_path: Path) -> None:
    base = dequantized(gpt_oss, tmp_path / "base")
    assert command("quantize", base, tmp_path / "mxfp4", "--format", "mxfp4", "--device", "cpu").status == 0
    moe_fused.disable()
    model: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mxfp4", quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    expected: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    state = expected.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def in_nf4_but_for(module: str, dense: Path) -> Any:
    """A Qwen3-MoE in nf4 with one module dense, loaded from the dense model that is saved in ``dense``."""
    build(QWEN3_MOE).save_pretrained(dense)
    skipped = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", module],
    )
    options: Any = {"quantization_config": skipped, "device_map": {"": "cpu"}}
    return AutoModelForCausalLM.from_pretrained(dense, **options)


@pytest.mark.parametrize("quant_type", ["nvfp4", "nf4"])
def test_the_plan_counts_experts_that_the_checkpoint_has_dense(quant_type: str, tmp_path: Path) -> None:
    """As they are loaded: those of one layer are in 4 bits, and those of the other are dense."""
    from moe_fused.finetune.options import Options
    from moe_fused.finetune.plan import plan_run
    from moe_fused.finetune.precheck import Process
    from moe_fused.finetune.resolve import set_up

    moe_fused.enable()
    path = tmp_path / "model"
    if quant_type == "nvfp4":
        compressed_checkpoint(path, quant_type, QWEN3_MOE, only=lambda key: "layers.0.mlp.experts" in key)
    else:
        in_nf4_but_for("model.layers.1.mlp.experts", tmp_path / "dense").save_pretrained(path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map={"": "cpu"})
    assert len(packed(loaded)) == 2
    tensors = [value for name, value in loaded.state_dict(keep_vars=True).items() if ".mlp.experts." in name]
    options = Options(model=str(path), dtype="float32")
    setup = set_up(options, loaded.config, torch.device("cpu"))
    assert setup.dense.experts == {f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down")}
    experts = plan_run(setup, plain_text=False).prediction.parts["experts"]
    # The table of 16 values and the like are not counted.
    assert experts == pytest.approx(sum(value.nbytes for value in tensors), rel=5e-3)
    with pytest.raises(ValueError, match=r"--shard: .* model\.layers\.1\.mlp\.experts\.down_proj is dense in --model"):
        set_up(replace(options, shard=True), loaded.config, torch.device("cpu"), Process(0, 0, 2, 2))


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_the_plan_counts_linear_layers_that_the_checkpoint_has_dense(layout: Any, tmp_path: Path) -> None:
    """As they are loaded, and they may be trained in full, which those in 4 bits cannot be."""
    from moe_fused.finetune.options import Options
    from moe_fused.finetune.plan import plan_run
    from moe_fused.finetune.resolve import set_up

    moe_fused.enable()
    path = tmp_path / "model"
    made = in_nf4_but_for("model.layers.1.self_attn", tmp_path / "dense")
    moe_fused.save_format(made, layout)
    made.save_pretrained(path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map={"": "cpu"})
    attention = [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"]
    assert all(type(loaded.get_submodule(name)) is torch.nn.Linear for name in attention)
    run = Options(model=str(path), dtype="float32", modules_to_save=("layers.1.self_attn.q_proj",))
    setup = set_up(run, loaded.config, torch.device("cpu"))
    assert setup.dense.linears == {*attention}
    assert not setup.dense.experts
    parts = plan_run(replace(setup, whole=type(setup.whole)()), plain_text=False).prediction.parts
    others = {id(value): value for name, value in loaded.named_parameters() if ".mlp.experts." not in name}
    held = sum(value.nbytes for value in others.values())
    # A 4-bit matrix has scales and tables beside it.
    states = [value.quant_state for value in others.values() if hasattr(value, "quant_state")]
    held += sum(
        each.nbytes
        for state in states
        for each in (state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
    )
    assert len(states) == 4
    assert parts["other weights"] == pytest.approx(held, rel=1e-3)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is in 4 bits and cannot be trained in full"):
        set_up(replace(run, modules_to_save=("layers.0.self_attn.q_proj",)), loaded.config, torch.device("cpu"))


@pytest.mark.parametrize("layout", ["per_expert", "fused", "linear layers alone"])
def test_tensors_of_bitsandbytes_under_another_config_are_refused_in_a_dry_run(
    layout: str, command: Command, nvfp4: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .broken import refuse_loading

    moe_fused.enable()
    path, model = tmp_path / "model", build(QWEN3_MOE, **WORDS)
    model.save_pretrained(tmp_path / "dense")
    skipped = ["lm_head", "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=skipped if layout == "linear layers alone" else ["lm_head"]
    )
    options: Any = {"quantization_config": quantization, "device_map": {"": "cpu"}}
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options)
    if layout != "linear layers alone":
        moe_fused.save_format(made, "fused" if layout == "fused" else "per_expert")
    made.save_pretrained(path)
    save_tokenizer(path)
    (path / "config.json").write_bytes((nvfp4 / "config.json").read_bytes())
    refuse_loading(monkeypatch)
    says = (
        "belongs to 4-bit weights of bitsandbytes, but config.json has the quantization_config of compressed-tensors in"
    )
    arguments = ("--dataset", rows, "--output", tmp_path / "new", "--dry-run")
    ended = command("finetune", "--model", path, *arguments)
    assert f"{says} nvfp4" in ended.error, ended
    assert f"{says} nvfp4" in command("generate", path, "--prompt", "w7").error


def test_quantize_says_as_what_it_writes_the_experts(command: Command, dense: Path, tmp_path: Path) -> None:
    build(GPT_OSS, **WORDS).save_pretrained(tmp_path / "gpt-oss")
    for source, says in ((dense, "compressed-tensors files"), (tmp_path / "gpt-oss", "mxfp4 stacks (gpt-oss)")):
        ended = command("quantize", source, tmp_path / "new", "--format", "mxfp4", "--dry-run")
        assert f"in mxfp4, experts as {says}\n" in ended.stdout, ended
