"""A checkpoint that lacks tensors, has some of another shape or too many is refused by every command before it is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

import moe_fused
from moe_fused.checkpoints.complete import check_complete
from moe_fused.checkpoints.files import find_weights, read_tensors
from moe_fused.checkpoints.loading import check_checkpoint, load_pretrained
from moe_fused.integrations.quantizer.packed_experts import four_bit_config
from moe_fused.memory import skeleton

from .broken import Change, changed, commands, edit_json, refuse_loading, refused, save
from .cli import Command, save_tokenizer
from .four_bit import BY_ID, build, stacked_checkpoint, v4_checkpoint
from .models import MODELS, QWEN3_MOE, ModelCase
from .test_cli_models import ATTENTION, make_adapter

LAYER = "model.layers.1"
Q = f"{LAYER}.self_attn.q_proj.weight"
EXPERT = f"{LAYER}.mlp.experts.2.up_proj.weight"


def drop(*keys: str) -> Change:
    return lambda tensors: [tensors.pop(key) for key in keys]


def cut(key: str) -> Change:
    return lambda tensors: tensors.update({key: tensors[key][:-1].clone()})


def drop_layer(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if key.startswith(f"{LAYER}.")]:
        del tensors[key]


BROKEN: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no projection": (drop(Q), ("missing", Q)),
    "no norm": (drop("model.norm.weight"), ("missing", "model.norm.weight")),
    "no router": (drop(f"{LAYER}.mlp.gate.weight"), ("missing", f"{LAYER}.mlp.gate.weight")),
    "no head": (drop("lm_head.weight"), ("missing", "lm_head.weight")),
    "no embedding": (drop("model.embed_tokens.weight"), ("missing", "model.embed_tokens.weight")),
    "no expert": (drop(EXPERT), ("missing", EXPERT)),
    "no layer": (drop_layer, ("missing", f"{LAYER}.")),
    "projection of another shape": (cut(Q), (Q, "(63, 64)", "(64, 64)")),
    "norm of another shape": (cut("model.norm.weight"), ("model.norm.weight", "(63,)", "(64,)")),
    "router of another shape": (cut(f"{LAYER}.mlp.gate.weight"), (f"{LAYER}.mlp.gate.weight", "(5, 64)", "(6, 64)")),
    "head of another shape": (cut("lm_head.weight"), ("lm_head.weight", "(63, 64)")),
    "expert of another shape": (cut(EXPERT), (EXPERT, "(31, 64)", "(32, 64)")),
    "a tensor too many": (
        lambda tensors: tensors.update({"model.layers.1.self_attn.gate.weight": torch.ones(2)}),
        ("model.layers.1.self_attn.gate.weight",),
    ),
    "a layer too many": (
        lambda tensors: tensors.update({Q.replace("layers.1", "layers.2"): tensors[Q].clone()}),
        (Q.replace("layers.1", "layers.2"),),
    ),
    "an expert too many": (
        lambda tensors: tensors.update({EXPERT.replace("experts.2", "experts.6"): tensors[EXPERT].clone()}),
        (EXPERT.replace("experts.2", "experts.6"),),
    ),
    "bytes for weights": (
        lambda tensors: tensors.update({Q: tensors[Q].to(torch.uint8)}),
        (Q, "U8", "quantization_config"),
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("complete") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, tmp_path_factory.mktemp("complete") / "adapter", **ATTENTION)


@pytest.mark.parametrize("name", BROKEN)
def test_dense(
    name: str, model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_loading(monkeypatch)
    change, words = BROKEN[name]
    broken = changed(model, tmp_path / "broken", change)
    for arguments in commands(broken, adapter, tmp_path / "out").values():
        refused(command, arguments, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_dry_run_finds_it(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    broken = changed(model, tmp_path / "broken", drop(Q))
    for name in ("quantize", "merge", "convert"):
        refused(command, (*commands(broken, adapter, tmp_path / "out")[name], "--dry-run"), Q)


def test_whole_ones_pass(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    for name, arguments in commands(model, adapter, tmp_path / "out").items():
        ended = command(*(value if value != tmp_path / "out" else tmp_path / name for value in arguments))
        assert ended.status == 0, ended


def test_tied_weights_may_be_missing(tmp_path: Path, command: Command) -> None:
    tied = save(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    assert command("quantize", tied, tmp_path / "out", "--device", "cpu").status == 0


def _missing_and_cut(case: ModelCase, path: Path) -> list[str]:
    """Keys of a checkpoint of ``case`` for which a missing tensor, or one of another shape, is not reported by name."""
    model, headers = skeleton(AutoConfig.from_pretrained(path)), dict(read_tensors(_weights(path)))
    check_complete(model, headers, "it")
    unnoticed = []
    seen = set()
    for key, stored in headers.items():
        # One key of each kind suffices, besides those of the last expert.
        kind = ".".join(part for part in key.split(".") if not part.isdigit())
        if kind in seen and ".experts.5." not in key:
            continue
        seen.add(kind)
        rest = {name: value for name, value in headers.items() if name != key}
        other = type(stored)(stored.path, stored.dtype, (*stored.shape, 2), stored.start, stored.nbytes)  # type: ignore[attr-defined, call-arg]
        for tensors in (rest, {**headers, key: other}):
            try:
                check_complete(model, tensors, "it")
            except ValueError as error:
                if key in str(error):
                    continue
            unnoticed.append(key)
    return unnoticed


def _weights(path: Path) -> Path:
    found = find_weights(str(path), download=False)
    assert found is not None
    return found


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_every_architecture(case: ModelCase, tmp_path: Path) -> None:
    """Every tensor that is missing or misshapen is reported by its name in the checkpoint, for every architecture."""
    case.build().save_pretrained(tmp_path)
    assert not _missing_and_cut(case, tmp_path)


MTP = {
    # Transformers' own exceptions.
    "deepseek_v3": "model.layers.61.",
    "glm4_moe": "model.layers.46.",
    "qwen3_next": "mtp.layers.0.",
}


@pytest.mark.parametrize("case_id", MTP)
def test_layers_that_predict_ahead_are_left_out(case_id: str, tmp_path: Path) -> None:
    BY_ID[case_id].build().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = MTP[case_id]
    extra = {f"{prefix}eh_proj.weight": torch.ones(2, 2), f"{prefix}self_attn.q_proj.weight": torch.ones(2, 2)}
    save_file(tensors | extra, tmp_path / "model.safetensors", {"format": "pt"})
    check_checkpoint(str(tmp_path), "it", AutoConfig.from_pretrained(tmp_path))
    other = {key.replace(prefix, "model.layers.7."): value for key, value in extra.items()}
    save_file(tensors | other, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.7\.eh_proj\.weight"):
        check_checkpoint(str(tmp_path), "it", AutoConfig.from_pretrained(tmp_path), packs=True)


def test_layers_ahead_that_the_config_announces(tmp_path: Path, command: Command) -> None:
    BY_ID["deepseek_v3"].build().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", num_nextn_predict_layers=1)
    tensors = load_file(tmp_path / "model.safetensors") | {"model.layers.2.eh_proj.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = AutoConfig.from_pretrained(tmp_path)
    load_pretrained(str(tmp_path), "it", config, dtype=torch.float32)
    ahead = {f"model.layers.2.mlp.experts.{i}.up_proj.weight": torch.ones(2, 2) for i in range(2)}
    save_file(tensors | ahead, tmp_path / "model.safetensors", {"format": "pt"})
    assert command("convert", "model", tmp_path, tmp_path.with_name("out"), "--to", "fused").status == 0
    save_file(tensors | {"model.layers.3.eh_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.3\.eh_proj"):
        check_checkpoint(str(tmp_path), "it", config, packs=True)


# In 4 bits.


def _packed(path: Path, layout: str) -> Path:
    moe_fused.enable()
    config = AutoConfig.from_pretrained(path)
    model = load_pretrained(
        str(path), "it", config, quantization=four_bit_config(torch.float32), device_map={"": "cpu"}
    )
    moe_fused.save_format(model, layout)
    target = path.parent / layout
    model.save_pretrained(target)
    save_tokenizer_of(path, target)
    return target


def save_tokenizer_of(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((source / name).read_bytes())


PACKED = {
    "no scales": drop(f"{Q}.absmax"),
    "no state": drop(f"{Q}.quant_state.bitsandbytes__nf4"),
    "no nested scales": drop(f"{Q}.nested_absmax"),
    "no weights": drop(Q),
    "half the weights": cut(Q),
    "scales cut": cut(f"{Q}.absmax"),
    "no projection": lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(Q)],
    "no norm": drop("model.norm.weight"),
    "router of another shape": cut(f"{LAYER}.mlp.gate.weight"),
}
OF_EXPERTS = {
    "per_expert": {
        "no matrix": (lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(EXPERT)], EXPERT),
        "no scales": (drop(f"{EXPERT}.absmax"), f"{EXPERT}.absmax"),
        "half a matrix": (cut(EXPERT), EXPERT),
    },
    "fused": {
        "no scales": (drop(f"{LAYER}.mlp.experts.down_proj_absmax"), f"{LAYER}.mlp.experts.down_proj_absmax"),
        "an expert less": (cut(f"{LAYER}.mlp.experts.down_proj"), f"{LAYER}.mlp.experts.down_proj"),
        "no stack": (
            lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1.mlp.experts.gate_up" in key],
            f"{LAYER}.mlp.experts.gate_up_proj",
        ),
    },
}


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_4_bits(
    layout: str, model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "model")
    packed = _packed(tmp_path / "model", layout)
    everything = commands(packed, adapter, tmp_path / "out")
    for name in ("merge", "generate"):
        assert command(*everything[name]).status == 0
    refuse_loading(monkeypatch)
    cases = {name: (change, Q) for name, change in PACKED.items()} | OF_EXPERTS[layout]
    cases["no norm"] = (PACKED["no norm"], "model.norm.weight")
    cases["router of another shape"] = (PACKED["router of another shape"], f"{LAYER}.mlp.gate.weight")
    for name, (change, word) in cases.items():
        broken = changed(packed, tmp_path / name, change)
        command_lines = commands(broken, adapter, tmp_path / "target")
        to = "per-expert" if layout == "fused" else "fused"
        for arguments in (command_lines["merge"], command_lines["generate"], (*command_lines["convert"][:-1], to)):
            refused(command, arguments, word)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("kind", ["nf4", "nvfp4"])
def test_a_module_in_4_bits_in_part(
    kind: str, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "nf4":
        packed, dense = _packed(save(tmp_path / "model"), "per_expert"), tmp_path / "model"
    else:
        from .published import compressed_checkpoint

        packed = compressed_checkpoint(tmp_path / "nvfp4", kind, QWEN3_MOE, vocab_size=64)
        save_tokenizer(packed)
        dense = packed / "dense"
    refuse_loading(monkeypatch)
    of_stack = re.compile(rf"{re.escape(LAYER)}\.mlp\.experts\.\d+\.down_proj\.")

    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if of_stack.match(key)]:
            del tensors[key]
        tensors |= {key: value for key, value in load_file(dense / "model.safetensors").items() if of_stack.match(key)}

    broken = changed(packed, tmp_path / "broken", change)
    says = f"{LAYER}.mlp.experts.down_proj must be of 4-bit weights like the rest of its module, but is dense"
    refused(command, commands(broken, adapter, tmp_path / "out")["generate"], f"MODEL {broken}: {says}")


def test_4_bits_of_others(dense: Path, tmp_path: Path) -> None:
    """Missing scales are found in older layouts:

    Transformers 4 has routers in 4 bits as well, the original project has its own.
    """
    moe_fused.enable()
    for name, make in (("v4", v4_checkpoint), ("stacked", stacked_checkpoint)):
        make(dense, tmp_path / name)
        load_pretrained(str(tmp_path / name), "it", AutoConfig.from_pretrained(tmp_path / name), device_map={"": "cpu"})
        key = f"{LAYER}.mlp.up_proj.weight.absmax" if name == "stacked" else f"{LAYER}.mlp.gate.weight.absmax"
        broken = changed(tmp_path / name, tmp_path / f"broken {name}", drop(key))
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            check_checkpoint(str(broken), "it", AutoConfig.from_pretrained(broken))
    moe_fused.disable()


def test_dense_experts_of_the_original_project(dense: Path, tmp_path: Path, adapter: Path, command: Command) -> None:
    """The original project's dense experts are refused where Transformers would load them.

    It does not know their names and would make random experts. Quantizing and converting read them.
    """
    assert command("convert", "model", dense, tmp_path / "original", "--to", "original").status == 0
    save_tokenizer_of(save(tmp_path / "other"), tmp_path / "original")
    command_lines = commands(tmp_path / "original", adapter, tmp_path / "out")
    for name in ("merge", "generate"):
        refused(command, command_lines[name], "_proj.weight is in the original project's layout", "moe-fused convert")
    assert command(*command_lines["quantize"]).status == 0


def test_files_of_torch(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    """A missing tensor is found in ``pytorch_model.bin``, which Transformers reads as well."""
    tensors = load_file(model / "model.safetensors")
    for name, saved in (("whole", tensors), ("broken", {key: value for key, value in tensors.items() if key != Q})):
        target = changed(model, tmp_path / name, lambda _: None)
        (target / "model.safetensors").unlink()
        torch.save(saved, target / "pytorch_model.bin")
    assert command(*commands(tmp_path / "whole", adapter, tmp_path / "out")["generate"]).status == 0
    for name in ("merge", "generate", "quantize"):
        refused(command, commands(tmp_path / "broken", adapter, tmp_path / "out")[name], Q)
    data = (tmp_path / "whole" / "pytorch_model.bin").read_bytes()
    (tmp_path / "broken" / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    refused(
        command,
        commands(tmp_path / "broken", adapter, tmp_path / "out")["generate"],
        "pytorch_model.bin is not a whole file of torch.save",
    )


def test_what_loading_says_counts_as_well(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Transformers reports as missing is an error, even where headers were not compared, as without accelerate."""
    from moe_fused.checkpoints import loading

    monkeypatch.setattr(loading, "check_complete", lambda *_, **__: None)
    broken = changed(model, model.parent / "late", drop(Q))
    config: Any = AutoConfig.from_pretrained(broken)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj"):
        load_pretrained(str(broken), "it", config, dtype=torch.float32)


def test_an_index_without_metadata(model: Path, tmp_path: Path, adapter: Path, command: Command) -> None:
    build(dtype=torch.float32).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    save_tokenizer_of(model, tmp_path / "shards")
    index = tmp_path / "shards" / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    del content["metadata"]
    index.write_text(json.dumps(content), encoding="utf-8")
    refused(command, commands(tmp_path / "shards", adapter, tmp_path / "out")["generate"], "has no metadata")
