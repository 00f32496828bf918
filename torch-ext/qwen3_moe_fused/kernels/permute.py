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
            z *= tl.load(weights_ptr + slot, mask=row >= 0, other=0.0).to(tl.float32)
        acc += z
    tl.store(y_ptr + token * N + offs_n, acc.to(y_ptr.dtype.element_ty), mask=in_n)


@triton.jit
def dispatch_kernel(
    x_ptr,  # (T, N)
    rows_ptr,  # (S, N) out
    offsets_ptr,  # (E+1,)
    slot_to_row_ptr,  # (S,)
    NUM_EXPERTS: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """rows[row of slot] = x[token], zeros in rows of no expert. Grid: (T, ⌈N / BLOCK_N⌉).

    A program reads a token once and writes it top_k times: 1.7 times as fast on an H100 as a program for each row.
    """
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    assigned = tl.load(offsets_ptr + NUM_EXPERTS)
    x = tl.load(x_ptr + token * N + offs_n, mask=in_n, other=0.0)
    for k in tl.range(0, TOP_K, loop_unroll_factor=8):
        slot = token * TOP_K + k
        row = tl.load(slot_to_row_ptr + slot)
        tl.store(rows_ptr + row.to(tl.int64) * N + offs_n, x, mask=in_n & (row >= 0))
        tl.store(rows_ptr + slot * N + offs_n, tl.zeros_like(x), mask=in_n & (slot >= assigned))


@triton.jit
def combine_backward_kernel(
    grad_y_ptr,  # (T, N)
    z_ptr,  # (S, N), read with NEED_WEIGHTS
    weights_ptr,  # (T, TOP_K)
    grad_z_ptr,  # (S, N) out
    grad_weights_ptr,  # (T, TOP_K) out with NEED_WEIGHTS
    offsets_ptr,  # (E+1,)
    slot_to_row_ptr,  # (S,)
    NUM_EXPERTS: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The backward of a weighted combine. Grid: (S,).

    grad_z[row] = weights[slot] · grad_y[token], zeros in rows of no expert; grad_weights[slot] = grad_y[token] · z[row].
    """
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(slot_to_row_ptr + slot).to(tl.int64)
    orphan = slot >= tl.load(offsets_ptr + NUM_EXPERTS)
    weight = tl.load(weights_ptr + slot).to(tl.float32)
    dots = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask = (offs_n < N) & (row >= 0)
        y = tl.load(grad_y_ptr + slot // TOP_K * N + offs_n, mask=mask, other=0.0).to(tl.float32)
        if NEED_WEIGHTS:
            dots += y * tl.load(z_ptr + row * N + offs_n, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_z_ptr + row * N + offs_n, (y * weight).to(grad_z_ptr.dtype.element_ty), mask=mask)
        zeros = tl.zeros((BLOCK_N,), dtype=grad_z_ptr.dtype.element_ty)
        tl.store(grad_z_ptr + slot * N + offs_n, zeros, mask=(offs_n < N) & orphan)
    if NEED_WEIGHTS:
        tl.store(grad_weights_ptr + slot, tl.sum(dots, axis=0).to(grad_weights_ptr.dtype.element_ty))
