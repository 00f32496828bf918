"""The pipeline stages as Triton launches: the functions of ``reference``, over the same arguments.

Each stage is one launch (routing two for many slots). Nothing waits for the device, and every size comes from shapes alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .activations import Gate
from .kernels import decode as decode_kernels
from .kernels import permute as permute_kernels
from .kernels import routing as routing_kernels
from .kernels.down_backward import bias_dots_kernel, down_backward_kernel
from .kernels.grouped_gemm import grouped_gemm_kernel, grouped_up_kernel
from .kernels.grouped_gram import grouped_gram_kernel, grouped_row_sum_kernel

if TYPE_CHECKING:
    from .routing import Routing

# Slots up to which ``decode`` serves a call without gradients.
DECODE_SLOTS = 64
# One-hot matrices of the routing kernels hold this many elements, blocks of slots are counted in parallel beyond this.
ROUTING_TILE = 16384
ROUTING_SINGLE_SLOTS = 1024
ROUTING_BLOCKS = 256

F = TypeVar("F", bound=Callable[..., Any])


def _on_device(stage: F) -> F:
    """Launches on the device of the stage's first argument, which need not be the current one."""

    @functools.wraps(stage)
    def wrapper(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.device.type == "cuda" and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return stage(first, *args, **kwargs)
        return stage(first, *args, **kwargs)

    return wrapper  # type: ignore[return-value]


def _precision(dtype: torch.dtype) -> str:
    """tl.dot's fp32 arithmetic: as torch multiplies matrices."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def _config(kernel: str, num_rows: int, num_experts: int, like: Tensor) -> tuning.LaunchConfig:
    target = tuning.target_of(like.device)
    return tuning.launch_config(kernel, tuning.bucket(num_rows, num_experts), target, like.element_size())


def _tile_height(num_rows: int, num_experts: int, device: torch.device, dtype: torch.dtype) -> int:
    return tuning.tile_height(tuning.bucket(num_rows, num_experts), tuning.target_of(device), dtype.itemsize)


def _num_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """Upper bound of the row tiles; the launches beyond the real number end at once."""
    return num_rows // block_m + num_experts + 1


def _weight_operand(stack: Tensor, config: tuning.LaunchConfig) -> tuple[Any, str]:
    """(kernel argument, WEIGHTS mode) of an (E, N, K) stack: a descriptor if asked for and the layout allows it."""
    num_experts, n, k = stack.shape
    if config.descriptor and stack.data_ptr() % 16 == 0 and stack.stride(0) == n * k:
        if stack.stride(2) == 1 and stack.stride(1) == k and k * stack.element_size() % 16 == 0:
            block = [config.block_n, config.block_k]
            return TensorDescriptor(stack, [num_experts * n, k], [k, 1], block), "rows"
        # A block across the end of an expert would multiply zeros with the next expert's weights, which may be Inf.
        aligned = n * stack.element_size() % 16 == 0 and k % config.block_k == 0
        if stack.stride(1) == 1 and stack.stride(2) == n and aligned:
            block = [config.block_k, config.block_n]
            return TensorDescriptor(stack, [num_experts * k, n], [n, 1], block), "columns"
    return stack, "pointer"


def _rows_operand(a: Tensor, config: tuning.LaunchConfig, block: list[int]) -> tuple[Any, bool]:
    """(kernel argument, whether it is a descriptor) of rows (S, K) that are not gathered, read in blocks of ``block``."""
    row_bytes = a.stride(0) * a.element_size()
    if config.descriptor and a.numel() > 0 and row_bytes % 16 == 0 and a.data_ptr() % 16 == 0:
        return TensorDescriptor(a, list(a.shape), [a.stride(0), 1], block), True
    return a, False


def _rows(a: Tensor) -> Tensor:
    """``a`` with contiguous features."""
    return a if a.stride(-1) == 1 and a.shape[-1] else a.contiguous()


def _experts_block(num_experts: int) -> int:
    return max(triton.next_power_of_2(num_experts), 2)


@_on_device
def route(top_k_index: Tensor, routing: Routing, dtype: torch.dtype) -> None:
    """``reference.route``."""
    num_slots, num_experts = top_k_index.numel(), routing.num_experts
    if num_slots == 0:
        routing.offsets.zero_()
        return
    ids = top_k_index.contiguous()
    experts = _experts_block(num_experts)
    sub = max(16, min(128, ROUTING_TILE // experts))
    single = num_slots <= ROUTING_SINGLE_SLOTS
    if single:
        num_blocks, block = 1, triton.next_power_of_2(max(num_slots, sub))
        counts = routing.offsets  # not read
    else:
        block = sub * triton.cdiv(num_slots, sub * ROUTING_BLOCKS)
        num_blocks = triton.cdiv(num_slots, block)
        counts = ids.new_empty((num_blocks, experts), dtype=torch.int32)
        routing_kernels.count_kernel[(num_blocks,)](
            ids, counts, num_experts, num_slots, BLOCK_S=block, SUB_S=sub, EXPERTS=experts
        )
    block_m = _tile_height(num_slots, num_experts, ids.device, dtype)
    tiles = _num_tiles(num_slots, num_experts, block_m)
    routing_kernels.route_kernel[(num_blocks,)](
        ids,
        counts,
        routing.offsets,
        routing.row_to_slot,
        routing.slot_to_row,
        routing.tile_expert,
        routing.tile_row,
        num_experts,
        num_slots,
        num_blocks,
        tiles,
        triton.cdiv(tiles, num_blocks),
        BLOCK_S=block,
        SUB_S=sub,
        SUB_B=max(1, min(ROUTING_TILE // experts, triton.next_power_of_2(num_blocks))),
        EXPERTS=experts,
        BLOCK_M=block_m,
        SINGLE=single,
    )


@_on_device
def route_sorted(m_sizes: Tensor, num_rows: int, routing: Routing, dtype: torch.dtype) -> None:
    """``reference.route_sorted``."""
    num_experts = routing.num_experts
    if num_experts == 0:
        routing.offsets.zero_()
        routing.tile_expert.fill_(-1)
        return
    experts = _experts_block(num_experts)
    block_m = _tile_height(num_rows, num_experts, m_sizes.device, dtype)
    tiles = _num_tiles(num_rows, num_experts, block_m)
    sub = max(16, min(128, ROUTING_TILE // experts))
    num_blocks = triton.cdiv(tiles, sub)
    routing_kernels.route_sorted_kernel[(num_blocks,)](
        m_sizes,
        routing.offsets,
        routing.tile_expert,
        routing.tile_row,
        num_experts,
        num_rows,
        tiles,
        sub,
        m_sizes.stride(0),
        EXPERTS=experts,
        BLOCK_M=block_m,
        SUB_T=sub,
    )


@_on_device
def grouped_gemm(
    a: Tensor, weight: Tensor, routing: Routing, num_rows: int, bias: Tensor | None, gather: bool, fill: float
) -> Tensor:
    """``reference.grouped_gemm``."""
    num_experts, n, k = weight.shape
    out = a.new_empty((num_rows, n))
    if out.numel() == 0:
        return out
    a = _rows(a)
    config = _config("gemm", num_rows, num_experts, a)
    a_operand, a_descriptor = (a, False) if gather else _rows_operand(a, config, [config.block_m, config.block_k])
    w_operand, weights = _weight_operand(weight, config)
    bias = bias if bias is None else bias.contiguous()
    grid = (_num_tiles(num_rows, num_experts, config.block_m) * triton.cdiv(n, config.block_n),)
    grouped_gemm_kernel[grid](
        a_operand,
        w_operand,
        out if bias is None else bias,
        out,
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
        num_experts,
        num_rows,
        a.stride(0),
        *weight.stride(),
        n,
        fill,
        N=n,
        K=k,
        TOP_K=routing.top_k,
        GATHER=gather,
        HAS_BIAS=bias is not None,
        A_DESCRIPTOR=a_descriptor,
        WEIGHTS=weights,
        PRECISION=_precision(a.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@_on_device
def grouped_up(
    x: Tensor, weight: Tensor, routing: Routing, num_rows: int, bias: Tensor | None, gate: Gate, save_gate_up: bool
) -> tuple[Tensor, Tensor]:
    """``reference.grouped_up``."""
    num_experts, columns, hidden = weight.shape
    intermediate = columns // 2 if gate.gated else columns
    h = x.new_empty((num_rows, intermediate))
    gate_up = x.new_empty((num_rows if save_gate_up else 0, columns))
    if h.numel() == 0:
        return h, gate_up
    x = _rows(x)
    config = _config("up", num_rows, num_experts, x)
    column_stride, up_offset = gate.column_layout(intermediate)
    w_operand, weights = (weight, "pointer") if gate.interleaved else _weight_operand(weight, config)
    bias = bias if bias is None else bias.contiguous()
    grid = (_num_tiles(num_rows, num_experts, config.block_m) * triton.cdiv(intermediate, config.block_n),)
    grouped_up_kernel[grid](
        x,
        w_operand,
        h if bias is None else bias,
        h,
        gate_up,
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
        num_experts,
        x.stride(0),
        *weight.stride(),
        columns,
        gate.alpha,
        gate.limit,
        H=hidden,
        I=intermediate,
        COLUMNS=columns,
        COLUMN_STRIDE=column_stride,
        UP_OFFSET=up_offset,
        TOP_K=routing.top_k,
        ACTIVATION=gate.activation,
        GATED=gate.gated,
        HAS_BIAS=bias is not None,
        SAVE_GATE_UP=save_gate_up,
        WEIGHTS=weights,
        PRECISION=_precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return h, gate_up


def _row_block(n: int) -> tuple[int, int]:
    """(columns, warps) of the kernels that pass over a row of n features once: 16 bytes a thread and more."""
    block = max(32, min(2048, triton.next_power_of_2(n)))
    return block, max(1, min(8, block // 256))


@_on_device
def combine(z: Tensor, routing: Routing, num_tokens: int, weights: Tensor | None) -> Tensor:
    """``reference.combine``."""
    n = z.shape[1]
    y = z.new_empty((num_tokens, n))
    if y.numel() == 0:
        return y
    block, warps = _row_block(n)
    permute_kernels.combine_kernel[(num_tokens, triton.cdiv(n, block))](
        z,
        y if weights is None else weights.contiguous(),
        y,
        routing.slot_to_row,
        N=n,
        TOP_K=routing.top_k,
        WEIGHTED=weights is not None,
        BLOCK_N=block,
        num_warps=warps,
    )
    return y


@_on_device
def dispatch(x: Tensor, routing: Routing, num_rows: int) -> Tensor:
    """``reference.dispatch``."""
    rows = x.new_empty((num_rows, x.shape[1]))
    _dispatch(_rows(x), rows, rows, rows, rows, routing, backward=False)
    return rows


@_on_device
def combine_backward(grad_y: Tensor, z: Tensor, routing: Routing, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.combine_backward``."""
    grad_z = torch.empty_like(z)
    grad_weights = torch.zeros(weights.numel(), dtype=torch.float32, device=z.device)
    _dispatch(_rows(grad_y), z, weights.contiguous(), grad_z, grad_weights, routing, backward=True)
    return grad_z, grad_weights.view(weights.shape).to(weights.dtype)


def _dispatch(
    x: Tensor, z: Tensor, weights: Tensor, rows: Tensor, grad_weights: Tensor, routing: Routing, backward: bool
) -> None:
    if rows.numel() == 0:
        return
    block, warps = _row_block(rows.shape[1])
    permute_kernels.dispatch_kernel[(rows.shape[0],)](
        x,
        z,
        weights,
        rows,
        grad_weights,
        routing.offsets,
        routing.row_to_slot,
        routing.num_experts,
        x.stride(0),
        N=rows.shape[1],
        TOP_K=routing.top_k,
        BACKWARD=backward,
        BLOCK_N=block,
        num_warps=warps,
    )


@_on_device
def down_backward(
    grad_y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate_up: Tensor,
    routing: Routing,
    top_k_weights: Tensor,
    gate: Gate,
    need_weighted_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.down_backward``."""
    num_experts, hidden, intermediate = weight.shape
    num_rows, columns = gate_up.shape
    grad_gate_up = torch.empty_like(gate_up)
    weighted_h = gate_up.new_empty((num_rows if need_weighted_h else 0, intermediate))
    if gate_up.numel() == 0:
        return grad_gate_up, weighted_h, torch.zeros_like(top_k_weights)
    grad_y = _rows(grad_y)
    config = _config("down_backward", num_rows, num_experts, grad_y)
    n_tiles = triton.cdiv(intermediate, config.block_n)
    column_stride, up_offset = gate.column_layout(intermediate)
    stack = weight.mT
    w_operand, weights = _weight_operand(stack, config)
    rows_operand, rows_descriptor = (grad_y, False)
    if config.gather_first and hidden * grad_y.element_size() % 16 == 0:
        rows_operand, rows_descriptor = _rows_operand(
            dispatch(grad_y, routing, num_rows), config, [config.block_m, config.block_k]
        )
    tiles = _num_tiles(num_rows, num_experts, config.block_m)
    num_parts = n_tiles + (bias is not None)
    # Zeros, for the slots of no expert.
    parts = torch.zeros((num_rows, num_parts), dtype=torch.float32, device=grad_y.device)
    down_backward_kernel[(tiles * n_tiles,)](
        rows_operand,
        w_operand,
        gate_up,
        top_k_weights.contiguous(),
        grad_gate_up,
        weighted_h,
        parts,
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
        num_experts,
        grad_y.stride(0),
        *stack.stride(),
        gate.alpha,
        gate.limit,
        H=hidden,
        I=intermediate,
        COLUMNS=columns,
        COLUMN_STRIDE=column_stride,
        UP_OFFSET=up_offset,
        TOP_K=routing.top_k,
        PARTS=num_parts,
        ACTIVATION=gate.activation,
        GATED=gate.gated,
        SAVE_WEIGHTED_H=need_weighted_h,
        ROWS_DESCRIPTOR=rows_descriptor,
        WEIGHTS=weights,
        PRECISION=_precision(grad_y.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SLICES=config.slices,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if bias is not None:
        bias_dots_kernel[(tiles,)](
            grad_y,
            bias.contiguous(),
            parts,
            routing.offsets,
            routing.row_to_slot,
            routing.tile_expert,
            routing.tile_row,
            num_experts,
            grad_y.stride(0),
            H=hidden,
            TOP_K=routing.top_k,
            PARTS=num_parts,
            BLOCK_M=config.block_m,
            BLOCK_K=64,
        )
    grad_weights = parts.sum(1).view(top_k_weights.shape).to(top_k_weights.dtype)
    return grad_gate_up, weighted_h, grad_weights


@_on_device
def grouped_gram(a: Tensor, b: Tensor, routing: Routing, gather_a: bool, gather_b: bool, out: Tensor) -> None:
    """``reference.grouped_gram``."""
    if out.stride(2) != 1 and out.stride(1) == 1:
        # Columns of the output are what the kernel stores side by side.
        return grouped_gram.__wrapped__(b, a, routing, gather_b, gather_a, out.mT)  # type: ignore[attr-defined,no-any-return]
    num_experts, m, n = out.shape
    if out.numel() == 0:
        return None
    if a.shape[0] == 0:
        out.zero_()
        return None
    a, b = _rows(a), _rows(b)
    num_rows = a.shape[0] * (routing.top_k if gather_a else 1)
    config = _config("gram", num_rows, num_experts, a)
    if config.gather_first:
        a = dispatch(a, routing, num_rows) if gather_a else a
        b = dispatch(b, routing, num_rows) if gather_b else b
        gather_a = gather_b = False
    a_operand, a_descriptor = (a, False) if gather_a else _rows_operand(a, config, [config.block_k, config.block_m])
    b_operand, b_descriptor = (b, False) if gather_b else _rows_operand(b, config, [config.block_k, config.block_n])
    grid = (num_experts * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    grouped_gram_kernel[grid](
        a,
        b,
        a_operand,
        b_operand,
        out,
        routing.offsets,
        routing.row_to_slot,
        a.stride(0),
        b.stride(0),
        *out.stride(),
        M=m,
        N=n,
        TOP_K=routing.top_k,
        GATHER_A=gather_a,
        GATHER_B=gather_b,
        A_DESCRIPTOR=a_descriptor,
        B_DESCRIPTOR=b_descriptor,
        PRECISION=_precision(a.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=4,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return None


@_on_device
def grouped_row_sum(a: Tensor, routing: Routing, weights: Tensor | None, gather: bool) -> Tensor:
    """``reference.grouped_row_sum``."""
    n = a.shape[1]
    out = a.new_zeros((routing.num_experts, n))
    if out.numel() == 0 or a.shape[0] == 0:
        return out
    a = _rows(a)
    block = max(16, min(128, triton.next_power_of_2(n)))
    grouped_row_sum_kernel[(routing.num_experts, triton.cdiv(n, block))](
        a,
        a if weights is None else weights.contiguous(),
        out,
        routing.offsets,
        routing.row_to_slot,
        a.stride(0),
        N=n,
        TOP_K=routing.top_k,
        GATHER=gather,
        WEIGHTED=weights is not None,
        BLOCK_N=block,
        BLOCK_K=32,
    )
    return out


def use_decode(num_tokens: int, top_k: int, down: Tensor) -> bool:
    """``reference.use_decode``: with few slots sorting costs more launches than sharing weights saves bytes."""
    return 0 < num_tokens * top_k <= DECODE_SLOTS and down.numel() > 0


@_on_device
def decode(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate: Gate,
) -> Tensor:
    """The expert MLP for a few slots, without gradients.

    Args:
        x: (T, H). top_k_index, top_k_weights: (T, top_k).
        up: (E, 2·I or I, H), up_bias: (E, 2·I or I) or None. down: (E, H, I), down_bias: (E, H) or None.

    Returns:
        (T, H) in the dtype of x.
    """
    num_tokens, top_k = top_k_index.shape
    num_experts, hidden, intermediate = down.shape
    x, ids = _rows(x), top_k_index.contiguous()
    h = x.new_empty((num_tokens * top_k, intermediate))
    y = torch.empty_like(x)
    column_stride, up_offset = gate.column_layout(intermediate)
    up_bias = up_bias if up_bias is None else up_bias.contiguous()
    down_bias = down_bias if down_bias is None else down_bias.contiguous()
    block_n = 8
    block_k = min(512, triton.next_power_of_2(hidden))
    decode_kernels.decode_up_kernel[(num_tokens * top_k, triton.cdiv(intermediate, block_n))](
        x,
        ids,
        up,
        h if up_bias is None else up_bias,
        h,
        num_experts,
        x.stride(0),
        *up.stride(),
        up.shape[1],
        gate.alpha,
        gate.limit,
        H=hidden,
        I=intermediate,
        COLUMN_STRIDE=column_stride,
        UP_OFFSET=up_offset,
        TOP_K=top_k,
        ACTIVATION=gate.activation,
        GATED=gate.gated,
        HAS_BIAS=up_bias is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )
    decode_kernels.decode_down_kernel[(num_tokens, triton.cdiv(hidden, block_n))](
        h,
        ids,
        top_k_weights.contiguous(),
        down,
        y if down_bias is None else down_bias,
        y,
        num_experts,
        *down.stride(),
        hidden,
        H=hidden,
        I=intermediate,
        TOP_K=top_k,
        HAS_BIAS=down_bias is not None,
        BLOCK_N=block_n,
        BLOCK_K=min(1024, triton.next_power_of_2(intermediate)),
    )
    return y
