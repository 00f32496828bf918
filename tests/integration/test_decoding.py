"""What is replaced while a step is recorded: where ours computes the same, and only within the block."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe import modeling_qwen3_moe

pytest.importorskip("triton")

from moe_fused import decoding
from moe_fused.decoding import attention
from tests.support import REPOSITORY, accelerator

from .models import MODELS, QWEN3_MOE, tokens


def test_the_cases_of_the_kernels() -> None:
    """Runs ``decoding_cases.py`` in a process of its own, on a CPU in Triton's interpreter."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, "tests/integration/decoding_cases.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "0" if accelerator() else "1"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


ARCHITECTURES = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 89, 100, 120, "gfx942"))]
ONE, MANY = 1, 32


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_compiles_without_spills(
    arch: int | str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the heads of Qwen3-30B-A3B, in few and many keys, and for those of Qwen3-Next and DeepSeek."""
    from tests.kernel.offline_compile import compiling_for

    monkeypatch.setattr(attention, "_multiprocessors", lambda _: 132)
    for batch, heads, kv_heads, count, size, value_size in (
        (ONE, 32, 4, 512, 128, 128),
        (ONE, 32, 4, 16384, 128, 128),
        (MANY, 32, 4, 512, 128, 128),
        (ONE, 16, 2, 512, 256, 256),
        (ONE, 16, 16, 512, 192, 128),
    ):
        keys, values = (meta(batch, kv_heads, count, each, dtype=dtype) for each in (size, value_size))
        mask = meta(batch, 1, 1, count, dtype=torch.bool)
        with compiling_for(arch) as found:
            attention.attend(meta(batch, heads, 1, size, dtype=dtype), keys, values, mask, 0.1, sinks=meta(heads))
        assert [resources.kernel for resources in found] == ["attention_kernel", "combine_kernel"]
        assert not any(resources.spills for resources in found)
        assert found[0].programs >= (2 if dtype is torch.bfloat16 else 1)


def rms_norm(values: Tensor, weight: Tensor, eps: float, in_place: bool) -> Tensor:
    assert not in_place
    return weight * (values.float() * torch.rsqrt(values.float().square().mean(-1, keepdim=True) + eps)).to(
        values.dtype
    )


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(values: Tensor) -> Tensor:
        first, second = values.chunk(2, dim=-1)
        return values * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)

    return turn(q), turn(k)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of stand-ins for Liger, whose kernels need a GPU."""
    counted: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted.append(name)
            return function(*args, **kwargs)

        return call

    stand_in = SimpleNamespace(liger_rms_norm=counting("norm", rms_norm), liger_rope=counting("rope", rope))
    monkeypatch.setattr(decoding, "_liger", lambda: stand_in)
    return counted


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.id)
def test_families_compute_the_same(case: Any, calls: list[str]) -> None:
    model = case.build()
    with torch.no_grad():
        want = model(tokens()).logits
        with decoding.fewer_launches(model):
            calls.clear()
            got = model(tokens()).logits
            used = len(calls)
        assert torch.equal(model(tokens()).logits, want)
    assert len(calls) == used
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_is_replaced(calls: list[str]) -> None:
    """Qwen3-MoE has two norms in a layer, those of queries and keys, a last one, and a rotary embedding in each layer."""
    model = QWEN3_MOE.build(num_hidden_layers=2)
    before = modeling_qwen3_moe.apply_rotary_pos_emb
    state = torch.get_rng_state()
    with torch.no_grad(), decoding.fewer_launches(model):
        assert modeling_qwen3_moe.apply_rotary_pos_emb is not before
        calls.clear()
        model(tokens())
        assert (calls.count("norm"), calls.count("rope")) == (2 * 4 + 1, 2)
    assert modeling_qwen3_moe.apply_rotary_pos_emb is before
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


class PlusOneRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(8)), 1e-6

    def forward(self, values: Tensor) -> Tensor:
        return rms_norm(values, 1 + self.weight, self.eps, in_place=False)


def test_others_stay(calls: list[str]) -> None:
    model = nn.Sequential(PlusOneRMSNorm(), nn.LayerNorm(8), nn.RMSNorm(8))
    before, rotate = [module.forward for module in model], modeling_qwen3_moe.apply_rotary_pos_emb
    with decoding.fewer_launches(model):
        assert [module.forward for module in model] == before  # RMSNorm of torch has no eps of its own by default
    with pytest.raises(KeyboardInterrupt), decoding.fewer_launches(QWEN3_MOE.build()):
        raise KeyboardInterrupt
    assert modeling_qwen3_moe.apply_rotary_pos_emb is rotate
