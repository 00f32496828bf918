"""``moe_fused_linear``: one grouped linear layer over rows sorted by expert, with adapters. And ``linear_4bit``: ordinary
linear layers of a few rows, several in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .lora import Loras, LoraWeights, fused, is_separate
from .lora import check as check_loras
from .ops.arguments import NO_LORA, StackArguments
from .ops.few_rows import SEPARATOR, FewRowsArguments, few_rows_linear, parts_of
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


def linear_4bit(
    input: Tensor, weights: Sequence[Packed4bitWeights], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """Linear layers over the same few rows: ``output[m][t, o] = Σ_i weights[m][0, o, i] · input[t, i] + biases[m][o]``.

    This is for generation. Up to three matrices share a launch, as the projections to queries, keys and values do. More than
    64 rows are computed 64 at a time, each time with all weights. Weights are rounded to the dtype that it computes in
    before they are multiplied, and sums are fp32. It computes in the dtype of the weights (of autocast, where it is on).
    It has no gradient; ``moe_fused_linear`` has one.

    Args:
        input: (T, in); any strides.
        weights: for each layer one matrix, a stack (1, out, in); their out features and formats may differ.
        biases: (out,) or None for each layer; None if there are none.

    Returns:
        (T, out) for each layer, in the dtype it computed in.

    Raises:
        TypeError: not a tensor or not packed, or of a dtype that does not fit.
        ValueError: a shape or device that does not fit, or a number of biases.
        NotImplementedError: a gradient of the input or of a bias is asked for.
        RuntimeError: a GPU or Triton version that is not supported.
    """
    weights = tuple(weights)
    if not weights:
        raise ValueError("weights must be at least one matrix, got none")
    biases = (None,) * len(weights) if biases is None else tuple(biases)
    if len(biases) != len(weights):
        raise ValueError(f"biases must be {len(weights)}, as many as weights, got {len(biases)}")
    checks.tensor("input", input, ("T", "in"))
    autocast = autocast_dtype(input.device)
    operands_of: list[tuple[Tensor, list[Tensor], str]] = []
    tensors: list[Tensor] = []
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name = f"weights[{index}]"
        if not isinstance(weight, Packed4bitWeights):
            raise TypeError(f"{name} must be Packed4bitWeights, got {type(weight).__name__}")
        check(name, weight, (1, "out", input.shape[1]))
        checks.device(name, weight, "input", input)
        if autocast is None:
            checks.dtype(name, weight, (input.dtype,), " like input")
        operands_of.append(operands(weight if autocast is None else weight.to(dtype=autocast)))
        if bias is None:
            tensors.append(input.new_empty(0))
            continue
        checks.tensor(f"biases[{index}]", bias, (weight.shape[1],))
        checks.device(f"biases[{index}]", bias, "input", input)
        if autocast is None:
            checks.dtype(f"biases[{index}]", bias, (input.dtype,), " like input")
        tensors.append(bias.to(input.dtype if autocast is None else autocast))
    checks.dtype("input", input, checks.FLOAT_DTYPES)
    if torch.is_grad_enabled() and any(value.requires_grad for value in (input, *tensors)):
        raise NotImplementedError(
            "input and biases must not require a gradient: linear_4bit has none, moe_fused_linear has"
        )
    packed, scales, formats = zip(*operands_of, strict=True)
    arguments = FewRowsArguments(
        input if autocast is None else input.to(autocast),
        list(packed),
        [scale for each in scales for scale in each],
        SEPARATOR.join(formats),
        tensors,
    )
    return parts_of(few_rows_linear(arguments), input.shape[0], [weight.shape[1] for weight in weights])
