"""Saved models in every layout of their experts: there and back bit for bit, and what becomes of everything else."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel
from typer.testing import CliRunner

import moe_fused
from moe_fused.checkpoints.models import Layout, convert_model
from moe_fused.cli import app
from tests.bits import dequantize_4bit

from .four_bit import (
    BY_ID,
    FOUR_BIT,
    MIXTRAL,
    build,
    load,
    logits,
    packed,
    quantize,
    rewrite,
    same_bits,
    same_state,
    stacked_checkpoint,
    stacks,
    v4_checkpoint,
)
from .models import QWEN3_MOE, STACKED, ModelCase
from .saved import config_of, same_tensors, tensors_of

pytestmark = pytest.mark.usefixtures("enabled")

DEEPSEEK_V3 = BY_ID["deepseek_v3"]
CASES = [case for case in FOUR_BIT if case.id not in STACKED]


def skip_linear_layers(path: Path) -> None:
    """``stacked_checkpoint`` has dense linear layers, whose names Transformers has to be told to run the model."""
    values = config_of(path)
    values["quantization_config"]["llm_int8_skip_modules"] = ["proj", "lm_head"]
    (path / "config.json").write_text(json.dumps(values), encoding="utf-8")


# Dense.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_dense_there_and_back(case: ModelCase, tmp_path: Path) -> None:
    original = build(case)
    original.save_pretrained(tmp_path / "dense")
    layouts: list[Layout] = ["fused", "original"] if case.id == "qwen3_moe" else ["fused"]
    for layout in layouts:
        there = convert_model(tmp_path / "dense", tmp_path / layout, layout, max_shard_size=20_000)
        back = convert_model(tmp_path / layout, tmp_path / f"{layout} back", "per-expert")
        assert (there.source_layout, there.layout, back.source_layout) == ("per-expert", layout, layout)
        assert (there.experts, there.notes) == (("bfloat16", "bfloat16"), ())
        assert len(there.shards) > 1
        assert same_tensors(tmp_path / f"{layout} back", tmp_path / "dense")
        assert config_of(tmp_path / f"{layout} back") == config_of(tmp_path / "dense")
    again = load(tmp_path / "fused", case, dtype=torch.bfloat16)
    assert same_state(again, load(tmp_path / "dense", case, dtype=torch.bfloat16))
    with torch.no_grad():
        assert torch.equal(logits(again), logits(load(tmp_path / "dense", case, dtype=torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dense_layouts(dtype: torch.dtype, tmp_path: Path) -> None:
    """Against stacks made by torch, in other dtypes."""
    original = build(dtype=dtype)
    original.save_pretrained(tmp_path / "dense")
    convert_model(tmp_path / "dense", tmp_path / "fused", "fused")
    convert_model(tmp_path / "fused", tmp_path / "original", "original")
    state, fused, stacked = original.state_dict(), tensors_of(tmp_path / "fused"), tensors_of(tmp_path / "original")
    assert state.keys() == fused.keys()
    assert all(same_bits(state[key], fused[key]) for key in state)
    expected = stacks(tensors_of(tmp_path / "dense"))
    assert expected.keys() == {key for key in stacked if re.search(r"mlp\.\w+_proj", key)}
    assert all(same_bits(expected[key], stacked[key]) for key in expected)


def test_architectures_say_who_can_read_the_result(dense: Path, tmp_path: Path) -> None:
    """The original project has a class of its own; to load its dense weights as Transformers' would leave them random."""
    convert_model(dense, tmp_path / "original", "original")
    convert_model(tmp_path / "original", tmp_path / "fused", "fused")
    assert config_of(tmp_path / "original")["architectures"] == ["Qwen3MoeFusedForCausalLM"]
    assert config_of(tmp_path / "fused")["architectures"] == ["Qwen3MoeForCausalLM"]


def test_blocks_are_called_as_on_the_hub(tmp_path: Path) -> None:
    """Transformers' own names, ``mlp`` for Mixtral's ``block_sparse_moe``, are read, and not written."""
    original = build(MIXTRAL)
    original.save_pretrained(tmp_path / "hub")
    original.save_pretrained(tmp_path / "memory", save_original_format=False)
    assert any(".mlp.experts.gate_up_proj" in key for key in tensors_of(tmp_path / "memory"))
    convert_model(tmp_path / "memory", tmp_path / "back", "per-expert")
    assert same_tensors(tmp_path / "back", tmp_path / "hub")


def test_a_model_without_a_head(tmp_path: Path) -> None:
    """Its names lack the prefix."""
    build().model.save_pretrained(tmp_path / "dense")
    assert "layers.0.mlp.experts.0.up_proj.weight" in tensors_of(tmp_path / "dense")
    convert_model(tmp_path / "dense", tmp_path / "fused", "fused")
    convert_model(tmp_path / "fused", tmp_path / "back", "per-expert")
    assert same_tensors(tmp_path / "back", tmp_path / "dense")
    assert same_state(AutoModel.from_pretrained(tmp_path / "fused"), AutoModel.from_pretrained(tmp_path / "dense"))


def test_weights_of_the_base_model_under_a_config_with_a_head(dense: Path, tmp_path: Path) -> None:
    def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix("model."): value for key, value in tensors.items()}

    rewrite(dense, tmp_path / "dense", without_prefix)
    convert_model(tmp_path / "dense", tmp_path / "fused", "fused")
    assert "layers.0.mlp.experts.gate_up_proj" in tensors_of(tmp_path / "fused")
    convert_model(tmp_path / "fused", tmp_path / "back", "per-expert")
    assert same_tensors(tmp_path / "back", tmp_path / "dense")


def test_layers_that_transformers_ignores_stay(tmp_path: Path) -> None:
    """As the ones that predict ahead, which Hub checkpoints of DeepSeek-V3 have."""
    case, extra = DEEPSEEK_V3, "model.layers.61.mlp.experts.0.up_proj.weight"
    build(case).save_pretrained(tmp_path / "plain")
    rewrite(tmp_path / "plain", tmp_path / "dense", lambda tensors: tensors | {extra: torch.ones(3, 5)})
    with pytest.warns(UserWarning, match=rf"{extra} and 0 more belong to layers that Transformers ignores, and stay"):
        convert_model(tmp_path / "dense", tmp_path / "fused", "fused")
    assert tensors_of(tmp_path / "fused")[extra].tolist() == torch.ones(3, 5).tolist()


def test_cast(tmp_path: Path) -> None:
    """All but what the model wants in fp32."""
    case = DEEPSEEK_V3
    model = build(case, dtype=torch.float32)
    model.save_pretrained(tmp_path / "dense")
    endings = tuple(model._keep_in_fp32_modules_strict)  # the router's bias, from Transformers 5.24 on its weight, too
    plan = convert_model(tmp_path / "dense", tmp_path / "half", "fused", dtype=torch.float16)
    assert plan.experts == ("float32", "float16")
    before = load(tmp_path / "dense", case, dtype=torch.float32).state_dict()
    after = tensors_of(tmp_path / "half")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert same_bits(value if key.endswith(endings) else value.half(), after[key]), key
    assert any(key.endswith(endings) for key in before)
    assert config_of(tmp_path / "half")["dtype"] == "float16"


# In 4 bits.


@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(QWEN3_MOE, {}, id="qwen3_moe"),
        pytest.param(QWEN3_MOE, {"compress_statistics": False}, id="plain absmax"),
        pytest.param(QWEN3_MOE, {"quant_type": "fp4", "blocksize": 128}, id="fp4 in blocks of 128"),
        pytest.param(QWEN3_MOE, {"blocksize": 32}, id="blocks of 32"),
        pytest.param(MIXTRAL, {}, id="mixtral"),
    ],
)
def test_4bit_there_and_back(case: ModelCase, options: dict[str, Any], tmp_path: Path) -> None:
    build(case).save_pretrained(tmp_path / "dense")
    v4_checkpoint(tmp_path / "dense", tmp_path / "v4", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost
        there = convert_model(tmp_path / "v4", tmp_path / "fused", "fused", max_shard_size="20KB")
        convert_model(tmp_path / "fused", tmp_path / "back", "per-expert", max_shard_size="20KB")
    blocks = f"{options.get('quant_type', 'nf4')} in blocks of {options.get('blocksize', 64)}"
    assert there.experts == (f"{blocks}{', double quantization' * options.get('compress_statistics', True)}",) * 2
    assert same_tensors(tmp_path / "back", tmp_path / "v4")
    assert config_of(tmp_path / "fused") == config_of(tmp_path / "v4")

    models = [load(tmp_path / name, case, dtype=torch.bfloat16) for name in ("v4", "fused", "back")]
    assert len(packed(models[1])) == 4
    assert same_state(models[0], models[1])
    with torch.no_grad():
        first, *others = (logits(model) for model in models)
    assert all(torch.equal(first, other) for other in others)

    moe_fused.save_format(models[0], "fused")
    models[0].save_pretrained(tmp_path / "saved")
    saved, converted = tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "fused")
    experts = [key for key in saved if ".experts." in key]
    assert experts == [key for key in sorted(converted) if ".experts." in key]
    assert all(same_bits(saved[key], converted[key]) for key in experts)


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_original_4bit_loses_double_quantization(layout: Layout, dense: Path, tmp_path: Path) -> None:
    stacked_checkpoint(dense, tmp_path / "original")
    skip_linear_layers(tmp_path / "original")
    with pytest.warns(
        UserWarning, match=r"double quantization is lost in 4 of 4 stacks, as model\.layers\.\d"
    ) as record:
        plan = convert_model(tmp_path / "original", tmp_path / "new", layout)
    assert len(record) == len(plan.notes) == 1
    assert plan.experts == ("nf4 in blocks of 64, double quantization", "nf4 in blocks of 64")
    before, after = load(tmp_path / "original"), load(tmp_path / "new")
    assert same_state(before, after)
    with torch.no_grad():
        assert torch.equal(logits(before), logits(after))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param({"moe_intermediate_size": 256}, {}, id="whole groups"),
        pytest.param({}, {"compress_statistics": False}, id="plain absmax"),
    ],
)
@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_original_4bit_without_loss(
    layout: Layout, sizes: dict[str, int], options: dict[str, Any], tmp_path: Path
) -> None:
    build(**sizes).save_pretrained(tmp_path / "dense")
    stacked_checkpoint(tmp_path / "dense", tmp_path / "original", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_model(tmp_path / "original", tmp_path / "new", layout)
    assert same_state(load(tmp_path / "original"), load(tmp_path / "new"))
    if options:  # the one format of 4 bits in which all layouts hold the same values
        convert_model(tmp_path / "new", tmp_path / "back", "original")
        assert same_tensors(tmp_path / "back", tmp_path / "original")


def test_same_layout_only_changes_files(v4: Path, dense: Path, tmp_path: Path) -> None:
    stacked_checkpoint(dense, tmp_path / "original")
    for source, layout in ((v4, "per-expert"), (dense, "per-expert"), (tmp_path / "original", "original")):
        target = tmp_path / f"{source.name} copied"
        plan = convert_model(source, target, layout, max_shard_size=20_000)
        assert plan.experts[0] == plan.experts[1]
        assert not plan.notes
        assert len(plan.shards) > 1
        assert same_tensors(source, target)


@pytest.mark.parametrize("layout", ["per-expert", "fused", "original"])
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as before", "fp32"])
def test_dequantize(layout: Layout, dtype: torch.dtype | None, dense: Path, v4: Path, tmp_path: Path) -> None:
    """Linear layers and routers, too: the result is a dense model, and rounded once."""

    def through_4bit(weight: Tensor) -> Tensor:
        packed, state = quantize(weight)
        state.dtype = dtype or torch.bfloat16
        return dequantize_4bit(packed, state).cpu()

    plan = convert_model(v4, tmp_path / "dense", layout, dequantize=True, dtype=dtype)
    values = config_of(tmp_path / "dense")
    assert "quantization_config" not in values
    assert plan.experts[1] == values["dtype"] == ("float32" if dtype else "bfloat16")
    result = tmp_path / "dense"
    if layout != "per-expert":
        result = tmp_path / "per-expert"
        convert_model(tmp_path / "dense", result, "per-expert")
    expected = {
        key: through_4bit(value) if re.search(r"(_proj|\.gate)\.weight$", key) else value.to(dtype or value.dtype)
        for key, value in tensors_of(dense).items()
    }
    assert expected.keys() == tensors_of(result).keys()
    for key, value in tensors_of(result).items():
        assert same_bits(value, expected[key]), key


def test_dequantized_model_computes_the_same(v4: Path, tmp_path: Path) -> None:
    convert_model(v4, tmp_path / "dense", "per-expert", dequantize=True)
    expected = load(v4, dtype=torch.bfloat16).dequantize().cpu()
    with torch.no_grad():
        assert torch.equal(logits(load(tmp_path / "dense", dtype=torch.bfloat16)), logits(expected))


# Files.


def test_shards_and_their_index(v4: Path, tmp_path: Path) -> None:
    plan = convert_model(v4, tmp_path / "fused", "fused", max_shard_size=20_000)
    index = json.loads((tmp_path / "fused" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    sizes: dict[str, int] = {}
    for name in plan.shards:
        shard = load_file(tmp_path / "fused" / name)
        assert dict.fromkeys(shard, name).items() <= index["weight_map"].items()
        sizes[name] = sum(value.nbytes for value in shard.values())
        assert sizes[name] <= 20_000 or len(shard) == 1
    assert len(index["weight_map"]) == plan.tensors[1]
    assert index["metadata"]["total_size"] == sum(sizes.values()) == plan.nbytes[1]


def test_other_files_are_copied(dense: Path, tmp_path: Path) -> None:
    rewrite(dense, tmp_path / "source", dict)
    kept = {"tokenizer.json": "{}", "chat_template.jinja": "ä", "additional/template.jinja": "b"}
    for name, text in kept.items() | {".cache/x": "", "pytorch_model.bin": "", "consolidated.safetensors": ""}.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    plan = convert_model(tmp_path / "source", tmp_path / "fused", "fused")
    assert sorted(plan.others) == sorted(kept)
    files = {path.relative_to(tmp_path / "fused").as_posix() for path in (tmp_path / "fused").rglob("*.*")}
    assert files == {*kept, "config.json", "model.safetensors"}
    for name, text in kept.items():
        assert (tmp_path / "fused" / name).read_text(encoding="utf-8") == text


def test_progress_and_dry_run(dense: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    plan = convert_model(dense, tmp_path / "fused", "fused", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert "per-expert experts (bfloat16)" in str(plan)
    assert str(convert_model(dense, tmp_path / "fused", "fused", progress=lambda *step: seen.append(step))) == str(plan)
    assert seen == sorted(seen)
    assert seen[-1] == (plan.nbytes[1], plan.nbytes[1])


def test_overwrite(dense: Path, v4: Path, tmp_path: Path) -> None:
    convert_model(dense, tmp_path / "model", "fused", max_shard_size=20_000)
    convert_model(v4, tmp_path / "model", "fused", overwrite=True)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 1
    assert same_state(load(tmp_path / "model"), load(v4))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_command(dense: Path, v4: Path, tmp_path: Path) -> None:
    invoke = CliRunner().invoke
    command = ["convert", "model"]
    arguments = [*command, str(dense), str(tmp_path / "fused"), "--to", "fused"]
    result = invoke(app, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "fused experts (bfloat16)" in result.output
    assert not list(tmp_path.iterdir())
    assert invoke(app, [*arguments, "--max-shard-size", "20KB"]).exit_code == 0
    assert len(list((tmp_path / "fused").glob("*.safetensors"))) > 1
    again = invoke(app, arguments)
    assert again.exit_code != 0
    assert str(again.exception) == f"{tmp_path / 'fused'} exists: choose another path, or replace it with --overwrite"
    assert invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert len(list((tmp_path / "fused").glob("*.safetensors"))) == 1
    gguf = [*command, str(v4), str(tmp_path / "gguf"), "--to", "per-expert", "--dequantize", "--dtype", "bfloat16"]
    assert invoke(app, gguf).exit_code == 0
    assert {value.dtype for value in tensors_of(tmp_path / "gguf").values()} == {torch.bfloat16}
    assert invoke(app, [*command, str(dense), str(tmp_path / "x"), "--to", "v5"]).exit_code == 2
