"""Launches of ``kernels.packed_gemm``: products with packed weights that dequantize what they multiply."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...activations import Gate
from ...formats.base import ROW_UNIT
from ...kernels.packed_gemm import packed_gemm_kernel, packed_transposed_kernel
from ...kernels.records import LowRankLayout, OutputLayout, Outputs, RowsLayout
from ...routing import max_tiles
from . import low_rank
from .bound_kernel import BoundKernel
from .operands import (
    cdiv,
    format_code,
    gate_layout,
    in_ptx,
    packed_tensors,
    plain_layout,
    plain_output,
    precision,
    routing_tensors,
    tile,
)

if TYPE_CHECKING:
    from ...formats.base import Format4bit
    from ...routing import Routing
    from ...tuning import LaunchConfig
    from ..stacks import PackedStack
    from ..terms import LowRankTerm


def up(
    config: LaunchConfig,
    x: Tensor,
    stack: PackedStack,
    routing: Routing,
    bias: Tensor | None,
    gate: Gate,
    h: Tensor | None,
    gate_up: Tensor | None,
    term: LowRankTerm | None,
) -> None:
    """``reference.grouped_up`` into h and gate_up."""
    shape = routing.row_to_slot.shape[0], gate.intermediate(stack.shape[1])
    _launch(config, x, stack, routing, bias, gate, True, 0.0, shape, h, gate_up, term)


def gemm(
    config: LaunchConfig,
    a: Tensor,
    stack: PackedStack,
    routing: Routing,
    bias: Tensor | None,
    gather: bool,
    fill: float,
    out: Tensor,
    term: LowRankTerm | None,
) -> None:
    """``reference.grouped_gemm`` into out; with a transposed stack neither gathered nor with a bias."""
    num_rows, n = out.shape
    if not stack.transposed:
        _launch(config, a, stack, routing, bias, None, gather, fill, (num_rows, n), out, None, term)
        return
    if n % config.block_n:
        config = replace(config, block_n=ROW_UNIT)
    dtype = a.dtype if in_ptx(a) else None
    kernel = _transposed_kernel(config, stack.format, low_rank.layout(term), dtype, precision(a.dtype))
    kernel(
        a.device,
        (max_tiles(num_rows, routing.num_experts, config.block_m) * (n // config.block_n), 1, 1),
        a,
        packed_tensors(stack),
        low_rank.tensors(term),
        Outputs(out, out),
        routing_tensors(routing),
        num_rows,
        fill,
    )


@functools.cache
def _gemm_kernel(
    config: LaunchConfig,
    format: Format4bit,
    n: int,
    gate: Gate | None,
    top_k: int,
    gather: bool,
    has_bias: bool,
    term: LowRankLayout | None,
    save_out: bool,
    save_gate_up: bool,
    dtype: torch.dtype | None,
    precision: str,
) -> BoundKernel:
    num_experts, _, k = format.shape
    layout = plain_layout(n) if gate is None else gate_layout(gate, n)
    constants = {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "K": k,
        "A": RowsLayout(k, gather),
        "FORMAT": format_code(format, dtype),
        "GATE": layout,
        "OUT": OutputLayout(n, layout.COLUMNS, layout.UP_OFFSET, save_out, save_gate_up),
        "LOW_RANK": term or low_rank.NOTHING,
        "HAS_BIAS": has_bias,
        "TILE": tile(config, precision),
    }
    return BoundKernel(packed_gemm_kernel, constants, config.num_warps, config.num_stages, fp_fusion=False)


def _launch(
    config: LaunchConfig,
    a: Tensor,
    stack: PackedStack,
    routing: Routing,
    bias: Tensor | None,
    gate: Gate | None,
    gather: bool,
    fill: float,
    shape: tuple[int, int],
    out: Tensor | None,
    gate_up: Tensor | None,
    term: LowRankTerm | None,
) -> None:
    """Into out, of ``shape``, and gate_up, where they are wanted."""
    num_rows, n = shape
    if a.shape[1] % config.block_k:
        config = replace(config, block_k=ROW_UNIT)
    if term is not None and term.separate and config.block_m >= 128:
        # Gate and up apart, each with a product of its own: 54 registers too many for four warps.
        config = replace(config, num_warps=max(8, config.num_warps))
    kernel = _gemm_kernel(
        config,
        stack.format,
        n,
        gate,
        routing.top_k,
        gather,
        bias is not None,
        low_rank.layout(term),
        out is not None,
        gate_up is not None,
        a.dtype if in_ptx(a) else None,
        precision(a.dtype),
    )
    kernel(
        a.device,
        (max_tiles(num_rows, routing.num_experts, config.block_m) * cdiv(n, config.block_n), 1, 1),
        a,
        packed_tensors(stack),
        None if bias is None else bias.contiguous(),
        low_rank.tensors(term),
        Outputs(a if out is None else out, a if gate_up is None else gate_up),
        routing_tensors(routing),
        num_rows,
        fill,
    )


@functools.cache
def _transposed_kernel(
    config: LaunchConfig, format: Format4bit, term: LowRankLayout | None, dtype: torch.dtype | None, precision: str
) -> BoundKernel:
    num_experts, k, n = format.shape
    constants = {
        "NUM_EXPERTS": num_experts,
        "K": k,
        "FORMAT": format_code(format, dtype),
        "GATE": plain_layout(n),
        "OUT": plain_output(n),
        "LOW_RANK": term or low_rank.NOTHING,
        "TILE": tile(config, precision),
    }
    return BoundKernel(packed_transposed_kernel, constants, config.num_warps, config.num_stages, fp_fusion=False)
