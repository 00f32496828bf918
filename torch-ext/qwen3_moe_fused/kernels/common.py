"""Device functions that several kernel families share."""

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
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of ``activations.ACTIVATIONS`` by name, fp32 in and out, but for ``swiglu_oai``, a function of two."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # tanh(u) = 2·sigmoid(2u) - 1
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        y = maximum(x, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        y = maximum(x, 0.0) * maximum(x, 0.0)
    return y


@triton.jit
def activate_derivative(x, ACTIVATION: tl.constexpr):
    """d activate / dx, fp32 in and out."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        d = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "relu":
        d = tl.where(x > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        d = 2.0 * maximum(x, 0.0)
    return d


@triton.jit
def apply_gate(gate, up, alpha, limit, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """h from the up projection's halves, fp32; ``up`` is not read unless GATED."""
    if not GATED:
        h = activate(gate, ACTIVATION)
    elif ACTIVATION == "swiglu_oai":
        g = minimum(gate, limit)
        h = g * tl.sigmoid(alpha * g) * (minimum(maximum(up, -limit), limit) + 1.0)
    else:
        h = activate(gate, ACTIVATION) * up
    return h


@triton.jit
def apply_gate_backward(gate, up, grad_h, alpha, limit, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """(grad_gate, grad_up) from the gradient of h, fp32; grad_up means nothing unless GATED."""
    if not GATED:
        grad_gate = grad_h * activate_derivative(gate, ACTIVATION)
        grad_up = grad_gate
    elif ACTIVATION == "swiglu_oai":
        g = minimum(gate, limit)
        u = minimum(maximum(up, -limit), limit)
        s = tl.sigmoid(alpha * g)
        grad_gate = tl.where(gate <= limit, grad_h * (u + 1.0) * s * (1.0 + alpha * g * (1.0 - s)), 0.0)
        grad_up = tl.where(tl.abs(up) <= limit, grad_h * g * s, 0.0)
    else:
        grad_gate = grad_h * up * activate_derivative(gate, ACTIVATION)
        grad_up = grad_h * activate(gate, ACTIVATION)
    return grad_gate, grad_up
