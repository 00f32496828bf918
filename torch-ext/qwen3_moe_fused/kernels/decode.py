"""A few slots, as in decoding: one matrix-vector product a slot, no sorting, two launches for the whole expert MLP.

Each weight is read once per slot that uses it; with few slots experts rarely repeat, and a repeat comes from the L2.
"""

import triton
import triton.language as tl

from .common import apply_gate


@triton.jit
def decode_up_kernel(
    x_ptr,  # (T, H)
    ids_ptr,  # (S,) expert ids, any integer dtype
    w_ptr,  # (E, COLUMNS, H)
    bias_ptr,  # (E, COLUMNS)
    h_ptr,  # (S, I) out
    NUM_EXPERTS: tl.constexpr,
    STRIDE_WE: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    COLUMNS: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[slot] = gate(w[expert] · x[token] + bias[expert]). Grid: (S, ⌈I / BLOCK_N⌉)."""
    slot = tl.program_id(0)
    expert = tl.load(ids_ptr + slot).to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_n = offs_n < I
    x_ptrs = x_ptr + (slot // TOP_K).to(tl.int64) * H + offs_k
    columns = offs_n * COLUMN_STRIDE
    w_ptrs = w_ptr + expert * STRIDE_WE + columns[:, None] * STRIDE_WN + offs_k[None, :] * STRIDE_WK
    gate = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        mask = in_n[:, None] & (offs_k < H - k)[None, :]
        x = tl.load(x_ptrs + k, mask=offs_k < H - k, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(w_ptrs + k * STRIDE_WK, mask=mask, other=0.0).to(tl.float32) * x
        if GATED:
            up += tl.load(w_ptrs + UP_OFFSET * STRIDE_WN + k * STRIDE_WK, mask=mask, other=0.0).to(tl.float32) * x
    g = tl.sum(gate, axis=1)
    u = tl.sum(up, axis=1)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert * COLUMNS + columns
        g += tl.load(bias_ptrs, mask=in_n, other=0.0).to(tl.float32)
        if GATED:
            u += tl.load(bias_ptrs + UP_OFFSET, mask=in_n, other=0.0).to(tl.float32)
    h = apply_gate(g, u, ALPHA, LIMIT, ACTIVATION, GATED)
    tl.store(h_ptr + slot * I + offs_n, h.to(h_ptr.dtype.element_ty), mask=in_n)


@triton.jit
def decode_down_kernel(
    h_ptr,  # (S, I)
    ids_ptr,  # (S,) expert ids, any integer dtype
    weights_ptr,  # (S,)
    w_ptr,  # (E, H, I)
    bias_ptr,  # (E, H)
    y_ptr,  # (T, H) out
    NUM_EXPERTS: tl.constexpr,
    STRIDE_WE: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[t] = Σ_k weights[t, k] · (w[expert] · h[slot] + bias[expert]), in slot order. Grid: (T, ⌈H / BLOCK_N⌉)."""
    token = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_n = offs_n < H
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    biases = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for slot_of_token in tl.range(0, TOP_K, loop_unroll_factor=2):
        slot = token * TOP_K + slot_of_token
        expert = tl.load(ids_ptr + slot).to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
        mine = (expert >= 0) & (expert < NUM_EXPERTS)
        weight = tl.load(weights_ptr + slot, mask=mine, other=0.0).to(tl.float32)
        w_ptrs = w_ptr + expert * STRIDE_WE + offs_n[:, None] * STRIDE_WN + offs_k[None, :] * STRIDE_WK
        for k in tl.static_range(0, I, BLOCK_K):
            in_k = (offs_k < I - k) & mine
            h = tl.load(h_ptr + slot * I + k + offs_k, mask=in_k, other=0.0).to(tl.float32) * weight
            w = tl.load(w_ptrs + k * STRIDE_WK, mask=in_n[:, None] & in_k[None, :], other=0.0).to(tl.float32)
            acc += w * h[None, :]
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert * H + offs_n, mask=in_n & mine, other=0.0).to(tl.float32)
            biases += bias * weight
    y = tl.sum(acc, axis=1) + biases
    tl.store(y_ptr + token.to(tl.int64) * H + offs_n, y.to(y_ptr.dtype.element_ty), mask=in_n)
