"""Facts about a model's architecture that decide how a run may train it.

``resolve`` asks them, and nobody else: which linear layers are those of attention, whether rows may lie side by side in
a sequence, whether something in the model is random or waits for the GPU, and which layouts an adapter of it can have.
They are read from the config and from the model on the meta device.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft  # noqa: F401  # first: `moe_fused.enable` waits for this import, with modules that the next imports are parts of
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_fused.checkpoints.adapters.by_expert import by_expert_refusal
from moe_fused.checkpoints.adapters.names import names_gpt_oss
from moe_fused.integrations.peft.targets import ExpertLayer, expert_layers
from moe_fused.memory import is_named

from .attention import APART, layer_types
from .precheck import INTERLEAVED

# The implementations of attention that keep rows apart by a mask. Others are given the boundaries of the rows.
_MASKED = frozenset({"eager", "sdpa", "flex_attention"})
# The functions of Transformers that make masks for the types of layers in ``APART``.
_MAKERS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")
# Parts of attention that choose which tokens it looks at. They get no adapters, for no gradient flows through a choice.
_SELECTORS = frozenset({"indexer", "scorer"})


def why_rows_mix(model: Any) -> str | None:
    """Why rows that lie side by side in a sequence would see each other; None if they would not.

    Args:
        model: The model on the meta device, with the attention of the run.
    """
    if others := sorted(layer_types(model.config) - APART):
        return f"its layers of type {' and '.join(others)} take no boundaries of rows"
    attn = model.config.get_text_config()._attn_implementation
    if attn in _MASKED and not _masks_by_position(model):
        return f"its masks for {attn} attention are made without positions, which begin anew in each row"
    return None


class _Reached(Exception):
    """Ends a forward pass when it reaches the first layer."""


def _masks_by_position(model: Any) -> bool:
    """Whether a model passes the positions of tokens to the functions that make its masks.

    These positions are the only thing by which Transformers tells apart rows that lie side by side. A forward pass up
    to the first layer shows whether they arrive, in every version of Transformers.

    Args:
        model: The model on the meta device.
    """
    given: list[bool] = []

    def maker(original: Callable[..., Any]) -> Callable[..., None]:
        signature = inspect.signature(original)

        def note(*args: Any, **kwargs: Any) -> None:
            given.append(signature.bind(*args, **kwargs).arguments.get("position_ids") is not None)

        return note

    def stop(*_: Any) -> None:
        raise _Reached

    modules = [sys.modules[name] for name in {type(module).__module__ for module in model.modules()}]
    makers = [(module, name, getattr(module, name)) for module in modules for name in _MAKERS if hasattr(module, name)]
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_pre_hook(stop) for layer in layers]
    tokens = torch.zeros((1, 2), dtype=torch.long, device="meta")
    try:
        for module, name, original in makers:
            setattr(module, name, maker(original))
        model(input_ids=tokens, position_ids=tokens, use_cache=False)
    except _Reached:
        return bool(given) and all(given)
    except (RuntimeError, TypeError, ValueError):  # the model reads values of a meta tensor, or takes no positions
        return False
    finally:
        for module, name, original in makers:
            setattr(module, name, original)
        for hook in hooks:
            hook.remove()
    return False


def attention_modules(model: nn.Module) -> tuple[str, ...]:
    """Names for PEFT of all linear layers of a model's attention, linear attention included.

    A name is the layer's own name if all layers of that name belong to attention. Otherwise it has as many of the names
    before it as tell these layers apart. Layers with a name that projections of experts had, such as ``gate_proj``, are left
    out: PEFT would take that name for the experts', whatever stands before it.
    """
    experts = {
        linear.leaf for layer in _expert_layers(model) for linears in layer.linears.values() for linear in linears
    }
    found: list[str] = []
    others: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            free = _is_plain(module) and path.rpartition(".")[2] not in experts
            (found if free and _is_attention(model, path) else others).append(path)
    names: dict[str, None] = {}
    for path in found:
        parts = path.split(".")
        candidates = (".".join(parts[-number:]) for number in range(1, len(parts) + 1))
        name = next(short for short in candidates if not any(is_named(other, (short,)) for other in others))
        names[name] = None
    return tuple(names)


def _expert_layers(model: nn.Module) -> list[ExpertLayer]:
    modules = ((name, module) for name, module in model.named_modules() if hasattr(type(module), "_apply_gate"))
    return expert_layers(model, modules)


def _is_attention(model: nn.Module, path: str) -> bool:
    parts = path.split(".")
    if not _SELECTORS.isdisjoint(parts):
        return False
    if any(part.endswith(("attn", "attention")) for part in parts):
        return True
    owners = (model.get_submodule(".".join(parts[:number])) for number in range(1, len(parts)))
    return any(type(owner).__name__.endswith("Attention") for owner in owners)


def _is_plain(module: nn.Linear) -> bool:
    """Whether a layer multiplies as ``nn.Linear`` does, which models' own subclasses of it need not."""
    return not type(module).__module__.startswith("transformers.models.")


def has_random_layers(config: Any) -> bool:
    """Whether a model drops or jitters something while it is trained, so that two passes over a batch differ."""
    values = config.get_text_config().to_dict()
    words = ("dropout", "pdrop", "layerdrop", "jitter_noise")
    return any(
        any(word in name for word in words) and isinstance(value, (int, float)) and value > 0
        for name, value in values.items()
    )


def waits_for_lengths(config: Any) -> bool:
    """Whether the rotary embedding reads the positions from the GPU, to see how it must be scaled."""
    text = config.get_text_config()
    ropes = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    # The parameters of all layers, or those of each type of layer.
    return any(isinstance(rope, Mapping) and rope.get("rope_type") == "dynamic" for rope in (ropes, *ropes.values()))


def apart_refusal(name: str, config: Any, model: nn.Module, layout: str) -> str | None:
    """Why an adapter cannot be had in a layout that has each expert, or gate and up, apart; None if it can.

    Args:
        name: The model's directory, or its name on the Hub.
        config: The model's config.
        model: A model of this architecture, on any device, meta included.
        layout: ``"per-expert"`` or ``"original"``.
    """
    # The conversion may know nothing about a model on the Hub but its name.
    if not Path(name).is_dir() and names_gpt_oss(name):
        return INTERLEAVED
    for module in model.modules():
        if not hasattr(type(module), "_apply_gate"):
            continue
        if not getattr(module, "has_gate", True):
            return f"experts of {type(module).__name__} have no gate, which the layout has"
        if not getattr(module, "is_concatenated", True):
            return INTERLEAVED
    if layout != "per-expert":
        return None
    # Transformers knows the layout of a model with several parts by its own name, or by that of its language model.
    types = [getattr(part, "model_type", None) for part in (config, getattr(config, "text_config", None))]
    refusals = [by_expert_refusal(model_type) for model_type in types if model_type]
    return next(filter(None, refusals), None)
