"""``LowRankTerm``: what a grouped GEMM adds to its product for a low-rank adapter."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LowRankTerm(NamedTuple):
    """A second product that a grouped GEMM adds to its tile before the epilogue: left[row] · right[expert of row]ᵀ.

    Attributes:
        left: (S, R) contiguous; or (S, 2·R) where gate and up features have factors apart, the gate's columns first.
        right: (E, N, R) of any strides.
    """

    left: Tensor
    right: Tensor

    @property
    def separate(self) -> bool:
        """Whether gate and up features have columns of ``left`` apart."""
        return self.left.shape[1] == 2 * self.right.shape[2]
