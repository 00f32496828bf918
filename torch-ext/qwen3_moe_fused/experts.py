"""``moe_experts``: the whole expert MLP.

For an activation that the kernels know, the MLP is one operator with a backward and a memory plan (``ops.experts``). A gate
function of the caller's, or dropout of an adapter, runs between two grouped linear layers, each stage with its own autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import checks, lora
from .activations import ACTIVATIONS, Gate, apply_gate
from .linear import adapted_linear, autocast_dtype
from .lora import Loras, LoraWeights
from .ops.arguments import StackArguments
from .ops.autograd import wants_gradient
from .ops.experts import Experts, ExpertsForward, fused_experts
from .ops.linear import Rows
from .ops.permute import CombineArguments, DispatchArguments, RouteArguments, Slots, combine, dispatch, routing_buffer
from .packed import Packed4bitWeights
from .weights import any_packed, check, operands


def _composed_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor | Packed4bitWeights,
    down_proj: Tensor | Packed4bitWeights,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    up_loras: list[LoraWeights],
    down_loras: list[LoraWeights],
    gate_fn: Callable[[Tensor], Tensor],
    transposed: bool,
) -> Tensor:
    """The experts as a chain of operators, each with its autograd, around a gate function or with dropout of adapters."""
    num_experts, top_k = gate_up_proj.shape[0], top_k_index.shape[1]
    intermediate = down_proj.shape[1 if transposed else 2]
    packed = any_packed(gate_up_proj, down_proj)
    buffer = routing_buffer(RouteArguments(top_k_index, num_experts, gate_up_proj.dtype, packed))
    slots = Slots(buffer, num_experts, top_k)
    rows = dispatch(DispatchArguments(hidden_states, slots))
    layer_rows = Rows(buffer, False, packed, top_k, 0.0)
    gate_up = adapted_linear(rows, gate_up_proj, gate_up_bias, layer_rows, up_loras, transposed)
    h = gate_fn(gate_up)
    if h.shape != (rows.shape[0], intermediate):
        raise ValueError(
            f"activation must map {tuple(gate_up.shape)} to {(rows.shape[0], intermediate)}, it gave {tuple(h.shape)}"
        )
    z = adapted_linear(h.to(down_proj.dtype), down_proj, down_bias, layer_rows, down_loras, transposed)
    return combine(CombineArguments(z, top_k_weights, slots))


def _check(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor | Packed4bitWeights,
    down_proj: Tensor | Packed4bitWeights,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str | Callable[[Tensor], Tensor],
    gated: bool,
    transposed: bool,
) -> None:
    """Raises TypeError or ValueError unless the arguments of ``moe_experts`` fit each other; dtypes are checked later."""
    checks.tensor("hidden_states", hidden_states, ("T", "H"))
    num_tokens, hidden = hidden_states.shape
    checks.tensor("top_k_index", top_k_index, (num_tokens, "top_k"))
    checks.tensor("top_k_weights", top_k_weights, (num_tokens, top_k_index.shape[1]))
    columns = "2*I" if gated else "I"
    check("gate_up_proj", gate_up_proj, ("E", hidden, columns) if transposed else ("E", columns, hidden))
    num_experts, size = gate_up_proj.shape[0], gate_up_proj.shape[2 if transposed else 1]
    if gated and size % 2:
        raise ValueError(f"gate_up_proj must have an even number of gate and up features, got {size}")
    intermediate = size // 2 if gated else size
    down_shape = (num_experts, intermediate, hidden) if transposed else (num_experts, hidden, intermediate)
    check("down_proj", down_proj, down_shape)
    tensors: dict[str, Any] = {"top_k_weights": top_k_weights, "gate_up_proj": gate_up_proj, "down_proj": down_proj}
    if gate_up_bias is not None:
        tensors["gate_up_bias"] = checks.tensor("gate_up_bias", gate_up_bias, (num_experts, size))
    if down_bias is not None:
        tensors["down_bias"] = checks.tensor("down_bias", down_bias, (num_experts, hidden))
    checks.dtype("top_k_index", top_k_index, checks.INDEX_DTYPES)
    checks.device("top_k_index", top_k_index, "hidden_states", hidden_states)
    for name, value in tensors.items():
        checks.dtype(name, value, checks.FLOAT_DTYPES)
        checks.device(name, value, "hidden_states", hidden_states)
    if top_k_index.shape[1] == 0:
        raise ValueError(
            "top_k_index must have at least one expert per token, got shape " + str(tuple(top_k_index.shape))
        )
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be a callable or one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if activation == "swiglu_oai" and not gated:
            raise ValueError("activation 'swiglu_oai' needs gated experts, got gated=False")
    elif not callable(activation):
        raise TypeError(f"activation must be a name or a callable, got {type(activation).__name__}")
    checks.expert_ids(top_k_index, num_experts)


def moe_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor | Packed4bitWeights,
    down_proj: Tensor | Packed4bitWeights,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    swiglu_alpha: float = 1.702,
    swiglu_limit: float = 7.0,
    gate_up_lora: Loras = None,
    down_lora: Loras = None,
    recompute: bool = False,
) -> Tensor:
    """The experts of a mixture-of-experts layer.

    ``y[t] = Σ_k top_k_weights[t, k] · down[e](gate(up[e](x[t])))`` with ``e = top_k_index[t, k]``; the arguments of
    Transformers' experts modules, computed as SwiGLU (arXiv:2002.05202) by default. Differentiable in everything that is
    not an index; only gradients asked for are computed. Deterministic: no atomics. Computes in the dtype of the weights (of
    autocast, where it is on), accumulating in fp32, and never waits for the GPU. Packed weights are frozen.
    They are dequantized inside the products or into a workspace of some 256 MiB, whichever is faster.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, top_k) any integer dtype. An id outside [0, E) means the expert is not held here: the slot
            contributes zero and gets zero gradients. ``MOE_FUSED_CHECK=1`` makes ids outside [0, E] an error.
        top_k_weights: (T, top_k), any floating dtype.
        gate_up_proj: (E, 2·I, H); (E, I, H) when not gated; the last two swapped when ``transposed``. Dense or packed, as
            is down_proj.
        down_proj: (E, H, I); (E, I, H) when ``transposed``.
        gate_up_bias: (E, 2·I or I), optional.
        down_bias: (E, H), optional.
        activation: one of ``silu``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu2``, ``swiglu_oai``, or a function from the up
            projection's output (S, 2·I or I), columns as in the weights, to (S, I), row by row.
        gated: the up projection makes gate and up features; otherwise h = activation(up).
        interleaved: gate and up features alternate instead of standing side by side.
        transposed: weights are stored (E, in, out).
        swiglu_alpha, swiglu_limit: of ``swiglu_oai``.
        gate_up_lora, down_lora: an adapter of either projection, (E, out, in) whether or not ``transposed``, or several that
            all count. No product with weights merged, and no gradient of weights, is ever formed for them.
        recompute: backward computes the up projection again instead of keeping its output, (T·top_k, 2·I); all of the
            experts where a caller's activation or an adapter's dropout runs between them.

    Returns:
        (T, H) in the dtype of hidden_states.

    Raises:
        TypeError: not a tensor, or of a dtype that does not fit.
        ValueError: a shape, device or option that does not fit.
        RuntimeError: a GPU or Triton version that is not supported.
    """
    biases = (gate_up_bias, down_bias)
    _check(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, *biases, activation, gated, transposed)
    out_dtype = hidden_states.dtype
    dtype = autocast_dtype(hidden_states.device)
    if dtype is None:
        dtype = gate_up_proj.dtype
        checks.dtype("hidden_states", hidden_states, (dtype,), " like gate_up_proj")
        checks.dtype("down_proj", down_proj, (dtype,), " like gate_up_proj")
        for name, bias in zip(("gate_up_bias", "down_bias"), biases, strict=True):
            if bias is not None:
                checks.dtype(name, bias, (dtype,), " like gate_up_proj")
    else:
        checks.dtype("hidden_states", hidden_states, checks.FLOAT_DTYPES)
        hidden_states = hidden_states.to(dtype)
        gate_up_proj, down_proj = gate_up_proj.to(dtype=dtype), down_proj.to(dtype=dtype)
        biases = tuple(None if bias is None else bias.to(dtype) for bias in biases)  # type: ignore[assignment]
    checks.number("swiglu_alpha", swiglu_alpha)
    checks.number("swiglu_limit", swiglu_limit)
    like = ("hidden_states", hidden_states)
    halves = gated and not interleaved
    up_loras = lora.check("gate_up_lora", gate_up_lora, gate_up_proj, *like, transposed=transposed, halves=halves)
    down_loras = lora.check("down_lora", down_lora, down_proj, *like, transposed=transposed)
    if callable(activation):
        gate_fn: Callable[[Tensor], Tensor] | None = activation
    else:
        gate = Gate(activation, gated, interleaved, swiglu_alpha, swiglu_limit)
        dropout = any(adapter.dropout for adapter in up_loras + down_loras)
        gate_fn = functools.partial(apply_gate, gate=gate) if dropout else None
    if gate_fn is not None:
        composed: Callable[..., Tensor] = _composed_experts
        if recompute and torch.is_grad_enabled():
            composed = functools.partial(checkpoint, _composed_experts, use_reentrant=False)
        inputs = (hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
        y = composed(*inputs, *biases, up_loras, down_loras, gate_fn, transposed)
    else:
        up, down = (StackArguments(*operands(weights), transposed) for weights in (gate_up_proj, down_proj))
        adapters = (lora.fused(up_loras), lora.fused(down_loras))
        experts = Experts(hidden_states, top_k_weights, up, down, *biases, *adapters, gate, recompute)
        y = fused_experts(ExpertsForward(experts, top_k_index, wants_gradient(experts)))
    return y if y.dtype == out_dtype else y.to(out_dtype)
