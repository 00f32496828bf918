"""Optimizers' states between layouts of experts: there and back, and a run that goes on in the other layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_fused.checkpoints.optimizers.convert import convert_optimizer, plan_optimizer

from .models import QWEN3_MOE
from .optimizers import adamw, fill, groups, load_state, same, save_state, separate, train, write_names

STEPS = 4


def build(apart: bool, seed: int = 0) -> nn.Module:
    model = QWEN3_MOE.build(seed).train()
    return separate(model) if apart else model


def transfer(state: dict[str, Tensor], model: nn.Module) -> None:
    """Loads weights that were trained in the other layout."""
    stacks = {name: value for name, value in state.items()}
    own = model.state_dict()
    for name, value in own.items():
        if name in stacks:
            value.copy_(stacks[name])
        elif ".experts.gate_up_proj" in name:
            block = name.removesuffix("gate_up_proj")
            for expert in range(len(value)):
                parts = [state[f"{block}{expert}.{part}_proj.weight"] for part in ("gate", "up")]
                value[expert].copy_(torch.cat(parts))
        elif ".experts.down_proj" in name:
            block = name.removesuffix("down_proj")
            for expert in range(len(value)):
                value[expert].copy_(state[f"{block}{expert}.down_proj.weight"])
        else:
            block, expert, leaf, _ = name.rsplit(".", 3)
            stack = state[f"{block}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"][int(expert)]
            value.copy_(stack if leaf == "down_proj" else stack.chunk(2)[leaf == "up_proj"])


@pytest.mark.parametrize("apart", [False, True], ids=["fused to per-expert", "per-expert to fused"])
def test_a_run_goes_on_in_the_other_layout(apart: bool, tmp_path: Path) -> None:
    model = build(apart)
    optimizer = adamw(model)
    train(model, optimizer, 0, STEPS)
    source = save_state(tmp_path / "checkpoint", optimizer)
    QWEN3_MOE.build().save_pretrained(source)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = train(model, optimizer, STEPS, STEPS)

    other = build(not apart, seed=1)
    transfer(weights, other)
    (tmp_path / "resumed").mkdir()
    names = None if apart else write_names(tmp_path / "names.json", groups(other))
    to = "fused" if apart else "per-expert"
    convert_optimizer(source, tmp_path / "resumed", to=to, target_parameters=names)
    resumed = adamw(other)
    resumed.load_state_dict(load_state(tmp_path / "resumed"))
    losses = train(other, resumed, STEPS, STEPS)
    assert losses == pytest.approx(expected, abs=1e-6)
    again = build(apart, seed=2)
    transfer(other.state_dict(), again)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
    # Without its state the run would be another one.
    transfer(weights, other)
    assert train(other, adamw(other), STEPS, STEPS) != pytest.approx(expected, abs=1e-4)
