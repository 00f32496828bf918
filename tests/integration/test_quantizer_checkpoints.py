"""Checkpoints with 4-bit experts, made by bitsandbytes in every layout there is, and what is wrong with broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moe_fused

from .four_bit import (
    MIXTRAL,
    build,
    config,
    load,
    logits,
    packed,
    quantized_tensors,
    rewrite,
    same_bits,
    same_state,
    stacked_checkpoint,
    stacks,
    through_4bit,
    v4_checkpoint,
)
from .models import QWEN3_MOE, ModelCase

pytestmark = pytest.mark.usefixtures("enabled")

EXPERTS = "model.layers.0.mlp.experts"
UP = f"{EXPERTS}.3.up_proj.weight"
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(QWEN3_MOE, {}, id="qwen3_moe"),
        pytest.param(QWEN3_MOE, {"compress_statistics": False}, id="plain absmax"),
        pytest.param(QWEN3_MOE, {"quant_type": "fp4", "blocksize": 128}, id="fp4 in blocks of 128"),
        pytest.param(QWEN3_MOE, {"blocksize": 32}, id="blocks of 32"),
        pytest.param(QWEN3_MOE, {"quant_storage": torch.bfloat16}, id="stored as bf16"),
        pytest.param(MIXTRAL, {}, id="mixtral"),
    ],
)
def test_reads_transformers_4(case: ModelCase, options: dict[str, Any], tmp_path: Path) -> None:
    original = build(case)
    original.save_pretrained(tmp_path / "dense")
    v4_checkpoint(tmp_path / "dense", tmp_path / "v4", **options)
    model = load(tmp_path / "v4", case, dtype=torch.bfloat16)

    weights = packed(model)
    assert len(weights) == 4
    for name, value in weights.items():
        assert value.format.blocksize == options.get("blocksize", 64)
        stack = value.dequantize(torch.bfloat16).cpu()
        for matrices, sources in zip(stack, original.get_parameter(name).detach(), strict=True):
            for matrix, source in zip(
                matrices.chunk(value.format.projections), sources.chunk(value.format.projections), strict=True
            ):
                assert torch.equal(matrix, through_4bit(source.contiguous(), **options))
    # A router was a linear layer then, and quantized.
    router, source = (m.get_parameter("model.layers.1.mlp.gate.weight") for m in (model, original))
    assert router.dtype == torch.bfloat16
    assert torch.equal(router.cpu(), through_4bit(source, **options))

    if "quant_storage" not in options:  # packed weights of experts are bytes, whatever they came as
        model.save_pretrained(tmp_path / "saved")
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("v4", "saved"))
        for key, value in before.items():
            if ".mlp.gate." not in key and ".block_sparse_moe.gate." not in key:
                assert same_bits(value, after[key]), key
        assert not [key for key in after if ".gate.weight." in key]
    assert same_state(load(tmp_path / "v4", case, dtype=torch.bfloat16), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dense_tensors_get_the_dtype_asked_for(dtype: torch.dtype, v4: Path) -> None:
    model = load(v4, dtype=dtype)
    dense = {name: p.dtype for name, p in model.named_parameters() if p.dtype != torch.uint8}
    assert {name.split(".")[-2] for name in dense} > {"gate", "norm", "embed_tokens", "lm_head"}
    assert set(dense.values()) == {dtype}
    with torch.no_grad():
        assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"compress_statistics": False}], ids=["groups run over experts", "plain absmax"]
)
def test_reads_the_original_project(options: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    stacked_checkpoint(dense, tmp_path, **options)
    model = load(tmp_path)
    sources = stacks(load_file(dense / "model.safetensors"))
    for name, value in packed(model).items():
        block, stack = name.split(".experts.")
        projections = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
        expected = [through_4bit(sources[f"{block}.{projection}.weight"], **options) for projection in projections]
        assert torch.equal(value.dequantize(torch.bfloat16).cpu(), torch.cat(expected, 1))


def test_reads_the_original_project_keeps_whole_groups(tmp_path: Path) -> None:
    """An expert of 256 blocks has its second-level scales to itself, which are then kept as they are."""
    build(moe_intermediate_size=256).save_pretrained(tmp_path / "dense")
    stacked_checkpoint(tmp_path / "dense", tmp_path / "stacked")
    model = load(tmp_path / "stacked")
    sources = stacks(load_file(tmp_path / "dense" / "model.safetensors"))
    weights = packed(model)["model.layers.1.mlp.experts.down_proj"]
    assert weights.format.double_quant
    expected = through_4bit(sources["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(weights.dequantize(torch.bfloat16).cpu(), expected)


def test_reads_the_original_project_dense(dense: Path, tmp_path: Path) -> None:
    """Quantized on loading it is what any other checkpoint of the same weights is."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in tensors.items() if ".experts." not in key} | stacks(tensors)

    rewrite(dense, tmp_path, change)
    assert same_state(load(tmp_path, quantization_config=config()), load(dense, quantization_config=config()))


def test_all_layouts_compute_the_same(v4: Path, tmp_path: Path) -> None:
    model = load(v4)
    with torch.no_grad():
        expected = logits(model)
        for layout in ("per_expert", "fused"):
            moe_fused.save_format(model, layout)
            model.save_pretrained(tmp_path / layout)
            again = load(tmp_path / layout)
            assert same_state(again, model)
            assert torch.equal(logits(again), expected)
    assert len(load_file(tmp_path / "fused" / "model.safetensors")) < 100


def test_dense_mlp_layers_are_not_taken_for_the_original_project(tmp_path: Path) -> None:
    """Their keys are called the same."""
    original = build(mlp_only_layers=[0])
    original.save_pretrained(tmp_path / "dense")
    v4_checkpoint(tmp_path / "dense", tmp_path / "v4")
    model = load(tmp_path / "v4", dtype=torch.bfloat16)
    assert {name.split(".experts.")[0] for name in packed(model)} == {"model.layers.1.mlp"}
    assert type(model.model.layers[0].mlp.gate_proj).__name__ == "Linear4bit"


def test_experts_that_the_checkpoint_has_dense_stay_dense(dense: Path, tmp_path: Path) -> None:
    """As Transformers 5 saves them without us: nothing is quantized that says it is quantized already."""
    v4_checkpoint(dense, tmp_path / "v5", only=r"self_attn")
    model = load(tmp_path / "v5", dtype=torch.bfloat16)
    assert not packed(model)
    original = build()
    for name, value in original.named_parameters():
        if ".experts." in name:
            assert same_bits(model.get_parameter(name), value)
    model.save_pretrained(tmp_path / "saved")
    assert same_state(load(tmp_path / "saved", dtype=torch.bfloat16), model)


def test_fused_dense_experts_of_a_quantized_checkpoint(dense: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        experts = {name: value.detach().clone() for name, value in build().named_parameters() if ".experts." in name}
        return {key: value for key, value in tensors.items() if ".experts." not in key} | experts

    rewrite(dense, tmp_path / "bf16", change)
    assert same_state(load(tmp_path / "bf16", quantization_config=config()), load(dense, quantization_config=config()))
    rewrite(dense, tmp_path / "4bit", change, llm_int8_skip_modules=["proj", "lm_head"], **NF4)
    model = load(tmp_path / "4bit", dtype=torch.bfloat16)
    assert not packed(model)
    assert same_state(model, load(dense, dtype=torch.bfloat16))


def test_linear_layers_that_are_dense_must_be_named(dense: Path, tmp_path: Path) -> None:
    """Transformers loads them into modules for 4 bits, which then cannot compute."""
    skipped = ["lm_head", "model.layers.1.self_attn"]
    model = load(dense, quantization_config=config(llm_int8_skip_modules=skipped))
    model.save_pretrained(tmp_path)
    assert same_state(load(tmp_path), model)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.q_proj to llm_int8_skip_modules in the quantization_conf"
    ):
        load(tmp_path)


# Broken checkpoints. Each row changes one tensor of a good one.

Change = Callable[[dict[str, Tensor]], object]


def rename(old: str, new: str) -> Change:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def replace(key: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({key: change(tensors[key]).contiguous()})


def drop(key: str) -> Change:
    return lambda tensors: tensors.pop(key)


def repeat(key: str, twin: str) -> Change:
    return lambda tensors: tensors.update({twin: tensors[key].clone()})


def edit(key: str, **values: Any) -> Change:
    """Changes fields of a JSON object in a tensor."""

    def change(tensor: Tensor) -> Tensor:
        fields = json.loads(bytes(tensor.tolist())) | values
        text = json.dumps({name: value for name, value in fields.items() if value is not None})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return replace(key, change)


STATE = f"{UP}.quant_state.bitsandbytes__nf4"
BROKEN: dict[str, tuple[Change, str]] = {
    "truncated weight": (replace(UP, lambda t: t[:-1]), rf"{UP} must have 1024 values of uint8, got 1023 of uint8"),
    "truncated absmax": (
        replace(f"{UP}.absmax", lambda t: t[:7]),
        rf"{UP}\.absmax must have 32 values of uint8, got 7",
    ),
    "absmax of another dtype": (replace(f"{UP}.absmax", Tensor.float), r"\.absmax must have .* got 32 of float32"),
    "no weight": (drop(UP), rf"{UP} is missing"),
    "no absmax": (drop(f"{UP}.absmax"), rf"{UP}\.absmax is missing"),
    "no nested absmax": (drop(f"{UP}.nested_absmax"), rf"{UP}\.nested_absmax is missing"),
    "no quant_map": (drop(f"{UP}.quant_map"), rf"{UP}\.quant_map is missing"),
    "no quant_state": (drop(STATE), rf"{UP}\.quant_state\.bitsandbytes__nf4 \(or fp4\) is missing"),
    "renamed absmax": (rename(f"{UP}.absmax", f"{UP}.absmin"), rf"{UP}\.absmin is not a tensor of nf4 weights"),
    "renamed expert": (
        rename(UP, f"{EXPERTS}.6.up_proj.weight"),
        r"\.experts\.6\.up_proj\.weight belongs to expert 6, but .* has 6 experts",
    ),
    "the same weight without the prefix": (
        repeat(UP, UP.removeprefix("model.")),
        rf"{EXPERTS}\.gate_up_proj must have each tensor once, got {UP.removeprefix('model.')} and {UP}, which are the same",
    ),
    "the same absmax by another number": (
        repeat(f"{UP}.absmax", f"{EXPERTS}.03.up_proj.weight.absmax"),
        rf"{EXPERTS}\.gate_up_proj must have each tensor once, got {EXPERTS}\.\d+\.up_proj\.weight\.absmax and .*\.absmax,",
    ),
    "nf4 called fp4": (
        rename(STATE, STATE.replace("nf4", "fp4")),
        r"__fp4 must hold the quant_type of its name, .* got 'nf4'",
    ),
    "another quant_type": (
        edit(STATE, quant_type="int4"),
        r"__nf4 must hold the quant_type of its name, .* got 'int4'",
    ),
    "another shape": (edit(STATE, shape=[64, 32]), r"__nf4 must hold shape \(32, 64\), got \(64, 32\)"),
    "no blocksize": (edit(STATE, blocksize=None), r"__nf4 must hold blocksize, a int, got None"),
    "odd blocksize": (edit(STATE, blocksize=48), r"__nf4 must hold a blocksize of bitsandbytes, got 48"),
    "another blocksize": (edit(STATE, blocksize=128), rf"{UP}\.absmax must have 16 values of uint8, got 32"),
    "odd nested blocksize": (edit(STATE, nested_blocksize=128), r"__nf4 must hold a nested_blocksize of 256, got 128"),
    "no nested offset": (edit(STATE, nested_offset=None), r"__nf4 must hold nested_offset, a float, got None"),
    "another dtype": (edit(STATE, dtype="int8"), r"__nf4 must hold a dtype of .*, got 'int8'"),
    "one matrix unlike the rest": (
        edit(STATE, dtype="float16"),
        rf"{UP} must be quantized like .*experts\.0\.gate_proj",
    ),
    "not JSON": (replace(STATE, lambda t: t[:9]), r"__nf4 must hold JSON"),
    "foreign quant_map": (
        replace(f"{UP}.quant_map", lambda t: t * 0.99),
        rf"{UP}\.quant_map must hold bitsandbytes' own",
    ),
    "foreign nested_quant_map": (
        replace(f"{UP}.nested_quant_map", lambda t: t.flip(0)),
        rf"{UP}\.nested_quant_map must hold bitsandbytes' own",
    ),
    "two layouts": (
        lambda tensors: tensors.update({f"{EXPERTS}.gate_up_proj_absmax": torch.zeros(1, dtype=torch.uint8)}),
        rf"{EXPERTS}\.gate_up_proj must be in one layout, got .*experts\.0\.gate_proj.* and .*gate_up_proj_absmax",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_matrices(name: str, v4: Path, tmp_path: Path) -> None:
    change, message = BROKEN[name]

    def apply(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change(tensors)
        return tensors

    rewrite(v4, tmp_path, apply)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


GATE_UP = f"{EXPERTS}.gate_up_proj"
BROKEN_FUSED: dict[str, tuple[Change, str]] = {
    "truncated": (replace(GATE_UP, lambda t: t[:, :-1]), rf"{GATE_UP} must be uint8 of .* got .* \(6, 2047\)"),
    "no format": (drop(f"{GATE_UP}_format"), rf"{GATE_UP}_format is missing"),
    "no weights": (drop(GATE_UP), rf"{GATE_UP} is missing"),
    "no absmax": (drop(f"{GATE_UP}_absmax"), rf"{GATE_UP}_absmax is missing"),
    "no offset": (drop(f"{GATE_UP}_nested_offset"), rf"{GATE_UP}_nested_offset is missing"),
    "another dtype": (replace(f"{GATE_UP}_absmax", Tensor.half), rf"{GATE_UP}_absmax must be uint8 .* got float16"),
    "another quant_type": (edit(f"{GATE_UP}_format", quant_type="nf3"), rf"{GATE_UP}_format .* got 'nf3'"),
    "another shape": (edit(f"{GATE_UP}_format", shape=[6, 64, 32]), r"must hold shape \(6, 64, 64\).* got \(6, 64, 32\)"),
    "plain absmax": (edit(f"{GATE_UP}_format", double_quant=False), r"nested_\w+ is not a tensor of .* double_quant=False"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_FUSED)
def test_broken_fused_layout(name: str, v4: Path, tmp_path: Path) -> None:
    change, message = BROKEN_FUSED[name]
    model = load(v4)
    moe_fused.save_format(model, "fused")
    model.save_pretrained(tmp_path / "good")

    def apply(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change(tensors)
        return tensors

    rewrite(tmp_path / "good", tmp_path / "bad", apply)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(drop(f"{EXPERTS}.2.down_proj.weight"), r"experts\.2\.down_proj\.weight is missing", id="missing"),
        pytest.param(
            replace(f"{EXPERTS}.2.down_proj.weight", lambda t: t.mT),
            r"experts\.2\.down_proj\.weight must have shape \(64, 32\), got \(32, 64\)",
            id="transposed",
        ),
        pytest.param(
            lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(EXPERTS)],
            rf"{EXPERTS}\.gate_up_proj is missing from the checkpoint",
            id="no experts",
        ),
        pytest.param(
            lambda tensors: tensors.update(quantized_tensors(UP, tensors[UP])),
            rf"{UP}\.\S+ belongs to 4-bit weights, but the checkpoint's config has no quantization_config",
            id="4-bit unannounced",
        ),
    ],
)
def test_broken_dense_checkpoints(change: Change, message: str, dense: Path, tmp_path: Path) -> None:
    def apply(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change(tensors)
        return tensors

    rewrite(dense, tmp_path, apply)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, quantization_config=config())


@pytest.mark.parametrize("only", ["(gate|up|q|k|v|o)_proj|mlp.gate.", "(down|q|k|v|o)_proj"])
def test_a_module_half_in_4_bits(only: str, dense: Path, tmp_path: Path) -> None:
    v4_checkpoint(dense, tmp_path, only=only)
    with pytest.raises(ValueError, match=r"_proj must be of 4-bit weights like the rest of its module, but is dense"):
        load(tmp_path)


def test_original_project_without_a_projection(dense: Path, tmp_path: Path) -> None:
    stacked_checkpoint(dense, tmp_path / "good")

    def drop_up(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in tensors.items() if not key.startswith("model.layers.0.mlp.up_proj")}

    rewrite(tmp_path / "good", tmp_path / "bad", drop_up)
    with pytest.raises(ValueError, match=rf"the up projection of {GATE_UP} is missing from the checkpoint"):
        load(tmp_path / "bad")
