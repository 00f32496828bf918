"""Norms and rotary embeddings are replaced where the others compute the same, and only within the block."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe import modeling_qwen3_moe

from moe_fused import decoding

from .models import MODELS, QWEN3_MOE, tokens


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
