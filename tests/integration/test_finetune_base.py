"""``moe-fused finetune --resume`` and the model that the run trained on: other weights or another config are noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moe_fused.finetune import fingerprint
from moe_fused.finetune.fingerprint import base_fingerprints

from .finetuning import Run, assert_error, finetune, losses, nothing_loads

CONFIG, WEIGHTS = "model config", "model weights"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two steps, with a checkpoint after the second."""
    return Run(tmp_path_factory.mktemp("whole"), "--max-steps", "2")


@pytest.fixture
def again(whole: Run, tmp_path: Path) -> Path:
    """Model, data and the finished run, to be changed. All of them are in another place than at first."""
    for name in ("model", "out"):
        shutil.copytree(whole.directory / name, tmp_path / name)
    shutil.copyfile(whole.directory / "chat.jsonl", tmp_path / "chat.jsonl")
    path = tmp_path / "out" / "finetune.yaml"
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    options = yaml.safe_load(path.read_text()) | {"model": "model", "dataset": "chat.jsonl"}
    path.write_text("\n".join([*head, yaml.safe_dump(options)]))
    return tmp_path


def _change_weights(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 0.5
    save_file(tensors, path, {"format": "pt"})


def _change_config(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.01}))


@pytest.mark.parametrize(
    "change, what, others", [(_change_weights, WEIGHTS, CONFIG), (_change_config, CONFIG, WEIGHTS)]
)
def test_another_model_is_not_gone_on_with(change: Callable[[Path], None], what: str, others: str, again: Path) -> None:
    change(again / "model")
    path = again / "out" / "finetune.yaml"
    before = path.read_bytes()
    arguments = ("--resume", "--output", "out", "--max-steps", "3")
    for options in (arguments, (*arguments, "--dry-run"), (*arguments, "--allow-changed-data")):
        ended = finetune(*options, cwd=again, before=nothing_loads)
        assert_error(ended, f"error: the {what} (sha256:", "changed since the run in out began: --model model ")
        assert_error(ended, "--allow-other-base")
        assert others not in ended.stderr
    assert path.read_bytes() == before
    ended = finetune(*arguments, "--allow-other-base", cwd=again)
    assert ended.status == 0, ended
    assert "the run goes on with the model of today" in ended.stderr
    assert sorted(losses(again / "out")) == [1, 2, 3]
    # From now on this is the model of the run.
    ended = finetune("--resume", "--output", "out", "--max-steps", "4", "--dry-run", cwd=again)
    assert ended.status == 0, ended
    assert "changed" not in ended.stderr


def test_the_same_model_elsewhere_is_the_same(again: Path) -> None:
    """Moved, with files that are written anew, and with a config that names another place and Transformers."""
    (again / "model").rename(again / "moved")
    config = json.loads((again / "moved" / "config.json").read_text())
    config |= {"_name_or_path": "elsewhere", "transformers_version": "5.0.0"}
    (again / "moved" / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=4))
    weights = again / "moved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    path = again / "out" / "finetune.yaml"
    path.write_text(path.read_text().replace("model: model", "model: moved"))
    ended = finetune("--resume", "--output", "out", "--max-steps", "3", "--dry-run", cwd=again)
    assert ended.status == 0, ended
    assert "changed" not in ended.stderr


def test_a_run_without_a_record_of_its_model_goes_on(again: Path) -> None:
    """As those of earlier versions. It has a record from then on."""
    path = again / "out" / "finetune.yaml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("# model ")))
    _change_weights(again / "model")
    ended = finetune("--resume", "--output", "out", "--max-steps", "3", cwd=again)
    assert ended.status == 0, ended
    assert "changed" not in ended.stderr
    assert sorted(losses(again / "out")) == [1, 2, 3]
    _change_weights(again / "model")
    ended = finetune("--resume", "--output", "out", "--max-steps", "4", cwd=again, before=nothing_loads)
    assert_error(ended, "the model weights (sha256:")


# What is read of the files.


def save_shards(directory: Path, *tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint in several files, as far as its fingerprint looks at it."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    names = [f"model-{number}.safetensors" for number in range(len(tensors))]
    for name, part in zip(names, tensors, strict=True):
        save_file(part, directory / name, {"format": "pt"})
    places = {key: name for name, part in zip(names, tensors, strict=True) for key in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def of(directory: Path) -> str:
    return base_fingerprints(str(directory), "main", download=False)[WEIGHTS]


def test_each_file_counts(tmp_path: Path) -> None:
    first, second = {"a": torch.arange(9.0)}, {"b": torch.arange(5.0)}
    known = of(save_shards(tmp_path / "one", first, second))
    assert of(save_shards(tmp_path / "same", first, second)) == known
    assert of(save_shards(tmp_path / "value", first, {"b": torch.arange(5.0) + 1})) != known
    assert of(save_shards(tmp_path / "name", first, {"c": torch.arange(5.0)})) != known
    assert of(save_shards(tmp_path / "shape", first, {"b": torch.arange(5.0)[None]})) != known
    assert of(save_shards(tmp_path / "more", first, second, {"c": torch.zeros(1)})) != known
    assert of(save_shards(tmp_path / "joined", first | second)) != known
    (tmp_path / "one" / "model-9.safetensors").write_bytes(b"a file that the index does not name")
    assert of(tmp_path / "one") == known


def test_samples_of_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The begin, the end and a block at each step are read, so that values between them can change unnoticed."""
    monkeypatch.setattr(fingerprint, "_EDGE", 64)
    monkeypatch.setattr(fingerprint, "_BLOCK", 16)
    monkeypatch.setattr(fingerprint, "_STEP", 256)
    path = save_shards(tmp_path / "model", {"a": torch.zeros(1024, dtype=torch.uint8)}) / "model-0.safetensors"
    content, known = path.read_bytes(), of(path.parent)
    size, header = len(content), 8 + int.from_bytes(content[:8], "little")
    noticed = set()
    for place in range(header, size):
        path.write_bytes(content[:place] + b"\1" + content[place + 1 :])
        if of(path.parent) != known:
            noticed.add(place)
    blocks = {place + i for place in range(256, size, 256) for i in range(16)}
    assert noticed == (blocks | set(range(size - 64, size))) & set(range(header, size))


def test_a_model_that_is_not_on_this_machine() -> None:
    assert base_fingerprints("org/not-here", "main", download=False) == {}


def test_a_model_of_the_hub_that_is_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are links in the cache. They have the fingerprints of a copy."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--name"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    parts = {"a": torch.arange(9.0)}, {"b": torch.arange(5.0)}
    (save_shards(tmp_path / "files", *parts)).rename(cached / "blobs")
    (cached / "snapshots" / "0123").mkdir()
    for blob in (cached / "blobs").iterdir():
        (cached / "snapshots" / "0123" / blob.name).symlink_to(blob)
    known = base_fingerprints("org/name", "main", download=False)
    assert known == base_fingerprints(str(save_shards(tmp_path / "copy", *parts)), "main", download=False)
    assert known.keys() == {CONFIG, WEIGHTS}
