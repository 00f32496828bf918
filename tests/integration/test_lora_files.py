"""Files of LoRA on experts: PEFT's own keys, or a matrix for each expert, written and read on every way there is."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from moe_fused.checkpoints.adapters import Layout
from moe_fused.checkpoints.adapters.convert import convert_adapter

from .compare import assert_near, forward_backward
from .conftest import DEVICE
from .lora import BOTH, LINEAR, OPTIONS, RANK, disabled, is_ours, ours, plain, randomize, run, theirs, wrappers
from .models import EXPERTS, HIDDEN, INTERMEDIATE, MODELS, QWEN3_MOE, STACKED, ModelCase, tokens

pytestmark = pytest.mark.usefixtures("enabled")

MIXTRAL = next(case for case in MODELS if case.id == "mixtral")
KINDS: dict[str, dict[str, Any]] = {
    "shared": {"target_modules": ["q_proj"], "target_parameters": BOTH},
    "shared, gate_up only": {"target_modules": [], "target_parameters": BOTH[:1]},
    "apart": {"target_modules": ["q_proj", *LINEAR]},
    "apart, gate and up only": {"target_modules": ["gate_proj", "up_proj"]},
    "apart, down only": {"target_modules": ["down_proj"], "use_rslora": True},
    "all linear": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "router": {"target_modules": ["gate", *LINEAR]},
}


def saved(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind: str, tmp_path: Path) -> None:
    model = ours(**KINDS[kind])
    expected = forward_backward(model, tokens())
    model.save_pretrained(tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(plain(), tmp_path / "first", is_trainable=True)
    assert all(map(is_ours, wrappers(loaded)))
    assert_near(forward_backward(loaded, tokens()), expected, 0.0)
    loaded.save_pretrained(tmp_path / "second")
    first, second = saved(tmp_path / "first"), saved(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_and_adds_adapters(kind: str, tmp_path: Path) -> None:
    # Transformers 5.17 does not load modules_to_save.
    options = {name: value for name, value in KINDS[kind].items() if name != "modules_to_save"}
    model = ours(**options)
    model.save_pretrained(tmp_path)
    loaded = plain()
    info = loaded.load_adapter(tmp_path)
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert torch.equal(run(loaded).logits, run(model).logits)
    loaded.add_adapter(LoraConfig(**{**OPTIONS, **options}), "second")
    randomize(loaded, "second", seed=4)
    assert (run(loaded).logits - run(model).logits).abs().max() > 1e-3
    loaded.set_adapter("default")
    state = peft.get_peft_model_state_dict(loaded)
    assert {f"base_model.model.{key}" for key in state} == saved(tmp_path).keys()
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(plain(), tmp_path / "again")
    assert torch.equal(run(again).logits, run(model).logits)


def test_files_of_shared_factors_are_those_of_peft(tmp_path: Path) -> None:
    ours(**KINDS["shared"]).save_pretrained(tmp_path / "ours")
    other = theirs(**KINDS["shared"])
    with disabled():
        other.save_pretrained(tmp_path / "theirs")
    one, other_file = saved(tmp_path / "ours"), saved(tmp_path / "theirs")
    assert one.keys() == other_file.keys()
    assert all(torch.equal(value, other_file[key]) for key, value in one.items())
    assert (tmp_path / "ours/adapter_config.json").read_text() == (tmp_path / "theirs/adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("case", "block", "leaves"),
    [
        pytest.param(QWEN3_MOE, "mlp.experts", LINEAR, id="qwen3_moe"),
        pytest.param(MIXTRAL, "block_sparse_moe.experts", ["w1", "w3", "w2"], id="mixtral"),
    ],
)
def test_files_of_linear_layers_are_those_of_transformers_4(
    case: ModelCase, block: str, leaves: list[str], tmp_path: Path
) -> None:
    model = ours(case, target_modules=["q_proj", *leaves])
    model.save_pretrained(tmp_path / "own")
    inner = INTERMEDIATE if case is QWEN3_MOE else 24
    wide, tall = (inner, HIDDEN), (HIDDEN, inner)
    shapes = {
        f"base_model.model.model.layers.{layer}.{block}.{expert}.{leaf}.lora_{factor}.weight": (
            (RANK, size[1]) if factor == "A" else (size[0], RANK)
        )
        for layer in range(2)
        for expert in range(EXPERTS)
        for leaf, size in zip(leaves, (wide, wide, tall), strict=True)
        for factor in "AB"
    }
    tensors = saved(tmp_path / "own")
    assert {key: tuple(value.shape) for key, value in tensors.items() if ".experts." in key} == shapes
    # PEFT reads them: into one A of twice the rank, exactly.
    with disabled():
        other = PeftModel.from_pretrained(case.build().to(DEVICE), tmp_path / "own")
    assert not any(map(is_ours, wrappers(other)))
    logits = run(model).logits
    torch.testing.assert_close(run(other).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_names_in_files_are_those_of_the_model(case: ModelCase, tmp_path: Path) -> None:
    """Keys in adapter files are the model's names, even if the model's checkpoints add a prefix to them.

    A file has matrices for each expert where the model's checkpoints do, and otherwise the factors of all experts.
    """
    model = ours(case, target_modules="all-linear")
    model.save_pretrained(tmp_path)
    keys = saved(tmp_path)
    assert all(key.startswith("base_model.model.model.layers.") for key in keys)
    expert_keys = {key for key in keys if ".experts." in key}
    stacked = {key for key in expert_keys if re.search(r"\.experts\.(base_layer\.)?lora_[AB]", key)}
    matrices = EXPERTS * (2 if case.id == "nemotron_h" else 3)  # which has no gate
    assert len(expert_keys) == 2 * case.moe_layers * (2 if case.id in STACKED else matrices)
    assert stacked == (expert_keys if case.id in STACKED else set())
    logits = run(model).logits
    assert torch.equal(run(PeftModel.from_pretrained(plain(case), tmp_path)).logits, logits)
    loaded = plain(case)
    assert not loaded.load_adapter(tmp_path).missing_keys
    assert torch.equal(run(loaded).logits, logits)


def test_the_converter_reads_what_is_written(tmp_path: Path) -> None:
    model = ours(target_modules=["q_proj", *LINEAR], use_rslora=True)
    model.save_pretrained(tmp_path / "apart")
    convert_adapter(tmp_path / "apart", tmp_path / "fused", to=Layout.PEFT_FUSED, widen=True)
    loaded = PeftModel.from_pretrained(plain(), tmp_path / "fused")
    logits = run(model).logits
    torch.testing.assert_close(run(loaded).logits, logits, atol=1e-5, rtol=1e-5)


def test_from_pretrained_finds_the_adapter(tmp_path: Path) -> None:
    QWEN3_MOE.build().save_pretrained(tmp_path / "base")
    model = ours(target_modules=LINEAR)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", experts_implementation="moe_fused").to(DEVICE)
    assert all(map(is_ours, wrappers(loaded)))
    torch.testing.assert_close(run(loaded).logits, run(model).logits)


def test_a_model_without_the_head(tmp_path: Path) -> None:
    """An adapter loads into the model without its head, where modules have other names than in the file."""
    QWEN3_MOE.build().save_pretrained(tmp_path / "base")
    model = ours(target_modules=LINEAR)
    model.save_pretrained(tmp_path / "adapter")
    body = AutoModel.from_pretrained(tmp_path / "base", experts_implementation="moe_fused").to(DEVICE)
    info = body.load_adapter(tmp_path / "adapter")
    assert not info.missing_keys
    expected = run(model.base_model.model.model).last_hidden_state
    torch.testing.assert_close(run(body).last_hidden_state, expected)


def test_second_adapter_from_a_file(tmp_path: Path) -> None:
    ours(target_modules=LINEAR, lora_alpha=7).save_pretrained(tmp_path)
    model = ours(target_modules=LINEAR)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    expected = run(ours(target_modules=LINEAR, lora_alpha=7)).logits
    assert torch.equal(run(model).logits, expected)


# Swapping.


@pytest.mark.parametrize("kind", ["shared", "apart", "apart, gate and up only"])
@pytest.mark.parametrize("compiled", [False, True])
def test_hotswap(kind: str, compiled: bool, tmp_path: Path) -> None:
    second = ours(**KINDS[kind], lora_alpha=9)
    randomize(second, seed=4)
    second.save_pretrained(tmp_path)
    model = ours(**KINDS[kind])
    if compiled:
        prepare_model_for_compiled_hotswap(model)
    hotswap_adapter(model, tmp_path, "default", torch_device=DEVICE)
    torch.testing.assert_close(run(model).logits, run(second).logits)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 2}, ValueError, "LoRA on experts cannot be swapped for one of another rank"),
        ({"rank_pattern": {"q_proj": 2}}, NotImplementedError, "adapters without rank_pattern"),
    ],
)
def test_hotswap_of_what_does_not_fit(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    ours(**KINDS["apart"], **options).save_pretrained(tmp_path)
    model = ours(**KINDS["apart"])
    before = run(model).logits
    with pytest.raises(error, match=message):
        hotswap_adapter(model, tmp_path, "default", torch_device=DEVICE)
    assert torch.equal(run(model).logits, before)


# What does not fit the model.


def edited(path: Path, source: dict[str, Tensor]) -> None:
    save_file(source, path / "adapter_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("loader", ["peft", "transformers"])
def test_a_missing_matrix(loader: str, tmp_path: Path) -> None:
    ours(target_modules=LINEAR).save_pretrained(tmp_path)
    key = "base_model.model.model.layers.1.mlp.experts.4.up_proj.lora_B.weight"
    tensors = saved(tmp_path)
    del tensors[key]
    edited(tmp_path, tensors)
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.experts.4.up_proj.lora_B.weight is missing, although it belongs to"
    ):
        PeftModel.from_pretrained(plain(), tmp_path) if loader == "peft" else plain().load_adapter(tmp_path)


def test_a_matrix_of_another_shape(tmp_path: Path) -> None:
    ours(target_modules=LINEAR).save_pretrained(tmp_path)
    key = "base_model.model.model.layers.1.mlp.experts.4.up_proj.lora_A.weight"
    edited(tmp_path, saved(tmp_path) | {key: torch.zeros(2, HIDDEN)})
    with pytest.raises(ValueError, match=rf"{key} has shape \(2, 40\), but needs \(3, 40\)"):
        PeftModel.from_pretrained(plain(), tmp_path)


@pytest.mark.parametrize("loader", ["peft", "transformers"])
def test_experts_that_match_nothing(loader: str, tmp_path: Path) -> None:
    ours(target_modules=["q_proj", *LINEAR]).save_pretrained(tmp_path)
    model = ours(target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "attention")
    (tmp_path / "adapter_config.json").write_text((tmp_path / "attention/adapter_config.json").read_text())
    with pytest.warns(
        UserWarning, match=r"for experts match nothing .* 4 others are loaded, such as .*q_proj.*moe-fused convert"
    ):
        PeftModel.from_pretrained(plain(), tmp_path) if loader == "peft" else plain().load_adapter(tmp_path)


def test_adapters_without_experts_do_not_warn(tmp_path: Path) -> None:
    ours(target_modules=["q_proj"]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(plain(), tmp_path)
        PeftModel.from_pretrained(QWEN3_MOE.build(), tmp_path)


def test_empty_weights_first(tmp_path: Path) -> None:
    model = ours(target_modules=LINEAR)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain(), tmp_path, low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(run(loaded).logits, run(model).logits)


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module")
def test_a_config_that_was_used_before(tmp_path: Path) -> None:
    """A config that was used for a model of ours can be used for a stock one, whose adapter then loads into both."""
    config = LoraConfig(**OPTIONS, target_modules=LINEAR)
    peft.get_peft_model(plain(), config)
    eager = peft.get_peft_model(QWEN3_MOE.build().to(DEVICE), config)
    assert not any(map(is_ours, wrappers(eager)))
    randomize(eager)
    eager.save_pretrained(tmp_path)
    for base in (QWEN3_MOE.build().to(DEVICE), plain()):
        loaded = PeftModel.from_pretrained(base, tmp_path)
        logits = run(loaded).logits
        torch.testing.assert_close(logits, run(eager).logits, atol=1e-5, rtol=1e-5)
