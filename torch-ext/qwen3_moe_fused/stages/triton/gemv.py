"""Launches of ``kernels.gemv`` and, for packed weights, of ``kernels.packed_gemv``: the expert MLP of a few slots.

Packed weights that tensor cores multiply go to ``few_rows``.
"""

from __future__ import annotations

import functools

from torch import Tensor

from ...activations import Gate
from ...kernels.gemv import gemv_down_kernel, gemv_up_kernel
from ...kernels.records import DenseLayout
from ..stacks import PackedStack, Stack
from . import packed_gemv, paths
from .bound_kernel import BoundKernel
from .few_rows import few_slots_experts
from .operands import cdiv, gate_layout, in_ptx, packed_tensors, power_of_2

# Output features a program computes.
BLOCK_N = 8


@functools.cache
def _up_kernel(
    num_experts: int,
    hidden: int,
    intermediate: int,
    strides: tuple[int, int, int],
    top_k: int,
    gate: Gate,
    has_bias: bool,
) -> BoundKernel:
    constants = {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "H": hidden,
        "WEIGHT": DenseLayout(*strides, "pointer"),
        "GATE": gate_layout(gate, intermediate),
        "HAS_BIAS": has_bias,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": min(512, power_of_2(hidden)),
    }
    return BoundKernel(gemv_up_kernel, constants)


@functools.cache
def _down_kernel(
    num_experts: int, hidden: int, intermediate: int, strides: tuple[int, int, int], top_k: int, has_bias: bool
) -> BoundKernel:
    constants = {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "H": hidden,
        "I": intermediate,
        "WEIGHT": DenseLayout(*strides, "pointer"),
        "HAS_BIAS": has_bias,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": min(1024, power_of_2(intermediate)),
    }
    return BoundKernel(gemv_down_kernel, constants)


def gemv_experts(
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
    if paths.multiplies_few_slots(num_tokens * top_k, up, down):
        assert isinstance(up, PackedStack)
        assert isinstance(down, PackedStack)
        return few_slots_experts(x, top_k_index, top_k_weights, up, down, up_bias, down_bias, gate)
    sizes = down.shape
    _, hidden, intermediate = sizes
    x, ids = x.contiguous(), top_k_index.contiguous()
    h = x.new_empty((num_tokens * top_k, intermediate))
    y = x.new_empty((num_tokens, hidden))
    has_up_bias, has_down_bias = up_bias is not None, down_bias is not None
    up_operand: object
    down_operand: object
    if isinstance(up, PackedStack) and isinstance(down, PackedStack):
        dtype = x.dtype if in_ptx(x) else None
        up_kernel = packed_gemv.up_kernel(up.format, dtype, top_k, gate, has_up_bias, BLOCK_N)
        down_kernel = packed_gemv.down_kernel(down.format, dtype, top_k, has_down_bias, BLOCK_N)
        up_operand, down_operand = packed_tensors(up), packed_tensors(down)
    elif isinstance(up, Tensor) and isinstance(down, Tensor):
        up_kernel = _up_kernel(*sizes, up.stride(), top_k, gate, has_up_bias)
        down_kernel = _down_kernel(*sizes, down.stride(), top_k, has_down_bias)
        up_operand, down_operand = up, down
    else:
        raise AssertionError("use_gemv refuses a packed stack beside a dense one")
    up_kernel(
        x.device,
        (num_tokens * top_k, cdiv(intermediate, BLOCK_N), 1),
        x,
        ids,
        up_operand,
        None if up_bias is None else up_bias.contiguous(),
        h,
    )
    down_kernel(
        x.device,
        (num_tokens, cdiv(hidden, BLOCK_N), 1),
        h,
        ids,
        top_k_weights.contiguous(),
        down_operand,
        None if down_bias is None else down_bias.contiguous(),
        y,
    )
    return y
