"""Back through combine, the down projection and the gate in one grouped GEMM.

With g = grad_y[token] · w_down[expert], a tile of g is all the epilogue needs next to the saved gate_up: the gradient of
gate_up, the weighted h that the down projection's weight gradient reads, and this tile's share of the routing weight's
gradient rowsum(g · h). Neither g nor the down projection's output ever reaches memory.
"""

import triton
import triton.language as tl

from .common import apply_gate, apply_gate_backward
from .grouped_gemm import load_weight


@triton.jit
def down_backward_kernel(
    grad_y_ptr,  # (T, H)
    w,  # (E, I, H) view of the down projection: element pointer, or descriptor of (E·I, H) or (E·H, I)
    bias_ptr,  # (E, H) of the down projection
    gate_up_ptr,  # (S, COLUMNS)
    weights_ptr,  # (S,) routing weights by slot
    grad_gate_up_ptr,  # (S, COLUMNS) out
    weighted_h_ptr,  # (S, I) out
    grad_weights_ptr,  # (S, N_TILES) fp32 out, by slot: parts of the routing weights' gradient
    offsets_ptr,  # (E+1,)
    row_to_slot_ptr,  # (S,)
    tile_expert_ptr,  # (tiles,)
    tile_row_ptr,  # (tiles,)
    num_experts,
    stride_yt,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    alpha,
    limit,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    COLUMNS: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_WEIGHTED_H: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (tiles · ⌈I / BLOCK_N⌉,), column tiles fastest."""
    N_TILES: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    n_tile = tl.program_id(0) % N_TILES
    n = n_tile * BLOCK_N
    expert = tl.load(tile_expert_ptr + tile)
    if (expert < 0) | (expert >= num_experts):
        return
    row = tl.load(tile_row_ptr + tile)
    end = tl.load(offsets_ptr + expert + 1)
    rows = row + tl.arange(0, BLOCK_M)
    live = rows < end
    slots = tl.load(row_to_slot_ptr + rows, mask=live, other=0)
    tokens = slots // TOP_K
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    y_ptrs = grad_y_ptr + tokens.to(tl.int64)[:, None] * stride_yt + offs_k[None, :]
    if WEIGHTS == "pointer":
        w_tile = w + expert.to(tl.int64) * stride_we + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
        first = 0
    else:
        w_tile = w
        first = expert * (I if WEIGHTS == "rows" else H)

    g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dots = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            y = tl.load(y_ptrs)
        else:
            y = tl.load(y_ptrs, mask=offs_k[None, :] < H - k, other=0.0)
        wt = load_weight(w_tile, first, n, k, offs_n, offs_k, I, H, WEIGHTS, BLOCK_N, BLOCK_K)
        g = tl.dot(y, wt, g, input_precision=PRECISION)
        if HAS_BIAS and n_tile == 0:
            bias = tl.load(bias_ptr + expert * stride_be + k + offs_k, mask=offs_k < H - k, other=0.0)
            dots += tl.sum(y.to(tl.float32) * bias.to(tl.float32)[None, :], axis=1)
        y_ptrs += BLOCK_K
        if WEIGHTS == "pointer":
            w_tile += BLOCK_K * stride_wk

    in_n = offs_n < I
    mask = live[:, None] & in_n[None, :]
    rows64 = rows.to(tl.int64)
    columns = rows64[:, None] * COLUMNS + (offs_n * COLUMN_STRIDE)[None, :]
    gate = tl.load(gate_up_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(gate_up_ptr + columns + UP_OFFSET, mask=mask, other=0.0).to(tl.float32)
    else:
        up = gate
    h = apply_gate(gate, up, alpha, limit, ACTIVATION, GATED)
    # Masked columns hold act(0)·0 = 0 but for swiglu_oai and products with g's leftovers, which must not count.
    dots += tl.sum(tl.where(mask, g * h, 0.0), axis=1)
    tl.store(grad_weights_ptr + slots * N_TILES + n_tile, dots, mask=live)
    weight = tl.load(weights_ptr + slots, mask=live, other=0.0).to(tl.float32)[:, None]
    if SAVE_WEIGHTED_H:
        out = weighted_h_ptr + rows64[:, None] * I + offs_n[None, :]
        tl.store(out, (h * weight).to(weighted_h_ptr.dtype.element_ty), mask=mask)
    grad_gate, grad_up = apply_gate_backward(gate, up, g * weight, alpha, limit, ACTIVATION, GATED)
    tl.store(grad_gate_up_ptr + columns, grad_gate.to(grad_gate_up_ptr.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(grad_gate_up_ptr + columns + UP_OFFSET, grad_up.to(grad_gate_up_ptr.dtype.element_ty), mask=mask)
