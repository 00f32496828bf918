"""Which modules of a model each layer of the kernel serves, and why it does not serve the others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_fused.hub import get_kernel, submodule
from moe_fused.integrations.transformers.experts_module import is_experts, is_under_interface, refusal
from moe_fused.integrations.transformers.forward import IMPLEMENTATION

from .mapping import EXPERTS, KERNEL_MAPPING, LORA_EXPERTS, LORA_WRAPPER, QWEN3_BLOCK, QWEN3_EXPERTS

_WRAPPERS = submodule(get_kernel(), "param_wrappers")
_has_own_forward: Callable[[nn.Module], bool] = _WRAPPERS.has_own_forward

QWEN3_MODULE = "transformers.models.qwen3_moe.modeling_qwen3_moe"


def _is_class(module: nn.Module, name: str) -> bool:
    return (type(module).__module__, type(module).__qualname__) == (QWEN3_MODULE, name)


def _wrapper_class(module: str) -> Any:
    """A class called ``ParamWrapper``, or an empty tuple as long as nobody has imported its module."""
    return getattr(sys.modules.get(module), "ParamWrapper", ())


def is_param_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is PEFT's layer around a parameter, be it PEFT's own or that of ``moe_fused``."""
    return isinstance(module, _wrapper_class("peft.tuners.lora.layer"))


def innermost(module: Any) -> Any:
    """What is inside all of PEFT's layers around a parameter."""
    while is_param_wrapper(module):
        module = module.base_layer
    return module


def layers_of(module: nn.Module) -> Iterator[str]:
    """Yields the names of the layers that could take the place of the forward of ``module``, the usual one first."""
    if is_experts(module):
        yield EXPERTS
        if _is_class(module, QWEN3_EXPERTS):
            yield QWEN3_EXPERTS
    elif is_param_wrapper(module):
        if is_experts(innermost(module)):
            ours = isinstance(module, _wrapper_class("moe_fused.integrations.peft.wrapper"))
            yield LORA_EXPERTS if ours else LORA_WRAPPER
    elif _is_class(module, QWEN3_BLOCK):
        yield QWEN3_BLOCK
    else:
        name = vars(type(module)).get("kernel_layer_name")  # a class that the user decorated
        if name in KERNEL_MAPPING:
            yield name


def _has_known_forward(module: nn.Module) -> bool:
    """Whether the forward of the class of ``module`` is the one that a layer can take the place of."""
    cls = type(module)
    if is_experts(module):
        return is_under_interface(cls)
    if is_param_wrapper(module):
        known = (_wrapper_class("peft.tuners.lora.layer"), _wrapper_class("moe_fused.integrations.peft.wrapper"))
        return any(getattr(owner, "forward", None) is cls.forward for owner in known)
    if _is_class(module, QWEN3_BLOCK):
        return (cls.forward.__module__, cls.forward.__qualname__) == (QWEN3_MODULE, f"{QWEN3_BLOCK}.forward")
    return True


def _experts_refusal(module: Any) -> str | None:
    """As the kernel's ``refusal``, and why a layer must not take precedence over the implementation of ``module``."""
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    function = None if chosen in (None, IMPLEMENTATION) else ALL_EXPERTS_FUNCTIONS.get(chosen)
    if function is None or function.__module__.startswith("transformers."):
        return refusal(module)
    return f"it is set to experts_implementation={chosen!r}, which is not one of Transformers'"


def refusal_of(module: nn.Module) -> str | None:
    """Why ``module`` keeps its own forward although a layer exists for it, or None if the layer can take its place."""
    if _has_own_forward(module):
        kind = type(vars(module)["forward"]).__name__
        reason = f"its forward is a {kind} of its own, as hooks of Accelerate and other libraries leave it"
        if hasattr(module, "_hf_hook"):  # as of from_pretrained with a device_map of several devices
            return f'{reason}. Call moe_fused.enable() and model.set_experts_implementation("{IMPLEMENTATION}") instead'
        return reason
    if not _has_known_forward(module):
        return "its class has a forward of its own"
    if is_experts(module):
        return _experts_refusal(module)
    if is_param_wrapper(module):
        layer: Any = module
        while is_param_wrapper(layer):
            if layer.parameter_name not in _WRAPPERS.ARGUMENTS:
                return f"it has adapters on {layer.parameter_name}, which PEFT merges on every pass"
            layer = layer.base_layer
        return _refusal_inside(layer)
    return _refusal_inside(innermost(module.experts)) if _is_class(module, QWEN3_BLOCK) else None


def _refusal_inside(experts: Any) -> str | None:
    """As ``refusal_of``, for what is around ``experts``."""
    if not is_experts(experts):
        return f"its experts are a {type(experts).__name__}"
    reason = _experts_refusal(experts)
    return None if reason is None else f"its experts cannot be served: {reason}"


def has_layer(module: nn.Module, layer: str) -> bool:
    """Whether ``layer`` is for modules such as ``module``."""
    return layer in layers_of(module)
