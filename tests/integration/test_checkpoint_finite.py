"""NaN and infinite weights are named: before a model is worked with, and before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

import moe_fused
from moe_fused.checkpoints.adapters import Layout
from moe_fused.checkpoints.adapters.convert import convert_adapter
from moe_fused.checkpoints.finite import Watch, check_finite, is_finite, not_finite, weights_of
from moe_fused.checkpoints.loading import load_pretrained
from moe_fused.checkpoints.models import convert_model
from moe_fused.checkpoints.readahead import Readahead
from moe_fused.integrations.quantizer import experts_quantizer
from moe_fused.integrations.quantizer.packed_experts import four_bit_config

from .adapters import per_expert_adapter
from .broken import changed, commands, poison, refused, save
from .cli import Command, save_tokenizer
from .four_bit import load, packed
from .models import QWEN3_MOE
from .published import GPT_OSS, compressed_checkpoint, gpt_oss_checkpoint
from .test_cli_models import ATTENTION, EXPERTS, make_adapter

LAYER = "model.layers.1"
Q, UP = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.mlp.experts.2.up_proj.weight"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("finite") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, tmp_path_factory.mktemp("finite") / "adapter", **ATTENTION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_element_is_found(value: float, dtype: torch.dtype) -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(tensor)
    for place in (0, 517, 999):
        broken = tensor.clone()
        broken[place] = value
        assert not is_finite(broken)
        assert list(not_finite([("a", tensor), ("b", broken), ("c", tensor)])) == ["b"]
    both = tensor.clone()
    both[1], both[2] = INF, -INF
    assert not is_finite(both)


def test_large_sums_are_no_fault() -> None:
    """Finite weights pass even if their sum overflows."""
    for tensor in (
        torch.full((4096,), 6e4, dtype=torch.float16),
        torch.full((64,), 3e38),
        torch.full((64,), 3e38).bfloat16(),
    ):
        assert not torch.isfinite(tensor.sum())
        assert is_finite(tensor)
        check_finite([("a", tensor)], "it")
    assert is_finite(torch.zeros(3, dtype=torch.uint8))
    assert is_finite(torch.empty(3, device="meta"))


def test_weights_of_a_model_are_all_looked_at() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert {name for name, _ in weights_of(model)} == {
        "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var",
    }  # fmt: skip


def test_bytes_on_their_way() -> None:
    good, bad = torch.ones(8), torch.tensor([1.0, NAN])
    data = [bytearray(value.numpy().tobytes()) for value in (good, bad)]
    with Watch() as watch:
        watch.see("good", data[0], torch.float32)
        watch.see("bytes", data[1], torch.uint8)

    def see_both() -> None:
        with Watch() as watch:
            watch.see("good", data[0], torch.float32)
            watch.see("bad", data[1], torch.float32)

    with pytest.raises(ValueError, match="bad holds NaN or infinite values"):
        see_both()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("key", [Q, UP, "model.norm.weight", "lm_head.weight", f"{LAYER}.mlp.gate.weight"])
def test_every_command_names_it(
    key: str, value: float, model: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    broken = changed(model, tmp_path / "broken", lambda tensors: poison(tensors, key, value))
    for name, arguments in commands(broken, adapter, tmp_path / "out").items():
        # A weight that is fused while it is loaded is reported by its name in the model; others by their name in the
        # file.
        word = key if key != UP or name == "quantize" else f"{LAYER}.mlp.experts.gate_up_proj"
        refused(command, arguments, word, "NaN or infinite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize("part", [f"{Q}.nested_absmax", f"{UP}.nested_absmax"])
def test_scales_of_4_bits(part: str, adapter: Path, tmp_path: Path, command: Command) -> None:
    source = save(tmp_path / "model")
    assert command("quantize", source, tmp_path / "packed", "--device", "cpu").status == 0
    broken = changed(tmp_path / "packed", tmp_path / "broken", lambda tensors: poison(tensors, part, NAN))
    command_lines = commands(broken, adapter, tmp_path / "out")
    word = Q if Q in part else f"{LAYER}.mlp.experts.gate_up_proj_nested_absmax"
    for name in ("merge", "generate", "convert"):
        refused(command, command_lines[name], part if name == "convert" and Q in part else word, "NaN or infinite")
    assert not (tmp_path / "out").exists()


def test_scales_without_double_quantization(adapter: Path, tmp_path: Path, command: Command) -> None:
    source = save(tmp_path / "model")
    options = ("--device", "cpu", "--no-double-quant", "--format", "fused")
    assert command("quantize", source, tmp_path / "packed", *options).status == 0
    key = f"{LAYER}.mlp.experts.down_proj_absmax"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].view(torch.float32)[2, 3] = INF

    broken = changed(tmp_path / "packed", tmp_path / "broken", change)
    refused(command, commands(broken, adapter, tmp_path / "out")["generate"], key, "NaN or infinite")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.\d\.down_proj\.weight\.absmax holds NaN"):
        convert_model(broken, tmp_path / "out", "per-expert")
    assert not (tmp_path / "out").exists()


def test_from_python(model: Path, tmp_path: Path, enabled: None) -> None:
    """The quantizer refuses NaN for every caller, because bitsandbytes ignores it."""
    from transformers import AutoModelForCausalLM

    for key in (Q, UP):
        broken = changed(model, tmp_path / key, lambda tensors, key=key: poison(tensors, key, NAN))
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            AutoModelForCausalLM.from_pretrained(broken, quantization_config=four_bit_config(torch.float32))


@pytest.mark.parametrize("kind", ["nf4", "nvfp4"])
def test_a_fault_of_a_linear_layer_ends_the_loading(
    kind: str, model: Path, tmp_path: Path, enabled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever conversion finds it. The thread that reads ahead ends as well."""
    from transformers import AutoModelForCausalLM

    stopped: list[Readahead] = []
    monkeypatch.setattr(experts_quantizer, "is_possible", lambda: True)
    monkeypatch.setattr(Readahead, "stop", lambda self, stop=Readahead.stop: (stopped.append(self), stop(self)))
    source, key, options = model, Q, {"quantization_config": four_bit_config(torch.float32)}
    if kind == "nvfp4":
        source, options = compressed_checkpoint(tmp_path / "source", kind, QWEN3_MOE), {}
        key = f"{LAYER}.self_attn.q_proj.weight_global_scale"
    broken = changed(source, tmp_path / "broken", lambda tensors: poison(tensors, key, NAN))
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(broken, **options)
    assert len(stopped) == 1


# For each fault: the format of the checkpoint, the tensor of a matrix, and what breaks one of its values.
FAULTS: dict[str, tuple[str, str, Callable[[torch.Tensor], object]]] = {
    "mxfp4, NaN": ("mxfp4", "weight_scale", lambda scale: scale[3].fill_(255)),
    "nvfp4, NaN": ("nvfp4", "weight_scale", lambda scale: scale.view(torch.uint8)[3].fill_(0x7F)),
    "nvfp4, -NaN": ("nvfp4", "weight_scale", lambda scale: scale.view(torch.uint8)[3].fill_(0xFF)),
    **{
        f"nvfp4, global {value}": ("nvfp4", "weight_global_scale", lambda scale, value=value: scale.fill_(value))
        for value in (0.0, NAN, INF, -3.0, 1e-38)
    },
}


@pytest.mark.parametrize("module", [f"{LAYER}.mlp.experts.2.up_proj", f"{LAYER}.self_attn.q_proj"])
@pytest.mark.parametrize("fault", FAULTS)
def test_scales_of_published_formats(fault: str, module: str, tmp_path: Path, command: Command) -> None:
    """They are found while a model is loaded, copied, merged or made dense, and nothing is written."""
    quant_type, part, damage = FAULTS[fault]
    source = compressed_checkpoint(tmp_path / "source", quant_type, QWEN3_MOE, vocab_size=64)
    save_tokenizer(source)
    adapter = make_adapter(tmp_path / "source/dense", tmp_path / "adapter", **ATTENTION)
    key = f"{module}.{part}"
    broken = changed(source, tmp_path / "broken", lambda tensors: damage(tensors[key]))
    lines = commands(broken, adapter, tmp_path / "out")
    lines["keep"] = (*lines["merge"], "--keep-format", "--allow-other-base")
    lines["merge"] = (*lines["merge"], "--allow-other-base")
    lines["copy"] = ("convert", "model", broken, tmp_path / "out", "--to", "per-expert")
    lines["dense"] = (*lines["copy"], "--dequantize")
    del lines["quantize"]
    if quant_type == "nvfp4":
        del lines["convert"]  # it has no stacks
    said = "positive finite numbers" if "global" in part else "NaN or infinite"
    for name, arguments in lines.items():
        # In a stack of all experts, the tensor is named as it would have been written.
        word = f"{LAYER}.mlp.experts.gate_up_proj_scales" if name == "convert" and "experts" in key else key
        refused(command, arguments, word, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "broken", "source"]


def test_scales_of_activations(tmp_path: Path, command: Command) -> None:
    """Nothing is multiplied with them, so that only what writes them says that they are not finite."""
    source = compressed_checkpoint(tmp_path / "source", "nvfp4", QWEN3_MOE, activations=True)
    key = f"{LAYER}.self_attn.q_proj.input_global_scale"
    broken = changed(source, tmp_path / "broken", lambda tensors: poison(tensors, key, NAN))
    ended = refused(command, ("convert", "model", broken, tmp_path / "out", "--to", "per-expert"), key)
    assert ended.error.endswith(f"{key} holds NaN or infinite values")


@pytest.mark.parametrize("module", [f"{LAYER}.mlp.experts.2.up_proj", f"{LAYER}.self_attn.q_proj"])
@pytest.mark.parametrize("fault", ["mxfp4, NaN", "nvfp4, NaN", "nvfp4, global 0.0", f"nvfp4, global {INF}"])
def test_scales_of_published_formats_from_python(fault: str, module: str, tmp_path: Path, enabled: None) -> None:
    from transformers import AutoModelForCausalLM

    quant_type, part, damage = FAULTS[fault]
    source = compressed_checkpoint(tmp_path / "source", quant_type, QWEN3_MOE)
    key = f"{module}.{part}"
    broken = changed(source, tmp_path / "broken", lambda tensors: damage(tensors[key]))
    assert AutoModelForCausalLM.from_pretrained(source) is not None
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(broken)


@pytest.mark.parametrize("damage", [255, 254], ids=["NaN", "infinite"])
def test_scales_of_stacks(damage: int, tmp_path: Path, command: Command) -> None:
    """A scale of 2^127 is finite, but not all of its weights are."""
    source = gpt_oss_checkpoint(tmp_path / "source", vocab_size=64)
    save_tokenizer(source)
    key = f"{LAYER}.mlp.experts.down_proj_scales"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][2, 3] = damage

    broken = changed(source, tmp_path / "broken", change)
    generate = commands(broken, source, tmp_path / "out")["generate"]
    refused(command, generate, key, "NaN or infinite")
    for options in ((), ("--dequantize",)):
        if damage == 255 or options:
            refused(command, ("convert", "model", broken, tmp_path / "out", "--to", "fused", *options), key, "NaN")
    assert not (tmp_path / "out").exists()


def test_a_large_scale_of_small_values_is_no_fault(tmp_path: Path, enabled: None) -> None:
    """Weights of 2^127 are finite."""
    source = gpt_oss_checkpoint(tmp_path / "source")
    key = f"{LAYER}.mlp.experts.down_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{key}_scales"][2, 3] = 254
        tensors[f"{key}_blocks"][2, 3] = 0x22

    large = changed(source, tmp_path / "large", change)
    model = load(large, GPT_OSS, dtype=torch.float32)
    dense = packed(model)[key].dequantize(torch.float32)
    assert dense[2, 3].unique().tolist() == [2.0**127]


def test_4_bits_from_python(model: Path, tmp_path: Path, command: Command) -> None:
    from transformers import AutoModelForCausalLM

    for options in ((), ("--no-double-quant",)):
        packed_model = tmp_path / f"packed{len(options)}"
        assert command("quantize", model, packed_model, "--device", "cpu", "--layout", "fused", *options).status == 0
        key = f"{LAYER}.mlp.experts.down_proj_{'absmax' if options else 'nested_absmax'}"

        def change(tensors: dict[str, torch.Tensor], key: str = key) -> None:
            tensors[key].view(torch.float32)[2, 0] = NAN

        broken = changed(packed_model, tmp_path / f"broken{len(options)}", change)
        moe_fused.enable()
        with pytest.raises(ValueError, match=f"{key.replace('.', '[.]')} holds NaN"):
            AutoModelForCausalLM.from_pretrained(broken)
        moe_fused.disable()


@pytest.mark.parametrize("options", [ATTENTION, EXPERTS], ids=["attention", "experts"])
def test_adapters(options: dict[str, object], model: Path, tmp_path: Path, command: Command) -> None:
    whole = make_adapter(model, tmp_path / "adapter", **options)
    file = "adapter_model.safetensors"
    keys = sorted(load_file(whole / file))
    for key in (keys[0], keys[-1]):
        broken = changed(whole, tmp_path / key, lambda tensors, key=key: poison(tensors, key, INF), file)
        command_lines = commands(model, broken, tmp_path / "out")
        refused(command, command_lines["merge"], f"ADAPTER {broken}", key, "NaN or infinite")
        refused(command, (*command_lines["generate"], "--adapter", broken), key, "NaN or infinite")
        if options is EXPERTS:
            with pytest.raises(ValueError, match=f"{key.replace('.', '[.]')} holds NaN"):
                convert_adapter(broken, tmp_path / "out", to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED)
    assert not (tmp_path / "out").exists()


def test_adapters_of_separate_experts(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight"
    whole = per_expert_adapter(tmp_path / "adapter", shared=True)
    broken = changed(whole, tmp_path / "broken", lambda tensors: poison(tensors, key, NAN), "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{key.replace('.', '[.]')} holds NaN"):
        convert_adapter(broken, tmp_path / "out", to=Layout.PEFT_FUSED)


def test_a_sum_that_overflows(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    """A merge in fp16 is refused if its result is infinite, although model and adapter are finite."""
    file, key = "adapter_model.safetensors", "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    large = changed(adapter, tmp_path / "large", lambda tensors: tensors[key].fill_(6e4), file)
    ended = refused(command, (*commands(model, large, tmp_path / "out")["merge"], "--dtype", "float16"), Q, "infinite")
    assert "merged with" in ended.error
    assert command(*commands(model, large, tmp_path / "out")["merge"]).status == 0


def test_each_weight_is_looked_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check passes over a dense model's weights once, and never over packed bytes."""
    from moe_fused.checkpoints import finite

    seen: list[int] = []

    def counting(tensors: Any) -> Any:
        pairs = list(tensors)
        seen.extend(value.nbytes for _, value in pairs)
        return not_finite(pairs)

    monkeypatch.setattr(finite, "not_finite", counting)
    dense = load_pretrained(str(model), "it", AutoConfig.from_pretrained(model), dtype=torch.float32)
    assert sum(seen) == sum(parameter.nbytes for parameter in dense.parameters())
    seen.clear()
    moe_fused.enable()
    quantization = four_bit_config(torch.float32)
    packed = load_pretrained(
        str(model), "it", AutoConfig.from_pretrained(model), quantization=quantization, device_map={"": "cpu"}
    )
    moe_fused.disable()
    bytes_of_4_bits = sum(value.nbytes for value in packed.parameters() if value.dtype == torch.uint8)
    assert sum(seen) < sum(parameter.nbytes for parameter in packed.parameters()) - 0.8 * bytes_of_4_bits
