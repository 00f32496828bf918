"""``moe_fused.register_layers``: after it, ``kernels.kernelize`` alone puts the kernel's layers on models."""

from __future__ import annotations

import copy
import importlib
import inspect
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import kernels
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from kernels import Mode
from kernels.layer.globals import _KERNEL_MAPPING
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ParamWrapper
from torch import nn
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeSparseMoeBlock

import moe_fused
from moe_fused.hub import get_kernel
from moe_fused.integrations.kernelize import registration

from .compare import assert_near, forward_backward
from .conftest import Calls
from .models import GPT_OSS, MODELS, QWEN3_MOE, ModelCase, experts_modules, tokens, with_derived_blocks
from .test_experts import decorated_classes, load_class

pytestmark = pytest.mark.skipif(not registration.has_conditions(), reason="this kernels asks no condition of a module")
ADAPTED = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture
def registered(spy: Calls) -> Iterator[Calls]:
    assert "moe_fused" not in ALL_EXPERTS_FUNCTIONS
    moe_fused.register_layers()
    assert "moe_fused" not in ALL_EXPERTS_FUNCTIONS, "layers do not need enable"
    yield spy
    moe_fused.disable()


def kernelize(model: nn.Module, mode: Mode = Mode.TRAINING) -> nn.Module:
    """Through ``kernels`` alone."""
    return kernels.kernelize(model, mode=mode, device=next(model.parameters()).device.type)


def adapt(model: nn.Module, targets: list[str] = ADAPTED, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 5, "target_modules": [], "target_parameters": targets} | options
    return get_peft_model(model, LoraConfig(init_lora_weights=False, **options))


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_kernelize_alone_serves_every_family(case: ModelCase, device: str, registered: Calls) -> None:
    model = case.build().to(device)
    ids = tokens(device=device)
    theirs = forward_backward(model, ids)
    kernelize(model)
    assert_near(forward_backward(model, ids), theirs, 1e-4)
    assert registered.count == case.moe_layers


@pytest.mark.parametrize("inherits", [True, False], ids=["inherits", "alone"])
def test_under_the_mapping_of_the_user(inherits: bool, device: str, registered: Calls) -> None:
    model = QWEN3_MOE.build().to(device)
    with kernels.use_kernel_mapping(moe_fused.KERNEL_MAPPING, inherit_mapping=inherits):
        kernelize(model)
    model(tokens(device=device))
    assert registered.count == 2


@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case.id)
@pytest.mark.parametrize("enabled", [False, True], ids=["PEFT's layers", "our layers"])
def test_adapters(enabled: bool, case: ModelCase, device: str, spy: Calls) -> None:
    """Adapters go into the kernel, and ``kernelize`` after a change of the mode changes nothing."""
    ids = tokens(device=device)
    theirs = forward_backward(adapt(case.build().to(device)), ids)
    if enabled:
        moe_fused.enable()
    else:
        moe_fused.register_layers()
    model = case.build().to(device)
    if enabled:
        model.set_experts_implementation("moe_fused")
    model = adapt(model)
    if enabled:
        model.set_experts_implementation("eager")
    kernelize(model)
    assert_near(forward_backward(model, ids), theirs, 1e-5)
    assert spy.adapters == 2 * case.moe_layers
    kernelize(model.eval(), Mode.INFERENCE)
    torch.testing.assert_close(model(ids).logits, theirs.logits, rtol=1e-4, atol=1e-5)
    assert spy.adapters == 4 * case.moe_layers


def test_adapters_that_are_added_afterwards_count(device: str, registered: Calls) -> None:
    ids = tokens(device=device)
    model = QWEN3_MOE.build().to(device)
    theirs = forward_backward(adapt(copy.deepcopy(model)), ids)
    model = adapt(kernelize(model))
    assert_near(forward_backward(model, ids), theirs, 1e-5)
    kernelize(model)
    registered.options.clear()
    assert_near(forward_backward(model, ids), theirs, 1e-5)
    assert registered.adapters == 4


def test_every_class_under_the_experts_interface_is_named(registered: Calls) -> None:
    """Those that were imported before, and those that are imported now. The layer has their signature."""
    layer = inspect.signature(get_kernel().layers.MoeExperts.forward).parameters.values()
    names = decorated_classes()
    assert len(names) > 40
    for name in names:
        cls = load_class(name)
        assert cls.kernel_layer_name == "MoeExperts", name
        kinds = [parameter.kind for parameter in inspect.signature(cls.forward).parameters.values()]
        assert kinds == [parameter.kind for parameter in layer], name
    assert Qwen3MoeSparseMoeBlock.kernel_layer_name == "Qwen3MoeSparseMoeBlock"
    assert ParamWrapper.kernel_layer_name == "LoraParamWrapper"


def test_code_of_a_model_is_named_as_it_is_defined(registered: Calls) -> None:
    """As ``trust_remote_code`` brings it, with both forms of the decorator."""
    decorate = transformers.integrations.use_experts_implementation

    @decorate
    class One(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()

        def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            return hidden_states

    @decorate(is_transposed=True, has_bias=True)
    class Other(One):
        def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            return hidden_states

    assert One.kernel_layer_name == Other.kernel_layer_name == "MoeExperts"
    assert Other(type("Config", (), {})()).is_transposed


def test_what_cannot_be_served_is_named(device: str, registered: Calls) -> None:
    """It keeps its forward, hooks included; so it does under a mapping that lacks our layers."""
    model = QWEN3_MOE.build().to(device)
    ids = tokens(device=device)
    expected = model(ids).logits
    first, last = experts_modules(model)
    first.register_buffer("counts", torch.zeros(1, device=device))
    add_hook_to_module(last, ModelHook())
    hooked = last.forward
    hook = "its forward is a partial of its own, as hooks of Accelerate and other libraries leave it"
    buffer = "it has a buffer of unknown purpose, counts"
    with (
        pytest.warns(UserWarning, match=f"Qwen3MoeExperts keeps its own forward instead of MoeExperts: {hook}"),
        pytest.warns(UserWarning, match=f"Qwen3MoeExperts keeps its own forward instead of MoeExperts: {buffer}"),
    ):
        kernelize(model)
    assert last.forward is hooked
    torch.testing.assert_close(model(ids).logits, expected)
    assert registered.count == 0
    with kernels.use_kernel_mapping({}, inherit_mapping=False), warnings.catch_warnings():
        warnings.simplefilter("error")
        kernelize(model)
    assert last.forward is hooked


def test_the_users_own_layers(device: str, registered: Calls) -> None:
    """Classes that a user decorates by a name of the mapping are served, by both ways."""

    @kernels.use_kernel_forward_from_hub("MoeFusedLinear")
    class MoeFusedLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 4, device=device))

        def forward(self, rows: Any, m_sizes: Any) -> Any:
            raise AssertionError("the layer takes the place of this")

    rows, sizes = torch.randn(6, 4, device=device), torch.tensor([1, 0, 5], device=device)
    for put in (kernelize, moe_fused.kernelize):
        layer = put(MoeFusedLinear())
        assert torch.equal(layer(rows, sizes), get_kernel().moe_fused_linear(rows, layer.weight, sizes))


def test_disable_undoes_all_of_it() -> None:
    """Twice registered is once registered, and nothing is left: names, decorator, mapping."""
    attributes = ("kernel_layer_name", "kernel_condition")
    classes = (Qwen3MoeExperts, GptOssExperts, Qwen3MoeSparseMoeBlock, ParamWrapper)
    decorator, mapping = moe.use_experts_implementation, dict(_KERNEL_MAPPING.get())
    assert not any(hasattr(cls, name) for cls in classes for name in attributes)
    moe_fused.register_layers()
    moe_fused.enable()
    moe_fused.register_layers()
    assert all(hasattr(cls, name) for cls in classes for name in attributes)
    assert moe_fused.KERNEL_MAPPING.keys() <= _KERNEL_MAPPING.get().keys()
    moe_fused.disable()
    assert not any(hasattr(cls, name) for cls in classes for name in attributes)
    assert moe.use_experts_implementation is decorator
    assert transformers.integrations.use_experts_implementation is decorator
    assert _KERNEL_MAPPING.get() == mapping
    moe_fused.enable()
    assert Qwen3MoeExperts.kernel_layer_name == "MoeExperts"


def test_an_entry_of_the_user_stays() -> None:
    """Neither ``register_layers`` nor ``disable`` touches it."""
    before = dict(_KERNEL_MAPPING.get())
    entry = kernels.LayerRepository("org/other", layer_name="Other", revision="main")
    kernels.register_kernel_mapping({"MoeExperts": {"cpu": entry}})
    try:
        for change in (moe_fused.register_layers, moe_fused.disable):
            change()
            assert list(_KERNEL_MAPPING.get()["MoeExperts"]["cpu"].repos.values()) == [entry]
    finally:
        _KERNEL_MAPPING.get().pop("MoeExperts")
    assert _KERNEL_MAPPING.get() == before


def test_a_derived_block_keeps_its_forward(device: str, registered: Calls) -> None:
    model = with_derived_blocks(QWEN3_MOE.build().to(device))
    ids = tokens(device=device)
    expected = model(ids).logits
    torch.testing.assert_close(kernelize(model)(ids).logits, expected)
    assert registered.count == 2


def test_modules_to_save_after_kernelize(device: str, registered: Calls) -> None:
    """PEFT's copy of the experts takes their place in a block that has its layer."""
    model = kernelize(QWEN3_MOE.build().to(device))
    ids = tokens(device=device)
    expected = model(ids).logits
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts"]))
    torch.testing.assert_close(wrapped(ids).logits, expected)


def test_a_name_from_the_library_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GptOssExperts, "kernel_layer_name", "Theirs", raising=False)
    moe_fused.register_layers()
    assert GptOssExperts.kernel_layer_name == "Theirs"
    moe_fused.disable()
    assert GptOssExperts.kernel_layer_name == "Theirs"


def test_libraries_that_are_imported_later() -> None:
    """In a process of its own: Transformers' models and PEFT come after the registration."""
    program = """
import sys
import moe_fused
moe_fused.register_layers()
assert "peft" not in sys.modules and not any("modeling_qwen3_moe" in name for name in sys.modules)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeSparseMoeBlock
assert Qwen3MoeExperts.kernel_layer_name == "MoeExperts", vars(Qwen3MoeExperts)
assert Qwen3MoeSparseMoeBlock.kernel_layer_name == "Qwen3MoeSparseMoeBlock"
from peft.tuners.lora import ParamWrapper
assert ParamWrapper.kernel_layer_name == "LoraParamWrapper"
from moe_fused.integrations.peft.wrapper import ParamWrapper
assert ParamWrapper.kernel_layer_name == "LoraMoeExperts"
moe_fused.disable()
assert not hasattr(Qwen3MoeExperts, "kernel_layer_name") and not hasattr(ParamWrapper, "kernel_layer_name")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 0, ended.stderr


def test_the_layer_in_peft_has_the_signature_of_its_class() -> None:
    """``kernels`` compares number and kinds of arguments."""
    wrapper = importlib.import_module("moe_fused.integrations.peft.wrapper").ParamWrapper
    layers = get_kernel().layers
    for cls, layer in ((wrapper, layers.LoraMoeExperts), (ParamWrapper, layers.LoraParamWrapper)):
        ours, theirs = (inspect.signature(owner.forward).parameters.values() for owner in (layer, cls))
        assert [parameter.kind for parameter in ours] == [parameter.kind for parameter in theirs]


def test_transformers_own_switch(device: str, registered: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """``use_kernels`` of Transformers finds the layers in the mapping, again after ``train`` and ``eval``."""
    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, "get_kernel_mapping_transformers", dict)  # the others would come from the Hub
    model = QWEN3_MOE.build().to(device)
    ids = tokens(device=device)
    expected = model(ids).logits
    model.set_use_kernels(True)
    for change in (model.eval, model.train):
        change()
        torch.testing.assert_close(model(ids).logits, expected)
    assert registered.count == 4


def test_with_an_older_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "has_conditions", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"register_layers needs kernels>=0\.17, found .*: moe_fused\.kernelize\(model\)"
    ):
        moe_fused.register_layers()
    moe_fused.enable()
    assert not hasattr(Qwen3MoeExperts, "kernel_layer_name")
