"""Training: PEFT before and after, both kinds of gradient checkpointing, autocast, torch.compile."""

from __future__ import annotations

import copy
from unittest import mock

import peft
import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

import moe_fused
from moe_fused import hub

from .compare import Pass, assert_near, assert_passes_as_good, forward_backward, under
from .conftest import Calls
from .models import GPT_OSS, MODELS, QWEN3_MOE, ModelCase, experts_modules, tokens

BY_ID = {case.id: case for case in MODELS}
ATTENTION = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")


def _with_lora(model: PreTrainedModel, config: LoraConfig) -> peft.PeftModel:
    """LoRA with factors that are not zero, the same for every call."""
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("case", [QWEN3_MOE, BY_ID["deepseek_v3"], GPT_OSS], ids=lambda case: case.id)
@pytest.mark.parametrize("enable_first", [True, False], ids=["before", "after"])
def test_attention_lora(case: ModelCase, enable_first: bool, device: str, calls: Calls) -> None:
    """Wrapping by PEFT before or after choosing the implementation; frozen experts get no gradient."""
    config = copy.deepcopy(ATTENTION)
    if case.id == "deepseek_v3":
        config.target_modules = {"q_a_proj", "kv_b_proj", "o_proj"}
    ids = tokens(device=device)
    model = case.build().to(device)
    truth = forward_backward(_with_lora(copy.deepcopy(model), config).double(), ids)
    theirs = forward_backward(_with_lora(copy.deepcopy(model), config), ids)
    assert calls.count == 0
    if enable_first:
        model.set_experts_implementation("moe_fused")
        wrapped = _with_lora(model, config)
    else:
        wrapped = _with_lora(model, config)
        wrapped.set_experts_implementation("moe_fused")
    ours = forward_backward(wrapped, ids)
    assert calls.count == case.moe_layers
    assert ours.gradients
    assert all("lora_" in name for name in ours.gradients)
    assert_passes_as_good(ours, theirs, truth)


@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case.id)
def test_experts_lora(case: ModelCase, device: str, calls: Calls) -> None:
    """Under another implementation PEFT parametrizes the experts' weights: the factors train through the kernel."""
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    ids = tokens(device=device)
    wrapped = _with_lora(case.build().to(device), config)
    truth = forward_backward(copy.deepcopy(wrapped).double(), ids)
    theirs = forward_backward(wrapped, ids)
    assert calls.count == 0
    wrapped.set_experts_implementation("moe_fused")
    ours = forward_backward(wrapped, ids)
    assert calls.count == 2
    assert len(ours.gradients) == 2 * 2 * 2  # layers, projections, A and B
    assert all(gradient.abs().max() > 0 for gradient in ours.gradients.values())
    assert_passes_as_good(ours, theirs, truth)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case.id)
def test_gradient_checkpointing(case: ModelCase, use_reentrant: bool, device: str, calls: Calls) -> None:
    model = case.build().to(device)
    ids = tokens(device=device)
    plain = under(model, "moe_fused", ids)
    assert calls.count == 2
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    recomputed = forward_backward(model, ids)
    assert calls.count == 2 + 2 * 2
    assert_near(recomputed, plain, 1e-6)


@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case.id)
def test_what_runs_again_ends_before_the_down_projection(
    case: ModelCase, device: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The experts are the last of a layer that saves anything: their output is of no use to backward."""
    stages = hub.submodule(moe_fused.get_kernel(), "stages").backend_for(torch.empty(0, device=device), torch.float32)
    combined = mock.Mock(wraps=stages.combine)
    monkeypatch.setattr(stages, "combine", combined)
    model = case.build().to(device)
    ids = tokens(device=device)
    under(model, "moe_fused", ids)
    assert combined.call_count == 2 * 2  # layers, forward and backward
    combined.reset_mock()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    forward_backward(model, ids)
    assert calls.count == 2 + 2 * 2
    assert combined.call_count == 2 * 2


@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case.id)
def test_autocast(case: ModelCase, device: str, calls: Calls) -> None:
    """One layer, so that rounding cannot route the second one differently."""
    model = case.build(num_hidden_layers=1, layer_types=["full_attention"]).to(device)
    ids = tokens(device=device)
    with torch.autocast(device, torch.bfloat16):
        theirs, ours = under(model, "eager", ids), under(model, "moe_fused", ids)
    assert calls.count == 1
    assert ours.logits.dtype == theirs.logits.dtype
    assert all(gradient.dtype == torch.float32 for gradient in ours.gradients.values())
    assert_near(ours, theirs, 4e-2)


def test_frozen_experts_get_no_gradient(device: str, enabled: None) -> None:
    """With everything but the embeddings frozen, the gradient still passes through the experts."""
    model = QWEN3_MOE.build().to(device)
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    ids = tokens(device=device)
    theirs, ours = under(model, "eager", ids), under(model, "moe_fused", ids)
    assert list(ours.gradients) == ["model.embed_tokens.weight"]
    assert_near(ours, theirs, 1e-5)


def test_training_step_reduces_the_loss(device: str, enabled: None) -> None:
    model = QWEN3_MOE.build().to(device).train()
    model.set_experts_implementation("moe_fused")
    ids = tokens(device=device)
    optimizer = torch.optim.SGD([p for m in experts_modules(model) for p in m.parameters()], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("case", [QWEN3_MOE, BY_ID["glm4_moe"], GPT_OSS], ids=lambda case: case.id)
def test_compile(case: ModelCase, device: str, calls: Calls) -> None:
    """The whole model in one graph, forward and backward."""
    model = case.build().to(device)
    ids = tokens(device=device)
    eager = under(model, "eager", ids)
    model.set_experts_implementation("moe_fused")
    torch._dynamo.reset()
    ours = forward_backward(torch.compile(model, fullgraph=True, backend="aot_eager"), ids)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in ours.gradients.items()}
    assert_near(Pass(ours.logits, gradients), eager, 1e-5)
