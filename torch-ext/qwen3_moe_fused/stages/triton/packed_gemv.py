"""The kernels of ``kernels.packed_gemv``, bound for a layer; ``gemv`` launches them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...activations import Gate
from ...kernels.packed_gemv import packed_gemv_down_kernel, packed_gemv_up_kernel
from .bound_kernel import BoundKernel
from .operands import format_code, gate_layout, in_ptx, power_of_2

if TYPE_CHECKING:
    from ...formats.base import Format4bit


def up_kernel(format: Format4bit, x: Tensor, top_k: int, gate: Gate, has_bias: bool, block_n: int) -> BoundKernel:
    """The up projection of a stack (E, 2·I or I, H), for the device and dtype of ``x``."""
    return _up_kernel(format, x.dtype if in_ptx(x) else None, top_k, gate, has_bias, block_n)


@functools.cache
def _up_kernel(
    format: Format4bit, dtype: torch.dtype | None, top_k: int, gate: Gate, has_bias: bool, block_n: int
) -> BoundKernel:
    num_experts, columns, hidden = format.shape
    constants = {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "H": hidden,
        "FORMAT": format_code(format, dtype),
        "GATE": gate_layout(gate, gate.intermediate(columns)),
        "HAS_BIAS": has_bias,
        "BLOCK_N": block_n,
        "BLOCK_K": min(2048, power_of_2(hidden)),
    }
    return BoundKernel(packed_gemv_up_kernel, constants, fp_fusion=False)


def down_kernel(format: Format4bit, x: Tensor, top_k: int, has_bias: bool, block_n: int) -> BoundKernel:
    """The down projection of a stack (E, H, I), for the device and dtype of ``x``."""
    return _down_kernel(format, x.dtype if in_ptx(x) else None, top_k, has_bias, block_n)


@functools.cache
def _down_kernel(
    format: Format4bit, dtype: torch.dtype | None, top_k: int, has_bias: bool, block_n: int
) -> BoundKernel:
    num_experts, hidden, intermediate = format.shape
    constants = {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "H": hidden,
        "I": intermediate,
        "FORMAT": format_code(format, dtype),
        "HAS_BIAS": has_bias,
        "BLOCK_N": block_n,
        "BLOCK_K": min(256, power_of_2(intermediate)),
    }
    return BoundKernel(packed_gemv_down_kernel, constants, fp_fusion=False)
