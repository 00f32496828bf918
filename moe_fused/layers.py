"""``kernelize``: the kernel's pure layers on a model's modules, through ``kernels.kernelize``.

``kernels.kernelize`` acts on every module whose class carries a ``kernel_layer_name``: it gives those without a kernel
in the mapping their class's forward back, over whatever had replaced it, and Transformers' experts classes have no such
name. So it is shown only the modules that we serve, under a mapping of ours alone, and their classes carry the name
only meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import kernels
import torch
from kernels import Mode
from torch import nn
from transformers.integrations.moe import _default_apply_gate

from .experts import Experts, layout_refusal
from .hub import get_kernel

_EXPERTS_LAYER = "Qwen3MoeExperts"
_BLOCK_LAYER = "Qwen3MoeSparseMoeBlock"
_BLOCK_CLASS = ("transformers.models.qwen3_moe.modeling_qwen3_moe", _BLOCK_LAYER)
LAYERS = (_EXPERTS_LAYER, _BLOCK_LAYER)
_DEVICES = ("cpu", "cuda", "rocm", "xpu")


@dataclass(frozen=True)
class KernelLayer:
    """A layer of the kernel as ``kernels`` expects it in a mapping, from wherever ``get_kernel`` finds the kernel."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        layer: type[nn.Module] = getattr(get_kernel().layers, self.layer_name)
        return layer


class _Selection(nn.Module):
    """A model in which ``kernels.kernelize`` finds the given modules and nothing below them."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.__dict__["selected"] = modules

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return ((str(index), module) for index, module in enumerate(self.__dict__["selected"]))


def _is_experts(module: Experts) -> bool:
    """Whether ``module`` is an experts module of Transformers that computes what the ``Qwen3MoeExperts`` layer does."""
    own = getattr(module, "_apply_gate", None)
    return (
        getattr(own, "__func__", None) is _default_apply_gate
        and getattr(module, "has_gate", False)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "is_transposed", True)
        and layout_refusal(module) is None
    )


def _serves(layer: str, module: Any) -> bool:
    if layer == _EXPERTS_LAYER:
        return _is_experts(module)
    return (type(module).__module__, type(module).__qualname__) == _BLOCK_CLASS and _is_experts(module.experts)


@contextmanager
def _layer_name(cls: type[nn.Module], name: str) -> Iterator[None]:
    """``kernels.replace_kernel_forward_from_hub(cls, name)`` for the duration of the context."""
    before = {key: cls.__dict__[key] for key in ("kernel_layer_name", "kernel_condition") if key in cls.__dict__}
    kernels.replace_kernel_forward_from_hub(cls, name)
    try:
        yield
    finally:
        for key in ("kernel_layer_name", "kernel_condition"):
            if key in before:
                setattr(cls, key, before[key])
            elif key in cls.__dict__:
                delattr(cls, key)


def kernelize(model: nn.Module, mode: Mode | None, device: str | torch.device | None, layer: str) -> nn.Module:
    """See ``moe_fused.kernelize``."""
    if layer not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
    selected = [module for module in model.modules() if _serves(layer, module)]
    if not selected:
        looked_for = _BLOCK_LAYER if layer == _BLOCK_LAYER else "gated experts in the layout of Qwen3MoeExperts"
        raise ValueError(f"model must contain {looked_for}, got a {type(model).__name__} without")
    for module in selected:
        # A layer that kernels put there is a method of the module; Accelerate's hooks and expert parallelism are not.
        forward = vars(module).get("forward")
        if forward is not None and not isinstance(forward, MethodType):
            raise ValueError(
                f"model must have layers whose forward nothing wraps, got a {type(module).__name__} whose forward is a "
                f"{type(forward).__name__} of its own: use moe_fused.enable() instead"
            )
    if device is None:
        device = next(selected[0].parameters()).device
    mapping = {layer: dict.fromkeys(_DEVICES, KernelLayer(layer))}
    with ExitStack() as stack:
        for cls in {type(module) for module in selected}:
            stack.enter_context(_layer_name(cls, layer))
        stack.enter_context(kernels.use_kernel_mapping(mapping, inherit_mapping=False))
        kernels.kernelize(_Selection(selected), mode=mode or Mode.TRAINING, device=device, use_fallback=False)
    return model
