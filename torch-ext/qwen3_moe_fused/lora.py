"""``LoraWeights``: a low-rank adapter (LoRA, arXiv:2106.09685) of an expert stack as callers pass it, and its checks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .ops.arguments import NO_LORA, LoraArguments
from .packed import Packed4bitWeights


class LoraWeights(NamedTuple):
    """One adapter of a stack of experts: the weights of expert e become W[e] + scaling · b[e] · a[e].

    Attributes:
        a: (E, r, in); or (E, 2·r, in) over a gated up projection whose gate and up features have factors apart, the
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
        return is_separate(self)


def is_separate(lora: LoraWeights) -> bool:
    """Whether gate and up have an ``a`` each, as a function: torch.compile does not trace a NamedTuple's property in 2.9."""
    return lora.a.shape[1] == 2 * lora.b.shape[2]


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
    """The adapters that a caller gave, which may be one, several or none, as a list.

    Args:
        name: the argument's name.
        weight: the weights (E, out, in) that they adapt; (E, in, out) if ``transposed``.
        like_name, like: a tensor on the device where the adapters must be, and its name.
        halves: gate and up features stand side by side, so they may have factors apart.

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


def fused(adapters: Sequence[LoraWeights]) -> LoraArguments:
    """One adapter that adds what all of ``adapters`` add, with their ranks side by side. Differentiable."""
    if not adapters:
        return NO_LORA
    if len(adapters) == 1:
        return LoraArguments(adapters[0].a, adapters[0].b, adapters[0].scaling)
    dtype = functools.reduce(torch.promote_types, (value.dtype for lora in adapters for value in (lora.a, lora.b)))
    scalings = {float(lora.scaling) for lora in adapters}
    if len(scalings) == 1:
        scaling, factors = scalings.pop(), [lora.b.to(dtype) for lora in adapters]
    else:  # in fp32 at least, so that b is rounded once
        wide = torch.promote_types(dtype, torch.float32)
        scaling, factors = 1.0, [lora.b.to(wide) * lora.scaling for lora in adapters]
    b = torch.cat(factors, dim=2)
    if not any(is_separate(lora) for lora in adapters):
        return LoraArguments(torch.cat([lora.a.to(dtype) for lora in adapters], dim=1), b, scaling)
    halves = [lora.a.to(dtype).chunk(2, dim=1) if is_separate(lora) else (lora.a.to(dtype),) * 2 for lora in adapters]
    gates, ups = zip(*halves, strict=True)
    return LoraArguments(torch.cat([*gates, *ups], dim=1), b, scaling)
