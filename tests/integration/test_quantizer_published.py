"""Experts in mxfp4 and nvfp4 keep the bytes of the checkpoint, compute, train, and are saved as they were published."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, Mxfp4Config, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

import moe_fused
from moe_fused.checkpoints.share import taking
from moe_fused.integrations.quantizer import published
from moe_fused.integrations.quantizer.packed_experts import packed_modules
from moe_fused.quantized import compressed_quant_type

from .conftest import DEVICE
from .four_bit import BY_ID, FOUR_BIT, MIXTRAL, load, logits, packed, same_bits, same_state
from .models import QWEN3_MOE, ModelCase, tokens
from .published import (
    GPT_OSS,
    compressed,
    compressed_checkpoint,
    gpt_oss_checkpoint,
    is_linear,
    on_the_fly,
    quantized,
    rewrite,
    tensors_of,
)
from .test_share import share

FORMATS = ("nvfp4", "mxfp4")
QWEN3_5_MOE = BY_ID["qwen3_5_moe"]


@pytest.fixture(autouse=True)
def _enabled(enabled: None) -> None:
    pass


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt_oss_checkpoint(tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="module", params=FORMATS)
def qwen3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_checkpoint(tmp_path_factory.mktemp(request.param), request.param, QWEN3_MOE, activations=True)


def load_here(path: Path, case: ModelCase, **options: Any) -> PreTrainedModel:
    return load(path, case, device_map={"": DEVICE}, **options)


def same_tensors(path: Path, expected: dict[str, Tensor]) -> bool:
    saved = tensors_of(path)
    return saved.keys() == expected.keys() and all(same_bits(saved[key], expected[key]) for key in saved)


# gpt-oss.


def test_gpt_oss_is_what_transformers_dequantizes(gpt_oss: Path) -> None:
    model = load_here(gpt_oss, GPT_OSS)
    assert isinstance(model.hf_quantizer, published.Mxfp4ExpertsQuantizer)
    assert len(list(packed_modules(model))) == 2
    dense = load_here(gpt_oss, GPT_OSS, quantization_config=Mxfp4Config(dequantize=True))
    assert not list(packed_modules(dense))
    dense.set_experts_implementation("moe_fused")
    assert torch.equal(logits(model), logits(dense))
    assert same_state(model.dequantize(), dense)
    assert model.model.layers[0].mlp.experts.is_transposed
    model.set_experts_implementation("moe_fused")
    assert torch.equal(logits(model), logits(dense))


def test_gpt_oss_is_saved_bit_for_bit(gpt_oss: Path, tmp_path: Path) -> None:
    model = load_here(gpt_oss, GPT_OSS)
    model.save_pretrained(tmp_path)
    assert same_tensors(tmp_path, tensors_of(gpt_oss))
    configs = [json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (gpt_oss, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_gpt_oss_trains_as_its_dense_model_does(gpt_oss: Path) -> None:
    """The adapters have the same names and shapes, and get the same gradients."""
    gradients = []
    for options in ({}, {"quantization_config": Mxfp4Config(dequantize=True), "experts_implementation": "moe_fused"}):
        model = load_here(gpt_oss, GPT_OSS, **options)
        torch.manual_seed(0)
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        adapted: Any = get_peft_model(model, LoraConfig(r=4, target_parameters=targets, init_lora_weights=False))
        batch = tokens(device=DEVICE)
        adapted(input_ids=batch, labels=batch).loss.backward()
        gradients.append({name: value.grad for name, value in adapted.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 8
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("case", [GPT_OSS, QWEN3_MOE, QWEN3_5_MOE, MIXTRAL], ids=lambda case: case.id)
@pytest.mark.parametrize("quant_type", FORMATS)
def test_dense_experts_are_quantized(case: ModelCase, quant_type: str, tmp_path: Path) -> None:
    if case is GPT_OSS and quant_type != "mxfp4":
        pytest.skip("compressed-tensors has no names for experts of gpt-oss")
    from .four_bit import build

    dense = build(case)
    dense.save_pretrained(tmp_path / "dense")
    model = load_here(tmp_path / "dense", case, quantization_config=on_the_fly(quant_type, case), dtype="auto")
    found = packed(model)
    assert len(found) == 4
    state = dense.to(DEVICE).state_dict()
    for name, weights in found.items():
        weight = state[name].mT if case is GPT_OSS else state[name]
        expected = quantized(weight, quant_type, weights.format.projections)
        assert weights.format == expected.format
        for part, value in weights.tensors().items():
            assert torch.equal(value, expected.tensors()[part]), f"{name} {part}"
    model.save_pretrained(tmp_path / "packed")
    again = load_here(tmp_path / "packed", case)
    assert same_state(model, again)
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("case", [case for case in FOUR_BIT if case.id != GPT_OSS.id], ids=lambda case: case.id)
def test_every_family_is_held_in_mxfp4(case: ModelCase, tmp_path: Path) -> None:
    from .four_bit import build

    build(case).save_pretrained(tmp_path / "dense")
    model = load_here(tmp_path / "dense", case, quantization_config=Mxfp4Config(), dtype="auto")
    assert len(list(packed_modules(model))) == case.moe_layers
    model.save_pretrained(tmp_path / "packed")
    again = load_here(tmp_path / "packed", case)
    assert same_state(model, again)
    dequantized = again.dequantize()
    assert not list(packed_modules(dequantized))
    dequantized.set_experts_implementation("moe_fused")
    assert torch.equal(logits(model), logits(dequantized))


# compressed-tensors.


def test_compressed_experts_keep_their_bytes(qwen3: Path, tmp_path: Path) -> None:
    """The experts are saved as they were. Linear layers are dequantized, and the config of the saved model says so."""
    model = load_here(qwen3, QWEN3_MOE)
    before = tensors_of(qwen3)
    model.save_pretrained(tmp_path)
    saved = tensors_of(tmp_path)
    experts = {key for key in before if ".experts." in key}
    assert {key for key in saved if ".experts." in key} == experts
    assert all(same_bits(before[key], saved[key]) for key in experts)
    linears = {key.removesuffix("_packed") for key in before if key.endswith(".weight_packed") and key not in experts}
    assert len(linears) == 8
    ignored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]["ignore"]
    assert {key.removesuffix(".weight") for key in linears} <= set(ignored)
    again = load_here(tmp_path, QWEN3_MOE)
    assert same_state(model, again)
    assert torch.equal(logits(model), logits(again))


def test_compressed_linear_layers_are_what_the_library_decompresses(qwen3: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((qwen3 / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    tensors, state = tensors_of(qwen3), load_here(qwen3, QWEN3_MOE).dequantize().state_dict()
    stack = state["model.layers.1.mlp.experts.gate_up_proj"]
    rows = stack.shape[1] // 2
    for key, ours in {
        "model.layers.0.self_attn.q_proj": state["model.layers.0.self_attn.q_proj.weight"],
        "model.layers.1.mlp.experts.3.gate_proj": stack[3, :rows],
        "model.layers.1.mlp.experts.3.up_proj": stack[3, rows:],
    }.items():
        parts = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{key}.")}
        theirs = compressor.decompress(parts, scheme)["weight"].to(ours.dtype)
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("case", [QWEN3_5_MOE, MIXTRAL], ids=lambda case: case.id)
def test_other_families_are_read(case: ModelCase, tmp_path: Path) -> None:
    path = compressed_checkpoint(tmp_path, "nvfp4", case, only=lambda key: ".experts." in key)
    model = load_here(path, case)
    assert len(packed(model)) == 4
    model.save_pretrained(tmp_path / "saved")
    saved, before = tensors_of(tmp_path / "saved"), tensors_of(path)
    experts = [key for key in before if ".experts." in key]
    assert experts
    assert all(same_bits(before[key], saved[key]) for key in experts)


def test_experts_that_are_dense_in_the_checkpoint_stay_dense(tmp_path: Path) -> None:
    path = compressed_checkpoint(tmp_path, "nvfp4", QWEN3_MOE, only=lambda key: "layers.0.mlp.experts" in key)
    model = load_here(path, QWEN3_MOE)
    assert [name for name, _ in packed_modules(model)] == ["model.layers.0.mlp.experts"]
    model.save_pretrained(tmp_path / "saved")
    assert same_tensors(tmp_path / "saved", tensors_of(path))


def test_dense_experts_may_be_named_one_by_one(tmp_path: Path) -> None:
    """compressed-tensors names every linear layer that stays dense, those of experts among them."""
    names = [f"model.layers.1.mlp.experts.{i}.{name}_proj" for i in range(6) for name in ("gate", "up", "down")]
    path = compressed_checkpoint(
        tmp_path, "nvfp4", QWEN3_MOE, only=lambda key: "layers.0.mlp.experts" in key, ignore=["lm_head", *names]
    )
    model = load_here(path, QWEN3_MOE)
    assert [name for name, _ in packed_modules(model)] == ["model.layers.0.mlp.experts"]
    dense = load(tmp_path / "dense", QWEN3_MOE).state_dict()
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{name}"
        assert same_bits(model.state_dict()[key], dense[key])


def test_a_model_without_experts_gets_dense_linear_layers(tmp_path: Path) -> None:
    llama = ModelCase("llama", "", "LlamaForCausalLM", "LlamaConfig")
    path = compressed_checkpoint(tmp_path, "nvfp4", llama)
    model = load_here(path, llama)
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "saved")
    again = load_here(tmp_path / "saved", llama)
    assert torch.equal(logits(model), logits(again))
    assert not torch.equal(logits(model), logits(load_here(tmp_path / "dense", llama)))


def test_each_process_loads_its_experts(gpt_oss: Path, qwen3: Path) -> None:
    for path, case in ((gpt_oss, GPT_OSS), (qwen3, QWEN3_MOE)):
        whole = packed(load_here(path, case))
        for rank in range(2):
            with taking(share(path, rank, 2)):
                held = packed(load_here(path, case))
            for name, weights in held.items():
                expected = whole[name].narrow(*share(path, rank, 2).of(whole[name].shape[0]))
                assert weights.format == expected.format
                assert all(torch.equal(value, expected.tensors()[part]) for part, value in weights.tensors().items())


def test_an_adapter_is_merged_into_the_format(qwen3: Path) -> None:
    model = load_here(qwen3, QWEN3_MOE)
    quant_type = model.hf_quantizer.quantization_config.quant_type
    before = {name: weights.dequantize(torch.float32) for name, weights in packed(model).items()}
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(model, config)
    layer = adapted.base_model.model.model.layers[0].mlp.experts
    delta = layer.get_delta_weight("default")
    merged = packed(adapted.merge_and_unload())
    name = "model.layers.0.mlp.experts.down_proj"
    expected = quantized(before[name] + delta.float(), quant_type)
    assert merged[name].format.quant_type == quant_type
    assert torch.equal(merged[name].packed, expected.packed)


def _adapted_gpt_oss(path: Path, parameter: str, **options: Any) -> Any:
    """gpt-oss with LoRA on one parameter of its experts, whose hidden and intermediate sizes are equal."""
    model = load_here(path, GPT_OSS, dtype=torch.float32, **options)
    assert packed(model)["model.layers.0.mlp.experts.down_proj"].shape[1:] == (64, 64)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_parameters=[f"mlp.experts.{parameter}"], init_lora_weights=False)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("kind", ["published", *FORMATS])
def test_merging_into_dense_experts_of_gpt_oss(kind: str, parameter: str, merged_before: bool, tmp_path: Path) -> None:
    """The experts are (E, out, in) in 4 bits and (E, in, out) when they are dense, and the adapter follows them."""
    path = gpt_oss_checkpoint(tmp_path, intermediate_size=64)
    options: dict[str, Any] = {}
    if kind != "published":
        path = tmp_path / "dense"
        options["quantization_config"] = Mxfp4Config() if kind == "mxfp4" else published.compressed_config(kind)
    model = _adapted_gpt_oss(path, parameter, **options)
    expected = logits(model)
    if merged_before:
        model.merge_adapter()
    merged = model.merge_and_unload(dtype=torch.float32)
    assert not packed(merged)
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_adapters_of_gpt_oss_follow_experts_that_are_dequantized(tmp_path: Path) -> None:
    path = gpt_oss_checkpoint(tmp_path, intermediate_size=64)
    model = _adapted_gpt_oss(path, "down_proj")
    expected = logits(model)
    model.get_base_model().dequantize()
    assert not packed(model)
    for implementation in ("eager", "moe_fused"):
        model.get_base_model().set_experts_implementation(implementation)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_the_config_of_dense_experts_names_no_format(tmp_path: Path) -> None:
    """Experts that became dense, or always were, are saved without a format, and are loaded again as they were."""
    attention = compressed_checkpoint(
        tmp_path / "attention", "nvfp4", QWEN3_MOE, only=lambda key: is_linear(key) and ".experts." not in key
    )
    experts = compressed_checkpoint(tmp_path / "experts", "nvfp4", QWEN3_MOE)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    merged: Any = get_peft_model(load_here(experts, QWEN3_MOE), config).merge_and_unload(dtype=torch.bfloat16)
    for name, model in (("loaded", load_here(attention, QWEN3_MOE)), ("merged", merged)):
        assert not packed(model)
        model.save_pretrained(tmp_path / name)
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))
        assert not [key for key in tensors_of(tmp_path / name) if key.endswith("weight_packed")]
        again = load_here(tmp_path / name, QWEN3_MOE)
        for key, value in model.state_dict().items():
            assert same_bits(again.state_dict()[key], value), key


def test_gpt_oss_is_not_saved_with_a_matrix_for_each_expert(gpt_oss: Path, tmp_path: Path) -> None:
    for quant_type in FORMATS:
        config = published.compressed_config(quant_type)
        model = load_here(gpt_oss / "dense", GPT_OSS, quantization_config=config)
        with pytest.raises(ValueError, match=rf"cannot be saved in {quant_type}.*Mxfp4Config\(\)"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


def _global_scales(path: Path) -> dict[str, Tensor]:
    """The global scales of gate and up of every expert, by the names of experts."""
    tensors = tensors_of(path)
    gates = [key for key in tensors if key.endswith("gate_proj.weight_global_scale")]
    assert gates
    return {key: torch.stack([tensors[key], tensors[key.replace("gate_proj", "up_proj")]]) for key in gates}


def test_gate_and_up_get_one_global_scale(tmp_path: Path) -> None:
    """It holds for what is quantized and for what is merged. What others published so that they differ stays as it is."""
    source = compressed_checkpoint(tmp_path / "source", "nvfp4", QWEN3_MOE)
    published_scales = _global_scales(source)
    assert any(not torch.equal(*pair) for pair in published_scales.values())
    model = load_here(source, QWEN3_MOE)
    model.save_pretrained(tmp_path / "saved")
    saved = _global_scales(tmp_path / "saved")
    assert all(torch.equal(pair, saved[key]) for key, pair in published_scales.items())

    config = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"], init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload().save_pretrained(tmp_path / "merged")
    dense = load_here(source / "dense", QWEN3_MOE, quantization_config=published.compressed_config("nvfp4"))
    dense.save_pretrained(tmp_path / "quantized")
    for name in ("merged", "quantized"):
        assert all(torch.equal(*pair) for pair in _global_scales(tmp_path / name).values()), name


def _losses(model: PreTrainedModel, steps: int) -> list[float]:
    """Trains an adapter of the experts on one batch, and returns the loss of each step."""
    torch.manual_seed(0)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_parameters=targets))
    optimizer = torch.optim.AdamW([value for value in adapted.parameters() if value.requires_grad], lr=5e-3)
    batch, losses = tokens(device=DEVICE), []
    for _ in range(steps):
        loss = adapted(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def test_a_hundred_steps_are_those_of_transformers_experts(gpt_oss: Path, qwen3: Path) -> None:
    """In fp32, over the dequantized weights."""
    for path, case in ((gpt_oss, GPT_OSS), (qwen3, QWEN3_MOE)):
        ours = _losses(load_here(path, case, dtype=torch.float32), 100)
        dense = load_here(path, case, dtype=torch.float32).dequantize()
        dense.set_experts_implementation("eager")
        theirs = _losses(dense, 100)
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-3, atol=2e-3)
        assert ours[-1] < 0.9 * ours[0]


# What is refused, and what is left to Transformers.


Edit = Callable[[dict[str, Tensor]], Any]


def _assert_refused(source: Path, case: ModelCase, edit: Edit, message: str, target: Path) -> None:
    """A copy of a checkpoint whose tensors were edited is refused with this message."""
    tensors = tensors_of(source)
    edit(tensors)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    with pytest.raises(ValueError, match=message):
        load_here(rewrite(source, target, tensors, config), case)


def _gpt_oss_changes() -> dict[str, tuple[Edit, str]]:
    down = "model.layers.1.mlp.experts.down_proj"
    return {
        "no scales": (lambda t: t.pop(f"{down}_scales"), rf"{down}_scales is missing"),
        "no blocks": (lambda t: t.pop(f"{down}_blocks"), rf"{down}_blocks is missing"),
        "no stack": (lambda t: (t.pop(f"{down}_blocks"), t.pop(f"{down}_scales")), rf"{down} is missing"),
        "another shape": (
            lambda t: t.update({f"{down}_blocks": t[f"{down}_blocks"][:, 1:].clone()}),
            rf"{down}_blocks must be uint8 of shape .*, got uint8 of shape",
        ),
        "another dtype": (
            lambda t: t.update({f"{down}_scales": t[f"{down}_scales"].float()}),
            rf"{down}_scales must be uint8 of shape .*, got float32",
        ),
        "fewer experts": (
            lambda t: t.update({f"{down}_scales": t[f"{down}_scales"][1:].clone()}),
            rf"{down}_scales must be uint8 of shape",
        ),
    }


@pytest.mark.parametrize("change", _gpt_oss_changes())
def test_broken_stacks_are_refused(change: str, gpt_oss: Path, tmp_path: Path) -> None:
    _assert_refused(gpt_oss, GPT_OSS, *_gpt_oss_changes()[change], tmp_path)


def _qwen3_changes() -> dict[str, tuple[Edit, str]]:
    up = "model.layers.1.mlp.experts.4.up_proj"
    return {
        "no scale": (lambda t: t.pop(f"{up}.weight_scale"), rf"{up}\.weight_scale is missing"),
        "no matrix": (
            lambda t: [
                t.pop(f"{up}.{part}", None) for part in ("weight_packed", "weight_scale", "weight_global_scale")
            ],
            rf"{up}\.weight_packed is missing",
        ),
        "one more expert": (
            lambda t: t.update({f"{up}.weight_packed".replace(".4.", ".6."): t[f"{up}.weight_packed"].clone()}),
            r"6\.up_proj\.weight_packed belongs to expert 6",
        ),
        "another shape": (
            lambda t: t.update({f"{up}.weight_packed": t[f"{up}.weight_packed"][1:].clone()}),
            rf"{up}\.weight_packed must be uint8 of shape \(32, 32\), got uint8 of shape \(31, 32\)",
        ),
    }


@pytest.mark.parametrize("change", _qwen3_changes())
def test_broken_matrices_are_refused(change: str, qwen3: Path, tmp_path: Path) -> None:
    _assert_refused(qwen3, QWEN3_MOE, *_qwen3_changes()[change], tmp_path)


def test_another_format_than_the_configs_is_refused(gpt_oss: Path, tmp_path: Path) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    with pytest.raises(ValueError, match=r"experts\.\w+_proj_\w+ is not a tensor of nf4 weights"):
        load_here(rewrite(gpt_oss, tmp_path, tensors_of(gpt_oss), config), GPT_OSS)


def test_a_format_that_the_checkpoint_does_not_have_is_refused(gpt_oss: Path, qwen3: Path, tmp_path: Path) -> None:
    """Whichever class of config asks for it. Transformers would name the classes, or keep the checkpoint's format."""
    held = json.loads((qwen3 / "config.json").read_text(encoding="utf-8"))["quantization_config"]["format"][:5]
    other = {"nvfp4": "mxfp4", "mxfp4": "nvfp4"}[held]
    bitsandbytes = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    in_nf4 = rewrite(qwen3 / "dense", tmp_path, tensors_of(qwen3 / "dense"), bitsandbytes.to_dict())
    for path, case, config, wanted, has in (
        (qwen3, QWEN3_MOE, moe_fused.quantization_config(other), other, held),  # type: ignore[arg-type]
        (qwen3, QWEN3_MOE, bitsandbytes, "nf4", held),
        (gpt_oss, GPT_OSS, moe_fused.quantization_config("nvfp4"), "nvfp4", "mxfp4"),
        (gpt_oss, GPT_OSS, BitsAndBytesConfig(load_in_4bit=True), "fp4", "mxfp4"),
        (in_nf4, QWEN3_MOE, moe_fused.quantization_config("nvfp4"), "nvfp4", "nf4"),
        (in_nf4, QWEN3_MOE, Mxfp4Config(), "mxfp4", "nf4"),
    ):
        with pytest.raises(ValueError, match=f"asks for {wanted}, but the checkpoint is in {has}: leave quantization_"):
            load_here(path, case, quantization_config=config)


def test_the_format_of_the_checkpoint_may_be_asked_for(gpt_oss: Path, qwen3: Path) -> None:
    """In whichever layout the config would write it, the checkpoint is read as it is."""
    expected = load_here(gpt_oss, GPT_OSS)
    model = load_here(gpt_oss, GPT_OSS, quantization_config=moe_fused.quantization_config("mxfp4"))
    assert same_state(model, expected)
    assert isinstance(model.hf_quantizer, published.Mxfp4ExpertsQuantizer)
    held: Any = json.loads((qwen3 / "config.json").read_text(encoding="utf-8"))["quantization_config"]["format"][:5]
    expected = load_here(qwen3, QWEN3_MOE)
    configs = [moe_fused.quantization_config(held), *([Mxfp4Config()] if held == "mxfp4" else [])]
    for config in configs:
        assert same_state(load_here(qwen3, QWEN3_MOE, quantization_config=config), expected)


def test_a_config_that_contradicts_itself_is_refused(qwen3: Path, tmp_path: Path) -> None:
    values = json.loads((qwen3 / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    values["config_groups"]["group_0"]["format"] = values["format"]
    rewrite(qwen3, tmp_path, tensors_of(qwen3), values)
    load_here(tmp_path, QWEN3_MOE)
    rewrite(qwen3, tmp_path, tensors_of(qwen3), values | {"format": "pack-quantized"})
    with pytest.raises(ValueError, match=r"must have one format, got pack-quantized for the whole and ..fp4-pack"):
        load_here(tmp_path, QWEN3_MOE)


def test_the_experts_cannot_be_offloaded(gpt_oss: Path, qwen3: Path) -> None:
    for path, case in ((gpt_oss, GPT_OSS), (qwen3, QWEN3_MOE)):
        places: dict[str, Any] = {"": "meta", "model.layers.1": "cpu"}
        with pytest.raises(
            ValueError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj is in 4 bits and cannot be"
        ):
            load(path, case, device_map=places)


def test_one_layout_is_saved(gpt_oss: Path, qwen3: Path, tmp_path: Path) -> None:
    for path, case, only, other in (
        (gpt_oss, GPT_OSS, "fused", "per_expert"),
        (qwen3, QWEN3_MOE, "per_expert", "fused"),
    ):
        model: Any = load_here(path, case)
        with pytest.raises(ValueError, match=f"layout must be '{only}', got '{other}': .* moe-fused convert model"):
            moe_fused.save_format(model, other)
        for unknown in ("published", "published_per_expert", "gguf"):
            with pytest.raises(ValueError, match=f"layout must be one of per_expert, fused, got '{unknown}'"):
                moe_fused.save_format(model, unknown)
        moe_fused.save_format(model, only)
        model.save_pretrained(tmp_path / only)
        saved = tensors_of(tmp_path / only)
        experts = {key: value for key, value in tensors_of(path).items() if ".experts." in key}
        assert all(same_bits(saved[key], value) for key, value in experts.items())


def test_other_schemes_are_left_to_transformers() -> None:
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    for scheme, name in (("W4A16", "pack-quantized"), ("FP8", "float-quantized"), ("MXFP8", "mxfp8-quantized")):
        config: Any = QuantizationConfig(
            config_groups={"group_0": preset_name_to_scheme(scheme, ["Linear"])},
            format=name,
            quantization_status="compressed",
        )
        values = json.loads(config.model_dump_json())
        assert compressed_quant_type(values) is None
        made = AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"].from_dict(values)
        assert type(made).__module__.startswith("transformers.")
        assert type(AUTO_QUANTIZER_MAPPING["compressed-tensors"](made)).__module__.startswith("transformers.")


def test_a_config_that_dequantizes_gets_transformers_own_quantizer(qwen3: Path) -> None:
    values = json.loads((qwen3 / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"].from_dict(values)
    assert isinstance(AUTO_QUANTIZER_MAPPING["compressed-tensors"](config), published.CompressedExpertsQuantizer)
    config.dequantize = True
    assert type(AUTO_QUANTIZER_MAPPING["compressed-tensors"](config)).__module__.startswith("transformers.")


def test_a_dense_checkpoint_that_cannot_be_held_is_not_called_quantized(tmp_path: Path) -> None:
    from .four_bit import build

    build(QWEN3_MOE, hidden_size=48).save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="Load the model without this quantization_config") as caught:
        load_here(tmp_path, QWEN3_MOE, quantization_config=moe_fused.quantization_config("mxfp4"))
    assert "its dense checkpoint" not in str(caught.value)


def test_disable_gives_transformers_quantizers_back() -> None:
    assert AUTO_QUANTIZER_MAPPING["mxfp4"].__module__ == published.__name__
    moe_fused.disable()
    for method in ("mxfp4", "compressed-tensors"):
        assert AUTO_QUANTIZER_MAPPING[method].__module__.startswith("transformers.")
        assert AUTO_QUANTIZATION_CONFIG_MAPPING[method].__module__.startswith("transformers.")
    assert AutoHfQuantizer.merge_quantization_configs.__module__.startswith("transformers.")


def test_a_dense_model_without_experts_is_refused(tmp_path: Path) -> None:
    from .four_bit import build

    llama = ModelCase("llama", "", "LlamaForCausalLM", "LlamaConfig")
    build(llama).save_pretrained(tmp_path)
    for config in (Mxfp4Config(), published.compressed_config("nvfp4")):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM has no experts that could be held in (mx|nv)fp4"):
            load_here(tmp_path, llama, quantization_config=config)


def test_our_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    """A dense checkpoint that is quantized while it is loaded is saved as compressed-tensors would have saved it.

    Gate and up have one global scale, as llm-compressor gives them and as vLLM needs.
    """
    from compressed_tensors.quantization import preset_name_to_scheme

    from .four_bit import build

    build(QWEN3_MOE).save_pretrained(tmp_path / "dense")
    for quant_type, scheme in (("nvfp4", "NVFP4A16"), ("mxfp4", "MXFP4A16")):
        config = published.compressed_config(quant_type)
        load_here(tmp_path / "dense", QWEN3_MOE, quantization_config=config, dtype="auto").save_pretrained(
            tmp_path / quant_type
        )
        saved = tensors_of(tmp_path / quant_type)
        dense = tensors_of(tmp_path / "dense")
        for key, weight in dense.items():
            if ".experts." not in key:
                assert same_bits(saved[key], weight)
                continue
            partner = key.replace(".up_", ".gate_") if ".up_" in key else key.replace(".gate_", ".up_")
            for part, value in compressed(weight, preset_name_to_scheme(scheme, ["Linear"]), dense[partner]).items():
                assert same_bits(saved[key.removesuffix("weight") + part], value), f"{key} {part}"
        values = json.loads((tmp_path / quant_type / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert compressed_quant_type(values) == quant_type
        assert any(re.search(r"self_attn\.q_proj", name) for name in values["ignore"])


def test_weights_that_are_too_large_are_refused(tmp_path: Path) -> None:
    """bf16 has finite values from which mxfp4 makes 4 · 2^126, which is infinite."""
    from .four_bit import build

    build(QWEN3_MOE).save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"][3, 4] = torch.finfo(torch.bfloat16).max
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    says = r"layers\.1\.mlp\.experts\.down_proj holds values that become NaN or infinite in mxfp4"
    with pytest.raises(ValueError, match=says):
        load_here(tmp_path, QWEN3_MOE, quantization_config=Mxfp4Config(), dtype="auto")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from .four_bit import build

    build(QWEN3_MOE).save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    key = "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors[key][3, 4] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{key} holds NaN or infinite values"):
        load_here(tmp_path, QWEN3_MOE, quantization_config=Mxfp4Config(), dtype="auto")
