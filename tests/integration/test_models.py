"""Whole models: logits and all gradients equal those of Transformers' own eager experts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import moe_fused

from .compare import assert_near, assert_passes_as_good, forward_backward, under
from .conftest import Calls
from .models import GPT_OSS, MODELS, QWEN3_MOE, ModelCase, experts_modules, tokens

by_model = pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)


@by_model
def test_float32_equals_eager(case: ModelCase, device: str, calls: Calls) -> None:
    model = case.build().to(device)
    ids = tokens(device=device)
    truth = under(copy.deepcopy(model).double(), "eager", ids)
    theirs = under(model, "eager", ids)
    assert calls.count == 0
    ours = under(model, "moe_fused", ids)
    assert calls.count == len(experts_modules(model)) == case.moe_layers
    assert_passes_as_good(ours, theirs, truth)
    trained = [name for name in ours.gradients if ".experts." in name]
    assert len(trained) >= 2 * case.moe_layers
    assert all(ours.gradients[name].abs().max() > 0 for name in trained)


@by_model
def test_bfloat16_equals_eager(case: ModelCase, device: str, calls: Calls) -> None:
    """One layer with experts at most, so that rounding cannot route the second one differently."""
    options = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "first_k_dense_replace": 0}
    options = {key: value for key, value in options.items() if key == "num_hidden_layers" or key in case.options}
    if case.id == "nemotron_h":  # whose layers are attention or experts
        options = {}
    if case.id == "granitemoehybrid":
        options["layer_types"] = ["attention"]
    model = case.build(**options).to(device, torch.bfloat16)
    ids = tokens(device=device)
    theirs, ours = under(model, "eager", ids), under(model, "moe_fused", ids)
    assert calls.count == 1
    # 8 bits of mantissa and a handful of roundings on the way; eager even sums the experts in bfloat16.
    assert_near(ours, theirs, 4e-2)


def test_detects_a_wrong_result(device: str, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails if one expert in six is off by a thousandth."""
    model = QWEN3_MOE.build().to(device)
    ids = tokens(device=device)
    truth, theirs = under(copy.deepcopy(model).double(), "eager", ids), under(model, "eager", ids)
    with torch.no_grad():
        experts_modules(model)[1].down_proj[2] *= 1.001
    ours = under(model, "moe_fused", ids)
    with pytest.raises(AssertionError, match="logits"):
        assert_passes_as_good(ours, theirs, truth)


@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case.id)
def test_float64_equals_eager(case: ModelCase, enabled: None) -> None:
    """On the CPU, where nothing else could hide a slip in a formula."""
    model = case.build().double()
    ids = tokens()
    assert_near(under(model, "moe_fused", ids), under(model, "eager", ids), 1e-12)


@by_model
def test_generates_the_same_tokens(case: ModelCase, device: str, calls: Calls) -> None:
    model = case.build().to(device)
    prompt = tokens(batch=2, length=5, device=device)
    texts = {}
    for implementation in ("eager", "moe_fused"):
        model.set_experts_implementation(implementation)
        texts[implementation] = model.generate(
            prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True
        )
        assert model.config._experts_implementation == implementation
    assert calls.count == 6 * case.moe_layers
    assert texts["moe_fused"].shape == (2, 11)
    torch.testing.assert_close(texts["moe_fused"], texts["eager"])


def test_records_the_router_logits(device: str, enabled: None) -> None:
    model = QWEN3_MOE.build().to(device)
    ids = tokens(device=device)
    model.set_experts_implementation("moe_fused")
    output = model(ids, labels=ids, output_router_logits=True)
    assert [logits.shape for logits in output.router_logits] == [(ids.numel(), 6)] * 2
    assert output.aux_loss > 0


@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case.id)
def test_save_and_load(case: ModelCase, device: str, calls: Calls, tmp_path: Path) -> None:
    """What is saved does not depend on the implementation, and the implementation can be asked for on loading."""
    model = case.build().to(device)
    ids = tokens(device=device)
    eager = model(ids).logits
    model.set_experts_implementation("moe_fused")
    model.save_pretrained(tmp_path)
    assert "moe_fused" not in (tmp_path / "config.json").read_text()

    stock = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").to(device)
    torch.testing.assert_close(stock(ids).logits, eager, rtol=0, atol=0)
    assert calls.count == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_fused").to(device)
    torch.testing.assert_close(loaded(ids).logits, eager)
    assert calls.count == 2
    weights = model.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)


def test_deepcopy(device: str, calls: Calls) -> None:
    model = QWEN3_MOE.build().to(device)
    ids = tokens(device=device)
    model.set_experts_implementation("moe_fused")
    before = forward_backward(model, ids)
    clone: PreTrainedModel = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_near(forward_backward(clone, ids), before, 1e-5)
    assert calls.count == 4


def test_disable(device: str) -> None:
    """A model that stays set to it raises Transformers' own error; enabling again is enough."""
    model = QWEN3_MOE.build().to(device)
    ids = tokens(device=device)
    with pytest.raises(ValueError, match="moe_fused"):
        model.set_experts_implementation("moe_fused")
    moe_fused.enable()
    try:
        model.set_experts_implementation("moe_fused")
        expected = model(ids).logits
        moe_fused.disable()
        with pytest.raises(KeyError, match="moe_fused"):
            model(ids)
        moe_fused.enable()
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    finally:
        moe_fused.disable()
