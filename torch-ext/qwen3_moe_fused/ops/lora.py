"""The products that a low-rank adapter (LoRA, arXiv:2106.09685) adds to a grouped linear layer, in forward and backward.

An adapter adds s·B[e]·A[e] to the matrix of expert e, and that sum is never formed. The forward makes *left* = s·x·A[e]ᵀ
(S, R), one thin product for all rows; the grouped GEMM then adds left·B[e]ᵀ to its tile before the epilogue (a
``LowRankTerm``). The gradient of the input does the same with s·grad·B[e] and A[e], and the gradients of both factors are
grouped weight-gradient products with these two thin products.

The gate and up features of a gated up projection may have factors apart. Then A holds the gate's R rows before the up's R
rows, and left holds the gate's R columns before the up's. The rows of B are in the order of the weights' rows either way.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..routing import Routing
from ..stages.terms import LowRankTerm
from .arguments import LoraArguments


class Adapter:
    """An adapter's factors in the dtype and layout of the products, and the products, computed by a backend's stages.

    Attributes:
        a: (E, R or 2·R, in), contiguous.
        b: (E, out, R), contiguous.
    """

    __slots__ = ("_grad_dtypes", "_scaling", "_stages", "_whole", "a", "b")

    def __init__(self, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype, stages: ModuleType) -> None:
        self.a = (a if a.dtype == dtype else a.to(dtype)).contiguous()
        self.b = (b if b.dtype == dtype else b.to(dtype)).contiguous()
        self._scaling = float(scaling)  # Triton takes an int for a constant of the kernel, or for another type
        self._whole = a.shape[1] == b.shape[2]  # gate and up features have no factors apart
        self._grad_dtypes = a.dtype, b.dtype
        self._stages = stages

    @classmethod
    def of(cls, arguments: LoraArguments, dtype: torch.dtype, stages: ModuleType) -> Adapter | None:
        """The adapter of an operator's arguments, or None where they hold none."""
        a, b, scaling = arguments
        return None if a is None or b is None else cls(a, b, scaling, dtype, stages)

    def left(self, x: Tensor, routing: Routing, num_rows: int, gather: bool) -> Tensor:
        """The thin product s·x·aᵀ (S, R or 2·R) of x (S, in), or of x (T, in) with ``gather``."""
        left = x.new_empty((num_rows, self.a.shape[1]))
        self._stages.shrink(x, self.a, routing, gather, self._scaling, left)
        return left

    def term(self, left: Tensor) -> LowRankTerm:
        """The term of the product with the weights (E, out, in)."""
        return LowRankTerm(left, self.b)

    def grad_left(self, grad: Tensor, routing: Routing, num_rows: int, gather: bool) -> Tensor:
        """The thin product s·grad·b (S, R or 2·R) of the output's gradient (S, out), or (T, out) with ``gather``."""
        left = grad.new_empty((num_rows, self.a.shape[1]))
        if self._whole:
            self._stages.shrink(grad, self.b.mT, routing, gather, self._scaling, left)
            return left
        halves = zip(grad.chunk(2, dim=1), self.b.chunk(2, dim=1), left.chunk(2, dim=1), strict=True)
        for half_grad, half_b, half_left in halves:
            self._stages.shrink(half_grad, half_b.mT, routing, gather, self._scaling, half_left)
        return left

    def grad_term(self, grad_left: Tensor) -> LowRankTerm:
        """The term of the product with the transposed weights (E, in, out), for the gradient of the input."""
        return LowRankTerm(grad_left, self.a.mT)

    def grad_a(self, grad_left: Tensor, x: Tensor, routing: Routing, gather: bool) -> Tensor:
        """The gradient of a, (E, R or 2·R, in), from x as ``left`` takes it, or from rows that are weighted already."""
        grad = torch.empty_like(self.a, dtype=self._grad_dtypes[0])
        self._stages.grouped_wgrad(grad_left, x, routing, gather_a=False, gather_b=gather, out=grad)
        return grad

    def grad_b(
        self, grad: Tensor, left: Tensor, routing: Routing, gather: bool, weights: Tensor | None = None
    ) -> Tensor:
        """The gradient of b, (E, out, R), from the output's gradient as ``grad_left`` takes it.

        Args:
            weights: (T, top_k), the weight of each slot, by which its row is multiplied; None for no weights.
        """
        grad_b = torch.empty_like(self.b, dtype=self._grad_dtypes[1])
        if self._whole:
            self._stages.grouped_wgrad(grad, left, routing, gather, gather_b=False, out=grad_b, weights=weights)
            return grad_b
        halves = zip(grad.chunk(2, dim=1), left.chunk(2, dim=1), grad_b.chunk(2, dim=1), strict=True)
        for half_grad, half_left, out in halves:
            self._stages.grouped_wgrad(half_grad, half_left, routing, gather, False, out=out, weights=weights)
        return grad_b
