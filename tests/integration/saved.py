"""What is in the directory of a saved model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from .four_bit import same_bits


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {key: value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}


def same_tensors(a: Path, b: Path) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    return left.keys() == right.keys() and all(same_bits(left[key], right[key]) for key in left)


def config_of(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return values
