"""NVFP4 of NVIDIA's ModelOpt becomes that of compressed-tensors, as the converter of compressed-tensors makes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import moe_fused
from moe_fused.quantized import check_quantization
from tests.packaging.hub import Hub, Repository

from .broken import changed, refused, save
from .cli import Command, save_tokenizer
from .four_bit import packed, same_bits
from .models import QWEN3_MOE
from .published import compressed_checkpoint, tensors_of

NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.*.mlp.gate"]}


@pytest.fixture
def modelopt(tmp_path: Path) -> Path:
    """A tiny Qwen3-MoE with the tensors and names of ModelOpt. Its scales of matrices are no powers of two."""
    made = compressed_checkpoint(tmp_path / "made", "nvfp4", QWEN3_MOE, activations=True, vocab_size=64)
    tensors: dict[str, Tensor] = {}
    for key, value in tensors_of(made).items():
        module, _, part = key.rpartition(".")
        if part == "weight_packed":
            tensors[f"{module}.weight"] = value
        elif part == "weight_global_scale":
            tensors[f"{module}.weight_scale_2"] = 1 / value[0]
        elif part == "input_global_scale":
            tensors[f"{module}.input_scale"] = 1 / value[0]
        else:
            tensors[key] = value
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.5)
    return _save(tmp_path / "modelopt", made, tensors, NVFP4)


def _save(path: Path, like: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    path.mkdir(exist_ok=True)
    config = json.loads((like / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    save_tokenizer(path)
    return path


def _expected(path: Path) -> dict[str, Tensor]:
    """What the converter of compressed-tensors makes of a checkpoint."""
    from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter

    tensors = tensors_of(path)
    del tensors["model.layers.0.self_attn.k_proj.k_scale"]
    converter = ModelOptNvfp4Converter(targets=["re:.*_proj$"])
    result: dict[str, Tensor] = converter.process(tensors)
    return result


@pytest.mark.parametrize("own_config", [False, True], ids=["in config.json", "in a file of its own"])
def test_becomes_a_checkpoint_of_compressed_tensors(
    own_config: bool, modelopt: Path, command: Command, tmp_path: Path
) -> None:
    if own_config:
        _save(modelopt, modelopt, tensors_of(modelopt), None)
        content = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
        (modelopt / "hf_quant_config.json").write_text(json.dumps(content), encoding="utf-8")
    target = tmp_path / "converted"
    ended = command("convert", "model", modelopt, target, "--to", "per-expert")
    assert ended.status == 0, ended
    assert "note: weight_scale_2 becomes weight_global_scale = 1/weight_scale_2" in ended.stdout
    assert "k_proj.k_scale and 0 more scales of the FP8 KV cache are left out" in ended.stdout
    saved, expected = tensors_of(target), _expected(modelopt)
    assert saved.keys() == expected.keys()
    assert all(same_bits(saved[key], expected[key].reshape(saved[key].shape)) for key in saved)
    moe_fused.enable()
    model = AutoModelForCausalLM.from_pretrained(target)
    assert len(packed(model)) == 4
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "made" / "dense")
    ours, theirs = model.model.layers[1].mlp.experts, dense.model.layers[1].mlp.experts
    weights = moe_fused.get_kernel().modules.weights_of(ours, "down_proj").dequantize(torch.float32)
    assert 0.02 < float((weights - theirs.down_proj.float()).norm() / theirs.down_proj.float().norm()) < 0.15


def test_a_config_in_a_file_of_its_own(modelopt: Path, command: Command, tmp_path: Path) -> None:
    """Other commands say how, and the file does not stay beside a result of which it is not true."""
    _save(modelopt, modelopt, tensors_of(modelopt), None)
    (modelopt / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    ended = command("generate", modelopt, "--prompt", "w7")
    assert "is quantized to modelopt (NVFP4), as its hf_quant_config.json says" in ended.error
    assert f"`moe-fused convert model {modelopt} NEW --to per-expert`" in ended.error
    dense = tmp_path / "dense"
    assert command("convert", "model", modelopt, dense, "--to", "per-expert", "--dequantize").status == 0
    assert command("convert", "model", dense, tmp_path / "fused", "--to", "fused").status == 0


def test_becomes_a_dense_checkpoint(modelopt: Path, command: Command, tmp_path: Path) -> None:
    assert command("convert", "model", modelopt, tmp_path / "made-again", "--to", "per-expert").status == 0
    ended = command("convert", "model", modelopt, tmp_path / "dense", "--to", "per-expert", "--dequantize")
    assert ended.status == 0, ended
    moe_fused.enable()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "made-again").dequantize().state_dict()
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    assert state.keys() == expected.keys()
    assert all(same_bits(state[key], expected[key]) for key in state)


def test_other_commands_say_how(modelopt: Path, command: Command, tmp_path: Path) -> None:
    for arguments in (("generate", modelopt, "--prompt", "w7"), ("quantize", modelopt, tmp_path / "new")):
        ended = command(*arguments)
        assert (
            "is quantized to modelopt (NVFP4), which moe_fused does not read yet: make a checkpoint of" in ended.error
        )
        assert f"`moe-fused convert model {modelopt} NEW --to per-expert`" in ended.error


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        (
            {"quant_algo": "FP8"},
            "is quantized to modelopt (FP8), as its hf_quant_config.json says, which moe_fused does not",
        ),
        (["NVFP4"], "hf_quant_config.json must hold an object called quantization, got ['NVFP4']"),
        (None, "hf_quant_config.json must hold an object called quantization, got None"),
    ],
)
def test_other_content_of_the_file(
    quantization: object, says: str, modelopt: Path, command: Command, tmp_path: Path
) -> None:
    """The conversion, which would not help, is not advised."""
    _save(modelopt, modelopt, tensors_of(modelopt), None)
    (modelopt / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    for arguments in (
        ("generate", modelopt, "--prompt", "w7"),
        ("convert", "model", modelopt, tmp_path / "new", "--to", "per-expert"),
    ):
        ended = refused(command, arguments, says)
        assert "convert model" not in ended.error


def test_a_file_that_quantizes_no_weights(command: Command, tmp_path: Path) -> None:
    """ModelOpt writes it for a model of which the cache of keys and values alone is quantized."""
    dense = save(tmp_path / "dense")
    content = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    (dense / "hf_quant_config.json").write_text(json.dumps(content))
    ended = command("generate", dense, "--prompt", "w7", "--max-new-tokens", 1, "--device", "cpu")
    assert ended.status == 0, ended


# What the Hub has in config.json, and in ModelOpt's file.
HUB_FILES: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "in config.json": (NVFP4, None),
    "in a file of its own": (None, {"quantization": {"quant_algo": "NVFP4"}}),
}


@pytest.mark.parametrize("place", HUB_FILES)
def test_names_on_the_hub(place: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is found on the Hub and then in its cache, and the message says how to get a directory to convert."""
    content, own = HUB_FILES[place]
    config = QWEN3_MOE.build().config.to_dict() | ({} if content is None else {"quantization_config": content})
    files = {"config.json": config, **({} if own is None else {"hf_quant_config.json": own})}
    # Transformers remembers the commit of a name as long as the process runs.
    hub, name = Hub(), f"org/{place.replace(' ', '-')}"
    hub.repositories[name] = Repository.new()
    hub.repositories[name].commit("main", {path: json.dumps(values).encode() for path, values in files.items()}, "it")
    says = (
        f"--model {name} is quantized to modelopt (NVFP4)",
        f"`hf download {name} --local-dir DIRECTORY` and `moe-fused convert model DIRECTORY NEW --to per-expert`",
    )
    arguments = ("bench", "--model", name, "--device", "cpu")
    with hub.serving():
        point_to(hub, tmp_path, monkeypatch)
        refused(command, arguments, *says)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(command, arguments, *says)


def test_a_dense_model_on_the_hub_is_asked_for_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    hub.repositories["org/dense"] = Repository.new()
    hub.repositories["org/dense"].commit("main", {"config.json": b"{}"}, "files")
    with hub.serving():
        point_to(hub, tmp_path, monkeypatch)
        for _ in range(2):
            check_quantization("MODEL", "org/dense", {})
    assert [request for request in hub.requests if "hf_quant" in request] == [
        "HEAD /org/dense/resolve/main/hf_quant_config.json"
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_quantization("MODEL", "org/dense", {})
    check_quantization("MODEL", "org/not-here", {})


def point_to(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets huggingface_hub, which is imported already, find the stand-in instead of the Hub."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("mlp.experts.2.up_proj.weight_scale", None, "weight_scale is missing"),
        ("mlp.experts.2.up_proj.weight", None, "weight is missing"),
        ("self_attn.q_proj.weight_scale_2", lambda value: value.double(), "must be a number in float32, got F64"),
        ("self_attn.q_proj.weight", lambda value: value[:, 1:].clone(), "must be"),
    ],
)
def test_broken_checkpoints_are_refused(
    key: str,
    change: Callable[[Tensor], Tensor] | None,
    says: str,
    modelopt: Path,
    command: Command,
    tmp_path: Path,
) -> None:
    tensors = tensors_of(modelopt)
    value = tensors.pop(f"model.layers.0.{key}")
    if change is not None:
        tensors[f"model.layers.0.{key}"] = change(value)
    save_file(tensors, modelopt / "model.safetensors", {"format": "pt"})
    ended = command("convert", "model", modelopt, tmp_path / "new", "--to", "per-expert")
    assert says in ended.error, ended
    assert key.rpartition(".")[0] in ended.error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("part", ["weight_scale_2", "input_scale"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_scales_that_are_no_positive_numbers(
    value: float, part: str, modelopt: Path, tmp_path: Path, command: Command
) -> None:
    key = f"model.layers.1.mlp.experts.2.up_proj.{part}"
    broken = changed(modelopt, tmp_path / "broken", lambda tensors: tensors[key].fill_(value))
    convert = ("convert", "model", broken, tmp_path / "out", "--to", "per-expert")
    refused(command, convert, key, f"must be a positive finite number, got {value}")
    assert not (tmp_path / "out").exists()


def test_kept_scales_of_activations_are_noted(modelopt: Path, tmp_path: Path, command: Command) -> None:
    ended = command("convert", "model", modelopt, tmp_path / "out", "--to", "per-expert")
    assert ended.status == 0, ended
    scales = [key for key in tensors_of(tmp_path / "out") if key.endswith("input_global_scale")]
    assert scales
    assert f"{len(scales)} scales of activations" in ended.stdout
    assert "input_activations is null" in ended.stdout
