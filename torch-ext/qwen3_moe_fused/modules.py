"""Stacks of 4-bit weights as the parameters of a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .packed import Packed4bitWeights


def attach(weights: Packed4bitWeights, module: nn.Module, name: str) -> None:
    """Makes ``module`` own the storage: frozen parameters ``name``, ``name_absmax``, … and ``name_format``."""
    for part, value in weights.tensors().items():
        parameter = nn.Parameter(value, requires_grad=False)
        module.register_parameter(name if part == "packed" else f"{name}_{part}", parameter)
    setattr(module, f"{name}_format", weights.format)


def weights_of(module: Any, name: str) -> Tensor | Packed4bitWeights:
    """What ``attach`` gave ``module``, or the dense parameter of that name."""
    format = getattr(module, f"{name}_format", None)
    if format is None:
        dense: Tensor = getattr(module, name)
        return dense
    parts = {part: getattr(module, name if part == "packed" else f"{name}_{part}") for part in format.storage()}
    return Packed4bitWeights(format, **parts)
