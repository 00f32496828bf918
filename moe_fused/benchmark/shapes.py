"""Finds the shape of a model's experts from its configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .layers import Layer


def layer_of(name: str, config: Any) -> Layer:
    """Returns the first layer with experts of the model that ``config`` describes. No weights are made.

    Raises:
        ValueError: the model has no such layer.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    for module in skeleton.modules():
        if not hasattr(type(module), "_apply_gate"):
            continue
        down: torch.Tensor = module.down_proj
        experts, *features = down.shape
        hidden, intermediate = reversed(features) if getattr(module, "is_transposed", False) else features
        return Layer(name, hidden, intermediate, experts, config.get_text_config().num_experts_per_tok)
    raise ValueError(f"{name} has no layer of experts that Transformers can exchange: {type(skeleton).__name__}")
