"""A few slots, as in generation: one matrix-vector product a slot, no sorting, two launches for the whole expert MLP.

Each weight is read once per slot that uses it; with few slots experts rarely repeat, and a repeat comes from the L2.
"""

import triton
import triton.language as tl

from .activations import apply_gate


@triton.jit
def gemv_up_kernel(
    x,  # (T, H)
    ids,  # (S,) expert ids, any integer dtype
    w,  # (E, COLUMNS, H)
    bias,  # (E, COLUMNS)
    h,  # (S, I) out
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    WEIGHT: tl.constexpr,  # DenseLayout
    GATE: tl.constexpr,  # GateLayout
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[slot] = gate(w[expert] · x[token] + bias[expert]). Grid: (S, ⌈I / BLOCK_N⌉)."""
    slot = tl.program_id(0)
    expert = tl.load(ids + slot).to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_n = offs_n < GATE.I
    x_ptrs = x + (slot // TOP_K).to(tl.int64) * H + offs_k
    columns = offs_n * GATE.COLUMN_STRIDE
    w_ptrs = w + expert * WEIGHT.STRIDE_E + columns[:, None] * WEIGHT.STRIDE_N + offs_k[None, :] * WEIGHT.STRIDE_K
    gate = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        mask = in_n[:, None] & (offs_k < H - k)[None, :]
        values = tl.load(x_ptrs + k, mask=offs_k < H - k, other=0.0).to(tl.float32)[None, :]
        gate_ptrs = w_ptrs + k * WEIGHT.STRIDE_K
        gate += tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32) * values
        if GATE.GATED:
            up_ptrs = w_ptrs + GATE.UP_OFFSET * WEIGHT.STRIDE_N + k * WEIGHT.STRIDE_K
            up += tl.load(up_ptrs, mask=mask, other=0.0).to(tl.float32) * values
    g = tl.sum(gate, axis=1)
    u = tl.sum(up, axis=1)
    if HAS_BIAS:
        bias_ptrs = bias + expert * GATE.COLUMNS + columns
        g += tl.load(bias_ptrs, mask=in_n, other=0.0).to(tl.float32)
        if GATE.GATED:
            u += tl.load(bias_ptrs + GATE.UP_OFFSET, mask=in_n, other=0.0).to(tl.float32)
    result = apply_gate(g, u, GATE)
    tl.store(h + slot * GATE.I + offs_n, result.to(h.dtype.element_ty), mask=in_n)


@triton.jit
def gemv_down_kernel(
    h,  # (S, I)
    ids,  # (S,) expert ids, any integer dtype
    weights,  # (S,)
    w,  # (E, H, I)
    bias,  # (E, H)
    y,  # (T, H) out
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    WEIGHT: tl.constexpr,  # DenseLayout
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
        expert = tl.load(ids + slot).to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
        mine = (expert >= 0) & (expert < NUM_EXPERTS)
        weight = tl.load(weights + slot, mask=mine, other=0.0).to(tl.float32)
        w_ptrs = w + expert * WEIGHT.STRIDE_E + offs_n[:, None] * WEIGHT.STRIDE_N + offs_k[None, :] * WEIGHT.STRIDE_K
        for k in tl.static_range(0, I, BLOCK_K):
            in_k = (offs_k < I - k) & mine
            values = tl.load(h + slot * I + k + offs_k, mask=in_k, other=0.0).to(tl.float32) * weight
            tile = tl.load(w_ptrs + k * WEIGHT.STRIDE_K, mask=in_n[:, None] & in_k[None, :], other=0.0).to(tl.float32)
            acc += tile * values[None, :]
        if HAS_BIAS:
            bias_values = tl.load(bias + expert * H + offs_n, mask=in_n & mine, other=0.0).to(tl.float32)
            biases += bias_values * weight
    result = tl.sum(acc, axis=1) + biases
    tl.store(y + token.to(tl.int64) * H + offs_n, result.to(y.dtype.element_ty), mask=in_n)
