"""Fused mixture-of-experts layers in Triton: grouped GEMMs with gather, gate and combine, forward and backward.

``moe_experts`` is the whole expert MLP, ``experts_forward`` the same as a function for Transformers' experts interface,
``moe_fused_linear`` one grouped linear layer, ``linear_4bit`` ordinary linear layers of a few rows, ``Packed4bitWeights`` a
stack of 4-bit weights for any of them, ``layers`` what ``kernels.kernelize`` puts on a model, ``reference`` all of it in
plain torch.
"""

from . import formats, interchange, layers, modules
from .experts import moe_experts
from .experts_module import experts_forward
from .formats import Format4bit
from .interchange import Piece
from .linear import linear_4bit, moe_fused_linear, moe_fused_linear_4bit
from .lora import LoraWeights
from .packed import Packed4bitWeights
from .permute import route
from .routing import Routing
from .stages import reference

__all__ = [
    "Format4bit",
    "LoraWeights",
    "Packed4bitWeights",
    "Piece",
    "Routing",
    "experts_forward",
    "formats",
    "interchange",
    "layers",
    "linear_4bit",
    "modules",
    "moe_experts",
    "moe_fused_linear",
    "moe_fused_linear_4bit",
    "reference",
    "route",
]
