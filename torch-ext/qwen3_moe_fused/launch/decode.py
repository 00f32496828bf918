"""Launches of ``kernels.decode`` and ``kernels.packed_decode``: the expert MLP of a few slots."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..activations import Gate
from ..kernels import decode as decode_kernels
from ..kernels import packed_decode as packed_kernels
from ..plan import Plan
from ..quantization import Format4bit
from ..weights import PackedStack, Stack
from .operands import cdiv, gate_constants, power_of_2, stride_constants
from .packed import decodes, ptx, storage_constants, storage_operands

# Slots up to which ``decode`` serves a call without gradients, in two launches instead of five. In a CUDA graph, where
# launches cost nothing, products over packed weights are faster from 4 tokens on (on an H100, of a Qwen3-30B-A3B layer, 73
# against 82 µs, 8 tokens 112 against 149), but a call must not depend on being captured: nobody has compiled what it takes.
DECODE_SLOTS = 64
# Output features a program of the decode kernels.
DECODE_BLOCK_N = 8


def use_decode(num_tokens: int, top_k: int, up: Stack, down: Stack) -> bool:
    """``reference.use_decode``: with few slots sorting costs more launches than sharing weights saves bytes."""
    num_slots = num_tokens * top_k
    if not 0 < num_slots <= DECODE_SLOTS or down.numel() == 0:
        return False
    packed = [stack for stack in (up, down) if isinstance(stack, PackedStack)]
    readable = (not own.transposed and decodes("gemm_4bit", own, num_slots, own.weights.packed) for own in packed)
    return len(packed) != 1 and all(readable)


def _shared_constants(
    num_experts: int, hidden: int, intermediate: int, top_k: int, gate: Gate, up_bias: bool, down_bias: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernels of both projections want to know of a layer, however its weights are stored."""
    common = {"NUM_EXPERTS": num_experts, "H": hidden, "TOP_K": top_k}
    return (
        {**common, **gate_constants(gate, intermediate), "HAS_BIAS": up_bias},
        {**common, "I": intermediate, "HAS_BIAS": down_bias},
    )


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
    up, down = _shared_constants(num_experts, hidden, intermediate, top_k, gate, up_bias, down_bias)
    up |= stride_constants(up_strides)
    up |= {"BLOCK_N": DECODE_BLOCK_N, "BLOCK_K": min(512, power_of_2(hidden))}
    down |= stride_constants(down_strides)
    down |= {"BLOCK_N": DECODE_BLOCK_N, "BLOCK_K": min(1024, power_of_2(intermediate))}
    return Plan(decode_kernels.decode_up_kernel, up), Plan(decode_kernels.decode_down_kernel, down)


@functools.cache
def _packed_plans(
    up_format: Format4bit,
    down_format: Format4bit,
    top_k: int,
    gate: Gate,
    up_ptx: str,
    down_ptx: str,
    up_bias: bool,
    down_bias: bool,
) -> tuple[Plan, Plan]:
    num_experts, hidden, intermediate = down_format.shape
    up, down = _shared_constants(num_experts, hidden, intermediate, top_k, gate, up_bias, down_bias)
    up |= {**storage_constants(up_format), "PTX": up_ptx, "BLOCK_K": min(2048, power_of_2(hidden))}
    down |= {**storage_constants(down_format), "PTX": down_ptx, "BLOCK_K": min(256, power_of_2(intermediate))}
    up["BLOCK_N"] = down["BLOCK_N"] = DECODE_BLOCK_N
    return (
        Plan(packed_kernels.packed_decode_up_kernel, up, fp_fusion=False),
        Plan(packed_kernels.packed_decode_down_kernel, down, fp_fusion=False),
    )


def decode(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Stack,
    down: Stack,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate: Gate,
) -> Tensor:
    """The expert MLP for a few slots, without gradients.

    Args:
        x: (T, H). top_k_index, top_k_weights: (T, top_k).
        up, down: (E, 2·I or I, H) and (E, H, I), both dense or both packed.
        up_bias, down_bias: (E, 2·I or I) and (E, H), or None.

    Returns:
        (T, H) in the dtype of x.
    """
    num_tokens, top_k = top_k_index.shape
    _, hidden, intermediate = down.shape
    x, ids, device = x.contiguous(), top_k_index.contiguous(), x.device
    h = x.new_empty((num_tokens * top_k, intermediate))
    y = x.new_empty((num_tokens, hidden))
    biases = (up_bias is not None, down_bias is not None)
    if isinstance(up, PackedStack) and isinstance(down, PackedStack):
        formats = up.weights.format, down.weights.format
        up_plan, down_plan = _packed_plans(*formats, top_k, gate, *(ptx(own, x) for own in formats), *biases)
        up_operands, down_operands = storage_operands(up.weights), storage_operands(down.weights)
    elif isinstance(up, Tensor) and isinstance(down, Tensor):
        up_plan, down_plan = _decode_plans(up.shape, up.stride(), down.stride(), top_k, gate, *biases)
        up_operands, down_operands = (up,), (down,)
    else:
        raise AssertionError("use_decode refuses a packed stack beside a dense one")
    up_plan(
        device,
        (num_tokens * top_k, cdiv(intermediate, DECODE_BLOCK_N), 1),
        x,
        ids,
        *up_operands,
        h if up_bias is None else up_bias.contiguous(),
        h,
    )
    down_plan(
        device,
        (num_tokens, cdiv(hidden, DECODE_BLOCK_N), 1),
        h,
        ids,
        top_k_weights.contiguous(),
        *down_operands,
        y if down_bias is None else down_bias.contiguous(),
        y,
    )
    return y
