"""The names of layouts and choices, apart from what takes torch to read and write them."""

from __future__ import annotations

from enum import Enum


class Layout(str, Enum):
    """How an adapter's file holds LoRA on experts. The package's docstring describes each."""

    PER_EXPERT = "per-expert"
    PEFT_FUSED = "peft-fused"
    PEFT_SWAPPED = "peft-swapped"
    GPT_OSS_INVERTED = "gpt-oss-inverted"
    UNSLOTH_GROUPED = "unsloth-grouped"
    UNSLOTH_SWAPPED = "unsloth-swapped"
    ORIGINAL = "original"


class ScalingChoice(str, Enum):
    """What becomes of alpha / rank, and of ranks that differ."""

    FOLD = "fold"
    KEEP = "keep"
