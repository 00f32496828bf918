"""Models whose experts are separate modules, as they were under Transformers 4, and optimizers on them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer

from .models import tokens

Names = list[str]


class Expert(nn.Module):
    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        for name, weight in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data.copy_(weight)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class SeparateExperts(nn.ModuleList):
    """Every expert computes every token: all have a gradient in every step, as stacked ones do."""

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        weights = torch.zeros(len(x), len(self), dtype=x.dtype).scatter(1, top_k_index, top_k_weights)
        return sum((expert(x) * weights[:, [index]] for index, expert in enumerate(self)), torch.zeros_like(x))


def separate(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with its experts apart, and behind the router, as Transformers 4 had those of Qwen3-MoE."""
    for module in model.modules():
        if isinstance(getattr(module, "gate", None), nn.Module) and hasattr(module, "experts"):
            stacks = module.experts
            del module.experts
            module.experts = SeparateExperts(
                Expert(gate_up, down)
                for gate_up, down in zip(stacks.gate_up_proj.data, stacks.down_proj.data, strict=True)
            )
    return model


def groups(model: nn.Module) -> list[Names]:
    """The names of the trained parameters as Trainer groups them: those whose weights decay, and the others."""
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [[name for name in names if (name in decaying) is decay] for decay in (True, False)]


def adamw(model: nn.Module, kind: Any = torch.optim.AdamW, **options: Any) -> Any:
    """As Trainer makes it."""
    parameters = dict(model.named_parameters())
    settings = [
        {"params": [parameters[name] for name in names], "weight_decay": decay}
        for names, decay in zip(groups(model), (0.1, 0.0), strict=True)
    ]
    return kind(settings, lr=1e-2, **options)


def train(model: nn.Module, optimizer: Any, first: int, steps: int) -> list[float]:
    """The losses of ``steps`` steps, on other tokens in each."""
    losses = []
    for step in range(first, first + steps):
        ids = (tokens() + step) % 60 + 3
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fill(optimizer: Any, names: Iterable[str], moments: Any) -> None:
    """Gives every parameter the state that ``moments`` makes for its name and shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        optimizer.state[parameter] = moments(name, parameter.shape)


def save_state(directory: Path, optimizer: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    return directory


def load_state(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path / "optimizer.pt", weights_only=True)
    return content


def write_names(path: Path, names: list[Names]) -> Path:
    path.write_text(json.dumps(names))
    return path


def same(one: Any, other: Any) -> bool:
    """Whether two states are the same, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
