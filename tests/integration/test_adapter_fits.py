"""An adapter with too little or too much for a model, or of another base, is refused before the model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig

import moe_fused
from moe_fused.checkpoints.adapters import Layout
from moe_fused.checkpoints.adapters.convert import convert_adapter
from moe_fused.checkpoints.adapters.fits import other_base

from .adapters import per_expert_adapter
from .broken import Change, changed, commands, edit_json, refuse_loading, refused, save
from .cli import Command, save_tokenizer
from .four_bit import BY_ID, MIXTRAL, build, load
from .models import EXPERTS as EXPERT_COUNT
from .models import QWEN3_MOE
from .test_cli_models import ATTENTION, EXPERTS, make_adapter

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers"
Q = f"{PREFIX}.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("fits") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with LoRA on attention and on experts."""
    return make_adapter(model, tmp_path_factory.mktemp("fits") / "adapter", **EXPERTS)


BROKEN: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no factor": (lambda tensors: tensors.pop(f"{Q}.lora_B.weight"), (f"{Q}.lora_B.weight", "missing")),
    "no module": (
        lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(Q)],
        (f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", "missing"),
    ),
    "no factor of experts": (
        lambda tensors: tensors.pop(f"{PREFIX}.0.mlp.experts.lora_A.weight"),
        (f"{PREFIX}.0.mlp.experts.lora_A.weight", "missing"),
    ),
    "no layer": (
        lambda tensors: [tensors.pop(key) for key in list(tensors) if ".layers.1." in key],
        (f"{PREFIX}.1.", "missing"),
    ),
    "of another rank": (
        lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(3, 64)}),
        (f"{Q}.lora_A.weight", "[3, 64]", "[2, 64]"),
    ),
    "of another width": (
        lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(2, 63)}),
        (f"{Q}.lora_A.weight", "[2, 63]"),
    ),
    "experts of another width": (
        lambda tensors: tensors.update({f"{PREFIX}.0.mlp.experts.lora_A.weight": torch.ones(12, 31)}),
        (f"{PREFIX}.0.mlp.experts.lora_A.weight", "[12, 31]"),
    ),
    "a layer too many": (
        lambda tensors: tensors.update({f"{PREFIX}.2.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)}),
        (f"{PREFIX}.2.self_attn.q_proj.lora_A.weight", "which the model does not have"),
    ),
    "a module too many": (
        lambda tensors: tensors.update({f"{PREFIX}.1.self_attn.o_proj.lora_A.weight": torch.ones(2, 64)}),
        (f"{PREFIX}.1.self_attn.o_proj.lora_A.weight", "which the model does not have"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors(
    name: str, model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words = BROKEN[name]
    broken = changed(adapter, tmp_path / "broken", change, WEIGHTS)
    command_lines = commands(model, broken, tmp_path / "out")
    refuse_loading(monkeypatch)
    for arguments in (
        command_lines["merge"],
        (*command_lines["merge"], "--dry-run"),
        (*command_lines["generate"], "--adapter", broken),
    ):
        argument = "--adapter" if "--adapter" in arguments else "ADAPTER"
        refused(command, arguments, f"{argument} {broken} does not fit Qwen3MoeForCausalLM", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize("left_out", ["one layer's", "all"])
def test_shared_experts_beside_separate_ones(left_out: str, tmp_path: Path, command: Command) -> None:
    """An adapter without any shared expert's weights fits. One that lacks a single layer's shared expert is refused."""
    case = BY_ID["qwen2_moe"]
    build(case, dtype=torch.float32, shared_expert_intermediate_size=64).save_pretrained(tmp_path / "model")
    moe_fused.enable()
    base = load(tmp_path / "model", case, experts_implementation="moe_fused")
    targets = ["gate_proj", "up_proj", "down_proj"]
    get_peft_model(base, LoraConfig(r=2, target_modules=targets)).save_pretrained(tmp_path / "adapter")
    begin = "layers.0.mlp.shared_expert." if left_out == "one layer's" else ".shared_expert."

    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if begin in name]
        assert names
        for name in names:
            del tensors[name]

    command_lines = commands(
        tmp_path / "model", changed(tmp_path / "adapter", tmp_path / "less", change, WEIGHTS), tmp_path / "out"
    )
    if left_out == "all":
        assert command(*command_lines["merge"], "--dry-run").status == 0
    else:
        refused(
            command,
            (*command_lines["merge"], "--dry-run"),
            "layers.0.mlp.shared_expert.gate_proj.lora_A.weight",
            "missing",
        )


def test_loading_names_them_too(model: Path, adapter: Path, tmp_path: Path, enabled: None) -> None:
    """``load_adapter`` names what is missing or too much by itself, without the checks that commands make before."""
    from moe_fused.commands.loading import load_adapter

    for name, (change, words) in BROKEN.items():
        broken = changed(adapter, tmp_path / name, change, WEIGHTS)
        with pytest.raises(ValueError, match=f"does not fit Qwen3MoeForCausalLM: .*{words[0].replace('.', '[.]')}"):
            load_adapter(load(model, experts_implementation="moe_fused"), str(broken))


def test_separate_experts(tmp_path: Path, command: Command) -> None:
    """A missing tensor is named in files with a matrix for each expert, which PEFT converts while loading."""
    QWEN3_MOE.build().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    whole = per_expert_adapter(tmp_path / "adapter", shared=True)
    key = f"{PREFIX}.1.mlp.experts.3.up_proj.lora_B.weight"
    broken = changed(whole, tmp_path / "broken", lambda tensors: tensors.pop(key), WEIGHTS)
    command_lines = commands(tmp_path / "model", broken, tmp_path / "out")
    refused(command, command_lines["merge"], key, "missing")
    with pytest.raises(ValueError, match=r"lora_B of \S+\.layers\.1\.mlp\.experts\.3\.up_proj is missing"):
        convert_adapter(broken, tmp_path / "out", to=Layout.PEFT_FUSED)


def test_another_number_of_experts(tmp_path: Path, command: Command) -> None:
    QWEN3_MOE.build().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    whole = per_expert_adapter(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "model"))
    for kept in (EXPERT_COUNT - 2, EXPERT_COUNT + 1):

        def change(tensors: dict[str, torch.Tensor], kept: int = kept) -> None:
            for key in list(tensors):
                before, found, after = key.partition(f".experts.{EXPERT_COUNT - 1}.")
                if found:
                    for expert in range(kept):
                        tensors[f"{before}.experts.{expert}.{after}"] = tensors[key].clone()
            for key in [key for expert in range(kept, EXPERT_COUNT) for key in tensors if f".experts.{expert}." in key]:
                del tensors[key]

        other = changed(whole, tmp_path / f"adapter{kept}", change, WEIGHTS)
        command_lines = commands(tmp_path / "model", other, tmp_path / "out")
        words = f"{other} has {kept} experts in a layer, "
        refused(command, command_lines["merge"], f"ADAPTER {words}the model {EXPERT_COUNT}")
        refused(command, (*command_lines["generate"], "--adapter", other), f"--adapter {words}the model {EXPERT_COUNT}")
        convert = ("convert", "adapter", other, tmp_path / "out", "--to", "peft-fused")
        refused(command, convert, f"SOURCE {words}its base {tmp_path / 'model'} {EXPERT_COUNT}")


@pytest.mark.parametrize("name", sorted(BROKEN.keys() - {"experts of another width"}))
def test_converting(name: str, adapter: Path, tmp_path: Path, command: Command) -> None:
    """Converting finds what is missing or too much, because the base model tells what must be there."""
    change, words = BROKEN[name]
    broken = changed(adapter, tmp_path / "broken", change, WEIGHTS)
    arguments = ("convert", "adapter", broken, tmp_path / "out", "--from", "peft-fused")
    refused(command, arguments, f"SOURCE {broken} does not fit its base", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_converting_there_and_back(adapter: Path, tmp_path: Path, command: Command) -> None:
    assert command("convert", "adapter", adapter, tmp_path / "out", "--from", "peft-fused").status == 0
    assert command("convert", "adapter", tmp_path / "out", tmp_path / "back", "--to", "peft-fused").status == 0
    key = f"{PREFIX}.1.mlp.experts.3.up_proj.lora_B.weight"
    broken = changed(tmp_path / "out", tmp_path / "broken", lambda tensors: tensors.pop(key), WEIGHTS)
    refused(command, ("convert", "adapter", broken, tmp_path / "no", "--to", "peft-fused"), key, "missing")


def test_a_factor_without_the_other(adapter: Path, tmp_path: Path) -> None:
    for name in ("A", "B"):
        key = f"{Q}.lora_{name}.weight"
        broken = changed(adapter, tmp_path / name, lambda tensors, key=key: tensors.pop(key), WEIGHTS)
        with pytest.raises(ValueError, match=f"{key.replace('.', '[.]')} is missing"):
            convert_adapter(broken, tmp_path / "out", to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED)


def test_what_is_trained_as_a_whole(model: Path, tmp_path: Path, command: Command) -> None:
    """A missing tensor of ``modules_to_save`` is named; in PEFT it is a KeyError."""
    whole = make_adapter(model, tmp_path / "adapter", **ATTENTION, modules_to_save=["lm_head"])
    assert command(*commands(model, whole, tmp_path / "out")["merge"]).status == 0
    broken = changed(
        whole, tmp_path / "broken", lambda tensors: tensors.pop("base_model.model.lm_head.weight"), WEIGHTS
    )
    refused(command, commands(model, broken, tmp_path / "other")["merge"], "lm_head.weight", "missing")


def test_damaged_files(
    model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_loading(monkeypatch)
    data = (adapter / WEIGHTS).read_bytes()

    def broken(name: str, content: bytes, file: str) -> Path:
        shutil.copytree(adapter, tmp_path / name)
        (tmp_path / name / file).write_bytes(content)
        return tmp_path / name

    cases = [
        (broken("cut", data[:-7], WEIGHTS), (WEIGHTS, "is not a whole safetensors file")),
        (broken("empty", b"", WEIGHTS), (WEIGHTS, "is not a whole safetensors file")),
        (broken("no json", b'{"peft_type": ', "adapter_config.json"), ("adapter_config.json must be JSON",)),
        (broken("a list", b"[]", "adapter_config.json"), ("adapter_config.json must be a JSON object, got a list",)),
        (broken("no type", b"{}", "adapter_config.json"), ("adapter_config.json must hold a peft_type",)),
        (broken("no such type", b'{"peft_type": "NONE"}', "adapter_config.json"), ("adapter_config.json", "NONE")),
    ]
    bare = broken("bare", b"", WEIGHTS)
    (bare / WEIGHTS).unlink()
    cases.append((bare, ("has no weights", WEIGHTS)))
    pickled = broken("pickled", b"", WEIGHTS)
    (pickled / WEIGHTS).unlink()
    torch.save(load_file(adapter / WEIGHTS), pickled / "adapter_model.bin")
    (pickled / "adapter_model.bin").write_bytes((pickled / "adapter_model.bin").read_bytes()[:-900])
    cases.append((pickled, ("adapter_model.bin is not a whole file of torch.save",)))
    for path, words in cases:
        command_lines = commands(model, path, tmp_path / "out")
        refused(command, command_lines["merge"], str(path), *words)
        refused(command, (*command_lines["generate"], "--adapter", path), str(path), *words)


# An adapter of another base.


def _adapter_of(path: Path, **options: object) -> Path:
    return make_adapter(path, path.parent / f"adapter of {path.name}", **ATTENTION, **options)


def test_another_architecture(model: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter of another architecture is refused, although its attention has the same names and shapes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    build(MIXTRAL, dtype=torch.float32).save_pretrained(tmp_path / "mixtral")
    other = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral"), LoraConfig(**ATTENTION, task_type="CAUSAL_LM")
    )
    other.save_pretrained(tmp_path / "adapter")
    command_lines = commands(model, tmp_path / "adapter", tmp_path / "out")
    generate = (*command_lines["generate"], "--adapter", tmp_path / "adapter")
    with monkeypatch.context() as patch:
        refuse_loading(patch)
        for arguments in (command_lines["merge"], (*command_lines["merge"], "--dry-run"), generate):
            refused(command, arguments, "has another base", "mixtral, not qwen3_moe", "--allow-other-base")
    assert not (tmp_path / "out").exists()
    for arguments in (command_lines["merge"], generate):
        assert command(*arguments, "--allow-other-base").status == 0


def test_other_weights_of_the_same_shapes(model: Path, tmp_path: Path, command: Command) -> None:
    adapter = _adapter_of(save(tmp_path / "other", seed=7))
    arguments = commands(model, adapter, tmp_path / "out")["merge"]
    refused(command, arguments, "has another base", "--allow-other-base")
    assert command(*arguments, "--allow-other-base").status == 0


def test_the_flag_is_not_for_other_shapes(model: Path, tmp_path: Path, command: Command) -> None:
    adapter = _adapter_of(save(tmp_path / "longer", num_hidden_layers=3))
    arguments = commands(model, adapter, tmp_path / "out")["merge"]
    refused(
        command,
        (*arguments, "--allow-other-base"),
        "layers.2.self_attn.q_proj.lora_A.weight",
        "the model does not have",
    )


def test_the_same_base_elsewhere(tmp_path: Path, command: Command) -> None:
    """The adapter's base may have been copied, moved, cast to bf16 or put into 4 bits since."""
    source = save(tmp_path / "model")
    adapter = _adapter_of(source)
    shutil.copytree(source, tmp_path / "copy")
    build(dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert command("quantize", source, tmp_path / "packed", "--device", "cpu").status == 0
    options = ("--device", "cpu", "--format", "fused")
    assert command("quantize", source, tmp_path / "fused", *options).status == 0
    for name in ("copy", "bf16", "packed", "fused"):
        ended = command("merge", tmp_path / name, adapter, tmp_path / "out", "--dry-run")
        assert ended.status == 0, ended
    source.rename(tmp_path / "moved")
    assert command("merge", tmp_path / "moved", adapter, tmp_path / "out").status == 0


def test_names_on_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.from_pretrained(model)
    monkeypatch.chdir(tmp_path)
    snapshot = "/cache/hub/models--Qwen--Qwen3-30B-A3B/snapshots/0123abcd"
    for recorded, name in (
        (None, "org/one"),
        ("", "org/one"),
        ("org/one", "org/one"),
        ("Org/One", "org/one"),
        (snapshot, "Qwen/Qwen3-30B-A3B"),
        ("Qwen/Qwen3-30B-A3B", snapshot),
        ("org/one", str(model)),
        ("/gone/model", str(model)),
        ("/gone/model", "org/one"),
        (f"{model}/", str(model)),
    ):
        assert other_base(recorded, name, config) is None, (recorded, name)
    for recorded, name in (("org/one", "org/two"), ("one/model", "two/model"), ("org/one", snapshot)):
        assert other_base(recorded, name, config) == f"it was made for {recorded}"


def test_a_config_with_other_sizes(model: Path, tmp_path: Path) -> None:
    """A base whose weights are gone is compared by its config."""
    (tmp_path / "base").mkdir()
    content = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "base" / "config.json").write_text(json.dumps(content), encoding="utf-8")
    config = AutoConfig.from_pretrained(model)
    assert other_base(str(tmp_path / "base"), str(model), config) is None
    edit_json(tmp_path / "base" / "config.json", num_local_experts=8)
    reason = other_base(str(tmp_path / "base"), str(model), config)
    assert reason is not None
    assert "experts is 8, not 6" in reason
