"""``moe_fused.kernelize``: the kernel's layers on one model, through ``kernels.kernelize``.

``kernels.kernelize`` acts on every module whose class carries a ``kernel_layer_name``, and it resets the forward of modules
that have no kernel in the mapping, whatever had replaced it. So it is shown only the modules that our layers can serve, with
a mapping for these layers alone, and classes carry the names of layers only while it runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import kernels
import torch
from kernels import Mode
from torch import nn

from moe_fused.integrations.transformers.originals import restore_experts

from .mapping import DEVICES, KERNEL_MAPPING, QWEN3_BLOCK
from .selection import has_layer, layers_of, refusal_of

# What kernels.replace_kernel_forward_from_hub sets.
_ATTRIBUTES = ("kernel_layer_name", "kernel_condition")


class _Selection(nn.Module):
    """A model in which ``kernels.kernelize`` finds the given modules and nothing below them."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.__dict__["selected"] = modules

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return ((str(index), module) for index, module in enumerate(self.__dict__["selected"]))


@contextmanager
def _layer_name(cls: type[nn.Module], name: str) -> Iterator[str]:
    """Applies ``kernels.replace_kernel_forward_from_hub(cls, name)`` within the context, and undoes it afterwards.

    The context's value is the name by which ``kernels.kernelize`` then looks the layer of ``cls`` up.
    """
    before = {key: cls.__dict__[key] for key in _ATTRIBUTES if key in cls.__dict__}
    kernels.replace_kernel_forward_from_hub(cls, name)
    try:
        yield name
    finally:
        for key in _ATTRIBUTES:
            if key in before:
                setattr(cls, key, before[key])
            elif key in cls.__dict__:
                delattr(cls, key)


def _choose(module: nn.Module, layer: str | None) -> str | None:
    """The layer for ``module``: ``layer`` if that is for such modules, by default the usual one, but no layer for blocks."""
    if layer is not None:
        return layer if has_layer(module, layer) else None
    usual = next(layers_of(module), None)
    return None if usual == QWEN3_BLOCK else usual


def _select(model: nn.Module, layer: str | None) -> tuple[dict[nn.Module, str], dict[tuple[str, str], str]]:
    """Returns the layer of each module that gets one, and the name of the first module by class and reason of a refusal."""
    selected: dict[nn.Module, str] = {}
    refused: dict[tuple[str, str], str] = {}
    for name, module in model.named_modules():
        chosen = _choose(module, layer)
        if chosen is None:
            continue
        reason = refusal_of(module)
        if reason is None:
            selected[module] = chosen
        else:
            refused.setdefault((type(module).__name__, reason), name)
    return selected, refused


def _check(model: Any, mode: Any, device: Any) -> None:
    """Raises TypeError or ValueError for arguments that ``kernels.kernelize`` would not name in its errors."""
    if not isinstance(model, nn.Module):
        got = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module that is loaded, got {got}")
    if mode is not None and not isinstance(mode, Mode):
        raise TypeError(f"mode must be a kernels.Mode, as Mode.TRAINING, got {mode!r}")
    if device is not None and not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a string or a torch.device, got {device!r}")


def _device_type(device: str | torch.device) -> str:
    """The type of ``device``, one of those that the kernel has a build for and that is on this machine.

    Raises:
        ValueError: it is not.
    """
    kind = torch.device(device).type if device != "rocm" else "rocm"
    if kind not in DEVICES:
        raise ValueError(
            f"device must be one of {', '.join(DEVICES)}, got {kind}: give the one that the model will be on"
        )
    if kind in ("cuda", "rocm") and not torch.cuda.is_available():
        raise ValueError(f"device is {kind}, but torch finds no such GPU on this machine")
    return kind


def kernelize(model: nn.Module, mode: Mode | None, device: str | torch.device | None, layer: str | None) -> nn.Module:
    """Implements ``moe_fused.kernelize``."""
    _check(model, mode, device)
    if layer is not None and layer not in KERNEL_MAPPING:
        raise ValueError(f"layer must be one of {', '.join(KERNEL_MAPPING)}, got {layer!r}")
    restore_experts(model)
    selected, refused = _select(model, layer)
    reasons = [f"{cls} ({name}) keeps its own forward: {why}" for (cls, why), name in refused.items()]
    if not selected:
        looked_for = f"modules for the layer {layer}" if layer else "experts under Transformers' experts interface"
        got = "; ".join(reasons) or f"a {type(model).__name__} without"
        raise ValueError(f"model must have {looked_for} that the kernel serves, got {got}")
    if device is None:
        device = next(next(iter(selected)).parameters()).device
    kind = _device_type(device)
    classes = {type(module): chosen for module, chosen in selected.items()}
    with ExitStack() as stack:
        mapping = {
            stack.enter_context(_layer_name(cls, chosen)): KERNEL_MAPPING[chosen] for cls, chosen in classes.items()
        }
        stack.enter_context(kernels.use_kernel_mapping(mapping, inherit_mapping=False))
        kernels.kernelize(_Selection([*selected]), mode=mode or Mode.TRAINING, device=kind, use_fallback=False)
    for reason in reasons:
        warnings.warn(reason, stacklevel=3)
    return model
