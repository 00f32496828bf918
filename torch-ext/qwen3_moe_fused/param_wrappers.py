"""PEFT's layers around experts modules: LoRA of single parameters, handed to the kernel instead of merged on every pass.

PEFT puts a layer around a module for each adapted parameter, so experts with two adapted stacks have two layers around them.
A layer names its parameter and holds factors by the names of adapters: ``lora_A`` (E·r, in) with the expert slowest,
``lora_B`` (out, r·E) with the expert fastest. This file needs no PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor

from .experts_module import compute_experts, is_under_interface, read_experts
from .lora import LoraWeights
from .ops._torch_compat import global_hooks_are_active

# For each parameter, the argument of ``compute_experts`` that takes its adapters.
ARGUMENTS = {"gate_up_proj": "gate_up_lora", "up_proj": "gate_up_lora", "down_proj": "down_lora"}

_LAYERS = f"{__name__.rpartition('.')[0]}.layers"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Returns A (E, r, in), or (E, 2r, in) if gate and up have separate factors, and B (E, out, r)."""
    a, b, experts = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.num_experts
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)


def active_loras(layer: Any, factors: Callable[[Any, str], tuple[Tensor, Tensor]] = factors) -> list[LoraWeights]:
    """Returns the adapters of ``layer`` that are active on this pass, by the factors that ``factors`` reads."""
    if layer.disable_adapters or layer.merged:
        return []
    loras = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b = factors(layer, name)
        scaling = layer.scaling[name]
        if isinstance(scaling, Tensor):  # multiplied in, so that swapping adapters needs no new compilation
            b, scaling = b * scaling, 1.0
        # PEFT has an Identity in place of a dropout of zero.
        dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
        loras.append(LoraWeights(a, b, scaling, dropout))
    return loras


def is_kernelized(module: Any, attribute: str = "forward") -> bool:
    """Whether a layer of this kernel has taken the place of the forward of ``module``.

    Args:
        attribute: where the forward is. Accelerate's hooks put one of their own there and call what was there before, which
            they keep in ``"_old_forward"``.
    """
    forward = vars(module).get(attribute)
    return isinstance(forward, MethodType) and forward.__func__.__module__ == _LAYERS


def has_own_forward(module: Any) -> bool:
    """Whether ``module`` has a forward that is neither that of its class nor a layer of this kernel."""
    forward = vars(module).get("forward")
    if forward is None or is_kernelized(module):
        return False
    # kernels.kernelize gives a module the forward of its class where it has no layer for it.
    return not isinstance(forward, MethodType) or forward.__func__ is not type(module).forward


def is_bare(module: Any) -> bool:
    """Whether a call of ``module`` runs the forward of its class or a layer of this kernel, and no hook."""
    for name in _HOOKS:
        if len(getattr(module, name)) > 0:
            return False
    return not global_hooks_are_active() and not has_own_forward(module)


def is_wrapper(module: Any) -> bool:
    """Whether ``module`` is PEFT's layer around a parameter, not a layer of another kind."""
    return hasattr(module, "parameter_name") and hasattr(module, "lora_A")


def adapted_experts(
    layer: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_lora: Any = (),
    down_lora: Any = (),
) -> Tensor | None:
    """The output of the experts inside ``layer`` with all active adapters around them, like hidden_states (…, H).

    Args:
        layer: the outermost layer of PEFT around an experts module.
        hidden_states, top_k_index, top_k_weights: as for ``experts_forward``.
        gate_up_lora, down_lora: further adapters.

    Returns:
        None if the kernel cannot do what a call of ``layer`` does: something inside has hooks, adapters are to be unmerged,
        another parameter is adapted, or the experts are such that ``experts_forward`` refuses them.
    """
    loras: dict[str, Any] = {"gate_up_lora": [*gate_up_lora], "down_lora": [*down_lora]}
    wrapper = layer
    while is_wrapper(wrapper):
        if wrapper.parameter_name not in ARGUMENTS or (wrapper.disable_adapters and wrapper.merged):
            return None
        if wrapper is not layer and not is_bare(wrapper):
            return None
        loras[ARGUMENTS[wrapper.parameter_name]].extend(active_loras(wrapper))
        wrapper = wrapper.base_layer
    if not is_bare(wrapper) or not is_under_interface(type(wrapper)):
        return None
    weights = read_experts(wrapper)
    if isinstance(weights, str):
        return None
    return compute_experts(weights, hidden_states, top_k_index, top_k_weights, **loras)
