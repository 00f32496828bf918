"""Fixtures of the integration tests: the device, and ``moe_fused`` enabled for the duration of a test."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moe_fused
from moe_fused.hub import submodule

from .cli import Command, runner
from .models import MODELS

# This must be set before datasets is imported; otherwise tests leave their rows in the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="moe-fused-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint of Qwen3-MoE."""
    from .four_bit import build  # which skips whoever imports it without bitsandbytes

    path = tmp_path_factory.mktemp("dense")
    build().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def v4(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of ``dense`` in 4 bits, as Transformers 4 saved it."""
    from .four_bit import v4_checkpoint

    path = tmp_path_factory.mktemp("v4")
    v4_checkpoint(dense, path)
    return path


@pytest.fixture(autouse=True)
def _stock_afterwards() -> Iterator[None]:
    """Undoes ``moe_fused.enable()`` and, on a GPU, Liger's layers.

    Other tests build models on a CPU, where those fail.
    """
    if DEVICE == "cuda":
        for case in MODELS:  # so that their modules are there, and what Liger replaces in them is known
            getattr(transformers, case.model)
    modules = [
        module for name, module in list(sys.modules.items()) if re.match(r"transformers\.models\..+\.modeling_", name)
    ]
    before = [dict(vars(module)) for module in modules] if DEVICE == "cuda" else []
    yield
    moe_fused.disable()
    for module, attributes in zip(modules, before, strict=False):
        vars(module).update(attributes)


@pytest.fixture
def enabled() -> Iterator[None]:
    """``moe_fused.enable()``, undone after the test."""
    moe_fused.enable()
    yield
    moe_fused.disable()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """The command ``moe-fused``; what it enables is disabled after the test."""
    yield runner(monkeypatch, capsys)
    moe_fused.disable()


class Calls:
    """Counts what reaches the kernel, so that a comparison cannot pass by comparing Transformers with itself."""

    def __init__(self, moe_experts: Callable[..., torch.Tensor]) -> None:
        self._moe_experts = moe_experts
        self.arguments: list[tuple[Any, ...]] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.arguments.append(args)
        self.options.append(kwargs)
        return self._moe_experts(*args, **kwargs)

    @property
    def count(self) -> int:
        return len(self.arguments)

    @property
    def adapters(self) -> int:
        """How many adapters the calls had, those of up and down projections together."""
        return sum(len(options["gate_up_lora"]) + len(options["down_lora"]) for options in self.options)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of the kernel's ``moe_experts`` for experts modules."""
    reader = submodule(moe_fused.get_kernel(), "experts_module")
    calls = Calls(reader.moe_experts)
    monkeypatch.setattr(reader, "moe_experts", calls)
    return calls


@pytest.fixture
def calls(spy: Calls) -> Iterator[Calls]:
    """``moe_fused`` enabled, and the calls of the kernel's ``moe_experts`` for experts modules."""
    moe_fused.disable()
    moe_fused.enable()
    yield spy
    moe_fused.disable()
