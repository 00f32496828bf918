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


class Qwen3MoeExperts(nn.Module):
    """The forward of Transformers' ``Qwen3MoeExperts``."""

    has_backward = True
    can_torch_compile = True

    gate_up_proj: Tensor
    down_proj: Tensor
    act_fn: nn.Module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return moe_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            self.down_proj,
            activation=gated_activation(self.act_fn),
        )


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
        y = moe_experts(
            tokens,
            top_k_index,
            top_k_weights,
            self.experts.gate_up_proj,
            self.experts.down_proj,
            activation=gated_activation(self.experts.act_fn),
        )
        return y.view(batch_size, sequence_length, hidden_dim)


class MoeFusedLinear(nn.Module):
    """A grouped linear layer with a ``weight`` (E, out, in): ``moe_fused_linear`` as a module's forward."""

    has_backward = True
    can_torch_compile = True

    weight: Tensor

    def forward(self, input: Tensor, m_sizes: Tensor) -> Tensor:
        return moe_fused_linear(input, self.weight, m_sizes)
