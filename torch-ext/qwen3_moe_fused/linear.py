"""``moe_fused_linear``: one grouped linear layer over rows sorted by expert, with adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .lora import Loras, LoraWeights, fused, is_separate
from .lora import check as check_loras
from .ops.arguments import NO_LORA, StackArguments
from .ops.linear import Linear, LinearForward, Rows, grouped_linear
from .ops.permute import RouteSortedArguments, sorted_routing_buffer
from .packed import Packed4bitWeights
from .weights import any_packed, check, operands


def adapted_linear(
    input: Tensor,
    weight: Tensor | Packed4bitWeights,
    bias: Tensor | None,
    rows: Rows,
    loras: list[LoraWeights],
    transposed: bool = False,
) -> Tensor:
    """A grouped linear layer with adapters.

    The adapters are fused into one, but for those with dropout, whose input is not the layer's, and those whose gate and up
    features have factors apart.

    Args:
        transposed: the weight is stored (E, in, out).
    """
    stack = StackArguments(*operands(weight), transposed)
    if not loras:
        return grouped_linear(LinearForward(input, Linear(stack, NO_LORA, rows), bias))
    apart = [lora for lora in loras if lora.dropout or is_separate(lora)]
    together = fused([lora for lora in loras if not (lora.dropout or is_separate(lora))])
    y = grouped_linear(LinearForward(input, Linear(stack, together, rows), bias))
    for lora in apart:
        dropped = torch.nn.functional.dropout(input, lora.dropout)
        left = lora.scaling * _thin_product(dropped, lora.a.to(input.dtype), rows)
        lefts = left.chunk(2, dim=1) if is_separate(lora) else (left,)
        rights = lora.b.to(input.dtype).chunk(len(lefts), dim=1)
        parts = [_thin_product(half, right, rows) for half, right in zip(lefts, rights, strict=True)]
        y = y + (torch.cat(parts, dim=1) if is_separate(lora) else parts[0])
    return y


def _thin_product(input: Tensor, factor: Tensor, rows: Rows) -> Tensor:
    """The product of rows (S, in) with one factor of an adapter (E, out, in)."""
    return grouped_linear(LinearForward(input, Linear(StackArguments(factor, [], "", False), NO_LORA, rows)))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype matrix products compute in under autocast on ``device``, or None outside autocast."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def moe_fused_linear(
    input: Tensor,
    weight: Tensor | Packed4bitWeights,
    m_sizes: Tensor,
    bias: Tensor | None = None,
    lora: Loras = None,
) -> Tensor:
    """Grouped linear layer: ``output[b, o] = Σ_i weight[expert(b), o, i] · input[b, i] + bias[expert(b), o]``.

    Differentiable in input, weight, bias and adapters. Computes in the dtype of weight (of autocast, where it is on),
    accumulating in fp32. Never waits for the GPU: there, sizes that do not sum to S are only checked with
    ``MOE_FUSED_CHECK=1``; otherwise rows of no expert come back as NaN, all rows if the sizes sum to more than S. Also named
    ``moe_fused_linear_4bit``.

    Args:
        input: (S, in), rows sorted by expert; any strides.
        weight: (E, out, in); dense, of any strides, or packed, and then frozen.
        m_sizes: (E,) any integer dtype; the number of rows of each expert.
        bias: (E, out), optional.
        lora: an adapter, or several that all count: weight[e] + scaling · b[e] · a[e], never formed.

    Returns:
        (S, out) in the dtype it computed in.

    Raises:
        TypeError: not a tensor, or of a dtype that does not fit.
        ValueError: a shape or device that does not fit, or sizes that do not sum to S.
        RuntimeError: a GPU or Triton version that is not supported.
    """
    check("weight", weight, ("E", "out", "in"))
    num_experts, out_features, in_features = weight.shape
    checks.tensor("input", input, ("S", in_features))
    checks.tensor("m_sizes", m_sizes, (num_experts,))
    checks.dtype("weight", weight, checks.FLOAT_DTYPES)
    checks.dtype("m_sizes", m_sizes, checks.INDEX_DTYPES)
    checks.device("weight", weight, "input", input)
    checks.device("m_sizes", m_sizes, "input", input)
    if bias is not None:
        checks.tensor("bias", bias, (num_experts, out_features))
        checks.device("bias", bias, "input", input)
    dtype = autocast_dtype(input.device)
    if dtype is None:
        checks.dtype("input", input, (weight.dtype,), " like weight")
        if bias is not None:
            checks.dtype("bias", bias, (weight.dtype,), " like weight")
    else:
        checks.dtype("input", input, checks.FLOAT_DTYPES)
        input, weight = input.to(dtype), weight.to(dtype=dtype)
        bias = None if bias is None else bias.to(dtype)
    num_rows = input.shape[0]
    checks.sizes_sum(m_sizes, num_rows)
    loras = check_loras("lora", lora, weight, "input", input)
    packed = any_packed(weight)
    buffer = sorted_routing_buffer(RouteSortedArguments(m_sizes, num_rows, weight.dtype, packed))
    return adapted_linear(input, weight, bias, Rows(buffer, True, packed, 1, float("nan")), loras)


moe_fused_linear_4bit = moe_fused_linear
