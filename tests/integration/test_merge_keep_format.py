"""``moe-fused merge --keep-format``: adapters merged back into 4 bits, and what the command says that this loses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import moe_fused
from moe_fused.commands.merge import error_table
from moe_fused.integrations.quantizer.packed_experts import four_bit_config

from .cli import Command, Ended
from .four_bit import build, load, logits, packed, same_state, stacked_checkpoint
from .models import QWEN3_MOE, ModelCase
from .published import GPT_OSS, compressed_checkpoint, gpt_oss_checkpoint, is_linear
from .saved import config_of, tensors_of

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}


@dataclass(frozen=True)
class Kept:
    """A model in 4 bits and an adapter for it.

    Attributes:
        method: the ``quant_method`` of the model.
        lora: the options of the adapter.
        linears: how many linear layers are quantized again.
    """

    method: str
    lora: Mapping[str, Any] = field(default_factory=lambda: LORA)
    case: ModelCase = QWEN3_MOE
    linears: int = 0


CASES = {
    "gpt-oss": Kept("mxfp4", case=GPT_OSS),
    "mxfp4": Kept("compressed-tensors"),
    "nvfp4": Kept("compressed-tensors"),
    "nvfp4, linear layers of experts": Kept(
        "compressed-tensors", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    ),
    "nf4": Kept("bitsandbytes", linears=2),
    "fp4, fused": Kept("bitsandbytes", linears=2),
    "nf4, DoRA": Kept("bitsandbytes", {"target_modules": ["q_proj", "o_proj"], "use_dora": True}, linears=4),
}


def checkpoint(name: str, path: Path) -> Path:
    """Saves the model of a case."""
    if name == "gpt-oss":
        return gpt_oss_checkpoint(path)
    kind = name.split(",", maxsplit=1)[0]
    if kind in ("mxfp4", "nvfp4"):
        return compressed_checkpoint(path, kind, QWEN3_MOE, activations=kind == "nvfp4")
    build().save_pretrained(path / "dense")
    config = four_bit_config(torch.bfloat16, kind, double_quant=kind == "nf4")
    model = load(path / "dense", quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    if "fused" in name:
        moe_fused.save_format(model, "fused")
    model.save_pretrained(path)
    return path


def make_adapter(model: Path, path: Path, case: ModelCase, **options: Any) -> Path:
    """Saves an adapter without factors of zero."""
    loaded = load(model, case, device_map="cpu")
    adapted = get_peft_model(loaded, LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options))
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(path)
    return path


def adapted_weights(model: Any, adapter: Path) -> dict[str, Tensor]:
    """The weights of a dense model by the names that the command prints, with an adapter merged if there is one."""
    state = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return {name.removesuffix(".weight"): value for name, value in state.items()}


def printed(ended: Ended) -> tuple[dict[str, float], float]:
    """The errors in the table that the command prints, in per cent, by the names of weights; and their mean."""
    lines = ended.stdout.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("layer "))
    columns = lines[first].split()[1:]
    errors: dict[str, float] = {}
    for line in lines[first + 1 :]:
        if mean := re.fullmatch(r"mean of all (\d+): ([\d.]+) %", line):
            assert int(mean[1]) == len(errors)
            return errors, float(mean[2])
        layer, *cells = line.replace(" %", "").split()
        errors |= {f"{layer} {column}": float(cell) for column, cell in zip(columns, cells, strict=True)}
    raise AssertionError(ended)


@pytest.mark.parametrize("name", CASES)
def test_merged_into_the_format(name: str, command: Command, tmp_path: Path) -> None:
    kept = CASES[name]
    moe_fused.enable()
    source = checkpoint(name, tmp_path / "source")
    adapter = make_adapter(source, tmp_path / "adapter", kept.case, **kept.lora)
    ended = command("merge", source, adapter, tmp_path / "out", "--keep-format")
    assert ended.status == 0, ended

    # The model is what PEFT merges in memory, and is saved as it was.
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == kept.method
    experts = {key for key in before if ".experts." in key}
    assert {key for key in after if ".experts." in key} == experts
    for key in experts:
        assert after[key].dtype == before[key].dtype, key
        assert after[key].shape == before[key].shape or "quant_state" in key  # whose JSON is as long as its numbers
    moe_fused.enable()
    options: dict[str, Any] = {"device_map": "cpu", "dtype": torch.bfloat16}
    merged = PeftModel.from_pretrained(load(source, kept.case, **options), adapter).merge_and_unload()
    again = load(tmp_path / "out", kept.case, **options)
    assert {key: value.format for key, value in packed(again).items()} == {
        key: value.format for key, value in packed(merged).items()
    }
    assert torch.equal(logits(merged), logits(again))
    assert not torch.equal(logits(load(source, kept.case, **options)), logits(again))
    if kept.method == "bitsandbytes":  # a matrix says as before which dtype it had
        attention = again.model.layers[0].self_attn.q_proj.weight
        assert attention.quant_state.dtype == torch.bfloat16

    # The errors are those of the weights.
    dense = [load(path, kept.case, device_map="cpu", dtype=torch.float32) for path in (source, tmp_path / "out")]
    exact = adapted_weights(dense[0].dequantize(torch.float32).float(), adapter)
    state = dense[1].dequantize(torch.float32).state_dict()
    rounded = {key.removesuffix(".weight"): value.float() for key, value in state.items()}
    errors, mean = printed(ended)
    assert len(errors) == (4 if "DoRA" not in name else 0) + kept.linears
    for key, error in errors.items():
        layer, column = key.split()
        (weight,) = (name for name in exact if name.startswith(f"{layer}.") and name.endswith(f".{column}"))
        expected = (rounded[weight] - exact[weight]).norm() / exact[weight].norm()
        assert error == pytest.approx(100 * expected.item(), abs=0.02), key
        assert 2 < error < 20
    assert mean == pytest.approx(sum(errors.values()) / len(errors), abs=0.02)
    said = "adapted linear layers stay dense and are not in this table" in ended.stdout
    assert said == (kept.linears == 0 and "target_parameters" in kept.lora)


def test_what_becomes_of_the_rest(command: Command, tmp_path: Path) -> None:
    """Linear layers of compressed-tensors become dense, and the command says so, and how large the result will be."""
    moe_fused.enable()
    source = checkpoint("nvfp4", tmp_path / "source")
    adapter = make_adapter(source, tmp_path / "adapter", QWEN3_MOE, target_parameters=EXPERTS)
    arguments = ("merge", source, adapter, tmp_path / "out", "--keep-format")
    dry = command(*arguments, "--dry-run")
    assert dry.status == 0, dry
    assert "in nvfp4, quantized again" in dry.stdout
    assert re.search(r"note: 8 linear layers, as model\.layers\.0\.\S+, become bfloat16, because those of", dry.stdout)
    assert not (tmp_path / "out").exists()
    assert command(*arguments).status == 0
    size = sum(value.nbytes for value in tensors_of(tmp_path / "out").values())
    assert f", {size / 1e9:.3g} GB" in dry.stdout
    moe_fused.enable()
    options: dict[str, Any] = {"device_map": "cpu"}
    before, after = load(source, **options), load(tmp_path / "out", **options)
    for name, value in before.state_dict().items():
        assert ".experts." in name or torch.equal(value, after.state_dict()[name]), name


def test_a_model_with_dense_experts_becomes_dense(command: Command, tmp_path: Path) -> None:
    """Linear layers of compressed-tensors are dequantized, so that nothing is left that could keep its format."""
    moe_fused.enable()
    source = compressed_checkpoint(
        tmp_path / "source", "nvfp4", QWEN3_MOE, only=lambda key: is_linear(key) and ".experts." not in key
    )
    adapter = make_adapter(source, tmp_path / "adapter", QWEN3_MOE, target_modules=["q_proj"])
    ended = command("merge", source, adapter, tmp_path / "out", "--keep-format")
    assert ended.status == 0, ended
    assert "out: dense, bfloat16" in ended.stdout
    assert "quantized again" not in ended.stdout
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert not [key for key in tensors_of(tmp_path / "out") if "weight_" in key]


def test_the_original_layout_is_not_written(command: Command, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "dense")
    stacked_checkpoint(tmp_path / "dense", tmp_path / "source")
    moe_fused.enable()
    adapter = make_adapter(tmp_path / "source", tmp_path / "adapter", QWEN3_MOE, target_parameters=EXPERTS)
    ended = command("merge", tmp_path / "source", adapter, tmp_path / "out", "--keep-format")
    assert ended.status == 0, ended
    assert (
        "note: the experts are written per-expert, because the original project's layout is only read" in ended.stdout
    )
    assert "model.layers.0.mlp.experts.0.up_proj.weight.absmax" in tensors_of(tmp_path / "out")


def test_merging_dense_needs_no_bitsandbytes(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model in a published format is merged into a dense one without it."""
    moe_fused.enable()
    source = checkpoint("gpt-oss", tmp_path / "source")
    adapter = make_adapter(source, tmp_path / "adapter", GPT_OSS, target_parameters=EXPERTS)
    from moe_fused.commands import options

    find = options.importlib.util.find_spec
    monkeypatch.setattr(
        options.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    ended = command("merge", source, adapter, tmp_path / "out")
    assert ended.status == 0, ended
    moe_fused.enable()
    expected = PeftModel.from_pretrained(load(source, GPT_OSS).dequantize(), adapter).merge_and_unload()
    assert same_state(load(tmp_path / "out", GPT_OSS), expected)


def test_what_is_refused(command: Command, tmp_path: Path) -> None:
    moe_fused.enable()
    build().save_pretrained(tmp_path / "dense")
    adapter = make_adapter(tmp_path / "dense", tmp_path / "adapter", QWEN3_MOE, target_modules=["q_proj"])
    source, target = checkpoint("nvfp4", tmp_path / "source"), tmp_path / "out"
    ended = command("merge", tmp_path / "dense", adapter, target, "--keep-format")
    assert ended.status == 1
    assert (
        f"--keep-format is for models in 4 bits, and MODEL {tmp_path / 'dense'} is dense: leave it out" in ended.error
    )
    ended = command("merge", source, adapter, target, "--keep-format", "--dtype", "float16")
    assert "--dtype is for dense results, and --keep-format makes one in 4 bits: leave one of them out" in ended.error
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(load(tmp_path / "dense"), config).save_pretrained(tmp_path / "ia3")
    ended = command("merge", source, tmp_path / "ia3", target, "--keep-format")
    assert f"--keep-format merges LoRA, and ADAPTER {tmp_path / 'ia3'} is IA3: leave it out" in ended.error
    # Finite factors whose product is not.
    moe_fused.enable()
    adapted = get_peft_model(
        load(source), LoraConfig(r=1, lora_alpha=1, task_type="CAUSAL_LM", target_parameters=EXPERTS)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.fill_(3e19)
    adapted.save_pretrained(tmp_path / "large")
    ended = command("merge", source, tmp_path / "large", target, "--keep-format")
    assert ended.status == 1
    assert re.search(r"model\.layers\.\d\.mlp\.experts\.\w+ merged with the adapter holds NaN or infinite", ended.error)
    assert not target.exists()


def test_the_table() -> None:
    """Columns have as many parts of a name as tell them apart, and a layer may lack a weight."""
    lines = list(
        error_table(
            {
                "model.layers.0.self_attn.q_proj": 0.1,
                "model.layers.0.mlp.shared_expert.down_proj": 0.2,
                "model.layers.10.mlp.experts.down_proj": 0.31234,
                "head": 0.0,
            }
        )
    )
    assert lines == [
        "layer             q_proj  shared_expert.down_proj  experts.down_proj     head",
        "model.layers.0   10.00 %                  20.00 %",
        "model.layers.10                                              31.23 %",
        "                                                                       0.00 %",
        "mean of all 4: 15.31 %",
    ]
