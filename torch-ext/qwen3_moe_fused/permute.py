"""``route``: which rows of the grouped GEMMs belong to which expert, worked out from expert ids."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .ops.permute import RouteArguments, routing_buffer
from .routing import Routing


def route(top_k_index: Tensor, num_experts: int, dtype: torch.dtype = torch.bfloat16, packed: bool = False) -> Routing:
    """Sorts the slots of ``top_k_index`` by expert, stably and without a host synchronisation.

    Args:
        top_k_index: (T, top_k) integer expert ids; ids outside [0, num_experts) belong to no expert.
        num_experts: E.
        dtype, packed: what the grouped GEMMs that will use the routing compute in, and whether their weights are packed; the
            height of the row tiles depends on them.

    Returns:
        The ``Routing`` of the T·top_k slots.

    Raises:
        TypeError, ValueError: ``top_k_index`` is not a two-dimensional tensor of integers.
    """
    checks.tensor("top_k_index", top_k_index, ("T", "top_k"))
    checks.dtype("top_k_index", top_k_index, checks.INDEX_DTYPES)
    checks.expert_ids(top_k_index, num_experts)
    buffer = routing_buffer(RouteArguments(top_k_index, num_experts, dtype, packed))
    return Routing.from_buffer(buffer, top_k_index.numel(), num_experts, top_k_index.shape[-1], packed=packed)
