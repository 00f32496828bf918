"""The ``quantization_config`` with which Transformers quantizes a dense checkpoint to one of the 4-bit formats."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import Mxfp4Config

from moe_fused.integrations.transformers.experts_module import is_experts
from moe_fused.quantized import PUBLISHED

from .packed_experts import four_bit_config
from .published import compressed_config


def config_for(quant_type: str, model: nn.Module, dtype: torch.dtype, *, double_quant: bool = True) -> Any:
    """Makes the config for a model.

    Args:
        quant_type: ``"nf4"``, ``"fp4"``, ``"mxfp4"`` or ``"nvfp4"``.
        model: the dense model, which may be on meta.
        dtype: the dtype that products with the weights compute in.
        double_quant: whether the scales of nf4 and fp4 are held in 8 bits.
    """
    if quant_type not in PUBLISHED:
        return four_bit_config(dtype, quant_type, double_quant)
    if quant_type == "mxfp4" and has_stacks_alone(model):
        return Mxfp4Config()
    return compressed_config(quant_type)


def has_stacks_alone(model: nn.Module) -> bool:
    """Whether checkpoints of a model have no matrix for each expert, as those of gpt-oss."""
    return any(getattr(module, "is_transposed", False) for module in model.modules() if is_experts(module))
