"""Launches of ``kernels.decode``: the expert MLP of a few slots."""

from __future__ import annotations

import functools

from torch import Tensor

from ..activations import Gate
from ..kernels import decode as decode_kernels
from ..plan import Plan
from .operands import cdiv, device_index, gate_constants, on_device, power_of_2, stride_constants

# Slots up to which ``decode`` serves a call without gradients.
DECODE_SLOTS = 64
# Output features a program of the decode kernels.
DECODE_BLOCK_N = 8


def use_decode(num_tokens: int, top_k: int, down: Tensor) -> bool:
    """``reference.use_decode``: with few slots sorting costs more launches than sharing weights saves bytes."""
    return 0 < num_tokens * top_k <= DECODE_SLOTS and down.numel() > 0


@functools.cache
def _decode_plans(
    up_shape: tuple[int, int, int],
    up_strides: tuple[int, int, int],
    down_strides: tuple[int, int, int],
    top_k: int,
    gate: Gate,
    up_bias: bool,
    down_bias: bool,
) -> tuple[Plan, Plan]:
    num_experts, columns, hidden = up_shape
    intermediate = gate.intermediate(columns)
    up = {
        "NUM_EXPERTS": num_experts,
        **stride_constants(up_strides),
        "H": hidden,
        **gate_constants(gate, intermediate),
        "TOP_K": top_k,
        "HAS_BIAS": up_bias,
        "BLOCK_N": DECODE_BLOCK_N,
        "BLOCK_K": min(512, power_of_2(hidden)),
    }
    down = {
        "NUM_EXPERTS": num_experts,
        **stride_constants(down_strides),
        "H": hidden,
        "I": intermediate,
        "TOP_K": top_k,
        "HAS_BIAS": down_bias,
        "BLOCK_N": DECODE_BLOCK_N,
        "BLOCK_K": min(1024, power_of_2(intermediate)),
    }
    return Plan(decode_kernels.decode_up_kernel, up), Plan(decode_kernels.decode_down_kernel, down)


@on_device
def decode(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate: Gate,
) -> Tensor:
    """The expert MLP for a few slots, without gradients.

    Args:
        x: (T, H). top_k_index, top_k_weights: (T, top_k).
        up: (E, 2·I or I, H), up_bias: (E, 2·I or I) or None. down: (E, H, I), down_bias: (E, H) or None.

    Returns:
        (T, H) in the dtype of x.
    """
    num_tokens, top_k = top_k_index.shape
    _, hidden, intermediate = down.shape
    x, ids, device = x.contiguous(), top_k_index.contiguous(), device_index(x)
    h = x.new_empty((num_tokens * top_k, intermediate))
    y = x.new_empty((num_tokens, hidden))
    up_plan, down_plan = _decode_plans(
        up.shape, up.stride(), down.stride(), top_k, gate, up_bias is not None, down_bias is not None
    )
    up_plan(
        device,
        (num_tokens * top_k, cdiv(intermediate, DECODE_BLOCK_N), 1),
        x,
        ids,
        up,
        h if up_bias is None else up_bias.contiguous(),
        h,
    )
    down_plan(
        device,
        (num_tokens, cdiv(hidden, DECODE_BLOCK_N), 1),
        h,
        ids,
        top_k_weights.contiguous(),
        down,
        y if down_bias is None else down_bias.contiguous(),
        y,
    )
    return y
