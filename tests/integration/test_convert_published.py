"""``convert model`` on checkpoints in mxfp4 and nvfp4: dense models of them, and from one published layout into another."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import Mxfp4Config

import moe_fused
from moe_fused.checkpoints.models import Layout, ModelConversionPlan, convert_model

from .cli import Command
from .four_bit import BY_ID, FOUR_BIT, MIXTRAL, build, load, logits, packed, same_bits, same_state
from .models import QWEN3_MOE, STACKED, ModelCase
from .published import GPT_OSS, compressed_checkpoint, gpt_oss_checkpoint, on_the_fly, rewrite
from .saved import config_of, same_tensors, tensors_of
from .test_convert_models_refusals import refuse

pytestmark = pytest.mark.usefixtures("enabled")

EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt_oss_checkpoint(tmp_path_factory.mktemp("gpt_oss") / "model")


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE with linear layers in nvfp4, too, and with scales of activations."""
    return compressed_checkpoint(tmp_path_factory.mktemp("nvfp4") / "model", "nvfp4", QWEN3_MOE, activations=True)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE with linear layers in mxfp4, too, as compressed-tensors has them."""
    return compressed_checkpoint(tmp_path_factory.mktemp("mxfp4") / "model", "mxfp4", QWEN3_MOE)


def quantized(path: Path, case: ModelCase, config: Any) -> Path:
    """A dense checkpoint of which ``from_pretrained`` has quantized the experts."""
    load(path.parent / "dense", case, quantization_config=config, dtype="auto").save_pretrained(path)
    return path


def convert(source: Path, target: Path, layout: Layout, **options: Any) -> ModelConversionPlan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes are in the plan as well
        return convert_model(source, target, layout, **options)


def config_with(path: Path, **quantization: Any) -> dict[str, Any]:
    return config_of(path)["quantization_config"] | quantization


# To dense models.


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as the config says", "fp32"])
@pytest.mark.parametrize("source", ["gpt_oss", "nvfp4", "mxfp4"])
def test_dequantize(source: str, dtype: torch.dtype | None, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The result is what ``from_pretrained`` and ``dequantize`` make of the checkpoint, linear layers included."""
    path, case = request.getfixturevalue(source), GPT_OSS if source == "gpt_oss" else QWEN3_MOE
    options = {} if dtype is None else {"dtype": dtype}
    expected = load(path, case, **options).dequantize()
    layouts: list[Layout] = ["fused"] if case is GPT_OSS else ["per-expert", "fused"]
    for layout in layouts:
        plan = convert(path, tmp_path / layout, layout, dequantize=True, dtype=dtype, max_shard_size="100KB")
        assert plan.experts == (
            "nvfp4 in blocks of 16" if source == "nvfp4" else "mxfp4 in blocks of 32",
            "bfloat16" if dtype is None else "float32",
        )
        assert len(plan.shards) > 1
        assert "quantization_config" not in config_of(tmp_path / layout)
        model = load(tmp_path / layout, case)
        assert model.dtype == expected.dtype
        assert same_state(model, expected)
        assert not packed(model)
        scales = [note for note in plan.notes if "scales of activations (input_global_scale) are left out" in note]
        assert len(scales) == len(plan.notes) == (source == "nvfp4")
    moe_fused.disable()  # the result needs nothing of ours
    loaded: Any = getattr(transformers, case.model).from_pretrained(tmp_path / layouts[0], output_loading_info=True)
    model, info = loaded
    assert not any(info.values())
    assert same_state(model, expected)


@pytest.mark.parametrize(
    "case", [case for case in FOUR_BIT if case.id not in ("gpt_oss", "qwen3_moe")], ids=lambda case: case.id
)
def test_stacks_of_every_family_are_dequantized(case: ModelCase, tmp_path: Path) -> None:
    build(case).save_pretrained(tmp_path / "dense")
    source = quantized(tmp_path / "stacks", case, Mxfp4Config())
    expected = load(source, case).dequantize()
    layout: Layout = "fused" if case.id in STACKED else "per-expert"
    convert(source, tmp_path / layout, layout, dequantize=True)
    assert same_state(load(tmp_path / layout, case), expected)


def test_original_layout_of_a_dequantized_model(nvfp4: Path, tmp_path: Path) -> None:
    convert(nvfp4, tmp_path / "original", "original", dequantize=True)
    convert(nvfp4, tmp_path / "dense", "per-expert", dequantize=True)
    assert config_of(tmp_path / "original")["architectures"] == ["Qwen3MoeFusedForCausalLM"]
    convert(tmp_path / "original", tmp_path / "back", "per-expert")
    assert same_tensors(tmp_path / "back", tmp_path / "dense")


def test_layers_that_transformers_ignores_are_dequantized(tmp_path: Path) -> None:
    """Such as the ones that predict ahead: their shapes are those of their tensors, as the model has no such layers."""
    case = BY_ID["deepseek_v3"]
    source = compressed_checkpoint(tmp_path / "source", "nvfp4", case, only=lambda key: ".experts." in key)
    tensors = tensors_of(source)
    known = "model.layers.1.mlp.experts.0.up_proj."
    extra = {key.replace(".1.", ".61.", 1): value.clone() for key, value in tensors.items() if key.startswith(known)}
    rewrite(source, tmp_path / "more", tensors | extra, config_of(source)["quantization_config"])
    convert(tmp_path / "more", tmp_path / "result", "per-expert", dequantize=True)
    result = tensors_of(tmp_path / "result")
    assert same_bits(result[known.replace(".1.", ".61.", 1) + "weight"], result[f"{known}weight"])
    del extra[known.replace(".1.", ".61.", 1) + "weight_scale"]
    rewrite(source, tmp_path / "less", tensors | extra, config_of(source)["quantization_config"])
    refuse(
        r"layers\.61\.mlp\.experts\.0\.up_proj\.weight_scale is missing",
        tmp_path / "less",
        "per-expert",
        dequantize=True,
    )


# From one published layout into another.


@pytest.mark.parametrize("case", [QWEN3_MOE, MIXTRAL, BY_ID["qwen3_5_moe"]], ids=lambda case: case.id)
def test_mxfp4_there_and_back(case: ModelCase, tmp_path: Path) -> None:
    """The layouts are those that ``save_pretrained`` writes of the same weights, and nothing is lost."""
    build(case).save_pretrained(tmp_path / "dense")
    matrices = quantized(tmp_path / "matrices", case, on_the_fly("mxfp4", case))
    stacks = quantized(tmp_path / "stacks", case, Mxfp4Config())
    there = convert(matrices, tmp_path / "there", "fused", max_shard_size="20KB")
    back = convert(tmp_path / "there", tmp_path / "back", "per-expert", max_shard_size="20KB")
    assert (there.source_layout, there.layout, back.source_layout) == ("per-expert", "fused", "fused")
    assert there.experts == back.experts == ("mxfp4 in blocks of 32",) * 2
    assert len(there.notes) == 1
    assert f"load this {case.model} after moe_fused.enable()" in there.notes[0]
    assert back.notes == ()
    assert len(there.shards) > 1
    assert same_tensors(tmp_path / "there", stacks)
    assert same_tensors(tmp_path / "back", matrices)
    assert config_of(tmp_path / "back") == config_of(matrices)
    assert config_of(tmp_path / "there")["quantization_config"]["quant_method"] == "mxfp4"
    models = [load(path, case) for path in (matrices, tmp_path / "there", tmp_path / "back")]
    assert len(packed(models[1])) == 4
    assert same_state(models[0], models[1])
    assert same_state(models[0], models[2])


def test_linear_layers_become_dense_in_stacks(mxfp4: Path, tmp_path: Path) -> None:
    plan = convert(mxfp4, tmp_path / "stacks", "fused")
    linears = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkvo"}
    assert plan.notes[0].startswith("8 linear layers, as model.layers.0.self_attn.")
    assert "become bfloat16: a checkpoint of quant_method mxfp4 has nothing but experts in 4 bits" in plan.notes[0]
    quantization = config_of(tmp_path / "stacks")["quantization_config"]
    assert linears | {"lm_head", "model.layers.1.mlp.gate"} <= set(quantization["modules_to_not_convert"])
    before, after = load(mxfp4), load(tmp_path / "stacks")
    assert same_state(before, after)
    assert torch.equal(logits(before), logits(after))
    # Back again, the experts have their bytes. The config says that the linear layers stay dense.
    convert(tmp_path / "stacks", tmp_path / "back", "per-expert")
    source, result = tensors_of(mxfp4), tensors_of(tmp_path / "back")
    experts = {key for key in source if ".experts." in key}
    assert {key for key in result if ".experts." in key} == experts
    assert all(same_bits(source[key], result[key]) for key in experts)
    assert linears <= set(config_of(tmp_path / "back")["quantization_config"]["ignore"])


def test_experts_that_are_dense_stay_dense(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "dense")
    source = quantized(
        tmp_path / "stacks", QWEN3_MOE, Mxfp4Config(modules_to_not_convert=["model.layers.0.mlp.experts"])
    )
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in tensors_of(source)  # beside the stacks of the other layer
    plan = convert(source, tmp_path / "matrices", "per-expert")
    assert plan.experts == ("bfloat16 and mxfp4 in blocks of 32",) * 2
    assert r"re:model\.layers\.0\.mlp\.experts\..*" in config_of(tmp_path / "matrices")["quantization_config"]["ignore"]
    convert(tmp_path / "matrices", tmp_path / "back", "fused")
    skipped = config_of(tmp_path / "back")["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.mlp.experts" in skipped
    assert "model.layers.1.mlp.experts" not in skipped
    convert(source, tmp_path / "result", "per-expert", dequantize=True)
    models = [load(path) for path in (source, tmp_path / "matrices", tmp_path / "back")]
    assert [len(packed(model)) for model in models] == [2, 2, 2]
    assert same_state(models[0], models[1])
    assert same_state(models[0], models[2])
    assert same_state(load(tmp_path / "result"), models[0].dequantize())


def test_dense_experts_of_gpt_oss(gpt_oss: Path, tmp_path: Path) -> None:
    """A layer whose experts are dense is copied, although such experts alone cannot be converted."""
    dense = load(gpt_oss, GPT_OSS).dequantize().state_dict()
    tensors = {key: value for key, value in tensors_of(gpt_oss).items() if ".0.mlp.experts." not in key}
    tensors |= {key: value for key, value in dense.items() if ".0.mlp.experts." in key}
    skipped = [*config_of(gpt_oss)["quantization_config"]["modules_to_not_convert"], "model.layers.0.mlp.experts"]
    rewrite(gpt_oss, tmp_path / "mixed", tensors, config_with(gpt_oss, modules_to_not_convert=skipped))
    plan = convert(tmp_path / "mixed", tmp_path / "result", "fused", dequantize=True)
    assert plan.experts == ("bfloat16 and mxfp4 in blocks of 32", "bfloat16")
    result = load(tmp_path / "result", GPT_OSS).state_dict()
    assert result.keys() == dense.keys()
    assert all(same_bits(result[key], dense[key]) for key in dense)


@pytest.mark.parametrize("source", ["gpt_oss", "nvfp4", "mxfp4"])
def test_the_same_layout_only_changes_files(source: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = request.getfixturevalue(source)
    plan = convert(path, tmp_path / "same", "fused" if source == "gpt_oss" else "per-expert", max_shard_size="20KB")
    assert len(plan.shards) > 1
    assert plan.notes == ()
    assert same_tensors(tmp_path / "same", path)
    assert config_of(tmp_path / "same") == config_of(path)


def test_a_checkpoint_whose_experts_are_dense(tmp_path: Path) -> None:
    """Its linear layers stay as they are, unless everything is to be dense."""
    source = compressed_checkpoint(
        tmp_path / "source", "nvfp4", QWEN3_MOE, only=lambda key: key.endswith("q_proj.weight")
    )
    plan = convert(source, tmp_path / "fused", "fused")
    assert plan.experts == ("bfloat16", "bfloat16")
    assert config_of(tmp_path / "fused") == config_of(source)
    expected = load(source)
    assert same_state(load(tmp_path / "fused"), expected)
    convert(source, tmp_path / "dense", "fused", dequantize=True)
    assert "quantization_config" not in config_of(tmp_path / "dense")
    assert same_state(load(tmp_path / "dense"), expected)


# What is refused.


def copied(source: Path, target: Path, **tensors: Tensor) -> Path:
    return rewrite(source, target, tensors_of(source) | tensors, config_of(source)["quantization_config"])


def test_layouts_that_nobody_publishes(nvfp4: Path, mxfp4: Path, gpt_oss: Path, tmp_path: Path) -> None:
    one, two, three = (copied(path, tmp_path / name) for path, name in ((nvfp4, "n"), (mxfp4, "m"), (gpt_oss, "g")))
    refuse(
        r"^model\.layers\.\d\.mlp\.experts\.\w+ is in nvfp4, which nobody publishes in the layout 'fused': give --to "
        r"per-expert, or --dequantize for a dense model$",
        one,
    )
    refuse(r"is in mxfp4, which nobody publishes in the layout 'original': give --to per-expert or", two, "original")
    refuse(
        r"cannot be written per expert: Transformers knows no such layout of this model; give --to fused$",
        three,
        "per-expert",
    )
    refuse(r"cannot be written per expert", three, "per-expert", dequantize=True)
    refuse(
        r"dtype=torch\.float16 is for dense models: those in 4 bits, .* must be dequantized", one, dtype=torch.float16
    )


def test_what_is_wrong_with_a_tensor(mxfp4: Path, nvfp4: Path, gpt_oss: Path, tmp_path: Path) -> None:
    up = f"{EXPERTS}.4.up_proj.weight_packed"
    stack = f"{EXPERTS}.down_proj_scales"
    wrong = copied(mxfp4, tmp_path / "shape", **{up: tensors_of(mxfp4)[up][1:].clone()})
    refuse(rf"{up} must be uint8 of shape \(32, 32\), got uint8 of shape \(31, 32\)", wrong)
    wrong = copied(nvfp4, tmp_path / "more", **{up.replace(".4.", ".6."): tensors_of(nvfp4)[up].clone()})
    refuse(r"6\.up_proj\.weight_packed belongs to expert 6", wrong, "per-expert", dequantize=True)
    wrong = copied(gpt_oss, tmp_path / "dtype", **{stack: tensors_of(gpt_oss)[stack].float()})
    refuse(rf"{stack} must be uint8 of shape .*, got float32", wrong, dequantize=True)
    scale = f"{EXPERTS}.4.up_proj.weight_scale"
    wrong = copied(mxfp4, tmp_path / "e8m0", **{scale: tensors_of(mxfp4)[scale].view(torch.float8_e8m0fnu)})
    refuse(rf"{scale} must be uint8 of shape .*, got float8_e8m0fnu", wrong)
    linear = "model.layers.0.self_attn.q_proj.weight_scale"
    wrong = copied(nvfp4, tmp_path / "linear", **{linear: tensors_of(nvfp4)[linear].float()})
    refuse(rf"{linear} must be float8_e4m3fn of shape .*, got float32", wrong, "per-expert", dequantize=True)
    tensors = tensors_of(mxfp4)
    del tensors[f"{EXPERTS}.4.up_proj.weight_scale"]
    wrong = rewrite(mxfp4, tmp_path / "missing", tensors, config_of(mxfp4)["quantization_config"])
    refuse(r"4\.up_proj\.weight_scale is missing", wrong)
    tensors = tensors_of(mxfp4)
    del tensors["model.layers.0.self_attn.q_proj.weight_packed"]
    wrong = rewrite(mxfp4, tmp_path / "no weight", tensors, config_of(mxfp4)["quantization_config"])
    refuse(r"layers\.0\.self_attn\.q_proj\.weight_packed must be a matrix, got none", wrong)


def test_weights_that_are_not_finite(gpt_oss: Path, tmp_path: Path) -> None:
    """A block of mxfp4 whose scale is 255 is NaN. The tensor with the scale is named, and nothing is left behind."""
    scales = tensors_of(gpt_oss)[f"{EXPERTS}.down_proj_scales"]
    scales[2, 3, 1] = 255
    wrong = copied(gpt_oss, tmp_path / "nan", **{f"{EXPERTS}.down_proj_scales": scales})
    refuse(rf"{EXPERTS}\.down_proj_scales holds NaN or infinite values", wrong, dequantize=True)


def test_the_dtype_of_the_config(gpt_oss: Path, tmp_path: Path) -> None:
    """It is bfloat16 where the config names none, and an error where no weights can have it."""
    one = copied(gpt_oss, tmp_path / "none")
    values = config_of(one)
    for name, expected in ((None, "bfloat16"), ("float16", "float16")):
        changed = {key: value for key, value in values.items() if key != "dtype"} | ({"dtype": name} if name else {})
        (one / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        assert convert(one, tmp_path / expected, "fused", dequantize=True, dry_run=True).experts[1] == expected
    (one / "config.json").write_text(json.dumps(values | {"dtype": "float64"}), encoding="utf-8")
    refuse(r"config\.json must hold a dtype of bfloat16, float16, float32, got 'float64'", one, dequantize=True)


def test_a_config_in_the_text_model(tmp_path: Path) -> None:
    """The quantization_config of the text model within a config is removed and replaced as well."""
    from moe_fused.quantized import with_content

    config = {"model_type": "a", "text_config": {"hidden_size": 1, "quantization_config": {"quant_method": "mxfp4"}}}
    dense = {"model_type": "a", "text_config": {"hidden_size": 1}}
    assert with_content(config, None) == dense
    assert with_content(config, {"quant_method": "b"}) == dense | {"quantization_config": {"quant_method": "b"}}
    assert "quantization_config" in config["text_config"]  # type: ignore[operator]


def test_command(gpt_oss: Path, nvfp4: Path, tmp_path: Path, command: Command) -> None:
    arguments = ("convert", "model", gpt_oss, tmp_path / "dense", "--to", "fused", "--dequantize", "--dtype", "float16")
    dry = command(*arguments, "--dry-run")
    assert dry.status == 0, dry
    assert "fused experts (mxfp4 in blocks of 32)" in dry.stdout
    assert "fused experts (float16)" in dry.stdout
    assert not list(tmp_path.iterdir())
    assert command(*arguments).status == 0
    assert config_of(tmp_path / "dense")["dtype"] == "float16"
    assert tensors_of(tmp_path / "dense")[f"{EXPERTS}.down_proj"].dtype == torch.float16
    ended = command("convert", "model", nvfp4, tmp_path / "stacks", "--to", "fused")
    assert ended.status == 1
    assert "which nobody publishes in the layout 'fused'" in ended.error
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
