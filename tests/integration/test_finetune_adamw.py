"""The kernel for steps of 8-bit AdamW: what it computes, what it compiles to, and a run that uses it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
pytest.importorskip("bitsandbytes")

import bitsandbytes as bnb

from moe_fused.finetune import adamw, adamw_device
from moe_fused.finetune.host import queued
from moe_fused.finetune.variables import ADAMW
from tests.support import REPOSITORY, accelerator

from .finetuning import OPTIONS, STEPS, chats, finetune, losses, save_model, write_jsonl


def test_the_cases_of_the_kernel() -> None:
    """Runs ``adamw_cases.py`` in a process of its own, on a CPU in Triton's interpreter."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "tests/integration/adamw_cases.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "0" if accelerator() else "1"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 89, 100, 120, "gfx942"))]
)
def test_the_kernel_compiles_without_spills(
    arch: int | str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A multiprocessor holds as many programs as there are registers for, and neighbours are loaded and stored together."""
    from tests.kernel.offline_compile import compiling_for

    monkeypatch.setattr(adamw, "runs_on", lambda device: True)
    monkeypatch.setenv(ADAMW, "1")
    optimizer = queued(bnb.optim.AdamW8bit)([nn.Parameter(torch.randn(80, 64, dtype=dtype))])
    optimizer.allocate()
    optimizer.param_groups[0]["params"][0].grad = torch.randn(80, 64, dtype=dtype)
    kernels: list[Any] = []
    with compiling_for(arch, kernels) as found:
        optimizer.step()
    (resources,), (kernel,) = found, kernels
    assert resources.kernel == adamw_device.adamw_kernel.fn.__name__
    assert resources.spills == 0
    assert resources.programs >= (3 if dtype is torch.bfloat16 else 2)
    assert resources.narrow_stores == 0
    if arch == 90:
        # Parameters, gradients and both kinds of codes.
        assert kernel.asm["ptx"].count("ld.global.v4.b32") >= 4


def _note_launches() -> None:
    """Switches the kernel on, and notes the steps of its launches. This runs in the process of a command."""
    os.environ[ADAMW] = "1"
    queue = adamw._Launch._queue

    def noting(self: Any, group: Any, step: int, gradients: list[int]) -> None:
        with Path("launches.txt").open("a") as file:
            file.write(f"{step}\n")
        queue(self, group, step, gradients)

    adamw._Launch._queue = noting  # type: ignore[method-assign]


def _switch_off() -> None:
    _note_launches()
    del os.environ[ADAMW]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA or AMD GPU")
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_a_run_has_the_losses_of_one_by_bitsandbytes(tmp_path: Path, optimizer: str) -> None:
    """Up to roundings, and it goes on from the checkpoint of a run that had the kernel."""
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "chat.jsonl", chats())
    arguments = (
        "--model", tmp_path / "model", "--dataset", tmp_path / "chat.jsonl", *OPTIONS, "--optimizer", optimizer,
        "--expert-rank", "32", "--weight-decay", "0.1",
    )  # fmt: skip
    for name, before in {"mine": _note_launches, "other": _switch_off}.items():
        ended = finetune(*arguments, "--output", name, cwd=tmp_path, before=before)
        assert ended.status == 0, ended
        launched = (tmp_path / "launches.txt").read_text().split()
        assert set(launched) == {str(step) for step in range(1, STEPS + 1)}  # and none by the second run
        assert len(launched) <= 2 * STEPS
    mine, other = (losses(tmp_path / name) for name in ("mine", "other"))
    assert mine.keys() == other.keys()
    assert list(mine.values()) == pytest.approx(list(other.values()), rel=0.01)
    ended = finetune("--resume", "--output", "mine", "--max-steps", str(STEPS + 2), cwd=tmp_path, before=_switch_off)
    assert ended.status == 0, ended
