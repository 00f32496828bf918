"""The pipeline stages as Triton launches: the functions of ``reference``, over the same arguments.

Each stage is one launch (routing two for many slots). Nothing waits for the device, and every size comes from shapes alone.
What depends on the layer alone, not on the number of tokens, is worked out once and cached as a ``plan.BoundKernel``.
"""

from .dequantize import dequantize
from .down_backward import down_backward
from .few_rows import few_rows_linear, few_slots
from .gemv import gemv_experts
from .grouped_gemm import grouped_gemm, grouped_up, shrink
from .grouped_wgrad import grouped_row_sum, grouped_wgrad
from .paths import use_gemv
from .permute import combine, combine_backward, dispatch
from .routing import route, route_sorted

__all__ = [
    "combine",
    "combine_backward",
    "dequantize",
    "dispatch",
    "down_backward",
    "few_rows_linear",
    "few_slots",
    "gemv_experts",
    "grouped_gemm",
    "grouped_row_sum",
    "grouped_up",
    "grouped_wgrad",
    "route",
    "route_sorted",
    "shrink",
    "use_gemv",
]
