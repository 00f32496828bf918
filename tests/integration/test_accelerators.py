"""Machines whose torch names a GPU that is not there, and machines with one that nobody asked for.

The package index gives everybody torch's CUDA build, on a machine without a GPU, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moe_fused import diagnosis
from moe_fused.devices import choose_device
from moe_fused.finetune.model import load_model
from moe_fused.finetune.options import Options
from moe_fused.finetune.resolve import set_up
from tests.support import REPOSITORY, accelerator, python_path

from .models import QWEN3_MOE

# What torch's CUDA build says where there is no GPU.
CUDA_BUILD = """
import torch

torch.accelerator.current_accelerator = lambda check_available=False: None if check_available else torch.device("cuda")
torch.accelerator.is_available = torch.cuda.is_available = lambda: False
torch.version.cuda = "13.0"
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """``code`` on such a machine, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": python_path(REPOSITORY)}
    environment.pop("LOCAL_KERNELS", None)
    return subprocess.run(
        [sys.executable, "-c", CUDA_BUILD + code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in this process."""

    def current_accelerator(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    for module in (torch.accelerator, torch.cuda):
        monkeypatch.setattr(module, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_all_kernel_tests_are_collected_and_run_on_a_cuda_build_without_a_gpu() -> None:
    ended = run_python(
        """
import sys
import pytest

quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
sys.exit(pytest.main([*quiet, "--collect-only", "tests/kernel"]) or pytest.main([*quiet, "tests/kernel/test_package.py"]))
"""
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "4 passed" in ended.stdout


def test_a_cuda_build_without_a_gpu_has_no_accelerator(cuda_build: None) -> None:
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    assert accelerator() is None
    assert choose_device("auto") == torch.device("cpu")


def test_doctor_finds_no_gpu_and_no_fault_on_a_cuda_build(cuda_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "driver_version", lambda: "")
    checks = list(diagnosis.examine())
    assert [check.found for check in checks if check.name == "GPU"] == ["none"]
    assert [check for check in checks if check.status is diagnosis.Status.PROBLEM] == []
    assert [check.found.rpartition(" ")[2] for check in checks if check.name == "path"] == ["cpu"]


@pytest.mark.parametrize("quantized", [True, False])
def test_a_cpu_that_was_asked_for_is_used_beside_a_gpu(
    quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers puts a quantized model on the GPU unless it is told where to."""
    asked: dict[str, Any] = {}
    usual = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        asked.update(options)
        return usual(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    QWEN3_MOE.build().save_pretrained(tmp_path)
    options = Options(model=str(tmp_path), device="cpu", quantization="nf4" if quantized else "none")
    model = load_model(set_up(options, transformers.AutoConfig.from_pretrained(tmp_path), torch.device("cpu")))
    assert asked["device_map"] == {"": torch.device("cpu")}
    assert bool(getattr(model, "is_loaded_in_4bit", False)) is quantized
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
