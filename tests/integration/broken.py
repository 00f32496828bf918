"""Models and adapters that something is wrong with, and what the commands say of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_fused.checkpoints import loading

from .cli import Command, Ended, save_tokenizer
from .four_bit import build

Change = Callable[[dict[str, Tensor]], object]


def save(path: Path, **options: Any) -> Path:
    """A tiny dense float32 model with a tokenizer."""
    build(dtype=torch.float32, **options).save_pretrained(path)
    save_tokenizer(path)
    return path


def changed(source: Path, target: Path, change: Change, file: str = "model.safetensors") -> Path:
    """A copy of ``source`` with other tensors; ``change`` works on them in place."""
    shutil.copytree(source, target)
    tensors = load_file(source / file)
    change(tensors)
    save_file(tensors, target / file, {"format": "pt"})
    return target


def edit_json(path: Path, **values: Any) -> None:
    """Changes a file of JSON; None removes an entry."""
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def commands(model: Path, adapter: Path, output: Path) -> dict[str, tuple[Any, ...]]:
    """Every command that reads a model, with nothing else wrong."""
    return {
        "quantize": ("quantize", model, output, "--device", "cpu"),
        "merge": ("merge", model, adapter, output),
        "generate": ("generate", model, "--prompt", "w7", "--max-new-tokens", 1, "--device", "cpu"),
        "convert": ("convert", "model", model, output, "--to", "fused"),
    }


def refuse_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which a model is loaded from now on."""

    def from_pretrained(*_: Any, **__: Any) -> nn.Module:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", from_pretrained)


def refused(command: Command, arguments: tuple[Any, ...], *words: str) -> Ended:
    """The command must end in one line that has all the words."""
    ended = command(*arguments)
    assert ended.status == 1, ended
    for word in words:
        assert word in ended.error, ended
    return ended


def poison(tensors: dict[str, Tensor], key: str, value: float) -> None:
    """One element of a tensor becomes ``value``."""
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[tensors[key].numel() // 2] = value
