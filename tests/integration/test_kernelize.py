"""``moe_fused.kernelize``: the kernel's layers on a model, and on nothing else."""

from __future__ import annotations

import contextlib
import copy
import re
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import kernels
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from kernels import Mode
from kernels.layer.globals import _KERNEL_MAPPING
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import moe_fused

from .compare import Pass, assert_near, assert_passes_as_good, forward_backward, under
from .conftest import Calls
from .models import GPT_OSS, MODELS, QWEN3_MOE, ModelCase, experts_modules, tokens, with_derived_blocks

BLOCK = "Qwen3MoeSparseMoeBlock"


@pytest.fixture
def layer_calls(spy: Calls) -> Iterator[Calls]:
    """The calls of ``moe_experts`` from the kernel's layers."""
    assert "moe_fused" not in ALL_EXPERTS_FUNCTIONS, "kernelize must not depend on enable"
    yield spy
    assert "moe_fused" not in ALL_EXPERTS_FUNCTIONS


def replaced(model: nn.Module) -> list[str]:
    """The names of the modules with a forward of their own."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
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


TARGETS = [
    ["mlp.experts.gate_up_proj"],
    ["mlp.experts.down_proj"],
    ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
]


def adapted(case: ModelCase, device: str, targets: list[str]) -> nn.Module:
    """The model with PEFT's own adapters, whose factors have values."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=targets, init_lora_weights=False)
    return get_peft_model(case.build().to(device), config)


@pytest.mark.parametrize("targets", TARGETS, ids=lambda targets: "+".join(name.split(".")[-1] for name in targets))
@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case.id)
def test_experts_lora(case: ModelCase, targets: list[str], device: str, layer_calls: Calls) -> None:
    """PEFT's own adapters go into the kernel instead of being merged on every pass."""
    targets = [name.replace("mlp.experts", "experts") for name in targets]
    ids = tokens(device=device)
    theirs = forward_backward(adapted(case, device, targets), ids)
    model = moe_fused.kernelize(adapted(case, device, targets))
    ours = forward_backward(model, ids)
    assert layer_calls.count == case.moe_layers
    assert layer_calls.adapters == case.moe_layers * len(targets)
    assert_near(ours, theirs, 1e-5)


def test_experts_lora_added_afterwards(device: str, layer_calls: Calls) -> None:
    """The adapter counts at once, merged on every pass, and goes into the kernel once kernelize is called again."""
    ids, targets = tokens(device=device), TARGETS[2]
    theirs = forward_backward(adapted(QWEN3_MOE, device, targets), ids)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=targets, init_lora_weights=False)
    model = get_peft_model(moe_fused.kernelize(QWEN3_MOE.build().to(device)), config)
    assert_near(forward_backward(model, ids), theirs, 1e-5)
    assert layer_calls.adapters == 0
    moe_fused.kernelize(model)
    layer_calls.options.clear()
    assert_near(forward_backward(model, ids), theirs, 1e-5)
    assert layer_calls.adapters == 4


def test_what_peft_does_with_adapters(device: str, layer_calls: Calls) -> None:
    """Switching, disabling, merging, unmerging and unloading give what they give without the layers."""
    ids = tokens(device=device)
    models = []
    for _ in range(2):
        model = adapted(QWEN3_MOE, device, TARGETS[2])
        torch.manual_seed(1)
        config = LoraConfig(r=3, target_modules=[], target_parameters=TARGETS[2], init_lora_weights=False)
        model.add_adapter("other", config)
        models.append(model)
    stock, ours = models
    moe_fused.kernelize(ours)

    def assert_equal() -> None:
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-5)

    for model in models:
        model.set_adapter("other")
    assert_equal()
    for model in models:
        model.base_model.set_adapter(["default", "other"])
    assert_equal()
    with stock.disable_adapter(), ours.disable_adapter():
        assert_equal()
    for model in models:
        model.merge_adapter()
    assert_equal()
    with stock.disable_adapter(), ours.disable_adapter():  # which unmerges
        assert_equal()
    assert_equal()
    stock, ours = (model.merge_and_unload() for model in models)
    assert_equal()
    assert ours.get_submodule("model.layers.0.mlp.experts").forward.__func__ is not None
    assert layer_calls.count > 0


def test_an_adapter_on_something_else_stays_pefts(device: str, layer_calls: Calls) -> None:
    """An adapted router is no experts module, and its adapter counts."""
    targets = ["mlp.gate.weight", "mlp.experts.down_proj"]
    ids = tokens(device=device)
    theirs = forward_backward(adapted(QWEN3_MOE, device, targets), ids)
    ours = forward_backward(moe_fused.kernelize(adapted(QWEN3_MOE, device, targets)), ids)
    assert_near(ours, theirs, 1e-5)
    assert layer_calls.adapters == 2


def test_hooks_on_adapted_experts_run(device: str, layer_calls: Calls) -> None:
    model = moe_fused.kernelize(adapted(QWEN3_MOE, device, TARGETS[2]))
    ids = tokens(device=device)
    expected = model(ids).logits
    seen = []
    for module in experts_modules(model):
        module.register_forward_hook(lambda module, *_: seen.append(module))
    torch.testing.assert_close(model(ids).logits, expected)
    assert seen == experts_modules(model)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_again_after_a_change_of_mode(training: bool, device: str, layer_calls: Calls) -> None:
    model = moe_fused.kernelize(adapted(QWEN3_MOE, device, TARGETS[2]).train(not training))
    ids = tokens(device=device)
    expected = model(ids).logits
    moe_fused.kernelize(model.train(training), Mode.TRAINING if training else Mode.INFERENCE)
    torch.testing.assert_close(model(ids).logits, expected)
    assert layer_calls.adapters == 8


def test_compile_with_adapters(device: str, layer_calls: Calls) -> None:
    ids = tokens(device=device)
    model = adapted(QWEN3_MOE, device, TARGETS[2])
    theirs = model(ids).logits
    moe_fused.kernelize(model, Mode.TRAINING | Mode.TORCH_COMPILE)
    torch._dynamo.reset()
    ours = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert layer_calls.count > 0


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


def test_what_wraps_a_forward_is_named(device: str, layer_calls: Calls) -> None:
    """Accelerate's hooks, which may be what brings the weights to the device. The other layers are served."""
    model = QWEN3_MOE.build().to(device)
    ids = tokens(device=device)
    expected = model(ids).logits
    last = experts_modules(model)[1]
    add_hook_to_module(last, ModelHook())
    hooked = last.forward
    with pytest.warns(
        UserWarning, match=r"Qwen3MoeExperts \(model\.layers\.1\.mlp\.experts\) keeps its own forward: it"
    ):
        moe_fused.kernelize(model)
    assert last.forward is hooked
    torch.testing.assert_close(model(ids).logits, expected)
    assert layer_calls.count == 1


def _derived(experts: nn.Module) -> None:
    """A class that derives from the experts and computes something else."""

    class Mine(type(experts)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            return 3 * super().forward(*args)

    experts.__class__ = Mine


def _method(experts: nn.Module) -> None:
    """A forward that another library has bound to the module, as Liger does."""
    before = experts.forward
    experts.forward = types.MethodType(lambda self, *args: 3 * before(*args), experts)


def _function(experts: nn.Module) -> None:
    before = experts.forward
    experts.forward = lambda *args: 3 * before(*args)


def _implementation(experts: Any) -> None:
    """An experts implementation of the user's own."""
    experts.config._experts_implementation = "mine"


@pytest.fixture
def mine() -> Iterator[None]:
    eager = Qwen3MoeExperts.forward.__wrapped__  # type: ignore[attr-defined]
    ALL_EXPERTS_FUNCTIONS.register("mine", lambda self, *args: 3 * eager(self, *args))
    yield
    del type(ALL_EXPERTS_FUNCTIONS)._global_mapping["mine"]


@pytest.mark.parametrize("lora", [False, True], ids=["dense", "lora"])
@pytest.mark.parametrize("layer", [None, BLOCK], ids=["experts", "block"])
@pytest.mark.parametrize("change", [_derived, _method, _function, _implementation], ids=lambda change: change.__name__)
def test_experts_that_compute_something_else(
    change: Callable[[Any], None], layer: str | None, lora: bool, mine: None, device: str, layer_calls: Calls
) -> None:
    """They keep computing it, changed before or after kernelize, and a warning names those that it finds."""
    ids = tokens(device=device)

    def build() -> nn.Module:
        return adapted(QWEN3_MOE, device, TARGETS[2]) if lora else QWEN3_MOE.build().to(device)

    stock = build()
    for module in experts_modules(stock):
        change(module)
    expected = forward_backward(stock, ids)
    ours = build()
    for module in experts_modules(ours):
        change(module)
    with warnings.catch_warnings(record=True), contextlib.suppress(ValueError):  # nothing in it may be served
        moe_fused.kernelize(ours, layer=layer)
    assert_near(forward_backward(ours, ids), expected, 1e-5)
    if change is _implementation or (change is _derived and layer is None):
        return  # a layer takes precedence over what the module is set to, or derived from, afterwards
    ours = moe_fused.kernelize(build(), layer=layer)
    if change in (_method, _function) and layer is None and not lora:
        return  # what is put in the place of a layer takes the place of the layer
    for module in experts_modules(ours):
        change(module)
    assert_near(forward_backward(ours, ids), expected, 1e-5)


def test_a_derived_block_keeps_its_forward(device: str, layer_calls: Calls) -> None:
    model = with_derived_blocks(QWEN3_MOE.build().to(device))
    ids = tokens(device=device)
    expected = model(ids).logits
    with pytest.raises(ValueError, match="layer Qwen3MoeSparseMoeBlock that the kernel serves"):
        moe_fused.kernelize(model, layer=BLOCK)
    moe_fused.kernelize(model)
    torch.testing.assert_close(model(ids).logits, expected)
    assert layer_calls.count == 2


def test_what_cannot_be_served_is_named(device: str, layer_calls: Calls) -> None:
    model = QWEN3_MOE.build().to(device)
    ids = tokens(device=device)
    expected = model(ids).logits
    experts_modules(model)[0].register_buffer("counts", torch.zeros(1, device=device))
    with pytest.warns(
        UserWarning, match=r"layers\.0\.mlp\.experts\) keeps its own forward: it has a buffer of unknown"
    ):
        moe_fused.kernelize(model)
    torch.testing.assert_close(model(ids).logits, expected)
    assert layer_calls.count == 1


def test_adapters_that_the_kernel_does_not_take_are_named(device: str, layer_calls: Calls) -> None:
    """gpt-oss has biases, which PEFT can adapt. Such layers merge on every pass, and results stay right."""
    targets = ["experts.gate_up_proj", "experts.down_proj_bias"]
    ids = tokens(device=device)
    theirs = forward_backward(adapted(GPT_OSS, device, targets), ids)
    with pytest.warns(UserWarning, match="it has adapters on down_proj_bias, which PEFT merges on every pass"):
        model = moe_fused.kernelize(adapted(GPT_OSS, device, targets))
    assert_near(forward_backward(model, ids), theirs, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a/model",), TypeError, "model must be a torch.nn.Module that is loaded, got str"),
        ((nn.Linear,), TypeError, "model must be a torch.nn.Module that is loaded, got Linear"),
        ((None, "training"), TypeError, "mode must be a kernels.Mode, as Mode.TRAINING, got 'training'"),
        ((None, None, 0), TypeError, "device must be a string or a torch.device, got 0"),
        ((None, None, "meta"), ValueError, "device must be one of cpu, cuda, rocm, xpu, got meta"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    model = QWEN3_MOE.build()
    given = (model, *arguments[1:]) if arguments[0] is None else arguments
    with pytest.raises(error, match=re.escape(message)):
        moe_fused.kernelize(*given)
    assert replaced(model) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has such a GPU")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device is cuda, but torch finds no such GPU on this machine"):
        moe_fused.kernelize(QWEN3_MOE.build(), device="cuda")


def test_errors() -> None:
    """Each names what was looked for, and leaves the model alone."""
    model = GPT_OSS.build()
    with pytest.raises(
        ValueError, match=r"layer Qwen3MoeSparseMoeBlock that the kernel serves, got a GptOssForCausalLM"
    ):
        moe_fused.kernelize(model, layer=BLOCK)
    with pytest.raises(ValueError, match=r"layer must be one of MoeExperts, Qwen3MoeExperts, .*, got 'Mlp'"):
        moe_fused.kernelize(model, layer="Mlp")
    with pytest.raises(ValueError, match="under Transformers' experts interface that the kernel serves, got a Linear"):
        moe_fused.kernelize(nn.Linear(2, 2))
    for module in experts_modules(model):
        module.has_post_expert_norm = True
    with pytest.raises(
        ValueError, match=r"got GptOssExperts \(model\.layers\.0\.mlp\.experts\) keeps .*: it normalizes"
    ):
        moe_fused.kernelize(model)
    assert replaced(model) == []
    qwen = QWEN3_MOE.build()
    with pytest.raises(ValueError, match="FALLBACK"):
        moe_fused.kernelize(qwen, Mode.FALLBACK)
    assert replaced(qwen) == []
    assert not hasattr(type(experts_modules(qwen)[0]), "kernel_layer_name")
