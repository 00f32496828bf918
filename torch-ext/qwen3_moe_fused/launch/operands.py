"""What the launches share: their configuration, and how tensors become kernel arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import tuning
from ..plan import Descriptor

if TYPE_CHECKING:
    from ..activations import Gate
    from ..routing import Routing
    from ..tuning import LaunchConfig


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def precision(dtype: torch.dtype) -> str:
    """tl.dot's fp32 arithmetic: as torch multiplies matrices, but on AMD GPUs, of which few have tf32, always exact."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    # The newer of torch's two settings; reading the older one raises once somebody set the newer.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:
        setting = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if setting == "tf32" else "ieee"


def config_of(kernel: str, num_rows: int, routing: Routing, like: Tensor) -> LaunchConfig:
    target = tuning.target_of(like.device)
    block_m = tuning.bucket(num_rows, routing.num_experts, routing.packed)
    return tuning.launch_config(kernel, block_m, target, like.element_size())


def tile_height(num_rows: int, routing: Routing, dtype: torch.dtype) -> int:
    return tuning.tile_height(tuning.bucket(num_rows, routing.num_experts, routing.packed), dtype.itemsize)


def weight_operand(stack: Tensor, config: LaunchConfig) -> tuple[Any, str]:
    """(kernel argument, WEIGHTS mode) of an (E, N, K) stack: a descriptor if asked for and the layout allows it."""
    if config.descriptor and stack.data_ptr() % 16 == 0:
        num_experts, n, k = stack.shape
        stride_e, stride_n, stride_k = stack.stride()
        itemsize = stack.element_size()
        if stride_k == 1 and stride_n == k and stride_e == n * k and k * itemsize % 16 == 0:
            return Descriptor(stack, (num_experts * n, k), (k, 1), (config.block_n, config.block_k)), "rows"
        # A block across the end of an expert would multiply zeros with the next expert's weights, which may be Inf.
        aligned = n * itemsize % 16 == 0 and k % config.block_k == 0
        if stride_n == 1 and stride_k == n and stride_e == n * k and aligned:
            return Descriptor(stack, (num_experts * k, n), (n, 1), (config.block_k, config.block_n)), "columns"
    return stack, "pointer"


def rows_operand(a: Tensor, config: LaunchConfig, block: tuple[int, int]) -> tuple[Any, bool]:
    """(kernel argument, whether it is a descriptor) of rows (S, K) of contiguous columns, read in blocks of ``block``."""
    if not config.descriptor:
        return a, False
    stride, _ = a.stride()
    if a.numel() > 0 and stride * a.element_size() % 16 == 0 and a.data_ptr() % 16 == 0:
        return Descriptor(a, tuple(a.shape), (stride, 1), block), True  # type: ignore[arg-type]
    return a, False


def whole_rows(a: Tensor) -> Tensor:
    """``a`` (S, K) with contiguous rows, which may lie apart."""
    if a.is_contiguous():
        return a
    row, column = a.stride()
    return a if column == 1 and row >= a.shape[1] else a.contiguous()


def tile_constants(config: LaunchConfig) -> dict[str, Any]:
    """The tile of a kernel's launch."""
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}


def stride_constants(strides: tuple[int, int, int]) -> dict[str, Any]:
    """The strides of a kernel's (E, N, K) weights."""
    return dict(zip(("STRIDE_WE", "STRIDE_WN", "STRIDE_WK"), strides, strict=True))


def gate_constants(gate: Gate, intermediate: int) -> dict[str, Any]:
    """The gate of a kernel, and how gate_up is laid out."""
    column_stride, up_offset = gate.column_layout(intermediate)
    return {
        "I": intermediate,
        "COLUMNS": gate.columns(intermediate),
        "COLUMN_STRIDE": column_stride,
        "UP_OFFSET": up_offset,
        "ACTIVATION": gate.activation,
        "GATED": gate.gated,
        "ALPHA": gate.alpha,
        "LIMIT": gate.limit,
    }
