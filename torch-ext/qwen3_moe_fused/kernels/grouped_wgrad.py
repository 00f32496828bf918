"""Products over the rows of each expert: weight gradients and bias gradients. Every output tile is written once.

Gathered rows are read in place. Copying them into expert order first, to read them through a descriptor too, took as long
at 16384 tokens on an H100 (1.54 ms against 1.55 ms for the gradient of a 1536×2048 up projection) and longer at 4096 (0.63
against 0.60), and the copy takes memory. Eight warps a tile were 12 % slower than four.
"""

import triton
import triton.language as tl


@triton.jit
def _load_rows(ptr, rows, columns, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, BLOCK) of a matrix with SIZE columns, zeros beyond.

    Masked: columns clamped to the last would be read one by one, which at 2880 columns made a backward four times as long.
    """
    ptrs = ptr + rows.to(tl.int64)[:, None] * STRIDE + columns[None, :]
    if SIZE % BLOCK == 0:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(columns < SIZE)[None, :], other=0.0)
    return tile


@triton.jit
def _weigh(tile, weights):
    """Each row of the tile by its weight, rounded once."""
    return (tile.to(tl.float32) * weights.to(tl.float32)[:, None]).to(tile.dtype)


@triton.jit
def grouped_wgrad_kernel(
    a_ptr,  # (S, M), or (T, M) where rows are gathered
    b_ptr,  # (S, N), or (T, N) where rows are gathered
    a,  # descriptor of a_ptr's matrix, read with A.DESCRIPTOR
    b,  # descriptor of b_ptr's matrix, read with B.DESCRIPTOR
    weights,  # (S,) by slot, read with B.SCALED
    out,  # (E, M, N) out
    offsets,  # (E+1,)
    row_to_slot,  # (S,), read where rows are gathered or weighted
    M: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    A: tl.constexpr,  # RowsLayout
    B: tl.constexpr,  # RowsLayout; SCALED: rows of b, the narrower, are multiplied by their slot's weight
    OUT: tl.constexpr,  # DenseLayout of out
    TILE: tl.constexpr,  # M, N of the output; K rows an iteration
    GROUP_M: tl.constexpr,  # row tiles that share column tiles in the L2
):
    """out[expert] = Σ_rows (weights[slot] ·) a[row]ᵀ · b[row].

    Grid: (E · ⌈M / TILE.M⌉ · ⌈N / TILE.N⌉,), an expert's tiles side by side.
    """
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    M_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    expert = tl.program_id(0) // (M_TILES * N_TILES)
    tile = tl.program_id(0) % (M_TILES * N_TILES)
    group = tile // (GROUP_M * N_TILES)
    group_size = min(M_TILES - group * GROUP_M, GROUP_M)
    m = (group * GROUP_M + (tile % (GROUP_M * N_TILES)) % group_size) * BLOCK_M
    n = ((tile % (GROUP_M * N_TILES)) // group_size) * BLOCK_N
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    offs_m = m + tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    in_m = offs_m < M
    in_n = offs_n < N

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    full = start + (end - start) // BLOCK_K * BLOCK_K
    for k in range(start, full, BLOCK_K):
        rows = k + offs_k
        if A.GATHER or B.GATHER or B.SCALED:
            slots = tl.load(row_to_slot + rows)
        a_rows = slots // TOP_K if A.GATHER else rows
        b_rows = slots // TOP_K if B.GATHER else rows
        if A.DESCRIPTOR:
            a_tile = a.load([k, m])
        else:
            a_tile = _load_rows(a_ptr, a_rows, offs_m, M, A.STRIDE, BLOCK_M)
        if B.DESCRIPTOR:
            b_tile = b.load([k, n])
        else:
            b_tile = _load_rows(b_ptr, b_rows, offs_n, N, B.STRIDE, BLOCK_N)
        if B.SCALED:
            b_tile = _weigh(b_tile, tl.load(weights + slots))
        acc = tl.dot(a_tile.T, b_tile, acc, input_precision=TILE.PRECISION)
    if full < end:
        rows = full + offs_k
        live = rows < end
        if A.GATHER or B.GATHER or B.SCALED:
            slots = tl.load(row_to_slot + rows, mask=live, other=0)
        a_rows = slots // TOP_K if A.GATHER else rows
        b_rows = slots // TOP_K if B.GATHER else rows
        # Both sides are masked: a row of the next expert may hold Inf, and 0·Inf is NaN.
        a_ptrs = a_ptr + a_rows.to(tl.int64)[:, None] * A.STRIDE + offs_m[None, :]
        b_ptrs = b_ptr + b_rows.to(tl.int64)[:, None] * B.STRIDE + offs_n[None, :]
        a_tile = tl.load(a_ptrs, mask=live[:, None] & in_m[None, :], other=0.0)
        b_tile = tl.load(b_ptrs, mask=live[:, None] & in_n[None, :], other=0.0)
        if B.SCALED:
            b_tile = _weigh(b_tile, tl.load(weights + slots, mask=live, other=0.0))
        acc = tl.dot(a_tile.T, b_tile, acc, input_precision=TILE.PRECISION)
    # int64: E·M·N passes 2³¹ in real models.
    out_ptrs = (
        out + expert.to(tl.int64) * OUT.STRIDE_E + offs_m[:, None] * OUT.STRIDE_N + offs_n[None, :] * OUT.STRIDE_K
    )
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def grouped_row_sum_kernel(
    a_ptr,  # (S, N), or (T, N) with GATHER
    weights_ptr,  # (S,) by slot, read with WEIGHTED
    out_ptr,  # (E, N) out
    offsets_ptr,  # (E+1,)
    row_to_slot_ptr,  # (S,), read with GATHER or WEIGHTED
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[expert] = Σ_rows (weights[slot] ·) a[row or token]. Grid: (E, ⌈N / BLOCK_N⌉)."""
    expert = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for k in range(start, end, BLOCK_K):
        rows = k + tl.arange(0, BLOCK_K)
        live = rows < end
        source = rows
        if GATHER or WEIGHTED:
            slots = tl.load(row_to_slot_ptr + rows, mask=live, other=0)
        if GATHER:
            source = slots // TOP_K
        mask = live[:, None] & (offs_n < N)[None, :]
        a = tl.load(a_ptr + source.to(tl.int64)[:, None] * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            a *= tl.load(weights_ptr + slots, mask=live, other=0.0).to(tl.float32)[:, None]
        acc += a
    total = tl.sum(acc, axis=0)
    tl.store(out_ptr + expert * N + offs_n, total.to(out_ptr.dtype.element_ty), mask=offs_n < N)
