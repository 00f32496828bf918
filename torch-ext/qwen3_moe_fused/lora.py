"""Low-rank adapters (LoRA, arXiv:2106.09685) of expert stacks: what callers give, and the products of forward and backward.

An adapter adds s·B[e]·A[e] to the matrix of expert e. It is never formed: with *left* = s·x·A[e]ᵀ (S, R), one thin product
for all rows, the grouped GEMM adds left·B[e]ᵀ to its tile before the epilogue (an ``Extension``). The gradient of the input
does the same with s·grad·B[e] and A[e], and the gradients of both factors are grouped Gram products with these two.

A gated up projection may have factors of its own for gate and up: then A holds the gate's R rows before the up's, and left
the gate's R columns before the up's. Rows of B are those of the weights either way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import checks

if TYPE_CHECKING:
    from .quantization import Packed4bitWeights
    from .routing import Routing


class LoraWeights(NamedTuple):
    """One adapter of a stack of experts: the weights of expert e become W[e] + scaling · b[e] · a[e].

    Attributes:
        a: (E, r, in); or (E, 2·r, in) over a gated up projection whose gate and up features have factors of their own, the
            gate's first.
        b: (E, out, r), rows as those of the weights. Both in any floating dtype; products round them to their own.
        scaling: alpha / r, or alpha / √r with rsLoRA.
        dropout: probability with which an element of the adapter's input is dropped, the others scaled by 1 / (1 - dropout).
            Zero outside training. With dropout the adapter takes products of its own instead of the fused ones.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def separate(self) -> bool:
        """Whether gate and up have an ``a`` each."""
        return self.a.shape[1] == 2 * self.b.shape[2]


class Extension(NamedTuple):
    """What a grouped GEMM adds: left[row] · right[expert of row]ᵀ.

    Attributes:
        left: (S, R) contiguous; or (S, 2·R), the gate's columns before the up's.
        right: (E, N, R) of any strides.
    """

    left: Tensor
    right: Tensor

    @property
    def separate(self) -> bool:
        return self.left.shape[1] == 2 * self.right.shape[2]


Loras = LoraWeights | Sequence[LoraWeights] | None


def check(
    name: str,
    loras: Loras,
    weight: Tensor | Packed4bitWeights,
    like_name: str,
    like: Tensor,
    *,
    transposed: bool = False,
    halves: bool = False,
) -> list[LoraWeights]:
    """One adapter, several or none, as a list.

    Args:
        name: of the argument.
        weight: (E, out, in) that they adapt; (E, in, out) if ``transposed``.
        like: a tensor on the device where they must be, and its name.
        halves: gate and up features stand side by side, and so may have factors of their own.

    Raises:
        TypeError: not ``LoraWeights``, or of a dtype that does not fit.
        ValueError: a shape, device, scaling or dropout that does not fit.
    """
    if loras is None:
        return []
    if not isinstance(loras, Sequence):
        raise TypeError(f"{name} must be LoraWeights or a sequence of them, got {type(loras).__name__}")
    adapters = [loras] if isinstance(loras, LoraWeights) else list(loras)
    num_experts, *features = weight.shape
    out_features, in_features = reversed(features) if transposed else features
    for lora in adapters:
        if not isinstance(lora, LoraWeights):
            raise TypeError(f"{name} must be LoraWeights or a sequence of them, got {type(lora).__name__}")
        checks.tensor(f"{name}.a", lora.a, (num_experts, "r", in_features))
        checks.tensor(f"{name}.b", lora.b, (num_experts, out_features, "r"))
        rows, rank = lora.a.shape[1], lora.b.shape[2]
        if rank < 1 or rows not in ((rank, 2 * rank) if halves else (rank,)):
            wanted = "r or, for gate and up apart, 2·r" if halves else "r"
            shapes = f"{tuple(lora.a.shape)} and {tuple(lora.b.shape)}"
            raise ValueError(f"{name}.a must have {wanted} rows for a {name}.b of rank r >= 1, got {shapes}")
        for part, value in (("a", lora.a), ("b", lora.b)):
            checks.dtype(f"{name}.{part}", value, checks.FLOAT_DTYPES)
            checks.device(f"{name}.{part}", value, like_name, like)
        checks.number(f"{name}.scaling", lora.scaling)
        checks.number(f"{name}.dropout", lora.dropout)
        if not 0.0 <= lora.dropout < 1.0:
            raise ValueError(f"{name}.dropout must be in [0, 1), got {lora.dropout}")
    return adapters


def fused(adapters: Sequence[LoraWeights]) -> tuple[Tensor | None, Tensor | None, float]:
    """a, b and scaling of one adapter that adds what all of them add: their ranks side by side. Differentiable."""
    if not adapters:
        return None, None, 1.0
    if len(adapters) == 1:
        return adapters[0][:3]
    dtype = functools.reduce(torch.promote_types, (value.dtype for lora in adapters for value in lora[:2]))
    scalings = {float(lora.scaling) for lora in adapters}
    if len(scalings) == 1:
        scaling, factors = scalings.pop(), [lora.b.to(dtype) for lora in adapters]
    else:  # in fp32 at least, so that b is rounded once
        wide = torch.promote_types(dtype, torch.float32)
        scaling, factors = 1.0, [lora.b.to(wide) * lora.scaling for lora in adapters]
    b = torch.cat(factors, dim=2)
    if not any(lora.separate for lora in adapters):
        return torch.cat([lora.a.to(dtype) for lora in adapters], dim=1), b, scaling
    halves = [lora.a.to(dtype).chunk(2, dim=1) if lora.separate else (lora.a.to(dtype),) * 2 for lora in adapters]
    return torch.cat([own[half] for half in (0, 1) for own in halves], dim=1), b, scaling


class Adapter:
    """The factors in the dtype and layout of the products, and the products, over the stages of a backend.

    Attributes:
        a: (E, R or 2·R, in). b: (E, out, R). Both contiguous.
    """

    __slots__ = ("_whole", "a", "b", "grad_dtypes", "scaling", "stages")

    def __init__(self, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype, stages: ModuleType) -> None:
        self.a = (a if a.dtype == dtype else a.to(dtype)).contiguous()
        self.b = (b if b.dtype == dtype else b.to(dtype)).contiguous()
        self.scaling = float(scaling)  # Triton takes an int for a constant of the kernel, or for another type
        self._whole = a.shape[1] == b.shape[2]  # no factors of its own for gate and up
        self.grad_dtypes = a.dtype, b.dtype
        self.stages = stages

    @classmethod
    def of(
        cls, a: Tensor | None, b: Tensor | None, scaling: float, dtype: torch.dtype, stages: ModuleType
    ) -> Adapter | None:
        return None if a is None or b is None else cls(a, b, scaling, dtype, stages)

    def left(self, x: Tensor, routing: Routing, num_rows: int, gather: bool) -> Tensor:
        """s·x·aᵀ (S, R or 2·R) of x (S, in), or (T, in) with ``gather``."""
        left = x.new_empty((num_rows, self.a.shape[1]))
        self.stages.shrink(x, self.a, routing, gather, self.scaling, left)
        return left

    def extension(self, left: Tensor) -> Extension:
        """Of the product with the weights (E, out, in)."""
        return Extension(left, self.b)

    def grad_left(self, grad: Tensor, routing: Routing, num_rows: int, gather: bool) -> Tensor:
        """s·grad·b (S, R or 2·R) of the output's gradient (S, out), or (T, out) with ``gather``."""
        left = grad.new_empty((num_rows, self.a.shape[1]))
        if self._whole:
            self.stages.shrink(grad, self.b.mT, routing, gather, self.scaling, left)
            return left
        halves = zip(grad.chunk(2, dim=1), self.b.chunk(2, dim=1), left.chunk(2, dim=1), strict=True)
        for own_grad, b, own_left in halves:
            self.stages.shrink(own_grad, b.mT, routing, gather, self.scaling, own_left)
        return left

    def grad_extension(self, grad_left: Tensor) -> Extension:
        """Of the product with the transposed weights (E, in, out), for the gradient of the input."""
        return Extension(grad_left, self.a.mT)

    def grad_a(self, grad_left: Tensor, x: Tensor, routing: Routing, gather: bool) -> Tensor:
        """(E, R or 2·R, in), of x as for ``left``, or weighted beforehand."""
        grad = torch.empty_like(self.a, dtype=self.grad_dtypes[0])
        self.stages.grouped_gram(grad_left, x, routing, gather_a=False, gather_b=gather, out=grad)
        return grad

    def grad_b(
        self, grad: Tensor, left: Tensor, routing: Routing, gather: bool, weights: Tensor | None = None
    ) -> Tensor:
        """(E, out, R), of the output's gradient as for ``grad_left``, rows weighted by their slot's weight if given."""
        grad_b = torch.empty_like(self.b, dtype=self.grad_dtypes[1])
        if self._whole:
            self.stages.grouped_gram(grad, left, routing, gather_a=gather, gather_b=False, out=grad_b, weights=weights)
            return grad_b
        halves = zip(grad.chunk(2, dim=1), left.chunk(2, dim=1), grad_b.chunk(2, dim=1), strict=True)
        for own_grad, own_left, out in halves:
            self.stages.grouped_gram(own_grad, own_left, routing, gather, False, out=out, weights=weights)
        return grad_b
