"""Adapters as kernels see them: what ``kernels.low_rank`` adds to a grouped GEMM, and the thin product before it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..plan import View
from .operands import power_of_2

if TYPE_CHECKING:
    from ..lora import Extension
    from ..tuning import LaunchConfig

# Columns of a thin product that one program computes at most.
MAX_THIN = 64
# RANK 0: nothing is added.
NONE = (0, 0, 0, 0, 0, 0, 0)


def constants(extension: Extension | None) -> tuple[int, ...]:
    """LOW_RANK: RANK, BLOCK_R, LEFT_STRIDE, left column of the up half, STRIDE_E, STRIDE_N, STRIDE_R."""
    if extension is None:
        return NONE
    left, right = extension
    (_, columns), (_, _, rank) = left.shape, right.shape
    return *_ranks(columns, rank, left.itemsize), *right.stride()


@functools.cache
def _ranks(columns: int, rank: int, itemsize: int) -> tuple[int, int, int, int]:
    block = min(64 if itemsize == 2 else 32, max(16, power_of_2(rank)))
    return rank, block, columns, rank if columns == 2 * rank else 0


def operands(extension: Extension | None, unused: Tensor, first: int = 0) -> tuple[Tensor, Tensor | View]:
    """(left, right), the latter from feature ``first`` on."""
    if extension is None:
        return unused, unused
    left, right = extension
    return left, View(right, first * right.stride(1), right.dtype) if first else right


@functools.cache
def thin(config: LaunchConfig, columns: int) -> LaunchConfig:
    """``config`` for a product with few columns."""
    return replace(config, block_n=min(config.block_n, max(16, power_of_2(columns))))


@functools.cache
def thin_gram(config: LaunchConfig, m: int, n: int) -> LaunchConfig:
    """``config``, the tile of (MAX_THIN, wide), for an (m, n) output one of whose sides is thin."""
    rows, columns = min(config.block_m, config.block_n), max(config.block_m, config.block_n)
    if m > n:
        rows, columns = columns, rows
    return replace(config, block_m=min(rows, max(16, power_of_2(m))), block_n=min(columns, max(16, power_of_2(n))))
