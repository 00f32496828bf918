"""Decides whether an adapter for a model can be written with a matrix for each expert, under names that readers know."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from moe_fused.checkpoints.names import is_per_expert

# The names of linear layers that are written.
_LEAVES = {"gate_proj", "up_proj", "down_proj"}


def by_expert_refusal(model_type: str) -> str | None:
    """Why an adapter of such a model cannot be written expert by expert, or None if it can or the type is unknown.

    Args:
        model_type: Transformers' name for the architecture.
    """
    conversions = get_checkpoint_conversion_mapping(model_type)
    if conversions is None:
        return None
    converters = [c for c in conversions if isinstance(c, WeightConverter) and is_per_expert(c)]
    if not converters:
        return f"checkpoints of {model_type} have the stacks of all experts, and no matrix for each"
    sources = [pattern for converter in converters for pattern in converter._original_source_patterns]
    leaves = [name.removesuffix(".weight").rpartition(".")[2] for name in sources]
    if others := [leaf for leaf in leaves if leaf not in _LEAVES]:
        return f"experts of {model_type} have {', '.join(others)} instead of gate_proj, up_proj, down_proj"
    return None


def model_type_of(model: str) -> str | None:
    """Returns the type of a model, a directory or a name on the Hub, or None if its config is not on this machine."""
    path = Path(model) / "config.json"
    if not path.is_file():
        try:
            cached = try_to_load_from_cache(model, "config.json")
        except ValueError:  # not a name on the Hub, but for example the path of a directory that is gone
            return None
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    value = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    return None if value is None else str(value)
