"""The gates that kernels fuse, and their derivatives; ``..activations`` has the same formulas for torch.

A new activation is one branch in ``activate`` and one in ``activate_derivative``.
"""

import triton
import triton.language as tl


@triton.jit
def minimum(x, y):
    """The smaller one, NaN if one is: Triton's own default answers with the other."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(x, y):
    """The larger one, NaN if one is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, GATE: tl.constexpr):
    """The activation of ``..activations.ACTIVATIONS`` by name, fp32 in and out, but for ``swiglu_oai``, a function of
    two.
    """
    if GATE.ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif GATE.ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif GATE.ACTIVATION == "gelu_tanh":
        # tanh(u) = 2·sigmoid(2u) - 1
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif GATE.ACTIVATION == "relu":
        y = maximum(x, 0.0)
    else:
        tl.static_assert(GATE.ACTIVATION == "relu2", "activate has no branch for this activation")
        y = maximum(x, 0.0) * maximum(x, 0.0)
    return y


@triton.jit
def activate_derivative(x, GATE: tl.constexpr):
    """d activate / dx, fp32 in and out."""
    if GATE.ACTIVATION == "silu":
        s = tl.sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif GATE.ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif GATE.ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        d = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif GATE.ACTIVATION == "relu":
        d = tl.where(x > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(GATE.ACTIVATION == "relu2", "activate_derivative has no branch for this activation")
        d = 2.0 * maximum(x, 0.0)
    return d


@triton.jit
def apply_gate(gate, up, GATE: tl.constexpr):
    """h from the up projection's halves, fp32, by a ``GateLayout``; ``up`` is not read unless gated."""
    if not GATE.GATED:
        h = activate(gate, GATE)
    elif GATE.ACTIVATION == "swiglu_oai":
        g = minimum(gate, GATE.LIMIT)
        h = g * tl.sigmoid(GATE.ALPHA * g) * (minimum(maximum(up, -GATE.LIMIT), GATE.LIMIT) + 1.0)
    else:
        h = activate(gate, GATE) * up
    return h


@triton.jit
def apply_gate_backward(gate, up, grad_h, GATE: tl.constexpr):
    """(grad_gate, grad_up) from the gradient of h, fp32, by a ``GateLayout``; grad_up means nothing unless gated."""
    if not GATE.GATED:
        grad_gate = grad_h * activate_derivative(gate, GATE)
        grad_up = grad_gate
    elif GATE.ACTIVATION == "swiglu_oai":
        g = minimum(gate, GATE.LIMIT)
        u = minimum(maximum(up, -GATE.LIMIT), GATE.LIMIT)
        s = tl.sigmoid(GATE.ALPHA * g)
        grad_gate = tl.where(gate <= GATE.LIMIT, grad_h * (u + 1.0) * s * (1.0 + GATE.ALPHA * g * (1.0 - s)), 0.0)
        grad_up = tl.where(tl.abs(up) <= GATE.LIMIT, grad_h * g * s, 0.0)
    else:
        grad_gate = grad_h * up * activate_derivative(gate, GATE)
        grad_up = grad_h * activate(gate, GATE)
    return grad_gate, grad_up
