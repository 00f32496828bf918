"""The pipeline stages as Triton launches: the functions of ``reference``, over the same arguments.

Each stage is one launch (routing two for many slots). Nothing waits for the device, and every size comes from shapes alone.
What depends on the layer alone, not on the number of tokens, is worked out once and cached as a ``Plan``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
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
from .plan import Plan

if TYPE_CHECKING:
    from .routing import Routing
    from .tuning import LaunchConfig, Target

# Slots up to which ``decode`` serves a call without gradients.
DECODE_SLOTS = 64
# The one-hot matrices of the routing kernels have this many elements.
ROUTING_TILE = 16384
# Slots that a single program routes; beyond, blocks of slots are counted first, in at most so many blocks.
ROUTING_SINGLE_SLOTS = 1024
ROUTING_BLOCKS = 256

F = TypeVar("F", bound=Callable[..., Any])


def _on_device(stage: F) -> F:
    """Launches on the device of the stage's first argument, which need not be the current one."""

    @functools.wraps(stage)
    def wrapper(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        device = first.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return stage(first, *args, **kwargs)
        return stage(first, *args, **kwargs)

    return wrapper  # type: ignore[return-value]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _index(tensor: Tensor) -> int:
    """The device index under which plans keep their compiled kernels."""
    return tensor.device.index or 0


def _precision(dtype: torch.dtype) -> str:
    """tl.dot's fp32 arithmetic: as torch multiplies matrices."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def _config(kernel: str, num_rows: int, num_experts: int, like: Tensor) -> LaunchConfig:
    target = tuning.target_of(like.device)
    return tuning.launch_config(kernel, tuning.bucket(num_rows, num_experts), target, like.element_size())


def _tile_height(num_rows: int, num_experts: int, device: torch.device, dtype: torch.dtype) -> int:
    return tuning.tile_height(tuning.bucket(num_rows, num_experts), tuning.target_of(device), dtype.itemsize)


def _num_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """Upper bound of the row tiles; the launches beyond the real number end at once."""
    return num_rows // block_m + num_experts + 1


def _weight_operand(stack: Tensor, config: LaunchConfig) -> tuple[Any, str]:
    """(kernel argument, WEIGHTS mode) of an (E, N, K) stack: a descriptor if asked for and the layout allows it."""
    if config.descriptor and stack.data_ptr() % 16 == 0:
        num_experts, n, k = stack.shape
        stride_e, stride_n, stride_k = stack.stride()
        itemsize = stack.element_size()
        if stride_k == 1 and stride_n == k and stride_e == n * k and k * itemsize % 16 == 0:
            return TensorDescriptor(stack, [num_experts * n, k], [k, 1], [config.block_n, config.block_k]), "rows"
        # A block across the end of an expert would multiply zeros with the next expert's weights, which may be Inf.
        aligned = n * itemsize % 16 == 0 and k % config.block_k == 0
        if stride_n == 1 and stride_k == n and stride_e == n * k and aligned:
            return TensorDescriptor(stack, [num_experts * k, n], [n, 1], [config.block_k, config.block_n]), "columns"
    return stack, "pointer"


def _rows_operand(a: Tensor, config: LaunchConfig, block: list[int]) -> tuple[Any, bool]:
    """(kernel argument, whether it is a descriptor) of rows (S, K) that are not gathered, read in blocks of ``block``."""
    row_bytes = a.stride(0) * a.element_size()
    if config.descriptor and a.numel() > 0 and row_bytes % 16 == 0 and a.data_ptr() % 16 == 0:
        return TensorDescriptor(a, list(a.shape), [a.stride(0), 1], block), True
    return a, False


def _rows(a: Tensor) -> Tensor:
    """``a`` with contiguous features."""
    return a if a.stride(-1) == 1 and a.shape[-1] else a.contiguous()


def _experts_block(num_experts: int) -> int:
    return max(_power_of_2(num_experts), 2)


def _routing_sub_block(experts: int) -> int:
    """Slots, or tiles, a routing kernel handles at a time."""
    return max(16, min(128, ROUTING_TILE // experts))


@functools.cache
def _count_plan(num_experts: int, block: int) -> Plan:
    experts = _experts_block(num_experts)
    constants = {
        "NUM_EXPERTS": num_experts,
        "BLOCK_S": block,
        "SUB_S": _routing_sub_block(experts),
        "EXPERTS": experts,
    }
    return Plan(routing_kernels.count_kernel, constants, num_warps=8)


@functools.cache
def _route_plan(num_experts: int, block: int, sub_blocks: int, block_m: int, single: bool) -> Plan:
    experts = _experts_block(num_experts)
    constants = {
        "NUM_EXPERTS": num_experts,
        "BLOCK_S": block,
        "SUB_S": _routing_sub_block(experts),
        "SUB_B": sub_blocks,
        "EXPERTS": experts,
        "BLOCK_M": block_m,
        "SINGLE": single,
    }
    return Plan(routing_kernels.route_kernel, constants, num_warps=8)


@_on_device
def route(top_k_index: Tensor, routing: Routing, dtype: torch.dtype) -> None:
    """``reference.route``."""
    num_slots, num_experts = top_k_index.numel(), routing.num_experts
    if num_slots == 0:
        routing.offsets.zero_()
        return
    ids = top_k_index.contiguous()
    device = _index(ids)
    experts = _experts_block(num_experts)
    sub = _routing_sub_block(experts)
    single = num_slots <= ROUTING_SINGLE_SLOTS
    if single:
        num_blocks, block, sub_blocks = 1, _power_of_2(max(num_slots, sub)), 1
        counts = routing.offsets  # not read
    else:
        # A power of two, so that few block sizes are ever compiled.
        block = sub * _power_of_2(_cdiv(num_slots, sub * ROUTING_BLOCKS))
        num_blocks = _cdiv(num_slots, block)
        sub_blocks = max(1, min(ROUTING_TILE // experts, _power_of_2(num_blocks)))
        counts = ids.new_empty((num_blocks, experts), dtype=torch.int32)
        _count_plan(num_experts, block)(device, (num_blocks, 1, 1), ids, counts, num_slots)
    block_m = _tile_height(num_slots, num_experts, ids.device, dtype)
    tiles = _num_tiles(num_slots, num_experts, block_m)
    _route_plan(num_experts, block, sub_blocks, block_m, single)(
        device,
        (num_blocks, 1, 1),
        ids,
        counts,
        routing.offsets,
        routing.row_to_slot,
        routing.slot_to_row,
        routing.tile_expert,
        routing.tile_row,
        num_slots,
        num_blocks,
        tiles,
        _cdiv(tiles, num_blocks),
    )


@functools.cache
def _route_sorted_plan(num_experts: int, stride: int, block_m: int) -> Plan:
    experts = _experts_block(num_experts)
    constants = {
        "NUM_EXPERTS": num_experts,
        "STRIDE_M": stride,
        "EXPERTS": experts,
        "BLOCK_M": block_m,
        "SUB_T": _routing_sub_block(experts),
    }
    return Plan(routing_kernels.route_sorted_kernel, constants, num_warps=8)


@_on_device
def route_sorted(m_sizes: Tensor, num_rows: int, routing: Routing, dtype: torch.dtype) -> None:
    """``reference.route_sorted``."""
    num_experts = routing.num_experts
    if num_experts == 0:
        routing.offsets.zero_()
        routing.tile_expert.fill_(-1)
        return
    block_m = _tile_height(num_rows, num_experts, m_sizes.device, dtype)
    tiles = _num_tiles(num_rows, num_experts, block_m)
    num_blocks = _cdiv(tiles, _routing_sub_block(_experts_block(num_experts)))
    _route_sorted_plan(num_experts, m_sizes.stride(0), block_m)(
        _index(m_sizes),
        (num_blocks, 1, 1),
        m_sizes,
        routing.offsets,
        routing.tile_expert,
        routing.tile_row,
        num_rows,
        tiles,
    )


@functools.cache
def _gemm_plan(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    stride_am: int,
    top_k: int,
    gather: bool,
    has_bias: bool,
    a_descriptor: bool,
    weights: str,
    precision: str,
) -> Plan:
    num_experts, n, k = shape
    constants = {
        "NUM_EXPERTS": num_experts,
        "STRIDE_AM": stride_am,
        "STRIDE_WE": strides[0],
        "STRIDE_WN": strides[1],
        "STRIDE_WK": strides[2],
        "N": n,
        "K": k,
        "TOP_K": top_k,
        "GATHER": gather,
        "HAS_BIAS": has_bias,
        "A_DESCRIPTOR": a_descriptor,
        "WEIGHTS": weights,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    return Plan(grouped_gemm_kernel, constants, config.num_warps, config.num_stages)


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
    config = _config("gemm" if k > tuning.SHORT_K else "gemm_short", num_rows, num_experts, a)
    a_operand, a_descriptor = (a, False) if gather else _rows_operand(a, config, [config.block_m, config.block_k])
    w_operand, weights = _weight_operand(weight, config)
    plan = _gemm_plan(
        config,
        weight.shape,
        weight.stride(),
        a.stride(0),
        routing.top_k,
        gather,
        bias is not None,
        a_descriptor,
        weights,
        _precision(a.dtype),
    )
    plan(
        _index(a),
        (_num_tiles(num_rows, num_experts, config.block_m) * _cdiv(n, config.block_n), 1, 1),
        a_operand,
        w_operand,
        out if bias is None else bias.contiguous(),
        out,
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
        num_rows,
        fill,
    )
    return out


@functools.cache
def _up_plan(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    stride_xt: int,
    top_k: int,
    gate: Gate,
    has_bias: bool,
    save_gate_up: bool,
    weights: str,
    precision: str,
) -> Plan:
    num_experts, columns, hidden = shape
    intermediate = gate.intermediate(columns)
    column_stride, up_offset = gate.column_layout(intermediate)
    constants = {
        "NUM_EXPERTS": num_experts,
        "STRIDE_XT": stride_xt,
        "STRIDE_WE": strides[0],
        "STRIDE_WN": strides[1],
        "STRIDE_WK": strides[2],
        "H": hidden,
        "I": intermediate,
        "COLUMNS": columns,
        "COLUMN_STRIDE": column_stride,
        "UP_OFFSET": up_offset,
        "TOP_K": top_k,
        "ACTIVATION": gate.activation,
        "GATED": gate.gated,
        "ALPHA": gate.alpha,
        "LIMIT": gate.limit,
        "HAS_BIAS": has_bias,
        "SAVE_GATE_UP": save_gate_up,
        "WEIGHTS": weights,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    return Plan(grouped_up_kernel, constants, config.num_warps, config.num_stages)


@_on_device
def grouped_up(
    x: Tensor, weight: Tensor, routing: Routing, num_rows: int, bias: Tensor | None, gate: Gate, save_gate_up: bool
) -> tuple[Tensor, Tensor | None]:
    """``reference.grouped_up``."""
    num_experts, columns, _ = weight.shape
    intermediate = gate.intermediate(columns)
    h = x.new_empty((num_rows, intermediate))
    gate_up = x.new_empty((num_rows, columns)) if save_gate_up else None
    if h.numel() == 0:
        return h, gate_up
    x = _rows(x)
    config = _config("up", num_rows, num_experts, x)
    w_operand, weights = (weight, "pointer") if gate.interleaved else _weight_operand(weight, config)
    plan = _up_plan(
        config,
        weight.shape,
        weight.stride(),
        x.stride(0),
        routing.top_k,
        gate,
        bias is not None,
        save_gate_up,
        weights,
        _precision(x.dtype),
    )
    plan(
        _index(x),
        (_num_tiles(num_rows, num_experts, config.block_m) * _cdiv(intermediate, config.block_n), 1, 1),
        x,
        w_operand,
        h if bias is None else bias.contiguous(),
        h,
        h if gate_up is None else gate_up,
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
    )
    return h, gate_up


def _row_block(n: int) -> tuple[int, int]:
    """(columns, warps) of the kernels that pass over a row of n features once: 16 bytes a thread."""
    block = max(32, min(2048, _power_of_2(n)))
    return block, max(1, min(8, block // 256))


@functools.cache
def _combine_plan(n: int, top_k: int, weighted: bool) -> tuple[Plan, int]:
    block, warps = _row_block(n)
    constants = {"N": n, "TOP_K": top_k, "WEIGHTED": weighted, "BLOCK_N": block}
    return Plan(permute_kernels.combine_kernel, constants, num_warps=warps), _cdiv(n, block)


@_on_device
def combine(z: Tensor, routing: Routing, num_tokens: int, weights: Tensor | None) -> Tensor:
    """``reference.combine``."""
    y = z.new_empty((num_tokens, z.shape[1]))
    if y.numel() == 0:
        return y
    plan, blocks = _combine_plan(z.shape[1], routing.top_k, weights is not None)
    plan(_index(z), (num_tokens, blocks, 1), z, y if weights is None else weights.contiguous(), y, routing.slot_to_row)
    return y


@functools.cache
def _dispatch_plan(num_experts: int, stride_xt: int, n: int, top_k: int, backward: bool) -> Plan:
    block, warps = _row_block(n)
    constants = {
        "NUM_EXPERTS": num_experts,
        "STRIDE_XT": stride_xt,
        "N": n,
        "TOP_K": top_k,
        "BACKWARD": backward,
        "BLOCK_N": block,
    }
    return Plan(permute_kernels.dispatch_kernel, constants, num_warps=warps)


def _dispatch(
    x: Tensor, z: Tensor, weights: Tensor, rows: Tensor, grad_weights: Tensor, routing: Routing, backward: bool
) -> None:
    if rows.numel() == 0:
        return
    plan = _dispatch_plan(routing.num_experts, x.stride(0), rows.shape[1], routing.top_k, backward)
    plan(
        _index(x),
        (rows.shape[0], 1, 1),
        x,
        z,
        weights,
        rows,
        grad_weights,
        routing.offsets,
        routing.row_to_slot,
    )


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


@functools.cache
def _down_backward_plan(
    config: LaunchConfig,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    stride_yt: int,
    top_k: int,
    gate: Gate,
    num_parts: int,
    save_weighted_h: bool,
    rows_descriptor: bool,
    weights: str,
    precision: str,
) -> Plan:
    num_experts, intermediate, hidden = shape
    column_stride, up_offset = gate.column_layout(intermediate)
    constants = {
        "NUM_EXPERTS": num_experts,
        "STRIDE_YT": stride_yt,
        "STRIDE_WE": strides[0],
        "STRIDE_WN": strides[1],
        "STRIDE_WK": strides[2],
        "H": hidden,
        "I": intermediate,
        "COLUMNS": gate.columns(intermediate),
        "COLUMN_STRIDE": column_stride,
        "UP_OFFSET": up_offset,
        "TOP_K": top_k,
        "PARTS": num_parts,
        "ACTIVATION": gate.activation,
        "GATED": gate.gated,
        "ALPHA": gate.alpha,
        "LIMIT": gate.limit,
        "SAVE_WEIGHTED_H": save_weighted_h,
        "ROWS_DESCRIPTOR": rows_descriptor,
        "WEIGHTS": weights,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SLICES": config.slices,
    }
    return Plan(down_backward_kernel, constants, config.num_warps, config.num_stages)


@functools.cache
def _bias_dots_plan(
    num_experts: int, stride_yt: int, hidden: int, top_k: int, num_parts: int, block_m: int
) -> Plan:
    constants = {
        "NUM_EXPERTS": num_experts,
        "STRIDE_YT": stride_yt,
        "H": hidden,
        "TOP_K": top_k,
        "PARTS": num_parts,
        "BLOCK_M": block_m,
        "BLOCK_K": 64,
    }
    return Plan(bias_dots_kernel, constants)


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
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``reference.down_backward``."""
    num_experts, hidden, intermediate = weight.shape
    num_rows = gate_up.shape[0]
    grad_gate_up = torch.empty_like(gate_up)
    weighted_h = gate_up.new_empty((num_rows, intermediate)) if need_weighted_h else None
    if gate_up.numel() == 0:
        return grad_gate_up, weighted_h, torch.zeros_like(top_k_weights)
    grad_y = _rows(grad_y)
    config = _config("down_backward", num_rows, num_experts, grad_y)
    n_tiles = _cdiv(intermediate, config.block_n)
    num_parts = n_tiles + (bias is not None)
    tiles = _num_tiles(num_rows, num_experts, config.block_m)
    stack = weight.mT
    w_operand, weights = _weight_operand(stack, config)
    rows_operand, rows_descriptor = grad_y, False
    if config.gather_first and hidden * grad_y.element_size() % 16 == 0:
        rows_operand, rows_descriptor = _rows_operand(
            dispatch(grad_y, routing, num_rows), config, [config.block_m, config.block_k]
        )
    plan = _down_backward_plan(
        config,
        stack.shape,
        stack.stride(),
        grad_y.stride(0),
        routing.top_k,
        gate,
        num_parts,
        need_weighted_h,
        rows_descriptor,
        weights,
        _precision(grad_y.dtype),
    )
    # Zeros, for the slots of no expert.
    parts = torch.zeros((num_rows, num_parts), dtype=torch.float32, device=grad_y.device)
    plan(
        _index(grad_y),
        (tiles * n_tiles, 1, 1),
        rows_operand,
        w_operand,
        gate_up,
        top_k_weights.contiguous(),
        grad_gate_up,
        grad_gate_up if weighted_h is None else weighted_h,
        parts,
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
    )
    if bias is not None:
        _bias_dots_plan(num_experts, grad_y.stride(0), hidden, routing.top_k, num_parts, config.block_m)(
            _index(grad_y),
            (tiles, 1, 1),
            grad_y,
            bias.contiguous(),
            parts,
            routing.offsets,
            routing.row_to_slot,
            routing.tile_expert,
            routing.tile_row,
        )
    grad_weights = parts.sum(1).view(top_k_weights.shape).to(top_k_weights.dtype)
    return grad_gate_up, weighted_h, grad_weights


@functools.cache
def _gram_plan(
    config: LaunchConfig,
    num_experts: int,
    stride_am: int,
    stride_bm: int,
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    top_k: int,
    gather_a: bool,
    gather_b: bool,
    a_descriptor: bool,
    b_descriptor: bool,
    precision: str,
) -> Plan:
    constants = {
        "STRIDE_AM": stride_am,
        "STRIDE_BM": stride_bm,
        "STRIDE_OE": strides[0],
        "STRIDE_OM": strides[1],
        "STRIDE_ON": strides[2],
        "M": shape[1],
        "N": shape[2],
        "TOP_K": top_k,
        "GATHER_A": gather_a,
        "GATHER_B": gather_b,
        "A_DESCRIPTOR": a_descriptor,
        "B_DESCRIPTOR": b_descriptor,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": 4,
    }
    return Plan(grouped_gram_kernel, constants, config.num_warps, config.num_stages)


@_on_device
def grouped_gram(a: Tensor, b: Tensor, routing: Routing, gather_a: bool, gather_b: bool, out: Tensor) -> None:
    """``reference.grouped_gram``."""
    if out.stride(2) != 1 and out.stride(1) == 1:
        # Columns of the output are what the kernel stores side by side.
        a, b, gather_a, gather_b, out = b, a, gather_b, gather_a, out.mT
    num_experts, m, n = out.shape
    if out.numel() == 0:
        return
    if a.shape[0] == 0:
        out.zero_()
        return
    a, b = _rows(a), _rows(b)
    num_rows = a.shape[0] * (routing.top_k if gather_a else 1)
    config = _config("gram", num_rows, num_experts, a)
    if config.gather_first and gather_a and n >= tuning.GATHER_FIRST_WIDTH:
        a, gather_a = dispatch(a, routing, num_rows), False
    if config.gather_first and gather_b and m >= tuning.GATHER_FIRST_WIDTH:
        b, gather_b = dispatch(b, routing, num_rows), False
    a_operand, a_descriptor = (a, False) if gather_a else _rows_operand(a, config, [config.block_k, config.block_m])
    b_operand, b_descriptor = (b, False) if gather_b else _rows_operand(b, config, [config.block_k, config.block_n])
    plan = _gram_plan(
        config,
        num_experts,
        a.stride(0),
        b.stride(0),
        out.shape,
        out.stride(),
        routing.top_k,
        gather_a,
        gather_b,
        a_descriptor,
        b_descriptor,
        _precision(a.dtype),
    )
    plan(
        _index(a),
        (num_experts * _cdiv(m, config.block_m) * _cdiv(n, config.block_n), 1, 1),
        a,
        b,
        a_operand,
        b_operand,
        out,
        routing.offsets,
        routing.row_to_slot,
    )


@functools.cache
def _row_sum_plan(stride_am: int, n: int, top_k: int, gather: bool, weighted: bool) -> tuple[Plan, int]:
    block = max(16, min(128, _power_of_2(n)))
    constants = {
        "STRIDE_AM": stride_am,
        "N": n,
        "TOP_K": top_k,
        "GATHER": gather,
        "WEIGHTED": weighted,
        "BLOCK_N": block,
        "BLOCK_K": 32,
    }
    return Plan(grouped_row_sum_kernel, constants), _cdiv(n, block)


@_on_device
def grouped_row_sum(a: Tensor, routing: Routing, weights: Tensor | None, gather: bool) -> Tensor:
    """``reference.grouped_row_sum``."""
    out = a.new_zeros((routing.num_experts, a.shape[1]))
    if out.numel() == 0 or a.shape[0] == 0:
        return out
    a = _rows(a)
    plan, blocks = _row_sum_plan(a.stride(0), a.shape[1], routing.top_k, gather, weights is not None)
    plan(
        _index(a),
        (routing.num_experts, blocks, 1),
        a,
        a if weights is None else weights.contiguous(),
        out,
        routing.offsets,
        routing.row_to_slot,
    )
    return out


def use_decode(num_tokens: int, top_k: int, down: Tensor) -> bool:
    """``reference.use_decode``: with few slots sorting costs more launches than sharing weights saves bytes."""
    return 0 < num_tokens * top_k <= DECODE_SLOTS and down.numel() > 0


@functools.cache
def _decode_plans(
    up_shape: tuple[int, int, int],
    up_strides: tuple[int, int, int],
    down_strides: tuple[int, int, int],
    stride_xt: int,
    top_k: int,
    gate: Gate,
    up_bias: bool,
    down_bias: bool,
) -> tuple[Plan, Plan]:
    num_experts, columns, hidden = up_shape
    intermediate = gate.intermediate(columns)
    column_stride, up_offset = gate.column_layout(intermediate)
    up = {
        "NUM_EXPERTS": num_experts,
        "STRIDE_XT": stride_xt,
        "STRIDE_WE": up_strides[0],
        "STRIDE_WN": up_strides[1],
        "STRIDE_WK": up_strides[2],
        "H": hidden,
        "I": intermediate,
        "COLUMNS": columns,
        "COLUMN_STRIDE": column_stride,
        "UP_OFFSET": up_offset,
        "TOP_K": top_k,
        "ACTIVATION": gate.activation,
        "GATED": gate.gated,
        "ALPHA": gate.alpha,
        "LIMIT": gate.limit,
        "HAS_BIAS": up_bias,
        "BLOCK_N": DECODE_BLOCK_N,
        "BLOCK_K": min(512, _power_of_2(hidden)),
    }
    down = {
        "NUM_EXPERTS": num_experts,
        "STRIDE_WE": down_strides[0],
        "STRIDE_WN": down_strides[1],
        "STRIDE_WK": down_strides[2],
        "H": hidden,
        "I": intermediate,
        "TOP_K": top_k,
        "HAS_BIAS": down_bias,
        "BLOCK_N": DECODE_BLOCK_N,
        "BLOCK_K": min(1024, _power_of_2(intermediate)),
    }
    return Plan(decode_kernels.decode_up_kernel, up), Plan(decode_kernels.decode_down_kernel, down)


# Output features a program of the decode kernels.
DECODE_BLOCK_N = 8


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
    _, hidden, intermediate = down.shape
    x, ids, device = _rows(x), top_k_index.contiguous(), _index(x)
    h = x.new_empty((num_tokens * top_k, intermediate))
    y = x.new_empty((num_tokens, hidden))
    up_plan, down_plan = _decode_plans(
        up.shape, up.stride(), down.stride(), x.stride(0), top_k, gate, up_bias is not None, down_bias is not None
    )
    up_plan(
        device,
        (num_tokens * top_k, _cdiv(intermediate, DECODE_BLOCK_N), 1),
        x,
        ids,
        up,
        h if up_bias is None else up_bias.contiguous(),
        h,
    )
    down_plan(
        device,
        (num_tokens, _cdiv(hidden, DECODE_BLOCK_N), 1),
        h,
        ids,
        top_k_weights.contiguous(),
        down,
        y if down_bias is None else down_bias.contiguous(),
        y,
    )
    return y
