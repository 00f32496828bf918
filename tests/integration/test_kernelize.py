"""``moe_fused.kernelize``: the kernel's layers on a model, and on nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import kernels
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from kernels import Mode
from kernels.layer.globals import _KERNEL_MAPPING
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moe_fused

from .compare import Pass, assert_near, assert_passes_as_good, forward_backward, under
from .conftest import Calls
from .models import GPT_OSS, MODELS, QWEN3_MOE, ModelCase, experts_modules, tokens

SERVED = [case for case in MODELS if case is not GPT_OSS]
BLOCK = "Qwen3MoeSparseMoeBlock"


@pytest.fixture
def layer_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The calls of ``moe_experts`` from the kernel's layers."""
    layers = moe_fused.get_kernel().layers
    spy = Calls(layers.moe_experts)
    monkeypatch.setattr(layers, "moe_experts", spy)
    assert "moe_fused" not in ALL_EXPERTS_FUNCTIONS, "kernelize must not depend on enable"
    yield spy
    assert "moe_fused" not in ALL_EXPERTS_FUNCTIONS


def replaced(model: nn.Module) -> list[str]:
    """The names of the modules with a forward of their own."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.id)
def test_equals_eager(case: ModelCase, device: str, layer_calls: Calls) -> None:
    model = case.build().to(device)
    ids = tokens(device=device)
    truth = forward_backward(copy.deepcopy(model).double(), ids)
    theirs = forward_backward(model, ids)
    assert moe_fused.kernelize(model) is model
    ours = forward_backward(model, ids)
    assert layer_calls.count == case.moe_layers
    assert_passes_as_good(ours, theirs, truth)
    assert [model.get_submodule(name) for name in replaced(model)] == experts_modules(model)


def test_block_equals_eager_and_records_router_logits(device: str, layer_calls: Calls) -> None:
    model = QWEN3_MOE.build().to(device)
    ids = tokens(device=device)
    expected = model(ids, labels=ids, output_router_logits=True)
    theirs = forward_backward(model, ids)
    moe_fused.kernelize(model, layer=BLOCK)
    assert replaced(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    output = model(ids, labels=ids, output_router_logits=True)
    assert layer_calls.count == 2
    assert len(output.router_logits) == 2
    for ours, reference in zip(output.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(output.aux_loss, expected.aux_loss)
    assert_near(forward_backward(model, ids), theirs, 1e-5)


def test_block_around_adapted_experts(device: str, layer_calls: Calls) -> None:
    """PEFT's layer takes the experts' place, and knows their adapters."""
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], init_lora_weights=False)
    models = []
    for kernelized in (False, True):
        model = QWEN3_MOE.build().to(device)
        if kernelized:
            moe_fused.kernelize(model, layer=BLOCK)
        torch.manual_seed(0)
        models.append(get_peft_model(model, config))
    theirs, ours = (forward_backward(model, tokens(device=device)) for model in models)
    assert_near(ours, theirs, 1e-5)


def test_experts_record_router_logits(device: str, layer_calls: Calls) -> None:
    model = QWEN3_MOE.build().to(device)
    ids = tokens(device=device)
    expected = model(ids, output_router_logits=True).router_logits
    ours = moe_fused.kernelize(model)(ids, output_router_logits=True).router_logits
    assert len(ours) == 2
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "mode",
    [Mode.TRAINING, Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE, Mode.INFERENCE | Mode.TORCH_COMPILE],
    ids=str,
)
def test_modes(mode: Mode, device: str, layer_calls: Calls) -> None:
    model = moe_fused.kernelize(QWEN3_MOE.build().to(device), mode, device=torch.device(device))
    model(tokens(device=device))
    assert layer_calls.count == 2


def test_touches_nothing_else(device: str, layer_calls: Calls) -> None:
    """Neither a forward that another kernel put there, nor Transformers' classes, nor the user's own mapping."""
    model = QWEN3_MOE.build().to(device)
    norms = [module for module in model.modules() if type(module).__name__ == "Qwen3MoeRMSNorm"]
    for norm in norms:
        norm.forward = lambda x: x  # as another call of kernels.kernelize would leave it
    attributes = {module: dict(vars(type(module))) for module in model.modules()}
    foreign = {"Qwen3MoeExperts": {device: kernels.LayerRepository("org/other", layer_name="Other", revision="main")}}
    with kernels.use_kernel_mapping(foreign):
        before = copy.copy(_KERNEL_MAPPING.get())
        moe_fused.kernelize(model)
        assert _KERNEL_MAPPING.get() == before
    assert all(norm(7) == 7 for norm in norms)
    assert len(replaced(model)) == len(norms) + 2
    assert all(dict(vars(type(module))) == attributes[module] for module in model.modules())


def test_wins_over_the_implementation(device: str, layer_calls: Calls) -> None:
    model = moe_fused.kernelize(QWEN3_MOE.build().to(device))
    ids = tokens(device=device)
    model.set_experts_implementation("batched_mm")
    model(ids)
    assert layer_calls.count == 2


def test_deepcopy_has_its_own_weights(device: str, layer_calls: Calls) -> None:
    model = moe_fused.kernelize(QWEN3_MOE.build().to(device))
    ids = tokens(device=device)
    expected = model(ids).logits
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for module in experts_modules(model):
            module.down_proj.zero_()
    torch.testing.assert_close(clone(ids).logits, expected)
    assert not torch.allclose(model(ids).logits, expected)


@pytest.mark.parametrize("kernelize_first", [True, False], ids=["before", "after"])
def test_experts_lora(kernelize_first: bool, device: str, layer_calls: Calls) -> None:
    """PEFT's ``target_parameters`` before or after: the adapter counts either way."""
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], init_lora_weights=False)
    ids = tokens(device=device)
    model = QWEN3_MOE.build().to(device)
    bare = model(ids).logits
    if kernelize_first:
        moe_fused.kernelize(model)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config)
    if not kernelize_first:
        moe_fused.kernelize(wrapped)
    ours = forward_backward(wrapped, ids)
    assert layer_calls.count == 2
    for module in experts_modules(wrapped):
        vars(module).pop("forward", None)
    theirs = forward_backward(wrapped, ids)
    assert layer_calls.count == 2
    assert_near(ours, theirs, 1e-5)
    assert not torch.allclose(ours.logits, bare)


def test_generates_the_same_tokens(device: str, layer_calls: Calls) -> None:
    model = QWEN3_MOE.build().to(device)
    prompt = tokens(length=5, device=device)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(prompt, **options)
    torch.testing.assert_close(moe_fused.kernelize(model, Mode.INFERENCE).generate(prompt, **options), expected)
    assert layer_calls.count == 5 * 2


def test_compile(device: str, layer_calls: Calls) -> None:
    model = QWEN3_MOE.build(num_hidden_layers=1).to(device)
    ids = tokens(device=device)
    theirs = under(model, "eager", ids)
    moe_fused.kernelize(model, Mode.TRAINING | Mode.TORCH_COMPILE)
    torch._dynamo.reset()
    ours = forward_backward(torch.compile(model, fullgraph=True, backend="aot_eager"), ids)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in ours.gradients.items()}
    assert_near(Pass(ours.logits, gradients), theirs, 1e-5)
    assert layer_calls.count > 0


def test_twice(device: str, layer_calls: Calls) -> None:
    model = moe_fused.kernelize(moe_fused.kernelize(QWEN3_MOE.build().to(device)))
    model(tokens(device=device))
    assert layer_calls.count == 2


def test_does_not_undo_what_wraps_a_forward() -> None:
    """Accelerate's hooks, which may be what brings the weights to the device."""
    model = QWEN3_MOE.build()
    last = experts_modules(model)[1]
    add_hook_to_module(last, ModelHook())
    hooked = last.forward
    with pytest.raises(ValueError, match=r"a Qwen3MoeExperts whose forward is a partial of its own: use moe_fused\.en"):
        moe_fused.kernelize(model)
    assert last.forward is hooked
    assert replaced(model) == ["model.layers.1.mlp.experts"]


def test_errors() -> None:
    """Each names what was looked for, and leaves the model alone."""
    model = GPT_OSS.build()
    with pytest.raises(ValueError, match=r"gated experts in the layout of Qwen3MoeExperts, got a GptOssForCausalLM"):
        moe_fused.kernelize(model)
    with pytest.raises(ValueError, match=r"Qwen3MoeSparseMoeBlock, got a GptOssForCausalLM"):
        moe_fused.kernelize(model, layer=BLOCK)
    with pytest.raises(ValueError, match=r"layer must be one of Qwen3MoeExperts, Qwen3MoeSparseMoeBlock, got 'Mlp'"):
        moe_fused.kernelize(model, layer="Mlp")
    with pytest.raises(ValueError, match="got a Linear"):
        moe_fused.kernelize(nn.Linear(2, 2))
    assert replaced(model) == []
    qwen = QWEN3_MOE.build()
    with pytest.raises(ValueError, match="FALLBACK"):
        moe_fused.kernelize(qwen, Mode.FALLBACK)
    assert replaced(qwen) == []
    assert not hasattr(type(experts_modules(qwen)[0]), "kernel_layer_name")
