"""Files that are damaged or lead elsewhere, and targets that cannot be written, are named before any work."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_fused import staging
from moe_fused.checkpoints.adapters.convert import convert_adapter
from moe_fused.checkpoints.adapters.names import Layout
from moe_fused.checkpoints.tensor_files import read_index

from .broken import commands, edit_json, refuse_loading, refused, save
from .cli import Command
from .four_bit import build
from .saved import same_tensors
from .test_cli_models import ATTENTION, EXPERTS, make_adapter

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose checkpoint consists of several files."""
    path = save(tmp_path_factory.mktemp("files") / "model")
    (path / "model.safetensors").unlink()
    build(dtype=torch.float32).save_pretrained(path, max_shard_size="100KB")
    return path


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, tmp_path_factory.mktemp("files") / "adapter", **ATTENTION)


def copy(model: Path, target: Path) -> Path:
    shutil.copytree(model, target, symlinks=True)
    return target


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("model-*.safetensors"))


def refused_by_all(
    broken: Path, adapter: Path, command: Command, monkeypatch: pytest.MonkeyPatch, *words: str, but: str = ""
) -> None:
    """Asserts that every command names the fault before it loads anything, and leaves nothing behind."""
    output = broken.parent / "out"
    with monkeypatch.context() as patch:
        refuse_loading(patch)
        for name, arguments in commands(broken, adapter, output).items():
            if name != but:
                refused(command, arguments, *words)
    assert not output.exists()
    assert not list(broken.parent.glob(".*"))


@pytest.mark.parametrize("left", [0, 5, 3000, -1])
def test_a_shard_that_is_cut(
    left: int, model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy(model, tmp_path / "broken")
    file = shards(broken)[1]
    file.write_bytes(file.read_bytes()[:left])
    refused_by_all(broken, adapter, command, monkeypatch, f"{file.name} is not a whole safetensors file")


def test_a_shard_that_is_missing(
    model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy(model, tmp_path / "broken")
    shards(broken)[1].unlink()
    refused_by_all(broken, adapter, command, monkeypatch, shards(model)[1].name, "is missing")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"metadata": {}, "weight_map": []}', b"\xff\xfe"])
def test_an_index_that_is_damaged(
    content: bytes, model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy(model, tmp_path / "broken")
    (broken / INDEX).write_bytes(content)
    refused_by_all(broken, adapter, command, monkeypatch, f"{INDEX} must be JSON with a weight_map")


OUTSIDE = ["../elsewhere/x.safetensors", "a/../../elsewhere/x.safetensors", "/{root}/elsewhere/x.safetensors",
           "..\\elsewhere\\x.safetensors", "C:\\x.safetensors", "link/x.safetensors", 3, None, ""]  # fmt: skip


@pytest.mark.parametrize("entry", OUTSIDE)
def test_an_index_that_leads_elsewhere(
    entry: Any, model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index must not lead out of the checkpoint.

    The file there has the tensor, and Transformers by itself would load it.
    """
    broken = copy(model, tmp_path / "broken")
    (tmp_path / "elsewhere").mkdir()
    content = json.loads((broken / INDEX).read_text(encoding="utf-8"))
    key, name = next(iter(content["weight_map"].items()))
    (broken / name).rename(tmp_path / "elsewhere" / "x.safetensors")
    (broken / "link").symlink_to(tmp_path / "elsewhere")
    if isinstance(entry, str):
        entry = entry.replace("{root}", str(tmp_path).lstrip("/"))
    for tensor_name, file in content["weight_map"].items():
        if file == name:
            content["weight_map"][tensor_name] = entry
    (broken / INDEX).write_text(json.dumps(content), encoding="utf-8")
    refused_by_all(broken, adapter, command, monkeypatch, INDEX, key, "within")


def test_an_index_of_files_of_torch(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    broken = copy(model, tmp_path / "broken")
    for file in [*shards(broken), broken / INDEX]:
        file.unlink()
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    content = {"metadata": {"total_size": 4}, "weight_map": {"a": "../x.bin"}}
    (broken / "pytorch_model.bin.index.json").write_text(json.dumps(content), encoding="utf-8")
    for name in ("quantize", "merge", "generate"):
        refused(command, commands(broken, adapter, tmp_path / "out")[name], "pytorch_model.bin.index.json", "within")


def test_a_file_that_the_config_names(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    broken = copy(model, tmp_path / "broken")
    edit_json(broken / "config.json", transformers_weights="../x.safetensors")
    refused(command, commands(broken, adapter, tmp_path / "out")["generate"], "transformers_weights", "within")


def test_links_as_in_the_cache_of_the_hub(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    """Files may be links that lead out of the directory, as in the Hub's cache, and the directory may be a link."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    shutil.copytree(model, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    (tmp_path / "link").symlink_to(snapshot)
    for source in (snapshot, tmp_path / "link"):
        assert command(*commands(source, adapter, tmp_path / "out")["generate"]).status == 0
    assert read_index(snapshot / INDEX)


JSON = {"config.json": "config.json", "tokenizer.json": "tokenizer", "tokenizer_config.json": "tokenizer",
        "generation_config.json": "generation_config.json"}  # fmt: skip


@pytest.mark.parametrize("name", JSON)
def test_other_files_that_are_damaged(
    name: str, model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged JSON is refused in files that would only be copied, too."""
    broken = copy(model, tmp_path / "broken")
    content = (broken / name).read_bytes()
    (broken / name).write_bytes(content[: len(content) // 2])
    refused_by_all(broken, adapter, command, monkeypatch, f"{name} must be JSON")


def test_a_tokenizer_that_is_json_and_none(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    broken = copy(model, tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    refused(command, commands(broken, adapter, tmp_path / "out")["generate"], "no tokenizer that can be read")


def test_a_config_of_the_wrong_type(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    broken = copy(model, tmp_path / "broken")
    edit_json(broken / "config.json", hidden_size="wide")
    refused(command, commands(broken, adapter, tmp_path / "out")["generate"], "hidden_size")


# generation_config.json


@pytest.mark.parametrize("values", [{"temperature": 0.6, "top_p": 0.95}, {"top_k": 20, "do_sample": False}])
def test_a_generation_config_that_transformers_does_not_write(
    values: dict[str, Any], model: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    source = copy(model, tmp_path / "source")
    edit_json(source / "generation_config.json", do_sample=None)
    edit_json(source / "generation_config.json", **values)
    text = (source / "generation_config.json").read_text(encoding="utf-8")
    for name in ("quantize", "merge"):
        arguments = commands(source, adapter, tmp_path / name)[name]
        before = command(*arguments, "--dry-run")
        assert "generation_config.json is copied as it is" in before.stdout, before
        ended = command(*arguments)
        assert ended.status == 0, ended
        assert (tmp_path / name / "generation_config.json").read_text(encoding="utf-8") == text
    assert command(*commands(source, adapter, tmp_path / "out")["convert"]).status == 0


def test_generation_options_in_the_config(model: Path, adapter: Path, tmp_path: Path, command: Command) -> None:
    """Options in config.json, where old checkpoints have them, go into the generation_config.json that is written."""
    source = copy(model, tmp_path / "source")
    (source / "generation_config.json").unlink()
    edit_json(source / "config.json", temperature=0.6)
    for name in ("quantize", "merge"):
        ended = command(*commands(source, adapter, tmp_path / name)[name])
        assert ended.status == 0, ended
        content = json.loads((tmp_path / name / "generation_config.json").read_text(encoding="utf-8"))
        assert content["temperature"] == 0.6


def test_a_generation_config_that_cannot_be_read(
    model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copy(model, tmp_path / "broken")
    edit_json(broken / "generation_config.json", max_new_tokens=-5)
    refuse_loading(monkeypatch)
    for name in ("quantize", "merge", "generate"):
        refused(command, commands(broken, adapter, tmp_path / "out")[name], "generation_config.json", "max_new_tokens")


# Targets.


def _writing(model: Path, adapter: Path, output: Path) -> list[tuple[Any, ...]]:
    return [arguments for name, arguments in commands(model, adapter, output).items() if name != "generate"]


def test_no_parent(
    model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    refuse_loading(monkeypatch)
    for parent in ("missing", "file"):
        for arguments in _writing(model, adapter, tmp_path / parent / "out"):
            refused(command, arguments, "cannot create", str(tmp_path / parent / "out"))
            if arguments[0] != "convert":
                refused(command, (*arguments, "--dry-run"), "cannot create")


def test_no_room(model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refuse_loading(monkeypatch)
    for arguments in _writing(model, adapter, tmp_path / "out"):
        refused(command, arguments, "are needed at", "are free")
        refused(command, (*arguments, "--dry-run"), "are needed at", "are free")
    assert not list(tmp_path.iterdir())


def test_no_right_to_write(
    model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that cannot be created is named. On a read-only medium, ``os.access`` may say that it can be."""
    mkdir = Path.mkdir

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.parent == tmp_path:
            raise OSError(30, "Read-only file system", str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    refuse_loading(monkeypatch)
    for arguments in _writing(model, adapter, tmp_path / "out"):
        refused(command, arguments, "cannot create", "Read-only file system", str(tmp_path / "out"))


@pytest.mark.parametrize("size", ["5", "5XB", "many"])
def test_a_size_of_files_that_is_none(
    size: str, model: Path, adapter: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_loading(monkeypatch)
    for name in ("quantize", "merge"):
        arguments = commands(model, adapter, tmp_path / "out")[name]
        ended = command(*arguments, "--max-shard-size", size)
        assert ended.status == 2, ended
        assert "--max-shard-size" in ended.error
        assert f"got {size}" in ended.error


def test_room_for_an_adapter(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", **EXPERTS)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="are needed at"):
        convert_adapter(adapter, tmp_path / "out", to=Layout.PER_EXPERT, given=Layout.PEFT_FUSED)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_options_that_are_no_numbers(value: str, model: Path, command: Command) -> None:
    for option in ("--temperature", "--top-p"):
        ended = command("generate", model, "--prompt", "w7", f"{option}={value}")
        assert ended.status in (1, 2)
        assert option in ended.error
    for name in ("bench", "tune"):
        ended = command(name, f"--seconds={value}")
        assert ended.status in (1, 2)
        assert "--seconds" in ended.error


def test_one_file_comes_before_an_index(model: Path, tmp_path: Path, command: Command) -> None:
    """Converting prefers model.safetensors to an index, as Transformers does.

    All commands must read the same weights.
    """
    both = copy(model, tmp_path / "both")
    build(dtype=torch.float32, seed=3).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", both / "model.safetensors")
    assert command("convert", "model", both, tmp_path / "out", "--to", "per-expert").status == 0
    assert same_tensors(tmp_path / "out", tmp_path / "other")
