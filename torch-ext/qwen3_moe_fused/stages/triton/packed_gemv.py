"""The kernels of ``kernels.packed_gemv``, bound for a layer; ``gemv`` launches them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from ...activations import Gate
from ...kernels.packed_gemv import packed_gemv_down_kernel, packed_gemv_up_kernel
from .bound_kernel import BoundKernel
from .operands import format_code, gate_layout, power_of_2

if TYPE_CHECKING:
    from ...formats.base import Format4bit


@functools.cache
def up_kernel(
    format: Format4bit, dtype: torch.dtype | None, top_k: int, gate: Gate, has_bias: bool, block_n: int
) -> BoundKernel:
    """The up projection of a stack (E, 2·I or I, H), with ``dtype`` as in ``format_code``."""
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


@functools.cache
def down_kernel(format: Format4bit, dtype: torch.dtype | None, top_k: int, has_bias: bool, block_n: int) -> BoundKernel:
    """The down projection of a stack (E, H, I), with ``dtype`` as in ``format_code``."""
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
