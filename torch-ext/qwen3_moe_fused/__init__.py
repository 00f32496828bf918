"""Fused mixture-of-experts layers in Triton: grouped GEMMs with gather, gate and combine, forward and backward.

``moe_experts`` is the whole expert MLP, ``moe_fused_linear`` one grouped linear layer, ``Packed4bitWeights`` a stack of
4-bit weights for either, ``layers`` what ``kernels.kernelize`` puts on a model, ``reference`` all of it in plain torch.
"""

from . import layers, reference
from .experts import moe_experts
from .linear import moe_fused_linear, moe_fused_linear_4bit
from .lora import LoraWeights
from .permute import route
from .quantization import Format4bit, Packed4bitWeights, Piece
from .routing import Routing

__all__ = [
    "Format4bit",
    "LoraWeights",
    "Packed4bitWeights",
    "Piece",
    "Routing",
    "layers",
    "moe_experts",
    "moe_fused_linear",
    "moe_fused_linear_4bit",
    "reference",
    "route",
]
