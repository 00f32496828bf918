"""The pipeline stages as Triton launches: the functions of ``reference``, over the same arguments.

Each stage is one launch (routing two for many slots). Nothing waits for the device, and every size comes from shapes alone.
What depends on the layer alone, not on the number of tokens, is worked out once and cached as a ``plan.Plan``.
"""

from .decode import decode, use_decode
from .down_backward import down_backward
from .gemm import grouped_gemm, grouped_up, shrink
from .gram import grouped_gram, grouped_row_sum
from .packed import dequantize
from .permute import combine, combine_backward, dispatch
from .routing import route, route_sorted

__all__ = [
    "combine",
    "combine_backward",
    "decode",
    "dequantize",
    "dispatch",
    "down_backward",
    "grouped_gemm",
    "grouped_gram",
    "grouped_row_sum",
    "grouped_up",
    "route",
    "route_sorted",
    "shrink",
    "use_decode",
]
