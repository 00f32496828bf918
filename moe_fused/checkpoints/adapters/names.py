"""The names of layouts and choices. Unlike the code that reads and writes layouts, this file does not need torch."""

from __future__ import annotations

import re
from enum import Enum


class Layout(str, Enum):
    """A layout of LoRA on experts in an adapter file. The package's docstring describes each."""

    PER_EXPERT = "per-expert"
    PEFT_FUSED = "peft-fused"
    PEFT_SWAPPED = "peft-swapped"
    GPT_OSS_INVERTED = "gpt-oss-inverted"
    UNSLOTH_GROUPED = "unsloth-grouped"
    UNSLOTH_SWAPPED = "unsloth-swapped"
    ORIGINAL = "original"


class ScalingChoice(str, Enum):
    """What a conversion does with alpha / rank, and with ranks that differ."""

    FOLD = "fold"
    KEEP = "keep"


def names_gpt_oss(name: str) -> bool:
    """Whether a name says gpt-oss, in which gate and up alternate in one tensor."""
    return re.search(r"gpt[-_]?oss", name, re.IGNORECASE) is not None
