"""Launches of ``kernels.packed_few_rows``: 4-bit experts of a few slots, and linear layers of a few rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import tuning
from ...activations import Gate
from ...kernels.packed_few_rows import few_rows_kernel, few_slots_kernel, sum_slots_kernel
from ...kernels.records import FewRowsTile, MatrixLayout, MatrixTensors
from . import paths
from .bound_kernel import BoundKernel
from .dequantize import dequantize
from .operands import cdiv, format_code, gate_layout, in_ptx, packed_tensors, plain_layout, power_of_2, precision

if TYPE_CHECKING:
    from ...formats.base import Format4bit
    from ...tuning import LaunchConfig
    from ..stacks import PackedStack

# Output features that a program of the sum over slots computes.
BLOCK_SUM = 256
# The fewest rows of a tile: tensor cores take no fewer on their right side.
LEAST_ROWS = 8
# One kernel serves up to so many slots.
LEAST_SLOTS = 16
# Matrices that a launch multiplies.
MATRICES = 3
# A launch of fewer warps leaves multiprocessors idle, as of a single matrix of few features: then more of them divide the in
# features, up to so many of a program.
LEAST_WARPS, MOST_OF_PROGRAM = 1024, 8


def _tile(config: LaunchConfig, k: int, precision: str) -> FewRowsTile:
    """The tile of a launch over K = k in features."""
    parts = config.num_warps // config.split_k
    return FewRowsTile(
        config.block_m,
        config.block_n // parts,
        min(config.block_k, power_of_2(k)),
        parts,
        config.split_k,
        precision,
        config.prefetch,
    )


def _bound(kernel: Any, constants: dict[str, Any], config: LaunchConfig, on_nvidia: bool) -> BoundKernel:
    registers = config.registers if on_nvidia else 0
    return BoundKernel(kernel, constants, config.num_warps, config.num_stages, fp_fusion=False, registers=registers)


@functools.cache
def _slots_kernel(
    config: LaunchConfig,
    format: Format4bit,
    gate: Gate | None,
    top_k: int,
    has_bias: bool,
    slots: int,
    dtype: torch.dtype | None,
    precision: str,
) -> tuple[BoundKernel, int]:
    """The kernel, and its programs along the out features. ``gate`` is None for a plain product."""
    num_experts, columns, k = format.shape
    layout = plain_layout(columns) if gate is None else gate_layout(gate, gate.intermediate(columns))
    constants = {
        "NUM_EXPERTS": num_experts,
        "TOP_K": top_k,
        "K": k,
        "FORMAT": format_code(format, dtype),
        "GATE": layout,
        "HAS_BIAS": has_bias,
        "SLOTS": slots,
        "TILE": _tile(config, k, precision),
    }
    kernel = _bound(few_slots_kernel, constants, config, dtype is not None)
    return kernel, cdiv(columns, config.block_n)


@functools.cache
def _sum_kernel(num_experts: int, top_k: int, n: int) -> BoundKernel:
    constants = {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "N": n, "BLOCK_N": min(BLOCK_SUM, power_of_2(n))}
    return BoundKernel(sum_slots_kernel, constants)


def few_slots(
    family: str,
    a: Tensor,
    ids: Tensor,
    stack: PackedStack,
    bias: Tensor | None,
    gate: Gate | None,
    top_k: int,
    out: Tensor,
) -> None:
    """``reference.few_slots``; ``family`` is that of the launch configuration."""
    num_slots = ids.numel()
    config = tuning.few_config(family, num_slots, tuning.target_of(a.device), a.itemsize)
    dtype = a.dtype if in_ptx(a) else None
    slots = max(LEAST_SLOTS, power_of_2(num_slots))
    bound, programs = _slots_kernel(
        config, stack.format, gate, top_k, bias is not None, slots, dtype, precision(a.dtype)
    )
    bound(
        a.device,
        (programs, num_slots, 1),
        a,
        ids,
        packed_tensors(stack),
        None if bias is None else bias.contiguous(),
        out,
        num_slots,
    )


def few_slots_experts(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: PackedStack,
    down: PackedStack,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate: Gate,
) -> Tensor:
    """``gemv.gemv_experts`` over 4-bit weights that tensor cores multiply."""
    num_tokens, top_k = top_k_index.shape
    num_experts, hidden, intermediate = down.shape
    x, ids = x.contiguous(), top_k_index.contiguous()
    h = x.new_empty((num_tokens * top_k, intermediate))
    z = x.new_empty((num_tokens * top_k, hidden), dtype=torch.float32)
    y = x.new_empty((num_tokens, hidden))
    few_slots("few_up_4bit", x, ids, up, up_bias, gate, top_k, h)
    few_slots("few_down_4bit", h, ids, down, down_bias, None, 1, z)
    _sum_kernel(num_experts, top_k, hidden)(
        x.device, (num_tokens, cdiv(hidden, BLOCK_SUM), 1), z, ids, top_k_weights.contiguous(), y
    )
    return y


@functools.cache
def _rows_kernel(
    config: LaunchConfig,
    formats: tuple[Format4bit, ...],
    has_biases: tuple[bool, ...],
    dtype: torch.dtype | None,
    precision: str,
) -> tuple[BoundKernel, int]:
    """The kernel, and how many programs compute all matrices."""
    k = formats[0].shape[2]
    layouts = [
        MatrixLayout(format.shape[1], format_code(format, dtype), has_bias)
        for format, has_bias in zip(formats, has_biases, strict=True)
    ]
    nothing = layouts[0]._replace(N=0)
    first, second, third = (layouts[i] if i < len(layouts) else nothing for i in range(MATRICES))
    constants = {"K": k, "FIRST": first, "SECOND": second, "THIRD": third, "TILE": _tile(config, k, precision)}
    kernel = _bound(few_rows_kernel, constants, config, dtype is not None)
    return kernel, sum(cdiv(layout.N, config.block_n) for layout in layouts)


def _filling(config: LaunchConfig, features: int, k: int) -> LaunchConfig:
    """``config`` with more warps along the K = k in features, where a launch over so many out features has too few."""
    programs = cdiv(features, config.block_n)
    while programs * config.num_warps < LEAST_WARPS and config.num_warps < MOST_OF_PROGRAM:
        if 2 * config.split_k * config.block_k > k:
            break
        config = replace(config, num_warps=2 * config.num_warps, split_k=2 * config.split_k)
    return config


def few_rows_linear(
    x: Tensor, stacks: Sequence[PackedStack], biases: Sequence[Tensor | None], outs: Sequence[Tensor]
) -> None:
    """``reference.few_rows_linear``; up to ``MATRICES`` of the matrices share a launch."""
    num_rows = x.shape[0]
    products = []
    for stack, bias, out in zip(stacks, biases, outs, strict=True):
        if paths.is_readable(stack):
            products.append((stack, bias, out))
        else:
            dense = x.new_empty(stack.shape)
            dequantize(stack, 0, 1, dense)
            out.copy_(torch.nn.functional.linear(x, dense[0], bias))
    if not num_rows:
        return
    x = x.contiguous()
    config = tuning.few_config("few_linear_4bit", num_rows, tuning.target_of(x.device), x.itemsize)
    height = min(config.block_m, max(LEAST_ROWS, power_of_2(num_rows)))
    dtype = x.dtype if in_ptx(x) else None
    for start in range(0, len(products), MATRICES):
        together = products[start : start + MATRICES]
        features = sum(stack.shape[1] for stack, _, _ in together)
        kernel, programs = _rows_kernel(
            _filling(replace(config, block_m=height), features, x.shape[1]),
            tuple(stack.format for stack, _, _ in together),
            tuple(bias is not None for _, bias, _ in together),
            dtype,
            precision(x.dtype),
        )
        matrices = [
            MatrixTensors(packed_tensors(stack), out if bias is None else bias.contiguous(), out)
            for stack, bias, out in together
        ]
        matrices += matrices[:1] * (MATRICES - len(matrices))
        kernel(x.device, (programs, 1, 1), x, *matrices, num_rows)
