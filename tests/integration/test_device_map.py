"""Models that Accelerate's hooks spread over devices, as ``from_pretrained(..., device_map=...)`` leaves them.

There is no second device here, so three things stand for it. Hooks around all modules of a model on the CPU compute real
numbers. A map of ``torch.device("cpu")`` and ``"cpu"`` offloads what has the string: for Accelerate only that is the place
of offloaded weights. And tensors without values are on two devices, the CPU and the meta device, which must not meet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.integrations.accelerate import _get_device_map

import moe_fused
from moe_fused import devices
from tests.support import REPOSITORY

from .conftest import Calls
from .finetuning import save_tokenizer
from .four_bit import SIZES, build, config, packed, same_state
from .lora import disabled, randomize
from .models import QWEN3_MOE, experts_modules, tokens

pytestmark = pytest.mark.usefixtures("enabled")

TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
GPU = torch.device("cpu")
both = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4bit"])


def two_devices(first: Any, second: Any, of_second: tuple[str, ...] = ("model.layers.1",)) -> dict[str, Any]:
    """A device_map with ``second`` for the parts ``of_second``, and ``first`` for the others."""
    return {part: second if part in of_second else first for part in PARTS}


def load(path: Path, **options: Any) -> PreTrainedModel:
    """In float32 with experts in the kernel, as everybody loads a model."""
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        path, **{"dtype": torch.float32, "experts_implementation": "moe_fused", "device_map": GPU, **options}
    )
    return model


def quantization(quantized: bool, **options: Any) -> dict[str, Any]:
    return {"quantization_config": config(**options)} if quantized else {}


def logits_of(model: nn.Module) -> Tensor:
    values: Tensor = model(input_ids=tokens()).logits
    return values


def hooked(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with the hooks that a device_map of several devices leaves."""
    dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    assert all(hasattr(experts, "_hf_hook") for experts in experts_modules(model))
    return model


def in_kernel(**options: Any) -> Any:
    """A model that was never saved."""
    model = QWEN3_MOE.build(**options)
    model.set_experts_implementation("moe_fused")
    return model


def trained(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one pass, and the gradients of the adapter."""
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Hooks around all modules.


@both
@pytest.mark.skipif(torch.cuda.is_available(), reason="PEFT spreads the model anew over the GPUs that it finds")
def test_hooks_change_no_bit(quantized: bool, dense: Path, calls: Calls, tmp_path: Path) -> None:
    """Logits, generation, and the training, saving and merging of an adapter."""
    alone = load(dense, **quantization(quantized))
    spread = hooked(load(dense, **quantization(quantized)))
    assert torch.equal(logits_of(spread), logits_of(alone))
    generated = [model.generate(tokens(), max_new_tokens=4, do_sample=False) for model in (alone, spread)]
    assert torch.equal(*generated)
    adapted = [get_peft_model(model, LoraConfig(**LORA)) for model in (alone, spread)]
    for model in adapted:
        randomize(model)
    before = calls.adapters
    (loss, gradients), (spread_loss, spread_gradients) = map(trained, adapted)
    assert calls.adapters == before + 2 * 2 * 2, "the adapters of two models, layers and stacks go into the kernel"
    assert torch.equal(spread_loss, loss)
    assert gradients.keys() == spread_gradients.keys() != set()
    assert all(torch.equal(spread_gradients[name], value) for name, value in gradients.items())
    adapted[1].save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(hooked(load(dense, **quantization(quantized))), tmp_path)
    assert torch.equal(logits_of(reloaded), logits_of(adapted[0]))
    merged = [model.merge_and_unload() for model in adapted]
    assert torch.equal(logits_of(merged[1]), logits_of(merged[0]))


@pytest.mark.parametrize("adapt_first", [False, True])
def test_adapters_of_kernelized_experts_within_hooks(adapt_first: bool, calls: Calls) -> None:
    """The kernel's layer takes no adapters, so they go around it, but not around the hooks."""
    expected, model = get_peft_model(in_kernel(), LoraConfig(**LORA)), in_kernel()
    adapted: Any = get_peft_model(model, LoraConfig(**LORA)) if adapt_first else model
    moe_fused.kernelize(adapted)
    hooked(model)
    seen: list[nn.Module] = []
    hook = experts_modules(model)[1]._hf_hook
    inner = hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: (seen.append(module), inner(module, *args, **kwargs))[1]
    adapted = adapted if adapt_first else get_peft_model(model, LoraConfig(**LORA))
    randomize(expected)
    randomize(adapted)
    torch.testing.assert_close(logits_of(adapted), logits_of(expected))
    assert calls.adapters == 2 * 2 * 2
    assert seen == [experts_modules(model)[1]]


def test_kernelize_names_what_serves_a_model_with_hooks(dense: Path) -> None:
    with pytest.raises(
        ValueError, match=r'hooks .*Call moe_fused\.enable\(\) and model\.set_experts_implementation\("moe'
    ):
        moe_fused.kernelize(hooked(load(dense)))


def test_tied_weights_on_two_devices(tmp_path: Path) -> None:
    """The head runs where it is, with the weights of the embedding."""
    build(dtype=torch.float32, tie_word_embeddings=True).save_pretrained(tmp_path)
    whole = load(tmp_path)
    offloaded = load(tmp_path, device_map=two_devices(GPU, "cpu", ("lm_head", "model.embed_tokens", "model.norm")))
    assert offloaded.lm_head.weight.is_meta
    assert torch.equal(logits_of(offloaded), logits_of(whole))


# Offloading.


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_dense_layers_are_offloaded(place: str, dense: Path, calls: Calls, tmp_path: Path) -> None:
    whole = load(dense)
    device_map = two_devices(GPU, "cpu") if place == "cpu" else two_devices("cpu", "disk")
    model = load(dense, device_map=device_map, offload_folder=tmp_path / "offloaded")
    assert [experts.gate_up_proj.is_meta for experts in experts_modules(model)] == [False, True]
    expected = logits_of(whole)
    assert torch.equal(logits_of(model), expected)
    assert calls.count == 4
    generated = [each.generate(tokens(), max_new_tokens=4, do_sample=False) for each in (whole, model)]
    assert torch.equal(*generated)
    model.save_pretrained(tmp_path / "saved")
    assert same_state(load(tmp_path / "saved"), whole)


def test_adapters_of_offloaded_experts_are_refused(dense: Path) -> None:
    """Their factors would be lost on the meta device. The experts of other layers, and linear layers, are adapted."""
    model = load(dense, device_map=two_devices(GPU, "cpu"))
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.experts must be on a GPU for LoRA, but .* offloads it"
    ):
        get_peft_model(model, LoraConfig(**LORA))
    model = load(dense, device_map=two_devices(GPU, "cpu"))
    adapted = get_peft_model(model, LoraConfig(**LORA, layers_to_transform=[0], layers_pattern="layers"))
    loss, gradients = trained(adapted)
    assert loss.isfinite()
    assert len(gradients) == 2 * 3, "q_proj and the two stacks of one layer"


def test_what_is_offloaded_by_name_stays_dense(dense: Path, tmp_path: Path) -> None:
    """With the option of Transformers; saved, such a model loads on any device with the same modules in 4 bits."""
    options = quantization(True, llm_int8_enable_fp32_cpu_offload=True)
    model = load(dense, device_map=two_devices(GPU, "cpu"), **options)
    assert {name.split(".")[2] for name in packed(model)} == {"0"}
    assert experts_modules(model)[1].gate_up_proj.dtype == torch.float32
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    for device_map in (GPU, "cpu", {"": "cpu"}):
        reloaded = load(tmp_path, device_map=device_map)
        assert {name.split(".")[2] for name in packed(reloaded)} == {"0"}
        assert torch.equal(logits_of(reloaded), expected)


def test_a_model_that_was_offloaded_as_a_whole(dense: Path, tmp_path: Path) -> None:
    options = quantization(True, llm_int8_enable_fp32_cpu_offload=True)
    model = load(dense, device_map=two_devices("cpu", "disk"), offload_folder=tmp_path / "offloaded", **options)
    assert not packed(model)
    model.save_pretrained(tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert not packed(reloaded)
    assert torch.equal(logits_of(reloaded), logits_of(model))


ALONE = "give a device_map of GPUs alone, or load the dense checkpoint with llm_int8_enable_fp32_cpu_offload=True"


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_4_bit_weights_are_not_offloaded(place: str, dense: Path, tmp_path: Path) -> None:
    """Every way to ask for it ends before anything is loaded, and says what to do."""
    on_gpu = two_devices(0, place)
    with pytest.raises(
        ValueError, match="you need to set `llm_int8_enable_fp32_cpu_offload=True`"
    ):  # Transformers' own
        load(dense, device_map=on_gpu, **quantization(True))
    load(dense, **quantization(True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"a checkpoint in 4 bits cannot be offloaded to the CPU or the disk: {ALONE}"):
        load(tmp_path, device_map=on_gpu)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"]["llm_int8_enable_fp32_cpu_offload"] = True
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    refused = rf"model\.layers\.1\.mlp\.experts\.gate_up_proj is in 4 bits and .* puts it on the {place}: {ALONE}"
    with pytest.raises(ValueError, match=refused):
        load(tmp_path, device_map=on_gpu)


def test_a_device_map_that_transformers_makes_offloads_no_4_bit_experts(dense: Path) -> None:
    """It is made when the experts are in 4 bits already, so the option that keeps them dense comes too late."""
    quantizer: Any = load(dense, **quantization(True, llm_int8_enable_fp32_cpu_offload=True)).hf_quantizer
    quantizer.validate_environment(device_map=two_devices(0, 1))
    quantizer.validate_environment(device_map=two_devices(0, "cpu", ("model.embed_tokens",)))
    with pytest.raises(
        ValueError, match=r"layers\.1\..* keeps dense only what a device_map offloads by name\. Give a dict"
    ):
        quantizer.validate_environment(device_map=two_devices(0, "cpu"))


# Maps that Transformers makes.


@both
def test_layers_are_spread_by_their_real_size(quantized: bool, tmp_path: Path) -> None:
    """What the GPUs hold is what they were said to have room for; layers are whole, and both GPUs get some."""
    build(num_hidden_layers=6).save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.bfloat16, **quantization(quantized))
    sizes = {part: sum(p.nbytes for p in module.parameters()) for part, module in layers_and_rest(model)}
    # As it is before its weights are loaded: experts have their dense shapes, and a quantizer knows what becomes of them.
    with torch.device("meta"):
        empty = type(model)(model.config).to(torch.bfloat16)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    # Transformers sets the size of the largest layer aside on the first GPU.
    room = sum(sizes.values()) // 2 + 2 * max(sizes.values())
    if quantizer is not None:
        quantizer.pre_quantized = False
        quantizer._process_model_before_weight_loading(empty, device_map="auto")
        room = int(room / 0.9) + 1  # Transformers leaves a tenth free
    device_map = _get_device_map(empty, "auto", {0: room, 1: room, "cpu": 0}, quantizer)
    assert set(device_map.values()) == {0, 1}
    places = {
        part: {place for name, place in device_map.items() if f"{name}.".startswith(f"{part}.")} for part in sizes
    }
    assert all(len(found) == 1 for part, found in places.items() if ".layers." in part), device_map
    for gpu in (0, 1):
        assert 0 < sum(size for part, size in sizes.items() if places[part] == {gpu}) <= room


def layers_and_rest(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    layers = [(f"model.layers.{index}", layer) for index, layer in enumerate(model.model.layers)]
    return [*layers, *((name, model.get_submodule(name)) for name in ("model.embed_tokens", "model.norm", "lm_head"))]


# Two devices whose tensors must not meet.


def without_values(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces the tensors of ``model`` by tensors without values."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter.detach())
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)


def put(module: nn.Module, device: str) -> None:
    """Moves the tensors of ``module`` and gives it Accelerate's hooks. To be called within the mode of these tensors."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.data.to(device), requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    attach_execution_device_hook(module, device)


@pytest.fixture
def spread(dense: Path, request: pytest.FixtureRequest) -> tuple[PeftModel, FakeTensorMode]:
    """A model with an adapter, its second layer and its head on the meta device."""
    # bitsandbytes' linear layers do not run on tensors without values.
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]
    model = load(dense, **quantization(request.param, llm_int8_skip_modules=linears))
    assert len(packed(model)) == (4 if request.param else 0)
    adapted, mode = get_peft_model(model, LoraConfig(**LORA)), FakeTensorMode()
    without_values(adapted, mode)
    with mode:
        for part, device in two_devices("cpu", "meta", ("model.layers.1", "model.norm", "lm_head")).items():
            put(model.get_submodule(part), device)
    add_hook_to_module(model, AlignDevicesHook("cpu", io_same_device=True), append=True)
    return adapted, mode


two_ways = pytest.mark.parametrize("spread", [False, True], ids=["dense", "4bit"], indirect=True)


@two_ways
def test_gradients_are_on_the_device_of_their_layer(spread: tuple[PeftModel, FakeTensorMode], calls: Calls) -> None:
    model, mode = spread
    with mode:
        ids = torch.zeros(2, 10, dtype=torch.long)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
    assert [arguments[0].device.type for arguments in calls.arguments] == ["cpu", "meta"]
    assert (output.loss.device.type, output.logits.device.type) == ("cpu", "cpu")
    devices_of = {
        name: (p.device.type, p.grad.device.type) for name, p in model.named_parameters() if p.grad is not None
    }
    assert len(devices_of) == 2 * 2 * 3
    for name, places in devices_of.items():
        place = "meta" if ".layers.1." in name else "cpu"
        assert places == (place, place), name


@two_ways
def test_tensors_that_meet_are_named(spread: tuple[PeftModel, FakeTensorMode]) -> None:
    """The stand-in for two devices refuses what two devices refuse, and the kernel says which tensor it was."""
    model, mode = spread
    wrapper: Any = model.base_model.model.model.layers[0].mlp.experts
    argument = {"down_proj": "down_lora", "gate_up_proj": "gate_up_lora"}[wrapper.parameter_name]
    remove_hook_from_module(wrapper, recurse=True)  # which would move the factor to where it belongs
    with mode:
        put(wrapper.lora_B, "meta")
        with pytest.raises(ValueError, match=rf"{argument}\.b must be on cpu like hidden_states, got meta"):
            model(input_ids=torch.zeros(2, 10, dtype=torch.long))


def test_factors_are_made_on_the_device_of_the_experts() -> None:
    model = in_kernel(**SIZES)
    model.model.layers[1].to("meta")
    adapted = get_peft_model(model, LoraConfig(**LORA))
    found = {(name.split(".")[4], p.device.type) for name, p in adapted.named_parameters() if p.requires_grad}
    assert found == {("0", "cpu"), ("1", "meta")}
    with disabled():  # as PEFT itself does it
        assert adapted.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"].weight.is_meta


# The documentation.


def test_the_example_in_the_documentation_runs(tmp_path: Path) -> None:
    """As it stands, with a small model in the place of the one on the Hub."""
    pytest.importorskip("markdown_it")
    from tests.docs.markdown import blocks

    page = blocks(REPOSITORY / "docs" / "several-gpus.md")
    (block,) = (block for block in page if block.language == "python" and "device_map=" in block.text)
    name = '"Qwen/Qwen3-235B-A22B"'
    assert block.text.count(name) == 1
    build(vocab_size=300).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    names: dict[str, Any] = {"__name__": "block"}
    exec(compile(block.text.replace(name, repr(str(tmp_path))), str(block), "exec"), names)
    gradients = [p.grad for p in names["model"].parameters() if p.requires_grad]
    assert len(gradients) == 2 * 2 * (4 + 2)
    assert names["loss"].isfinite()
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


# The device of a command.


@pytest.mark.parametrize("name, made_current", [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_a_gpu_with_a_number_is_the_current_one(
    name: str, made_current: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise ``bench --device cuda:1`` would time the other GPU's stream."""
    current: list[int] = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    assert devices.choose_device(name) == torch.device(name)
    assert current == made_current
