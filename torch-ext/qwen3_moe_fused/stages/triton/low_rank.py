"""Adapters as kernels see them: what ``kernels.low_rank`` adds to a grouped GEMM, and tiles of products with few columns."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from ...kernels.records import LowRankLayout, LowRankTensors
from ...views import View
from .operands import power_of_2

if TYPE_CHECKING:
    from ...tuning import LaunchConfig
    from ..terms import LowRankTerm

# Columns of a thin product that one program computes at most.
MAX_THIN = 64
NOTHING = LowRankLayout(0, 0, 0, 0, 0, 0, 0)


def layout(term: LowRankTerm | None) -> LowRankLayout | None:
    """How the factors of ``term`` lie; None if there is none, for which kernels take ``NOTHING``."""
    if term is None:
        return None
    left, right = term
    return _layout(left.shape[1], right.shape[2], left.itemsize, right.stride())


@functools.cache
def _layout(columns: int, rank: int, itemsize: int, strides: tuple[int, int, int]) -> LowRankLayout:
    block = min(64 if itemsize == 2 else 32, max(16, power_of_2(rank)))
    return LowRankLayout(rank, block, columns, rank if columns == 2 * rank else 0, *strides)


def tensors(term: LowRankTerm | None, first: int = 0) -> LowRankTensors | None:
    """The factors of ``term``, the right one from feature ``first`` on; None if there is no term."""
    if term is None:
        return None
    left, right = term
    return LowRankTensors(left, View(right, first * right.stride(1), right.dtype) if first else right)


@functools.cache
def thin(config: LaunchConfig, columns: int) -> LaunchConfig:
    """``config`` for a product with few columns."""
    return replace(config, block_n=min(config.block_n, max(16, power_of_2(columns))))


@functools.cache
def thin_wgrad(config: LaunchConfig, m: int, n: int) -> LaunchConfig:
    """``config``, the tile of (MAX_THIN, wide), for an (m, n) output one of whose sides is thin."""
    rows, columns = min(config.block_m, config.block_n), max(config.block_m, config.block_n)
    if m > n:
        rows, columns = columns, rows
    return replace(config, block_m=min(rows, max(16, power_of_2(m))), block_n=min(columns, max(16, power_of_2(n))))
