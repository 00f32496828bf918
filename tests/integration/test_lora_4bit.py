"""LoRA on experts in 4 bits computes and trains as on the dequantized experts, and merges as it says."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel

import moe_fused

from .compare import Pass, assert_near, forward_backward
from .conftest import DEVICE, Calls
from .four_bit import config, load, packed, same_bits
from .lora import BOTH, LINEAR, OPTIONS, adapt, disabled, is_ours, randomize, run, wrappers
from .models import tokens
from .test_lora import losses

pytestmark = pytest.mark.usefixtures("enabled")

TOLERANCE = 1e-5
TARGETS = {"shared": {}, "apart": {"target_modules": LINEAR}, "down only": {"target_modules": ["down_proj"]}}


def quantized(path: Path, **options: Any) -> PreTrainedModel:
    """A model with experts, and nothing else, in 4 bits, in float32."""
    skipped = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    settings = config(bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=skipped, **options)
    return load(path, quantization_config=settings, dtype=torch.float32)


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    dense = copy.deepcopy(model).dequantize()
    dense.set_experts_implementation("eager")
    return dense.float()


def test_computes_what_peft_does_on_dequantized_experts(dense: Path) -> None:
    model = quantized(dense)
    with disabled():
        other = adapt(dequantized(model), target_modules=["q_proj"], target_parameters=BOTH)
    one = adapt(model, target_modules=["q_proj"], target_parameters=BOTH)
    assert all(map(is_ours, wrappers(one)))
    result, expected = forward_backward(one, tokens()), forward_backward(other, tokens())
    assert_near(result, expected, TOLERANCE)
    assert all(".lora_" in name for name in result.gradients)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_equals_the_dense_experts_in_the_kernel(targets: dict[str, Any], dense: Path) -> None:
    model = quantized(dense)
    other = dequantized(model)
    other.set_experts_implementation("moe_fused")
    passes = [forward_backward(adapt(each, **targets), tokens()) for each in (model, other)]
    assert_near(*passes, TOLERANCE)


def test_all_linear_layers(dense: Path) -> None:
    model = load(dense, quantization_config=config(bnb_4bit_compute_dtype=torch.bfloat16), dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        adapted = get_peft_model(model, LoraConfig(**OPTIONS, target_modules="all-linear"))
    randomize(adapted)
    layer = adapted.base_model.model.model.layers[0]
    assert [type(getattr(layer.self_attn, name)).__name__ for name in ("q_proj", "o_proj")] == ["Linear4bit"] * 2
    assert [wrapper.parameter_name for wrapper in wrappers(layer)] == ["down_proj", "gate_up_proj"]
    gradients = forward_backward(adapted, tokens()).gradients
    # A and B of four linear layers and two stacks in two layers.
    assert len(gradients) == 2 * 2 * 6
    assert all(gradient.dtype is torch.float32 and gradient.abs().sum() > 0 for gradient in gradients.values())


def test_adapters_in_the_compute_dtype(dense: Path) -> None:
    model = load(dense, quantization_config=config(bnb_4bit_compute_dtype=torch.bfloat16), dtype=torch.bfloat16)
    adapted = get_peft_model(
        model, LoraConfig(**OPTIONS, target_parameters=BOTH, target_modules=[]), autocast_adapter_dtype=False
    )
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.bfloat16}


def test_trains_as_dequantized_experts(dense: Path) -> None:
    model = quantized(dense)
    with disabled():
        other = adapt(dequantized(model))
    curve, expected = losses(adapt(model)), losses(other)
    assert curve == pytest.approx(expected, rel=1e-3)
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_prepared_for_training(reentrant: bool, dense: Path) -> None:
    model = quantized(dense)
    expected = forward_backward(adapt(copy.deepcopy(model), target_modules=["q_proj", *LINEAR]), tokens())
    prepared = prepare_model_for_kbit_training(model, True, {"use_reentrant": reentrant})
    adapted = adapt(prepared, target_modules=["q_proj", *LINEAR])
    adapted.train()
    assert len(packed(adapted)) == 4
    assert_near(forward_backward(adapted, tokens()), expected, 0.0)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("first", [True, False], ids=["kernelized before", "kernelized after"])
def test_kernelized(first: bool, targets: dict[str, Any], dense: Path, calls: Calls) -> None:
    """4-bit experts with adapters compute the same bits through the layers, trained and evaluated, and merge as before."""
    model = quantized(dense)
    expected = adapt(copy.deepcopy(model), **targets)
    if first:
        moe_fused.kernelize(model)
    model = adapt(model, **targets)
    if not first:
        moe_fused.kernelize(model)
    count = calls.count
    for training in (True, False):
        expected.train(training)
        moe_fused.kernelize(model.train(training)) if not first else model.train(training)
        assert_near(forward_backward(model, tokens()), forward_backward(expected, tokens()), 0.0)
    assert calls.count == count + 8
    merged, merged_too = (each.merge_and_unload() for each in (model, expected))
    with torch.no_grad():
        ids = tokens().to(merged.device)
        assert torch.equal(merged(ids).logits, merged_too(ids).logits)


def expected_merge(model: PeftModel) -> dict[str, Any]:
    """What the experts are to be after merging: quantized as before, from their sum with the adapter's product."""
    result = {}
    for name, weights in packed(model).items():
        wrapper = next(candidate for candidate in wrappers(model) if candidate.weight is weights.packed)
        form = weights.format
        result[name] = type(weights).quantize(
            weights.dequantize(torch.float32) + wrapper.get_delta_weight("default").detach(),
            quant_type=form.quant_type,
            blocksize=form.blocksize,
            double_quant=form.double_quant,
            projections=form.projections,
            dtype=form.dtype,
        )
    return result


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        weights.format == wanted.format
        and all(same_bits(value, wanted.tensors()[part]) for part, value in weights.tensors().items())
        for weights, wanted in zip(one.values(), other.values(), strict=True)
    )


@pytest.mark.parametrize("targets", [{}, {"target_modules": LINEAR}], ids=["shared", "apart"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_merging_quantizes_again(targets: dict[str, Any], double_quant: bool, dense: Path) -> None:
    model = adapt(quantized(dense, bnb_4bit_use_double_quant=double_quant), **targets)
    before, expected = packed(model), expected_merge(model)
    logits = run(model).logits
    model.merge_adapter(safe_merge=True)
    assert same_weights(packed(model), expected)
    assert not same_weights(packed(model), before)
    with model.disable_adapter():  # which unmerges
        run(model)
    assert same_weights(packed(model), before)
    assert torch.equal(run(model).logits, logits)
    merged = model.merge_and_unload()
    assert same_weights(packed(merged), expected)


def test_several_adapters_are_quantized_once(dense: Path) -> None:
    model = adapt(quantized(dense))
    model.add_adapter("second", LoraConfig(**OPTIONS, target_parameters=BOTH, target_modules=[]))
    randomize(model, "second", seed=4)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["second"])
    one_by_one = packed(model)
    model.unmerge_adapter()
    model.merge_adapter(["default", "second"])
    assert same_weights(packed(model), one_by_one)


@pytest.mark.parametrize("merged_before", [False, True])
def test_merging_into_dense_experts(merged_before: bool, dense: Path, tmp_path: Path) -> None:
    model = adapt(quantized(dense))
    logits = run(model).logits
    if merged_before:
        model.merge_adapter()
    merged = model.merge_and_unload(dtype=torch.float32)
    assert not packed(merged)
    torch.testing.assert_close(run(merged).logits, logits, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(run(load(tmp_path).to(DEVICE)).logits, logits, atol=1e-5, rtol=1e-5)


def test_safe_merge_leaves_the_experts(dense: Path) -> None:
    model = adapt(quantized(dense))
    with torch.no_grad():
        for wrapper in wrappers(model):
            wrapper.lora_B["default"].weight[0, 0] = torch.inf
    before = packed(model)
    with pytest.raises(
        ValueError, match=r"^NaNs detected in the merged weights\. The adapter default seems to be broken"
    ):
        model.merge_adapter(safe_merge=True)
    assert same_weights(packed(model), before)
    assert not any(wrapper.merged for wrapper in wrappers(model))


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_saves_and_loads(targets: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    model = quantized(dense)
    fresh, another = copy.deepcopy(model), copy.deepcopy(model)
    adapted = adapt(model, **targets)
    adapted.save_pretrained(tmp_path)
    expected = forward_backward(adapted, tokens())
    assert_near(
        forward_backward(PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True), tokens()), expected, 0.0
    )
    another.load_adapter(tmp_path)
    result = Pass(run(another).logits.detach(), {})
    assert torch.equal(result.logits, expected.logits)
