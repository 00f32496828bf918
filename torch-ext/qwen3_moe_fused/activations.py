"""The activations the kernels fuse, and what the up projection's output means.

The output of the up projection, *gate_up*, has 2·I columns when the experts are gated and I when they are not. Gate and
up columns stand side by side ([gate | up], Transformers' "concatenated") or alternate (gate0, up0, gate1, … "interleaved").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SQRT_HALF = math.sqrt(0.5)
SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
GELU_CUBIC = 0.044715


class Activation(NamedTuple):
    """A function of one value, and its derivative.

    Attributes:
        value: x to y, elementwise.
        derivative: x to dy/dx, elementwise.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_derivative(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * SQRT_HALF)) + x * torch.exp(-0.5 * x * x) * INV_SQRT_2PI


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(SQRT_2_OVER_PI * (x + GELU_CUBIC * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * x * x)


# The activations of one value; x is the gate when the experts are gated, else the up projection itself.
OF_ONE_VALUE = {
    # x·sigmoid(x)
    "silu": Activation(torch.nn.functional.silu, _silu_derivative),
    # x·Φ(x), by erf
    "gelu": Activation(torch.nn.functional.gelu, _gelu_derivative),
    # Hendrycks & Gimpel's tanh approximation of gelu (arXiv:1606.08415)
    "gelu_tanh": Activation(functools.partial(torch.nn.functional.gelu, approximate="tanh"), _gelu_tanh_derivative),
    # max(x, 0)
    "relu": Activation(torch.relu, lambda x: (x > 0).to(x.dtype)),
    # max(x, 0)²
    "relu2": Activation(lambda x: torch.relu(x).square(), lambda x: 2 * torch.relu(x)),
}
# All that the kernels fuse. swiglu_oai, of gpt-oss, is a function of gate and up:
# min(gate, limit)·sigmoid(alpha·gate)·(clamp(up, ±limit) + 1).
ACTIVATIONS = (*OF_ONE_VALUE, "swiglu_oai")


def of_one_value(name: str) -> Activation:
    """The activation of that name.

    Raises:
        ValueError: there is none of one value; says which there are.
    """
    activation = OF_ONE_VALUE.get(name)
    if activation is None:
        raise ValueError(f"activation must be one of {', '.join(OF_ONE_VALUE)}, got {name!r}")
    return activation


class Gate(NamedTuple):
    """How gate_up becomes h.

    Attributes:
        activation: one of ``ACTIVATIONS``.
        gated: gate_up holds gate and up columns; h = act(gate)·up. Otherwise h = act(gate_up).
        interleaved: gate and up columns alternate.
        alpha, limit: of ``swiglu_oai``.
    """

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0

    def columns(self, intermediate: int) -> int:
        """Columns of gate_up for I = ``intermediate``."""
        return 2 * intermediate if self.gated else intermediate

    def intermediate(self, columns: int) -> int:
        """I of a gate_up of ``columns`` columns."""
        return columns // 2 if self.gated else columns

    def column_layout(self, intermediate: int) -> tuple[int, int]:
        """(column stride, offset of the up columns) of gate_up for I = ``intermediate``."""
        return (2, 1) if self.interleaved else (1, intermediate if self.gated else 0)


def _split(gate_up: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """The gate and up columns of gate_up (…, 2·I) as views (…, I)."""
    if gate.interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    half = gate_up.shape[-1] // 2
    return gate_up[..., :half], gate_up[..., half:]


def apply_gate(gate_up: Tensor, gate: Gate) -> Tensor:
    """h (…, I) from gate_up (…, 2·I or I), in the dtype of gate_up."""
    if not gate.gated:
        return of_one_value(gate.activation).value(gate_up)
    g, u = _split(gate_up, gate)
    if gate.activation == "swiglu_oai":
        g = g.clamp(max=gate.limit)
        return g * torch.sigmoid(gate.alpha * g) * (u.clamp(-gate.limit, gate.limit) + 1)
    return of_one_value(gate.activation).value(g) * u


def apply_gate_backward(gate_up: Tensor, grad_h: Tensor, gate: Gate) -> Tensor:
    """The gradient of gate_up (…, 2·I or I), in its column layout, from the gradient of h (…, I)."""
    if not gate.gated:
        return grad_h * of_one_value(gate.activation).derivative(gate_up)
    g, u = _split(gate_up, gate)
    grad = torch.empty_like(gate_up)
    grad_g, grad_u = _split(grad, gate)
    if gate.activation == "swiglu_oai":
        gc, uc = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
        s = torch.sigmoid(gate.alpha * gc)
        grad_g.copy_(grad_h * (uc + 1) * s * (1 + gate.alpha * gc * (1 - s)) * (g <= gate.limit))
        grad_u.copy_(grad_h * gc * s * (u.abs() <= gate.limit))
    else:
        activation = of_one_value(gate.activation)
        grad_g.copy_(grad_h * u * activation.derivative(g))
        grad_u.copy_(grad_h * activation.value(g))
    return grad
