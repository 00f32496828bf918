"""Random tokens, routings and weights to time experts on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Layer

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Inputs:
    """One set of inputs of a layer, including the gradient of its output."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    grad_output: Tensor

    @classmethod
    def random(cls, layer: Layer, tokens: int, generator: torch.Generator) -> Inputs:
        """Makes normally distributed tokens, routed by random logits. The routing weights of a token sum to one."""
        device = generator.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

        weights, index = torch.topk(normal(tokens, layer.experts).softmax(-1), layer.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(DTYPE)
        x = normal(tokens, layer.hidden).to(DTYPE)
        return cls(x.requires_grad_(), index, weights.requires_grad_(), normal(tokens, layer.hidden).to(DTYPE))


def random_weights(layer: Layer, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Makes gate_up (E, 2·I, H) and down (E, H, I), normally distributed and scaled so that outputs stay near unit size."""

    def weight(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=generator.device, dtype=DTYPE)
        return values.mul_(shape[-1] ** -0.5)

    return (
        weight(layer.experts, 2 * layer.intermediate, layer.hidden),
        weight(layer.experts, layer.hidden, layer.intermediate),
    )
