"""What an experts module of Transformers computes and how its weights lie, as the kernel reads it.

The kernel's ``experts_module`` reads the flags of such a module, so that the kernel works without this package. This file
names what of it the integrations use. It looks the functions up once, at module level, where tracers find them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from moe_fused.hub import get_kernel, submodule

# An experts module of Transformers. Its flags and weights are attributes that nn.Module's type does not know.
Experts: TypeAlias = Any

_KERNELS = submodule(get_kernel(), "experts_module")

projections_of: Callable[[Experts], tuple[str, str]] = _KERNELS.projections_of
is_packed: Callable[[Experts], bool] = _KERNELS.is_packed
layout_refusal: Callable[[Experts], str | None] = _KERNELS.layout_refusal
weights_refusal: Callable[[Tensor, Tensor], str | None] = _KERNELS.weights_refusal
refusal: Callable[[Experts], str | None] = _KERNELS.refusal
read_experts: Callable[[Experts], Any] = _KERNELS.read_experts
compute_experts: Callable[..., Tensor] = _KERNELS.compute_experts
is_under_interface: Callable[[type], bool] = _KERNELS.is_under_interface


def is_experts(module: Experts) -> bool:
    """Whether ``module`` is under Transformers' experts interface."""
    return hasattr(type(module), "_apply_gate")


def serves(module: Experts) -> bool:
    """Whether ``module`` is an experts module that the kernel computes under ``"moe_fused"``, and that takes adapters."""
    return is_experts(module) and refusal(module) is None
