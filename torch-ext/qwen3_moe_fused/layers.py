"""Pure layers for ``kernels.kernelize``: forwards that replace those of a model's modules.

A layer has no state and no constructor; annotations name what it reads from the module it is put on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .experts_module import activation_of, compute_experts, is_under_interface, read_experts
from .linear import moe_fused_linear
from .modules import weights_of
from .param_wrappers import active_loras, adapted_experts, is_bare

__all__ = [
    "LoraMoeExperts",
    "LoraMoeFusedLinear",
    "LoraParamWrapper",
    "MoeExperts",
    "MoeFusedLinear",
    "Qwen3MoeExperts",
    "Qwen3MoeSparseMoeBlock",
    "activation_of",
]


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    weights = read_experts(module)
    if isinstance(weights, str):
        y: Tensor = type(module).forward(module, hidden_states, top_k_index, top_k_weights)
        return y
    return compute_experts(weights, hidden_states, top_k_index, top_k_weights)


class MoeExperts(nn.Module):
    """The forward of every experts class under Transformers' ``use_experts_implementation`` (see ``experts_forward``).

    A module that the kernel cannot compute, such as one that has got another parameter, runs the forward of its class.
    """

    has_backward = True
    can_torch_compile = True

    gate_up_proj: Tensor
    down_proj: Tensor
    act_fn: nn.Module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _experts(self, hidden_states, top_k_index, top_k_weights)


class Qwen3MoeExperts(nn.Module):
    """As ``MoeExperts``, under the name of Qwen3-MoE's own class."""

    has_backward = True
    can_torch_compile = True

    gate_up_proj: Tensor
    down_proj: Tensor
    act_fn: nn.Module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _experts(self, hidden_states, top_k_index, top_k_weights)


class Qwen3MoeSparseMoeBlock(nn.Module):
    """The forward of Transformers' ``Qwen3MoeSparseMoeBlock``; calls ``self.gate``, whose hook records the router logits.

    Experts that the kernel cannot compute, and those that something wraps or hooks, such as PEFT's adapters, are called as
    the modules that they are.
    """

    has_backward = True
    can_torch_compile = True

    gate: nn.Module
    experts: Any

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        tokens = hidden_states.view(-1, hidden_dim)
        _, top_k_weights, top_k_index = self.gate(tokens)
        experts = self.experts
        weights = read_experts(experts) if is_under_interface(type(experts)) and is_bare(experts) else ""
        if isinstance(weights, str):
            y = experts(tokens, top_k_index, top_k_weights)
        else:
            y = compute_experts(weights, tokens, top_k_index, top_k_weights)
        return y.view(batch_size, sequence_length, hidden_dim)


class LoraMoeExperts(nn.Module):
    """The forward of the layer that ``moe_fused`` puts around experts in PEFT: adapters go into the kernel.

    ``base_layer`` is the experts module, or the layer of its other adapted parameter. What the kernel cannot do runs the
    forward of the layer's own class, which knows every case.
    """

    has_backward = True
    can_torch_compile = True

    base_layer: Any
    parameter_name: str
    num_experts: int
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        gate_up_lora: Any = (),
        down_lora: Any = (),
        adapter_names: list[str] | None = None,
    ) -> Tensor:
        arguments = (hidden_states, top_k_index, top_k_weights, gate_up_lora, down_lora)
        y = None if adapter_names else adapted_experts(self, *arguments)
        if y is None:
            y = type(self).forward(self, *arguments, adapter_names)
        return y


class LoraParamWrapper(nn.Module):
    """The forward of PEFT's own ``lora.ParamWrapper`` around experts; otherwise as ``LoraMoeExperts``."""

    has_backward = True
    can_torch_compile = True

    base_layer: Any
    parameter_name: str
    num_experts: int
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = None
        if len(args) == 2 and not kwargs:
            y = adapted_experts(self, x, *args)
        if y is None:
            y = type(self).forward(self, x, *args, **kwargs)
        return y


class MoeFusedLinear(nn.Module):
    """A grouped linear layer with a ``weight`` (E, out, in): ``moe_fused_linear`` as a module's forward."""

    has_backward = True
    can_torch_compile = True

    weight: Tensor

    def forward(self, input: Tensor, m_sizes: Tensor) -> Tensor:
        return moe_fused_linear(input, weights_of(self, "weight"), m_sizes)


def _linear_factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r), which a grouped linear layer holds as they are."""
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


class LoraMoeFusedLinear(nn.Module):
    """A grouped linear layer under LoRA adapters, as PEFT holds them: ``base_layer.weight`` (E, out, in), and by the name of
    an adapter ``lora_A[name].weight`` (E, r, in), ``lora_B[name].weight`` (E, out, r) and ``scaling[name]``.
    """

    has_backward = True
    can_torch_compile = True

    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def forward(self, input: Tensor, m_sizes: Tensor) -> Tensor:
        weight = weights_of(self.base_layer, "weight")
        return moe_fused_linear(input, weight, m_sizes, lora=active_loras(self, _linear_factors))
