"""Grouped GEMM: rows of one expert against that expert's weights, plain and with the gate in the epilogue.

One program computes one tile of BLOCK_M rows, all of one expert, and BLOCK_N output features; the column tiles of a row tile
are neighbours in the grid, so they share the rows of x through the L2. Which expert and row a tile has was written by the
routing kernel. Rows past the end of the expert are computed on whatever is there (always valid memory) and not stored.
"""

import triton
import triton.language as tl

from .common import apply_gate
from .low_rank import add_low_rank


@triton.jit
def load_weight(
    w,  # WEIGHTS "pointer": element pointers of this tile; "rows"/"columns": a descriptor
    first,  # descriptor: first row of this expert's matrix in the flattened stack
    n,
    k,
    offs_n,
    offs_k,
    N: tl.constexpr,
    K: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The weight provider's device half: the (BLOCK_K, BLOCK_N) tile at in-feature k, out-feature n."""
    if WEIGHTS == "rows":  # (E·N, K), in features contiguous
        tile = w.load([first + n, k]).T
    elif WEIGHTS == "columns":  # (E·K, N), out features contiguous
        tile = w.load([first + k, n])
    elif K % BLOCK_K == 0 and N % BLOCK_N == 0:
        tile = tl.load(w)
    else:
        tile = tl.load(w, mask=(offs_k[:, None] < K - k) & (offs_n[None, :] < N), other=0.0)
    return tile


@triton.jit
def fill_rows(
    out_ptr,
    row,
    num_rows,
    n,
    value,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Stores ``value`` in the (S, N) output's tile of rows of no expert that starts at ``row`` and column ``n``."""
    rows = row + tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    tile = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32) + value
    out = out_ptr + rows.to(tl.int64)[:, None] * STRIDE + offs_n[None, :]
    tl.store(out, tile.to(out_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & (offs_n < N)[None, :])


@triton.jit
def _up_tile(
    x_ptr,
    w,
    bias_ptr,
    left_ptr,
    right_ptr,
    h_ptr,
    gate_up_ptr,
    row_to_slot_ptr,
    expert,
    row,
    end,
    n,
    STRIDE_WE: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    COLUMNS: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    H_STRIDE: tl.constexpr,
    GATE_UP_STRIDE: tl.constexpr,
    GATE_UP_OFFSET: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    SAVE_H: tl.constexpr,
    SAVE_GATE_UP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``grouped_up_kernel``: rows row…min(row + BLOCK_M, end) of ``expert``, columns from n."""
    rows = row + tl.arange(0, BLOCK_M)
    live = rows < end
    tokens = tl.load(row_to_slot_ptr + rows, mask=live, other=0) // TOP_K
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # int64: T·H and E·out·in pass 2³¹ in real models.
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * H + offs_k[None, :]
    if WEIGHTS == "pointer":
        w_ptr = w + expert.to(tl.int64) * STRIDE_WE
        gate_w = w_ptr + (offs_n[None, :] * COLUMN_STRIDE) * STRIDE_WN + offs_k[:, None] * STRIDE_WK
        up_w = gate_w + UP_OFFSET * STRIDE_WN
        first = 0
    else:
        gate_w = w
        up_w = w
        first = expert * (COLUMNS if WEIGHTS == "rows" else H)

    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < H - k, other=0.0)
        wg = load_weight(gate_w, first, n, k, offs_n, offs_k, I, H, WEIGHTS, BLOCK_N, BLOCK_K)
        gate = tl.dot(x, wg, gate, input_precision=PRECISION)
        if GATED:
            wu = load_weight(up_w, first, n + UP_OFFSET, k, offs_n, offs_k, I, H, WEIGHTS, BLOCK_N, BLOCK_K)
            up = tl.dot(x, wu, up, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        if WEIGHTS == "pointer":
            gate_w += BLOCK_K * STRIDE_WK
            up_w += BLOCK_K * STRIDE_WK

    in_n = offs_n < I
    columns = offs_n * COLUMN_STRIDE
    if LOW_RANK[0] > 0:
        gate = add_low_rank(gate, left_ptr, right_ptr, expert, row, live, columns, in_n, LOW_RANK, PRECISION, BLOCK_M)
        if GATED:
            left_ptr += LOW_RANK[3]
            columns_up = columns + GATE_UP_OFFSET
            up = add_low_rank(
                up, left_ptr, right_ptr, expert, row, live, columns_up, in_n, LOW_RANK, PRECISION, BLOCK_M
            )
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert * COLUMNS + columns
        gate += tl.load(bias_ptrs, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptrs + UP_OFFSET, mask=in_n, other=0.0).to(tl.float32)[None, :]
    mask = live[:, None] & in_n[None, :]
    # The tile's base in int64, offsets inside it in int32: half the registers.
    row64 = row.to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    if SAVE_GATE_UP:
        out = gate_up_ptr + row64 * GATE_UP_STRIDE + offs_m[:, None] * GATE_UP_STRIDE + columns[None, :]
        tl.store(out, gate.to(gate_up_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(out + GATE_UP_OFFSET, up.to(gate_up_ptr.dtype.element_ty), mask=mask)
    if SAVE_H:
        h = apply_gate(gate, up, ALPHA, LIMIT, ACTIVATION, GATED)
        out = h_ptr + row64 * H_STRIDE + offs_m[:, None] * H_STRIDE + offs_n[None, :]
        tl.store(out, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def grouped_up_kernel(
    x_ptr,  # (T, H)
    w,  # (E, COLUMNS, H): element pointer, or descriptor of (E·COLUMNS, H) or (E·H, COLUMNS)
    bias_ptr,  # (E, COLUMNS)
    left_ptr,  # (S, RANK), or (S, 2·RANK): the gate's, then the up's
    right_ptr,  # (E, COLUMNS, RANK)
    h_ptr,  # (S, I) out
    gate_up_ptr,  # (S, COLUMNS) out
    offsets_ptr,  # (E+1,)
    row_to_slot_ptr,  # (S,)
    tile_expert_ptr,  # (tiles,)
    tile_row_ptr,  # (tiles,)
    num_rows,  # S
    NUM_EXPERTS: tl.constexpr,
    STRIDE_WE: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    COLUMNS: tl.constexpr,  # 2·I when gated, else I
    COLUMN_STRIDE: tl.constexpr,  # of the gate features in w, bias and gate_up
    UP_OFFSET: tl.constexpr,  # from a gate feature to its up feature, in w and bias
    H_STRIDE: tl.constexpr,  # of the rows of h, which may have more columns than w computes
    GATE_UP_STRIDE: tl.constexpr,  # of the rows of gate_up
    GATE_UP_OFFSET: tl.constexpr,  # from a gate column to its up column
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,  # an adapter's product, left · right[expert]ᵀ, is added
    SAVE_H: tl.constexpr,
    SAVE_GATE_UP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of h; the program multiplies twice as many columns when gated
    BLOCK_K: tl.constexpr,
    HALF_TILES: tl.constexpr,  # an expert's last tile is half as high where that is enough
):
    """h = gate(x[token] · w[expert]ᵀ + bias[expert]). Grid: (tiles · ⌈I / BLOCK_N⌉,), column tiles fastest."""
    N_TILES: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    n = (tl.program_id(0) % N_TILES) * BLOCK_N
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    row = tl.load(tile_row_ptr + tile)
    if expert == NUM_EXPERTS:
        if SAVE_H:
            fill_rows(h_ptr, row, num_rows, n, 0.0, I, H_STRIDE, BLOCK_M, BLOCK_N)
        if SAVE_GATE_UP:
            if GATED and COLUMN_STRIDE == 1:
                fill_rows(gate_up_ptr, row, num_rows, n, 0.0, I, GATE_UP_STRIDE, BLOCK_M, BLOCK_N)
                fill_rows(gate_up_ptr + GATE_UP_OFFSET, row, num_rows, n, 0.0, I, GATE_UP_STRIDE, BLOCK_M, BLOCK_N)
            else:
                fill_rows(gate_up_ptr, row, num_rows, n, 0.0, COLUMNS, GATE_UP_STRIDE, BLOCK_M, BLOCK_N)
                if GATED:
                    fill_rows(gate_up_ptr, row, num_rows, n + I, 0.0, COLUMNS, GATE_UP_STRIDE, BLOCK_M, BLOCK_N)
        return
    end = tl.load(offsets_ptr + expert + 1)
    if HALF_TILES and end - row <= BLOCK_M // 2:
        _up_tile(
            x_ptr, w, bias_ptr, left_ptr, right_ptr, h_ptr, gate_up_ptr, row_to_slot_ptr, expert, row, end, n,
            STRIDE_WE, STRIDE_WN, STRIDE_WK, H, I, COLUMNS, COLUMN_STRIDE, UP_OFFSET, H_STRIDE, GATE_UP_STRIDE,
            GATE_UP_OFFSET, TOP_K, ACTIVATION, GATED, ALPHA, LIMIT, HAS_BIAS, LOW_RANK, SAVE_H, SAVE_GATE_UP,
            WEIGHTS, PRECISION, BLOCK_M // 2, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _up_tile(
            x_ptr, w, bias_ptr, left_ptr, right_ptr, h_ptr, gate_up_ptr, row_to_slot_ptr, expert, row, end, n,
            STRIDE_WE, STRIDE_WN, STRIDE_WK, H, I, COLUMNS, COLUMN_STRIDE, UP_OFFSET, H_STRIDE, GATE_UP_STRIDE,
            GATE_UP_OFFSET, TOP_K, ACTIVATION, GATED, ALPHA, LIMIT, HAS_BIAS, LOW_RANK, SAVE_H, SAVE_GATE_UP,
            WEIGHTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _gemm_tile(
    a,
    w,
    bias_ptr,
    left_ptr,
    right_ptr,
    out_ptr,
    row_to_slot_ptr,
    scale,
    expert,
    row,
    end,
    n,
    STRIDE_WE: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    A_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,
    SCALED: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of ``grouped_gemm_kernel``: rows row…min(row + BLOCK_M, end) of ``expert``, columns from n."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    live = row + offs_m < end
    if not A_DESCRIPTOR:
        if GATHER:
            source = tl.load(row_to_slot_ptr + row + offs_m, mask=live, other=0) // TOP_K
        else:
            source = tl.where(live, row + offs_m, row)
        a_ptrs = a + source.to(tl.int64)[:, None] * A_STRIDE + offs_k[None, :]
    if WEIGHTS == "pointer":
        w_tile = w + expert.to(tl.int64) * STRIDE_WE + offs_n[None, :] * STRIDE_WN + offs_k[:, None] * STRIDE_WK
        first = 0
    else:
        w_tile = w
        first = expert * (N if WEIGHTS == "rows" else K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if A_DESCRIPTOR:
            x = a.load([row, k])
        elif K % BLOCK_K == 0:
            x = tl.load(a_ptrs)
        else:
            x = tl.load(a_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
        wt = load_weight(w_tile, first, n, k, offs_n, offs_k, N, K, WEIGHTS, BLOCK_N, BLOCK_K)
        acc = tl.dot(x, wt, acc, input_precision=PRECISION)
        if not A_DESCRIPTOR:
            a_ptrs += BLOCK_K
        if WEIGHTS == "pointer":
            w_tile += BLOCK_K * STRIDE_WK
    in_n = offs_n < N
    if LOW_RANK[0] > 0:
        acc = add_low_rank(acc, left_ptr, right_ptr, expert, row, live, offs_n, in_n, LOW_RANK, PRECISION, BLOCK_M)
    if SCALED:
        acc *= scale
    if HAS_BIAS:
        acc += tl.load(bias_ptr + expert * N + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row.to(tl.int64) * OUT_STRIDE + offs_m[:, None] * OUT_STRIDE + offs_n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def grouped_gemm_kernel(
    a,  # (S, K), or (T, K) with GATHER: element pointer, or descriptor with A_DESCRIPTOR
    a_half,  # the same; a descriptor has blocks of half the height
    w,  # (E, N, K): element pointer, or descriptor of (E·N, K) or (E·K, N)
    bias_ptr,  # (E, N)
    left_ptr,  # (S, RANK)
    right_ptr,  # (E, N, RANK)
    out_ptr,  # (S, N) out
    offsets_ptr,  # (E+1,)
    row_to_slot_ptr,  # (S,), read with GATHER
    tile_expert_ptr,  # (tiles,)
    tile_row_ptr,  # (tiles,)
    num_rows,  # S
    fill,  # of rows that belong to no expert
    scale,  # of the product, with SCALED
    NUM_EXPERTS: tl.constexpr,
    STRIDE_WE: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    A_STRIDE: tl.constexpr,  # of the rows of a
    OUT_STRIDE: tl.constexpr,  # of the rows of out, which may have more columns than w computes
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,  # an adapter's product, left · right[expert]ᵀ, is added
    SCALED: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF_TILES: tl.constexpr,
):
    """out[row] = a[row or token] · w[expert]ᵀ + bias[expert]. Grid: (tiles · ⌈N / BLOCK_N⌉,), column tiles fastest."""
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    n = (tl.program_id(0) % N_TILES) * BLOCK_N
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    row = tl.load(tile_row_ptr + tile)
    if expert == NUM_EXPERTS:
        fill_rows(out_ptr, row, num_rows, n, fill, N, OUT_STRIDE, BLOCK_M, BLOCK_N)
        return
    end = tl.load(offsets_ptr + expert + 1)
    if HALF_TILES and end - row <= BLOCK_M // 2:
        _gemm_tile(
            a_half, w, bias_ptr, left_ptr, right_ptr, out_ptr, row_to_slot_ptr, scale, expert, row, end, n, STRIDE_WE,
            STRIDE_WN, STRIDE_WK, N, K, A_STRIDE, OUT_STRIDE, TOP_K, GATHER, HAS_BIAS, LOW_RANK, SCALED, A_DESCRIPTOR,
            WEIGHTS, PRECISION, BLOCK_M // 2, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _gemm_tile(
            a, w, bias_ptr, left_ptr, right_ptr, out_ptr, row_to_slot_ptr, scale, expert, row, end, n, STRIDE_WE,
            STRIDE_WN, STRIDE_WK, N, K, A_STRIDE, OUT_STRIDE, TOP_K, GATHER, HAS_BIAS, LOW_RANK, SCALED, A_DESCRIPTOR,
            WEIGHTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
