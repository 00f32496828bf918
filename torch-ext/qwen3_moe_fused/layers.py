"""Pure layers for ``kernels.kernelize``: forwards that replace those of a model's own modules.

A layer has no state and no constructor; annotations name what it reads from the module it is put on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .experts import moe_experts
from .linear import moe_fused_linear
from .lora import LoraWeights
from .quantization import Packed4bitWeights

# Activation modules by class name, so that torch's own and Transformers' both count.
_ACTIVATION_OF_CLASS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
}


def activation_of(act_fn: Callable[[Tensor], Tensor]) -> str | None:
    """The name under which the kernels fuse ``act_fn``, a module or function, or None if they do not know it."""
    if act_fn is nn.functional.silu:
        return "silu"
    if isinstance(act_fn, nn.GELU):
        return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    return _ACTIVATION_OF_CLASS.get(type(act_fn).__name__)


def gated_activation(act_fn: Callable[[Tensor], Tensor]) -> str | Callable[[Tensor], Tensor]:
    """``act_fn`` as ``moe_experts`` takes it for concatenated gated experts: a name, or the gate as a function."""
    name = activation_of(act_fn)
    if name is not None:
        return name

    def gate(gate_up: Tensor) -> Tensor:
        g, u = gate_up.chunk(2, dim=-1)
        return act_fn(g) * u

    return gate


def gated_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What ``Qwen3MoeExperts`` computes, with the weights that ``experts`` owns, dense or packed.

    Packed weights compute in the dtype of their format, whatever that of ``hidden_states``, as 4-bit linear layers do.
    """
    gate_up_proj = Packed4bitWeights.of_module(experts, "gate_up_proj")
    down_proj = Packed4bitWeights.of_module(experts, "down_proj")
    dtype = hidden_states.dtype
    if isinstance(gate_up_proj, Packed4bitWeights) and not torch.is_autocast_enabled(hidden_states.device.type):
        hidden_states = hidden_states.to(gate_up_proj.dtype)
    activation = gated_activation(experts.act_fn)
    y = moe_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation=activation)
    return y if y.dtype == dtype else y.to(dtype)


class Qwen3MoeExperts(nn.Module):
    """The forward of Transformers' ``Qwen3MoeExperts``."""

    has_backward = True
    can_torch_compile = True

    gate_up_proj: Tensor
    down_proj: Tensor
    act_fn: nn.Module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return gated_experts(self, hidden_states, top_k_index, top_k_weights)


class Qwen3MoeSparseMoeBlock(nn.Module):
    """The forward of Transformers' ``Qwen3MoeSparseMoeBlock``; calls ``self.gate``, whose hook records the router logits."""

    has_backward = True
    can_torch_compile = True

    gate: nn.Module
    experts: Any

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        tokens = hidden_states.view(-1, hidden_dim)
        _, top_k_weights, top_k_index = self.gate(tokens)
        if hasattr(self.experts, "base_layer"):  # PEFT's layer around them, which knows their adapters
            y = self.experts(tokens, top_k_index, top_k_weights)
        else:
            y = gated_experts(self.experts, tokens, top_k_index, top_k_weights)
        return y.view(batch_size, sequence_length, hidden_dim)


class MoeFusedLinear(nn.Module):
    """A grouped linear layer with a ``weight`` (E, out, in): ``moe_fused_linear`` as a module's forward."""

    has_backward = True
    can_torch_compile = True

    weight: Tensor

    def forward(self, input: Tensor, m_sizes: Tensor) -> Tensor:
        return moe_fused_linear(input, Packed4bitWeights.of_module(self, "weight"), m_sizes)


def _active_loras(layer: Any) -> list[LoraWeights]:
    """The adapters that count in a layer with the attributes of a PEFT LoRA layer."""
    if layer.disable_adapters or layer.merged:
        return []
    loras = []
    for name in layer.active_adapters:
        if name in layer.lora_A:
            # PEFT has an Identity in place of a dropout of zero.
            dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
            weights = (layer.lora_A[name].weight, layer.lora_B[name].weight)
            loras.append(LoraWeights(*weights, layer.scaling[name], dropout))
    return loras


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
        weight = Packed4bitWeights.of_module(self.base_layer, "weight")
        return moe_fused_linear(input, weight, m_sizes, lora=_active_loras(self))
