"""Puts the repository's root on the path, as ``python -m benchmarks.…`` does, and makes rows for the tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import runner  # noqa: E402
from benchmarks.rows import Row, read_rows  # noqa: E402
from moe_fused.integrations.quantizer import bitsandbytes_cpu  # noqa: E402


def plain_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """The experts in a few lines of torch, as a stand-in for the kernel."""
    gate, up = torch.einsum("th,eih->tei", hidden_states, gate_up_proj).chunk(2, dim=-1)
    every = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, down_proj)
    chosen = every.gather(1, top_k_index[..., None].expand(-1, -1, every.shape[-1]))
    return (chosen * top_k_weights[..., None]).sum(1)


@pytest.fixture(autouse=True)
def _right_on_every_cpu() -> Iterator[None]:
    """What the benchmarks' commands do first: bitsandbytes' own kernel for CPUs is wrong at the sizes of these tests."""
    bitsandbytes_cpu.register()
    yield
    bitsandbytes_cpu.unregister()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What benchmarks take for the kernel; tests replace parts of it."""
    stand_in = SimpleNamespace(moe_experts=plain_experts)
    monkeypatch.setattr(runner, "load_kernel", lambda: stand_in)
    return stand_in


@pytest.fixture
def run_with_kernel(tmp_path: Path) -> Callable[..., tuple[list[Row], str]]:
    """Runs a benchmark on a CPU as a user does, in a process of its own; gives the rows written and what was printed."""

    def run(benchmark: str, *options: str, tokens: Sequence[int]) -> tuple[list[Row], str]:
        output = tmp_path / "rows.json"
        sizes = [option for size in tokens for option in ("--tokens", str(size))]
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", *options, *sizes, "--output", str(output)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "ceilings: copy" in result.stdout
        assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        rows = read_rows(output)
        assert {(row.benchmark, row.gpu) for row in rows} == {(benchmark, "cpu")}
        assert all(row.ms is not None and row.ms > 0 for row in rows)
        return rows, result.stdout

    return run


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """A row of our forward at 512 tokens, with whatever is given in place of the defaults."""

    def make(**changes: Any) -> Row:
        values: dict[str, Any] = {
            "benchmark": "experts",
            "gpu": "NVIDIA H100 80GB HBM3",
            "date": "2026-11-23",
            "torch": "2.11.0+cu130",
            "triton": "3.6.0",
            "layer": "qwen3-30b-a3b",
            "tokens": 512,
            "implementation": "moe_fused",
            "phase": "forward",
            "weights": "bf16",
            "lora_rank": 0,
            "ms": 0.5,
            "tflops": 77.3,
            "peak_mib": 12.5,
        }
        return Row(**{**values, **changes})

    return make
