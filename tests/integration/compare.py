"""Comparisons of a model with itself under another experts implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Pass(NamedTuple):
    """Logits, and the gradient of every parameter by name, of one forward and backward pass."""

    logits: Tensor
    gradients: dict[str, Tensor]


def forward_backward(model: torch.nn.Module, ids: Tensor) -> Pass:
    """One pass with a loss to which every logit counts."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids.to(next(model.parameters()).device)).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape).to(logits)
    (logits * weights).sum().backward()
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return Pass(logits.detach(), gradients)


def under(model: PreTrainedModel, implementation: str, ids: Tensor) -> Pass:
    model.set_experts_implementation(implementation)
    return forward_backward(model, ids)


def assert_as_good(
    ours: Tensor, theirs: Tensor, truth: Tensor, name: str = "", computed_in: torch.dtype | None = None
) -> None:
    """``ours`` is at most twice as far from ``truth`` as ``theirs``, or within 4 ulp of the largest element.

    The latter because the better of two roundings may happen to be exact.

    Args:
        computed_in: whose ulp counts, where that is not the tensors' own dtype: the gradients of fp32 parameters have no
            more digits than the bf16 activations they come from.
    """
    assert ours.dtype == theirs.dtype, name
    scale = truth.abs().max().item()
    error = (ours.to(truth) - truth).abs().max().item()
    eps = torch.finfo(computed_in or ours.dtype).eps
    allowed = 2 * (theirs.to(truth) - truth).abs().max().item() + 4 * eps * scale
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, scale {scale:.2e}"


def assert_passes_as_good(ours: Pass, theirs: Pass, truth: Pass, computed_in: torch.dtype | None = None) -> None:
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert_as_good(ours.logits, theirs.logits, truth.logits, "logits", computed_in)
    for name, gradient in ours.gradients.items():
        assert_as_good(gradient, theirs.gradients[name], truth.gradients[name], name, computed_in)


def assert_near(ours: Pass, theirs: Pass, tolerance: float) -> None:
    """All tensors agree within ``tolerance``, relative in the Frobenius norm."""
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, a, b in (
        ("logits", ours.logits, theirs.logits),
        *((name, gradient, theirs.gradients[name]) for name, gradient in ours.gradients.items()),
    ):
        difference = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
        assert difference <= tolerance, f"{name}: relative difference {difference:.2e}, allowed {tolerance:.0e}"
