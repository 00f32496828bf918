"""``BitsAndBytesConfig(load_in_4bit=True)`` on models with experts: loading, saving, and everything else models do."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.core_model_loading import ErnieFuseAndSplitTextVisionExperts, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

import moe_fused
from moe_fused.checkpoints.names import Names, Target
from moe_fused.integrations.quantizer.packed_experts import PackedConfig, packed_modules
from tests.bits import dequantize_4bit

from .conftest import DEVICE, Calls
from .four_bit import (
    FOUR_BIT,
    MIXTRAL,
    SIZES,
    build,
    config,
    load,
    logits,
    packed,
    same_bits,
    same_state,
    through_4bit,
)
from .models import GPT_OSS, QWEN3_MOE, ModelCase, experts_modules, tokens
from .saved import same_tensors, tensors_of

pytestmark = pytest.mark.usefixtures("enabled")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]


def dequantized_matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All packed weights as dense bf16 matrices, by parameter, expert and projection."""
    result = {}
    for name, weights in packed(model).items():
        stack = weights.dequantize(torch.bfloat16).cpu()
        for expert, matrices in enumerate(stack):
            for projection, matrix in enumerate(matrices.chunk(weights.format.projections)):
                result[f"{name} {expert} {projection}"] = matrix
    return result


@pytest.mark.parametrize(
    ("case", "quant_type", "double_quant"),
    [
        pytest.param(QWEN3_MOE, "fp4", False, id="qwen3_moe-fp4"),
        pytest.param(MIXTRAL, "nf4", False, id="mixtral-renamed keys"),
        *(pytest.param(case, "nf4", True, id=case.id) for case in FOUR_BIT),
    ],
)
def test_quantizes_on_loading_as_bitsandbytes(
    case: ModelCase, quant_type: str, double_quant: bool, tmp_path: Path
) -> None:
    original = build(case)
    original.save_pretrained(tmp_path / "dense")
    options = config(bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant)
    model = load(tmp_path / "dense", case, quantization_config=options)

    weights = packed(model)
    assert len(weights) == 2 * case.moe_layers
    ours = dequantized_matrices(model)
    for name, value in weights.items():
        form = value.format
        assert form.shape == original.get_parameter(name).shape
        assert (form.quant_type, form.double_quant, form.blocksize) == (quant_type, double_quant, 64)
        stack = original.get_parameter(name)
        for expert, matrices in enumerate(stack.detach()):
            for projection, matrix in enumerate(matrices.chunk(form.projections)):
                theirs = through_4bit(matrix.contiguous(), quant_type=quant_type, compress_statistics=double_quant)
                assert torch.equal(ours[f"{name} {expert} {projection}"], theirs), (name, expert, projection)

    model.save_pretrained(tmp_path / "saved")
    assert same_state(load(tmp_path / "saved", case), model)


def test_logits_equal_those_of_the_dequantized_model(dense: Path) -> None:
    """Logits equal those of the dequantized model. Attention stays dense, so that only the experts can differ."""
    options = config(llm_int8_skip_modules=LINEAR, bnb_4bit_compute_dtype=torch.float32)
    model = load(dense, quantization_config=options, dtype=torch.float32)
    reference = load(dense, dtype=torch.float32, experts_implementation="eager", device_map=DEVICE)
    with torch.no_grad():
        for name, weights in packed(model).items():
            reference.get_parameter(name).copy_(weights.dequantize(torch.float32))
        ours, theirs = logits(model), logits(reference)
        unquantized = logits(load(dense, dtype=torch.float32, device_map=DEVICE))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - unquantized).abs().max() > 1e-2  # or 4 bits would not show


def test_gpt_oss_is_trained_as_its_dequantized_self(tmp_path: Path) -> None:
    """Weights of one input lie side by side, gate and up features alternate, and biases stay dense and trainable."""
    build(GPT_OSS).save_pretrained(tmp_path)
    model = load(tmp_path, GPT_OSS, quantization_config=config(llm_int8_skip_modules=LINEAR), dtype=torch.float32)
    reference = load(tmp_path, GPT_OSS, dtype=torch.float32, experts_implementation="eager", device_map=DEVICE)
    with torch.no_grad():
        for name, weights in packed(model).items():
            reference.get_parameter(name).copy_(weights.dequantize(torch.float32))
    ids = tokens(device=DEVICE)
    for trained in (model, reference):
        trained(ids, labels=ids).loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    wanted = {name: p.grad for name, p in reference.named_parameters() if name not in packed(model)}
    assert {name for name in wanted if name.endswith("_bias")}
    for name, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_no_other_implementation_computes_packed_experts(implementation: str, dense: Path) -> None:
    model = load(dense, quantization_config=config(), experts_implementation=implementation)
    with torch.no_grad():
        before = logits(model)
        model.set_experts_implementation("moe_fused")
        ours = logits(model)
        model.set_experts_implementation(implementation)
        after = logits(model)
    assert torch.equal(before, ours)
    assert torch.equal(after, ours)
    moe_fused.disable()
    with pytest.raises(KeyError, match="moe_fused"):
        logits(model)


def test_computes_in_the_compute_dtype(dense: Path, calls: Calls) -> None:
    """Experts cast their inputs to the compute dtype and their outputs back, as 4-bit linear layers do."""
    model = load(dense, quantization_config=config(bnb_4bit_compute_dtype=torch.float16), dtype=torch.bfloat16)
    with torch.no_grad():
        values = logits(model)
    assert values.dtype == torch.bfloat16
    assert calls.count == 2
    for hidden_states, _, _, up, down in calls.arguments:
        assert hidden_states.dtype == up.dtype == down.dtype == torch.float16


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "gradient checkpointing"])
def test_gradients_reach_inputs_and_not_packed_weights(recompute: bool, dense: Path) -> None:
    model = load(dense, quantization_config=config(bnb_4bit_compute_dtype=torch.bfloat16)).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.embed_tokens.weight.requires_grad_()
    ids = tokens(device=str(model.device))
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0
    assert all(p.grad is None for name, p in model.named_parameters() if ".experts." in name)


def test_compiles(dense: Path) -> None:
    model = load(dense, quantization_config=config(), dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    torch.manual_seed(0)
    arguments = [x.to(model.device) for x in (torch.randn(5, 64), torch.randint(0, 6, (5, 2)), torch.rand(5, 2))]
    with torch.no_grad():
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")(*arguments)
        torch.testing.assert_close(compiled, experts(*arguments))


# What can be asked for when loading.


def test_skipped_experts_stay_dense(dense: Path, tmp_path: Path) -> None:
    skip = ["lm_head", "model.layers.0.mlp.experts"]
    model = load(dense, quantization_config=config(llm_int8_skip_modules=skip))
    assert {name.rpartition(".")[0] for name in packed(model)} == {"model.layers.1.mlp.experts"}
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    for layout in ("per_expert", "fused"):
        moe_fused.save_format(model, layout)
        model.save_pretrained(tmp_path / layout)
        assert same_state(load(tmp_path / layout), model)
        keys = load_file(tmp_path / layout / "model.safetensors").keys()
        # Dense experts are saved as they were in the checkpoint that they came from.
        assert "model.layers.0.mlp.experts.5.gate_proj.weight" in keys
        assert "model.layers.0.mlp.experts.5.gate_proj.weight.absmax" not in keys


def test_all_experts_skipped(dense: Path, tmp_path: Path) -> None:
    model = load(dense, quantization_config=config(llm_int8_skip_modules=["lm_head", "experts"]))
    assert not packed(model)
    model.save_pretrained(tmp_path)
    assert same_state(load(tmp_path), model)


def test_skipping_one_expert_is_an_error(dense: Path) -> None:
    skip = ["model.layers.0.mlp.experts.3.gate_proj"]
    with pytest.raises(
        ValueError, match=r"llm_int8_skip_modules must name all experts .*layers\.0\.mlp\.experts, or none"
    ):
        load(dense, quantization_config=config(llm_int8_skip_modules=skip))


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"low_cpu_mem_usage": True},
        {"dtype": "auto"},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_loading_options_change_nothing(options: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    # Bits differ between CPU and GPU, in bitsandbytes itself.
    on_cpu = {"device_map": {"": "cpu"}} if "cpu" in str(options.get("device_map")) else {}
    plain = load(dense, quantization_config=config(), **on_cpu)
    model = load(dense, quantization_config=config(), **options)
    assert same_state(model, plain)
    model.save_pretrained(tmp_path)
    assert same_state(load(tmp_path, **options), model)


def test_dtype_is_that_of_the_weights_before(dense: Path, tmp_path: Path) -> None:
    """Experts are quantized from the dtype asked for, and checkpoints record it, as for 4-bit linear layers."""
    model = load(dense, quantization_config=config(), dtype=torch.float16)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        key = "model.layers.0.mlp.experts.0.gate_proj.weight.quant_state.bitsandbytes__nf4"
        assert json.loads(bytes(file.get_tensor(key).tolist()))["dtype"] == "float16"


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_sharded_checkpoints(layout: Any, dense: Path, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 3
    model = load(tmp_path / "dense", quantization_config=config())
    assert same_state(model, load(dense, quantization_config=config()))
    moe_fused.save_format(model, layout)
    model.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    assert same_state(load(tmp_path / "saved"), model)


def test_base_model_and_auto_class(dense: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config())
    base = AutoModel.from_pretrained(dense, quantization_config=config())
    assert same_state(base, whole.model)
    whole.save_pretrained(tmp_path)
    assert same_state(AutoModel.from_pretrained(tmp_path), whole.model)


# Saving.


def test_a_head_that_the_checkpoint_does_not_have(dense: Path, tmp_path: Path) -> None:
    model = load(dense, quantization_config=config())
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    assert type(classifier.score) is torch.nn.Linear
    assert classifier.score.weight.is_floating_point()
    assert same_state(classifier.model, model.model)


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize(
    ("case", "skip"),
    [
        pytest.param(QWEN3_MOE, None, id="qwen3_moe"),
        # The layer has another name in the part, and so in its config.
        pytest.param(
            QWEN3_MOE, ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts"], id="partly dense"
        ),
        pytest.param(MIXTRAL, None, id="mixtral-renamed keys"),
    ],
)
def test_saving_a_model_without_its_head(case: ModelCase, skip: list[str] | None, layout: Any, tmp_path: Path) -> None:
    build(case).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", case, quantization_config=config(llm_int8_skip_modules=skip))
    moe_fused.save_format(model.model, layout)
    for path in (tmp_path / "decoder", tmp_path / "again"):
        model.model.save_pretrained(path)
        decoder = AutoModel.from_pretrained(path)
        assert len(packed(decoder)) == (2 if skip else 4)
        assert same_state(decoder, model.model)
    assert same_tensors(tmp_path / "decoder", tmp_path / "again")
    fused = [key for key in tensors_of(tmp_path / "decoder") if "gate_up" in key]
    assert bool(fused) == (layout == "fused")
    model.save_pretrained(tmp_path / "whole")
    assert same_state(load(tmp_path / "whole", case), model)


def test_saving_the_text_model_of_another(tmp_path: Path) -> None:
    """The text model of a larger model saves that it is in 4 bits, which its config does not say while it is a part."""
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = {**SIZES, **sizes, "num_experts": 6, "num_experts_per_tok": 3}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    original = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    original.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "dense", quantization_config=config())
    part = model.model.language_model
    assert len(packed(part)) == 4
    part.save_pretrained(tmp_path / "text")
    assert same_state(type(part).from_pretrained(tmp_path / "text"), part)
    model.save_pretrained(tmp_path / "whole")
    assert same_state(type(model).from_pretrained(tmp_path / "whole"), model)
    model.dequantize()
    for name, saved in (("dense whole", model), ("dense text", part)):
        saved.save_pretrained(tmp_path / name)
        assert "quantization_config" not in (tmp_path / name / "config.json").read_text(encoding="utf-8")
        again = type(saved).from_pretrained(tmp_path / name)
        assert not packed(again)
        assert same_state(again, saved)


def test_dequantizing_a_model_without_its_head(dense: Path, tmp_path: Path) -> None:
    """Dequantizing a model without its head leaves the whole model dequantized, for its head never was in 4 bits."""
    model = load(dense, quantization_config=config())
    model.model.dequantize()
    model.save_pretrained(tmp_path)
    assert tensors_of(tmp_path).keys() == tensors_of(dense).keys()
    assert same_state(load(tmp_path), model)


def test_default_checkpoint_is_that_of_bitsandbytes(dense: Path, tmp_path: Path) -> None:
    """By default, a checkpoint has the keys that bitsandbytes reads and writes, and no others."""
    import bitsandbytes as bnb

    model = load(dense, quantization_config=config())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not [key for key in saved if "gate_up" in key]
    sources = load_file(dense / "model.safetensors")
    for expert, name in ((0, "gate_proj"), (3, "up_proj"), (5, "down_proj")):
        key = f"model.layers.1.mlp.experts.{expert}.{name}.weight"
        parts = {part.removeprefix(f"{key}."): value for part, value in saved.items() if part.startswith(f"{key}.")}
        weight = bnb.nn.Params4bit.from_prequantized(saved[key], dict(parts), device=DEVICE)
        state = weight.quant_state.as_dict(packed=True)
        assert state.keys() == parts.keys()
        assert all(same_bits(state[part], parts[part]) for part in parts)
        theirs = dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(theirs.cpu(), through_4bit(sources[key]))


def test_routers_are_named_for_transformers_4(dense: Path, tmp_path: Path) -> None:
    """Routers are listed as skipped, because Transformers 4 has them as linear layers and would expect 4 bits."""
    load(dense, quantization_config=config()).save_pretrained(tmp_path / "qwen")
    build(MIXTRAL).save_pretrained(tmp_path / "dense")
    load(tmp_path / "dense", MIXTRAL, quantization_config=config()).save_pretrained(tmp_path / "mixtral")
    for name, routers in (("qwen", "model.layers.{}.mlp.gate"), ("mixtral", "model.layers.{}.block_sparse_moe.gate")):
        values = json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        skipped = values["llm_int8_skip_modules"]
        assert {"lm_head", routers.format(0), routers.format(1)} == set(skipped)


def test_save_format_is_checked(dense: Path) -> None:
    model = load(dense, quantization_config=config())
    with pytest.raises(ValueError, match="layout must be one of per_expert, fused, got 'gguf'"):
        moe_fused.save_format(model, "gguf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must have 4-bit experts, got a Qwen3MoeForCausalLM without"):
        moe_fused.save_format(load(dense), "fused")


# What models do.


def test_dequantize(dense: Path, tmp_path: Path) -> None:
    model = load(dense, quantization_config=config(bnb_4bit_compute_dtype=torch.float32), dtype=torch.float32)
    expected = {name: weights.dequantize(torch.float32) for name, weights in packed(model).items()}
    with torch.no_grad():
        before = logits(model)
        model.dequantize()
        assert not list(packed_modules(model))
        assert all(torch.equal(model.get_parameter(name), value) for name, value in expected.items())
        assert not any(isinstance(module.config, PackedConfig) for module in experts_modules(model))
        for implementation in ("eager", "moe_fused"):
            model.set_experts_implementation(implementation)
            torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(dense / "model.safetensors").keys()
    assert same_state(load(tmp_path, dtype=torch.float32), model)


def test_memory_footprint(dense: Path) -> None:
    model = load(dense, quantization_config=config())
    experts = sum(weights.nbytes for weights in packed(model).values())
    counted = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    assert counted == experts
    others = sum(p.nbytes for name, p in model.named_parameters() if ".experts." not in name)
    assert model.get_memory_footprint(return_buffers=False) == experts + others
    parameters = 2 * sum(64 * 96 for _ in range(6))
    # 4 bits and a byte for each 64 weights; groups of 256 blocks are mostly empty in matrices this small.
    assert experts / parameters < 0.5 + 1 / 64 + 8 / 2048 + 1e-9


def test_the_size_for_device_maps_is_the_real_one(dense: Path) -> None:
    model = load(dense, quantization_config=config())
    quantizer = model.hf_quantizer
    for name, weights in packed(model).items():
        placeholder = torch.empty(weights.shape, device="meta")
        assert quantizer.param_element_size(model, name, placeholder) * placeholder.numel() == weights.nbytes


def test_prepare_model_for_kbit_training_leaves_packed_weights(dense: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(dense, quantization_config=config())
    before = {name: weights.tensors() for name, weights in packed(copy.deepcopy(model)).items()}
    model = peft.prepare_model_for_kbit_training(model)
    assert model.model.norm.weight.dtype == torch.float32
    for name, weights in packed(model).items():
        assert all(torch.equal(value, before[name][part]) for part, value in weights.tensors().items())


def test_deepcopy_and_state_dict(dense: Path, tmp_path: Path) -> None:
    # 4-bit linear layers write state dicts that they cannot load.
    model = load(dense, quantization_config=config(llm_int8_skip_modules=LINEAR))
    twin = copy.deepcopy(model)
    assert same_state(twin, model)
    for weights in packed(model).values():
        weights.packed.zero_()
    assert not same_state(twin, model)
    model.load_state_dict(twin.state_dict())
    assert same_state(twin, model)
    twin.dequantize()
    model.save_pretrained(tmp_path)
    assert same_state(load(tmp_path), model)


def test_kernelize(dense: Path) -> None:
    model = load(dense, quantization_config=config(bnb_4bit_compute_dtype=torch.float16))
    with torch.no_grad():
        before = logits(model)
        for layer in ("Qwen3MoeExperts", "Qwen3MoeSparseMoeBlock"):
            twin = moe_fused.kernelize(copy.deepcopy(model), layer=layer)
            assert torch.equal(logits(twin), before)


def test_changed_modules_are_refused(dense: Path) -> None:
    """Another implementation would multiply with packed bytes."""
    model = load(dense, quantization_config=config())
    model.model.layers[0].mlp.experts.register_parameter("surprise", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(NotImplementedError, match=r"4-bit weights has no other implementation: .* surprise"):
        logits(model)


# What is left alone.


def test_disable_puts_the_own_quantizer_back() -> None:
    moe_fused.enable()
    moe_fused.disable()
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is Bnb4BitHfQuantizer
    moe_fused.enable()
    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is not Bnb4BitHfQuantizer


def test_what_is_not_supported_stays_dense(tmp_path: Path) -> None:
    build(hidden_size=40, moe_intermediate_size=12).save_pretrained(tmp_path / "dense")
    reason = r"Qwen3MoeExperts stays dense with load_in_4bit=True: .* multiple of the blocksize 64"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(tmp_path / "dense", quantization_config=config(), dtype=torch.bfloat16)
    assert len([warning for warning in caught if re.search(reason, str(warning.message))]) == 1
    assert not packed(model)
    assert type(model.get_submodule("model.layers.0.self_attn.q_proj")).__name__ == "Linear4bit"
    assert all(experts.down_proj.dtype == torch.bfloat16 for experts in experts_modules(model))
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").config.quantization_config.load_in_4bit


def test_experts_that_checkpoints_hold_together_stay_dense() -> None:
    """Experts stay dense if a checkpoint stacks those of text and images together, as that of Ernie 4.5-VL does.

    No such checkpoint is at hand, so this asks the quantizer alone.
    """
    converter = WeightConverter(
        ["experts.*.down_proj.weight"],
        ["text.experts.down_proj", "images.experts.down_proj"],
        [ErnieFuseAndSplitTextVisionExperts()],
    )
    quantizer = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"](config(), pre_quantized=False)
    targets = [Target(f"{block}.experts.down_proj", (6, 64, 32), 1) for block in ("text", "images", "other")]
    quantizer.names = Names(targets)
    with pytest.warns(
        UserWarning, match=r"images\.experts, text\.experts stays dense .*: checkpoints hold its experts together"
    ):
        kept, converters = quantizer._with_converters([converter])
    assert [target.name for target in kept] == ["other.experts.down_proj"]
    assert not converters  # of ours: Transformers' own goes on


def test_the_default_compute_dtype_is_slower_than_the_model(dense: Path, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(UserWarning, match=r"compute in float32.* although the model is torch\.bfloat16"):
        load(dense, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    recwarn.clear()
    load(dense, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert not [warning for warning in recwarn if "compute in float32" in str(warning.message)]


def test_the_dtype_of_storage(dense: Path, tmp_path: Path) -> None:
    stored = load(dense, quantization_config=config(bnb_4bit_quant_storage=torch.bfloat16))
    plain = load(dense, quantization_config=config())
    layers = [model.model.layers[0] for model in (stored, plain)]
    assert {value.dtype for value in layers[0].mlp.experts.parameters()} == {torch.bfloat16}
    assert layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    for (name, weights), other in zip(packed(stored).items(), packed(plain).values(), strict=True):
        for part, value in weights.tensors().items():
            assert torch.equal(value, other.tensors()[part]), f"{name} {part}"
    with torch.no_grad():
        assert torch.equal(logits(stored), logits(plain))
    moe_fused.save_format(stored, "fused")
    stored.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.experts.down_proj"].dtype == torch.uint8
    again = load(tmp_path)
    assert again.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert same_state(again, stored)
    assert again.dequantize().model.layers[0].mlp.experts.down_proj.dim() == 3


def test_models_without_experts_and_8_bits_are_untouched(dense: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).save_pretrained(tmp_path)

    def states() -> list[dict[str, torch.Tensor]]:
        llama = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config())
        eight = load(dense, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
        return [llama.state_dict(), eight.state_dict()]

    ours = states()
    moe_fused.disable()
    for mine, theirs in zip(ours, states(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_enable_without_bitsandbytes() -> None:
    code = """
import sys
sys.modules["bitsandbytes"] = None
import moe_fused
moe_fused.enable()
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print(AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"].__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "Experts4bitQuantizer"
