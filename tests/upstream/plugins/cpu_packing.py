"""Leaves bitsandbytes' path for avx512_bf16 on while ``moe_fused`` is enabled, on every processor.

Where the processor lacks the instructions, the product with packed weights runs in plain torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fused.integrations.quantizer import bitsandbytes_cpu


def _product(functional: Any) -> Callable[..., Tensor]:
    """bitsandbytes' ``gemv_4bit`` for packed weights in plain torch, with bfloat16 scales as the instructions have them."""

    def gemv_4bit(x: Tensor, weight: Tensor, out: Any = None, state: Any = None, **_: Any) -> Tensor:
        # A copy, because bitsandbytes as it is changes the state.
        data, _ = functional._convert_weight_packed_for_cpu_inverse(weight, copy.copy(state))
        data = data.reshape(-1).view(torch.uint8)
        nibbles = torch.stack([data >> 4, data & 0xF], dim=1).reshape(state.shape)
        scales = state.absmax.T.repeat_interleave(state.blocksize, dim=1)
        dense = state.code[nibbles.int()].to(torch.bfloat16) * scales
        return torch.nn.functional.linear(x.to(torch.bfloat16), dense).to(x.dtype)

    return gemv_4bit


def _import() -> Any:
    with bitsandbytes_cpu._without_hub_kernel():
        from bitsandbytes import functional
    if not functional.has_avx512bf16():
        functional.gemv_4bit = _product(functional)
    return functional


def pack_everywhere() -> None:
    """Makes bitsandbytes pack the weights of layers that are made from now on, whatever the processor has."""
    _import()
    from bitsandbytes.nn import modules

    layers: Any = modules  # a layer calls this function when it is made
    layers.has_avx512bf16 = lambda: True


def pytest_configure() -> None:
    bitsandbytes_cpu._never_repack = lambda linear: lambda: None
    bitsandbytes_cpu._restore_repacked = lambda linear: None
    _import()
