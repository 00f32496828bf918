"""Tokens to rows in expert order and back: memory-bound, one pass over each row."""

import triton
import triton.language as tl


@triton.jit
def combine_kernel(
    z_ptr,  # (S, N)
    weights_ptr,  # (T, TOP_K), read with WEIGHTED
    y_ptr,  # (T, N) out
    slot_to_row_ptr,  # (S,)
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[t] = Σ_k (weights[t, k] ·) z[row of slot], fp32, in slot order. Grid: (T, ⌈N / BLOCK_N⌉)."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in tl.range(0, TOP_K, loop_unroll_factor=8):
        slot = token * TOP_K + k
        row = tl.load(slot_to_row_ptr + slot)
        z = tl.load(z_ptr + row.to(tl.int64) * N + offs_n, mask=in_n & (row >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            z *= tl.load(weights_ptr + slot).to(tl.float32)
        acc += z
    tl.store(y_ptr + token * N + offs_n, acc.to(y_ptr.dtype.element_ty), mask=in_n)


@triton.jit
def dispatch_kernel(
    x_ptr,  # (T, N)
    z_ptr,  # (S, N), read with BACKWARD
    weights_ptr,  # (S,) by slot, read with BACKWARD
    rows_ptr,  # (S, N) out
    grad_weights_ptr,  # (S,) fp32 by slot, out with BACKWARD
    offsets_ptr,  # (E+1,)
    row_to_slot_ptr,  # (S,)
    NUM_EXPERTS: tl.constexpr,
    STRIDE_XT: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """rows[row] = x[token of row], zero for rows of no expert. Grid: (S,).

    With BACKWARD, of a weighted combine: rows[row] = weights[slot] · x[token], grad_weights[slot] = x[token] · z[row].
    """
    row = tl.program_id(0).to(tl.int64)
    mine = row < tl.load(offsets_ptr + NUM_EXPERTS)
    slot = tl.load(row_to_slot_ptr + row, mask=mine, other=0)
    x_ptr += (slot // TOP_K).to(tl.int64) * STRIDE_XT
    dots = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        in_n = offs_n < N
        x = tl.load(x_ptr + offs_n, mask=in_n & mine, other=0.0)
        if BACKWARD:
            z = tl.load(z_ptr + row * N + offs_n, mask=in_n & mine, other=0.0).to(tl.float32)
            dots += x.to(tl.float32) * z
            x = x.to(tl.float32) * tl.load(weights_ptr + slot, mask=mine, other=0.0).to(tl.float32)
        tl.store(rows_ptr + row * N + offs_n, x.to(rows_ptr.dtype.element_ty), mask=in_n)
    if BACKWARD:
        tl.store(grad_weights_ptr + slot, tl.sum(dots, axis=0), mask=mine)
