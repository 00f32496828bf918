"""Launches of ``kernels.dequantize``: packed weights as dense ones, whole or some features at a time in a workspace."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...kernels.dequantize import dequantize_kernel
from ...kernels.records import ByteRuns
from ...views import View
from .bound_kernel import BoundKernel
from .operands import cdiv, format_code, packed_tensors

if TYPE_CHECKING:
    from ...activations import Gate
    from ...formats.base import Format4bit
    from ...routing import Routing
    from ...tuning import LaunchConfig
    from ..stacks import PackedStack, Stack

WORKSPACE_BYTES = 256 * 2**20
# Bytes that a program of the dequantization reads.
DEQUANTIZE_BLOCK = 1024


@functools.cache
def _dequantize_kernel(format: Format4bit, runs: ByteRuns, skip: bool) -> BoundKernel:
    _, rows, columns = format.shape
    constants = {
        "SIZE": rows * columns,
        "RUNS": runs,
        "FORMAT": format_code(format, None),
        "SKIP": skip,
        "BLOCK": DEQUANTIZE_BLOCK,
    }
    return BoundKernel(dequantize_kernel, constants, fp_fusion=False)


def dequantize(stack: PackedStack, first: int, count: int, out: Tensor) -> None:
    """``reference.dequantize``."""
    size = stack.packed.shape[1]
    dequantize_runs(stack, ByteRuns(size, size), first, count, out, None)


def dequantize_runs(
    stack: PackedStack, runs: ByteRuns, first: int, count: int, out: Tensor, offsets: Tensor | None
) -> None:
    """``runs`` of experts ``first`` to ``first + count`` into ``out``; only of those with rows, given ``offsets``."""
    _dequantize_kernel(stack.format, runs, offsets is not None)(
        stack.device,
        (count * cdiv(runs.TOTAL, DEQUANTIZE_BLOCK), 1, 1),
        packed_tensors(stack),
        stack.packed if offsets is None else offsets,
        out,
        first,
    )


class Part(NamedTuple):
    """Some out features of all experts, dense. In gated up projections a feature has a gate and an up row.

    Attributes:
        stack: (E, N, K).
        config: to launch with.
        first, width: its features.
    """

    stack: Tensor
    config: LaunchConfig
    first: int
    width: int

    def columns(self, values: Tensor, gate: Gate | None = None) -> Tensor | View:
        """Rows of features (…, N of the whole) from this part's first feature on."""
        start = self.offset(gate)
        return View(values, start, values.dtype) if start else values

    def offset(self, gate: Gate | None = None) -> int:
        """The first of this part's rows in the whole stack."""
        return self.first * (2 if gate is not None and gate.interleaved else 1)

    def bias(self, bias: Tensor, gate: Gate | None = None) -> Tensor:
        """(E, N) of the whole bias, contiguous."""
        if self.stack.shape[1] == bias.shape[1]:
            return bias.contiguous()
        rows = _rows_of(self.first, self.width, bias.shape[1], gate)
        return torch.cat([bias[:, start : start + size] for start, size in rows], dim=1)


def _rows_of(first: int, width: int, rows: int, gate: Gate | None) -> list[tuple[int, int]]:
    """(first, number) of the stack's rows that make up ``width`` features from ``first`` on, of ``rows`` in all."""
    if gate is None or not gate.gated:
        return [(first, width)]
    if gate.interleaved:
        return [(2 * first, 2 * width)]
    if 2 * width == rows:
        return [(0, rows)]  # which begin and end with a byte, as the halves of an odd number of features do not
    return [(first, width), (rows // 2 + first, width)]


def dense_parts(
    weight: Stack, routing: Routing, dtype: torch.dtype, config: LaunchConfig, gate: Gate | None = None
) -> Iterator[Part]:
    """The stack dense in ``dtype``, in parts: a dense one in a single part, packed weights in a workspace.

    Parts are of features, not of experts: so every part has all row tiles, and no program of a part is idle. A part's stack
    holds only until the next part is taken, and experts without rows hold anything.

    Args:
        gate: of an up projection.
    """
    num_experts, n, k = weight.shape
    features = n if gate is None else gate.intermediate(n)
    if isinstance(weight, Tensor):
        yield Part(weight, config, 0, features)
        return
    width, config = _part_width(features, num_experts * (n // features) * k * dtype.itemsize, config, WORKSPACE_BYTES)
    if weight.transposed and features % 2:
        width = features  # a byte has weights of two rows
    stack: Tensor | None = None
    for first in range(0, features, width):
        part_width = min(width, features - first)
        size, runs = _runs(first, part_width, n, k, gate, weight.transposed)
        shape = (num_experts, k, size) if weight.transposed else (num_experts, size, k)
        if stack is None:
            stack = torch.empty(shape, dtype=dtype, device=weight.device)
        elif stack.shape != shape:  # the last part, in the same memory
            stack = stack.as_strided(shape, (size * k, shape[2], 1))
        dequantize_runs(weight, runs, 0, num_experts, stack, routing.offsets)
        yield Part(stack.mT if weight.transposed else stack, config, first, part_width)


def part_tiles(weight: Stack, dtype: torch.dtype, config: LaunchConfig) -> int:
    """The width of the column tiles with which ``dense_parts`` without a gate launches."""
    if isinstance(weight, Tensor):
        return config.block_n
    num_experts, features, k = weight.shape
    return _part_width(features, num_experts * k * dtype.itemsize, config, WORKSPACE_BYTES)[1].block_n


@functools.cache
def _part_width(
    features: int, feature_bytes: int, config: LaunchConfig, workspace_bytes: int
) -> tuple[int, LaunchConfig]:
    """How many features fit the workspace, in parts of nearly one size, and ``config`` with column tiles that fit them."""
    most = max(1, workspace_bytes // feature_bytes)
    if most >= features:
        return features, config
    block_n = min(config.block_n, max(16, 1 << (most.bit_length() - 1)))
    most = max(block_n, most // block_n * block_n)
    width = cdiv(cdiv(features, cdiv(features, most)), block_n) * block_n
    return width, replace(config, block_n=block_n, slices=min(config.slices, block_n // 16))


@functools.cache
def _runs(first: int, width: int, n: int, k: int, gate: Gate | None, transposed: bool) -> tuple[int, ByteRuns]:
    """How many rows of an (n, k) matrix ``width`` features from ``first`` on are, and their bytes.

    The matrix is stored as it is, or (k, n) if ``transposed``.
    """
    rows = _rows_of(first, width, n, gate)
    (start, number), *others = rows
    stride = others[0][0] - start if others else 0
    size = len(rows) * number
    if transposed:
        # A run for each stored row and segment of columns.
        return size, ByteRuns(size * k // 2, number // 2, len(rows), start // 2, stride // 2, n // 2)
    return size, ByteRuns(size * k // 2, number * k // 2, len(rows), start * k // 2, stride * k // 2)
