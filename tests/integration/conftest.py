"""Fixtures of the integration tests: the device, and ``moe_fused`` enabled for the duration of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_fused

from .cli import Command, runner

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
    """The same in 4 bits, as Transformers 4 saved it."""
    from .four_bit import v4_checkpoint

    path = tmp_path_factory.mktemp("v4")
    v4_checkpoint(dense, path)
    return path


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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """``moe_fused`` enabled, and the calls of the kernel's ``moe_experts`` from it."""
    kernel = moe_fused.get_kernel()
    spy = Calls(kernel.moe_experts)
    monkeypatch.setattr(kernel, "moe_experts", spy)
    moe_fused.disable()
    moe_fused.enable()
    yield spy
    moe_fused.disable()
