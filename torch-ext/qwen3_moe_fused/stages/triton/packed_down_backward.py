"""Launch of ``kernels.packed_down_backward``."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...activations import Gate
from ...formats.base import ROW_UNIT
from ...kernels.packed_down_backward import packed_down_backward_kernel
from ...kernels.records import BackwardLayout, BackwardTensors, LowRankLayout
from ...routing import max_tiles
from . import low_rank
from .bound_kernel import BoundKernel
from .operands import format_code, gate_layout, in_ptx, packed_tensors, precision, routing_tensors, tile

if TYPE_CHECKING:
    from ...formats.base import Format4bit
    from ...routing import Routing
    from ...tuning import LaunchConfig
    from ..stacks import PackedStack
    from ..terms import LowRankTerm


def fit(config: LaunchConfig, intermediate: int) -> LaunchConfig:
    """``config`` with column tiles that ``intermediate`` is a multiple of."""
    if intermediate % config.block_n == 0:
        return config
    return replace(config, block_n=ROW_UNIT, slices=min(config.slices, 4))


@functools.cache
def _kernel(
    config: LaunchConfig,
    format: Format4bit,
    top_k: int,
    gate: Gate,
    layout: BackwardLayout,
    term: LowRankLayout | None,
    dtype: torch.dtype | None,
    precision: str,
) -> BoundKernel:
    num_experts, hidden, intermediate = format.shape
    constants = {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "H": hidden,
        "FORMAT": format_code(format, dtype),
        "GATE": gate_layout(gate, intermediate),
        "LAYOUT": layout,
        "LOW_RANK": term or low_rank.NOTHING,
        "TILE": tile(config, precision),
    }
    return BoundKernel(packed_down_backward_kernel, constants, config.num_warps, config.num_stages, fp_fusion=False)


def launch(
    config: LaunchConfig,
    grad_y: Tensor,
    stack: PackedStack,
    routing: Routing,
    gate: Gate,
    tensors: BackwardTensors,
    layout: BackwardLayout,
    num_rows: int,
    term: LowRankTerm | None,
) -> None:
    """``reference.down_backward`` into the outputs among ``tensors``.

    Args:
        config: of ``fit``.
        stack: (E, H, I), stored like that.
    """
    format = stack.format
    dtype = grad_y.dtype if in_ptx(grad_y) else None
    kernel = _kernel(config, format, routing.top_k, gate, layout, low_rank.layout(term), dtype, precision(grad_y.dtype))
    kernel(
        grad_y.device,
        (max_tiles(num_rows, routing.num_experts, config.block_m) * (format.shape[2] // config.block_n), 1, 1),
        grad_y,
        packed_tensors(stack),
        low_rank.tensors(term),
        tensors,
        routing_tensors(routing),
    )
