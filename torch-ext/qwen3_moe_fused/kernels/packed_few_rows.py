"""A few rows over 4-bit weights, as in generation: tensor cores multiply them, and no launch sorts rows by expert.

A program of ``few_slots_kernel`` belongs to a slot and some out features. It looks through the ids of all slots, ends if an
earlier slot has the same expert, and else computes the rows of all slots of that expert: weights that several slots share
are dequantized once. ``few_rows_kernel`` multiplies rows with up to three matrices.

Looking nibbles up is what such a product takes its time for: byte permutations, shifts and conversions run at half the rate
of other instructions, 64 lanes a cycle and multiprocessor on sm_90. Of the up projection of a Qwen3-30B-A3B layer,
``packed_gemm`` in tiles of 16 rows issues 4.0 instructions a weight to that pipe, and this product 3.1, where 2.6 look up.
All of its instructions are 4.2 a weight; those of ``packed_gemv`` are 9.7, for it unpacks what it looked up and multiplies
on the FMA units. All this is counted in code that was compiled with Triton 3.6. At 1.75 GHz on 132 multiprocessors, the pipe
would take 109 µs for the up projection by ``packed_gemm`` at 32 tokens, where 105 were measured on an H200.

Estimates for this product by the same count, which nobody has measured, in µs, beside what the bytes would take: at one
token 5.3 for the up projection (3) and 2.6 for the down projection (1.5), at 8 tokens, with some 50 experts, 49 for both
(30), at 32 tokens 127 (64). Launches and the first latencies come on top. At one token 192 and 256 programs of 4 warps have
64 rows of weights each, and ask for all of them at once: 95 and 48 KB a multiprocessor.

Three things save instructions:

- A thread dequantizes one contiguous run of words, a block of 64 weights where a step has 256, so that it makes a scale's
  table once. Tensor cores give each of four threads every fourth element, so the product runs over the in features in an
  order in which that is so (``in_chunks``).
- Weights are the left operand, rows the right one: rows are padded to 8, not to 16, and stay where they are loaded.
- Warps divide a tile along a dimension of its own (``FewRowsTile``), as a batch of products, and each sees only its part.
  In two dimensions the same product took 200 registers instead of 113.

Halves of words are multiplied one after the other (``halves``), because the order of even and odd places, which
``packed_gemm`` has for small tiles, moves every pair of a row's elements (0.5 instructions a weight).
"""

import triton
import triton.language as tl

from .activations import apply_gate
from .dequantize import elements, load_code, spread


@triton.jit
def in_chunks(tile, CHUNK: tl.constexpr):
    """The columns of ``tile`` (rows, 4·n·CHUNK) as if they were n for each of four threads, CHUNK at a time."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    chunks = tl.reshape(tile, (ROWS, 4, COLUMNS // (4 * CHUNK), CHUNK))
    return tl.reshape(tl.permute(chunks, (0, 2, 1, 3)), (ROWS, COLUMNS))


@triton.jit
def halves(tile):
    """The first four and the last four of every eight columns, each (rows, columns / 2)."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    fours = tl.permute(tl.reshape(tile, (ROWS, COLUMNS // 8, 2, 4)), (0, 1, 3, 2))
    return tl.split(tl.reshape(fours, (ROWS, COLUMNS // 2, 2)))


@triton.jit
def parts_of_rows(tile, TILE: tl.constexpr):
    """Rows (SPLIT·M, columns) as the right operand of each part: (PARTS·SPLIT, columns, M)."""
    COLUMNS: tl.constexpr = tile.shape[1]
    M: tl.constexpr = TILE.M
    PARTS: tl.constexpr = TILE.PARTS
    SPLIT: tl.constexpr = TILE.SPLIT
    rows = tl.permute(tl.reshape(tile, (SPLIT, M, COLUMNS)), (0, 2, 1))
    if PARTS > 1:
        rows = tl.broadcast_to(rows[None, :, :, :], (PARTS, SPLIT, COLUMNS, M))
        rows = tl.reshape(rows, (PARTS * SPLIT, COLUMNS, M))
    return rows


@triton.jit
def columns_of(TILE: tl.constexpr):
    """(PARTS·SPLIT·N,) the column of the program's tile that each row of its weights belongs to."""
    N: tl.constexpr = TILE.N
    SPLIT: tl.constexpr = TILE.SPLIT
    index = tl.arange(0, TILE.PARTS * SPLIT * N)
    return index // (SPLIT * N) * N + index % N


@triton.jit
def prefetch(packed, start, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Asks for COUNT of SIZE bytes from each of ``start`` (rows,) on to be brought into the L2, on an NVIDIA GPU.

    The first weights are otherwise asked for only once the first scales are there, a whole latency later.
    """
    LINE: tl.constexpr = 64
    LINES: tl.constexpr = triton.next_power_of_2((COUNT + LINE - 1) // LINE)
    offset = tl.minimum(start[:, None] + LINE * tl.arange(0, LINES)[None, :], SIZE - 1)
    address = (packed + offset).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def few_rows_product(
    a,  # rows of K columns
    row_starts,  # (M,) int64: where each row begins in a
    live,  # (M,) rows that count; the others are zeros
    w,  # PackedTensors of a stack (E, features, K)
    expert,  # int64
    features,  # (PARTS·SPLIT·N,): the feature of each of ``columns_of``
    SIZE: tl.constexpr,  # weights of an expert
    K: tl.constexpr,
    FORMAT: tl.constexpr,  # FormatCode
    TILE: tl.constexpr,  # FewRowsTile
):
    """(PARTS·N, M) fp32: the products of the program's features with the rows."""
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    SPLIT: tl.constexpr = TILE.SPLIT
    OF: tl.constexpr = FORMAT.PER_ELEMENT
    SPAN: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    WHOLE: tl.constexpr = SPLIT * SPAN == K
    HALF: tl.constexpr = BLOCK_K // 2
    PARTS: tl.constexpr = TILE.PARTS
    BATCH: tl.constexpr = PARTS * SPLIT
    dtype: tl.constexpr = a.dtype.element_ty
    offs_k = tl.arange(0, BLOCK_K)
    offs_e = tl.arange(0, BLOCK_K // OF)
    runs = FORMAT.RUN * tl.arange(0, BLOCK_K // FORMAT.RUN)
    # The first in feature of each row's part of the sum: of a's, and of the weights'.
    if SPLIT == 1:
        starts, counts = row_starts, live
        first_a = tl.zeros((M,), dtype=tl.int32)
        first_w = tl.zeros((BATCH * N,), dtype=tl.int32)
    else:
        starts = tl.reshape(tl.broadcast_to(row_starts[None, :], (SPLIT, M)), (SPLIT * M,))
        starts = tl.multiple_of(starts, 8)  # which the compiler forgets in reshaping
        counts = tl.reshape(tl.broadcast_to(live[None, :], (SPLIT, M)), (SPLIT * M,))
        first_a = tl.arange(0, SPLIT * M) // M * SPAN
        first_w = tl.arange(0, BATCH * N) // N % SPLIT * SPAN
    a_ptrs = a + (starts + first_a)[:, None] + offs_k[None, :]
    if TILE.PREFETCH and OF == 8:
        prefetch(w.packed + expert * (SIZE // 2), features * (K // 2) + first_w // 2, SPAN // 2, SIZE // 2)
    w_ptrs = elements(w.packed, FORMAT) + expert * (SIZE // OF) + (features * (K // OF) + first_w // OF)[:, None]
    w_ptrs = w_ptrs + offs_e[None, :]
    code = load_code(w.code, FORMAT)
    prepared = FORMAT.prepare(w.scales, expert, features * K, K, FORMAT)
    block = features[:, None] * K + tl.minimum(first_w[:, None] + runs[None, :], K - FORMAT.RUN)
    scale = FORMAT.block_scale(w.scales, expert, block // FORMAT.BLOCK, prepared, FORMAT)
    acc = tl.zeros((BATCH, N, M), dtype=tl.float32)
    for k in range(0, SPAN, BLOCK_K):
        if WHOLE:
            rows = tl.load(a_ptrs, mask=counts[:, None], other=0.0)
            packed = tl.load(w_ptrs)
        else:
            rows = tl.load(a_ptrs, mask=counts[:, None] & (first_a[:, None] + k + offs_k[None, :] < K), other=0.0)
            packed = tl.load(w_ptrs, mask=first_w[:, None] // OF + k // OF + offs_e[None, :] < K // OF, other=0)
        # The scales of the next step are loaded during this one.
        ahead = first_w[:, None] + k + BLOCK_K + runs[None, :]
        block = features[:, None] * K + tl.minimum(ahead, K - FORMAT.RUN)
        next_scale = FORMAT.block_scale(w.scales, expert, block // FORMAT.BLOCK, prepared, FORMAT)
        wide = in_chunks(spread(scale, BLOCK_K // OF), 8 // OF)
        weights = FORMAT.in_order(code, in_chunks(packed, 8 // OF), wide, dtype, FORMAT, False)
        first_weights, last_weights = halves(weights)
        first_rows, last_rows = halves(in_chunks(rows, 8))
        left = tl.reshape(first_weights, (BATCH, N, HALF))
        acc = tl.dot(left, parts_of_rows(first_rows, TILE), acc, input_precision=TILE.PRECISION)
        left = tl.reshape(last_weights, (BATCH, N, HALF))
        acc = tl.dot(left, parts_of_rows(last_rows, TILE), acc, input_precision=TILE.PRECISION)
        scale = next_scale
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K // OF
    if SPLIT > 1:
        acc = tl.sum(tl.reshape(acc, (PARTS, SPLIT, N, M)), axis=1)
    return tl.reshape(acc, (PARTS * N, M))


@triton.jit(do_not_specialize=["num_slots"])
def few_slots_kernel(
    a,  # (T, K), or (S, K) with TOP_K = 1
    ids,  # (S,) expert ids, any integer dtype
    w,  # PackedTensors of a stack (E, COLUMNS, K)
    bias,  # (E, COLUMNS)
    out,  # (S, I) out
    num_slots,  # S
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,  # slots that share a row of a
    K: tl.constexpr,
    FORMAT: tl.constexpr,  # FormatCode
    GATE: tl.constexpr,  # GateLayout; of a plain product where its activation is "none"
    HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr,  # power of two from S on
    TILE: tl.constexpr,  # FewRowsTile
):
    """out[slot] = gate(a[slot // TOP_K] · w[expert]ᵀ + bias[expert]). Grid: (⌈I / features of a program⌉, S).

    Rows of slots whose expert is not ours are not written.
    """
    slot = tl.program_id(1)
    expert = tl.load(ids + slot)
    slots = tl.arange(0, SLOTS)
    in_range = slots < num_slots
    same = in_range & (tl.load(ids + slots, mask=in_range, other=-1) == expert)
    first = tl.min(tl.where(same, slots, SLOTS), axis=0)
    if (expert < 0) | (expert >= NUM_EXPERTS) | (first < slot):
        return
    rank = tl.cumsum(same.to(tl.int32), axis=0) - 1
    count = tl.sum(same.to(tl.int32), axis=0)
    expert64 = expert.to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
    M: tl.constexpr = TILE.M
    COLUMNS: tl.constexpr = TILE.PARTS * TILE.N
    columns = columns_of(TILE)
    # A gate's column and its up's are neighbours. Columns past the last one are computed from it and not stored.
    WIDTH: tl.constexpr = COLUMNS // 2 if GATE.GATED else COLUMNS
    n = tl.program_id(0) * WIDTH
    if GATE.GATED:
        features = tl.minimum(n + columns // 2, GATE.I - 1) * GATE.COLUMN_STRIDE + columns % 2 * GATE.UP_OFFSET
    else:
        features = tl.minimum(n + columns, GATE.I - 1) * GATE.COLUMN_STRIDE
    offs_n = n + tl.arange(0, WIDTH)
    for begin in range(0, count, M):
        rows = begin + tl.arange(0, M)
        live = rows < count
        chosen = same[None, :] & (rank[None, :] == rows[:, None])
        source = tl.sum(tl.where(chosen, slots[None, :], 0), axis=1)
        starts = (source // TOP_K).to(tl.int64) * K
        result = few_rows_product(a, starts, live, w, expert64, features, GATE.COLUMNS * K, K, FORMAT, TILE)
        if GATE.GATED:
            pairs = tl.permute(tl.reshape(result, (WIDTH, 2, M)), (0, 2, 1))
            g, u = tl.split(pairs)
        else:
            g, u = result, result
        if HAS_BIAS:
            bias_ptrs = bias + expert64 * GATE.COLUMNS + tl.minimum(offs_n, GATE.I - 1) * GATE.COLUMN_STRIDE
            g += tl.load(bias_ptrs).to(tl.float32)[:, None]
            if GATE.GATED:
                u += tl.load(bias_ptrs + GATE.UP_OFFSET).to(tl.float32)[:, None]
        if GATE.ACTIVATION == "none":
            y = g
        else:
            y = apply_gate(g, u, GATE)
        out_ptrs = out + source.to(tl.int64)[:, None] * GATE.I + offs_n[None, :]
        mask = live[:, None] & (offs_n < GATE.I)[None, :]
        tl.store(out_ptrs, tl.trans(y).to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_slots_kernel(
    z,  # (S, N) fp32
    ids,  # (S,) expert ids, any integer dtype
    weights,  # (S,)
    y,  # (T, N) out
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[t] = Σ_k weights[t, k] · z[t, k], in slot order, over the slots whose expert is ours. Grid: (T, ⌈N / BLOCK_N⌉)."""
    token = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    y_row = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = token * TOP_K + choice
        expert = tl.load(ids + slot)
        mine = (expert >= 0) & (expert < NUM_EXPERTS)
        weight = tl.load(weights + slot).to(tl.float32)
        row = tl.load(z + slot.to(tl.int64) * N + offs_n, mask=in_n & mine, other=0.0)
        y_row += tl.where(mine, row * weight, 0.0)
    tl.store(y + token.to(tl.int64) * N + offs_n, y_row.to(y.dtype.element_ty), mask=in_n)


@triton.jit
def _few_rows_of(
    a,  # (T, K)
    matrix,  # MatrixTensors
    tile,  # of the columns of the matrix
    num_rows,  # T
    K: tl.constexpr,
    MATRIX: tl.constexpr,  # MatrixLayout
    TILE: tl.constexpr,  # FewRowsTile
):
    """The program's columns of one matrix, for all rows."""
    M: tl.constexpr = TILE.M
    N: tl.constexpr = MATRIX.N
    FORMAT: tl.constexpr = MATRIX.FORMAT
    WIDTH: tl.constexpr = TILE.PARTS * TILE.N
    n = tile * WIDTH
    features = tl.minimum(n + columns_of(TILE), N - 1)
    offs_n = n + tl.arange(0, WIDTH)
    for begin in range(0, num_rows, M):
        rows = begin + tl.arange(0, M)
        live = rows < num_rows
        starts = tl.where(live, rows, 0).to(tl.int64)
        zero = (tile * 0).to(tl.int64)
        result = few_rows_product(a, starts * K, live, matrix.weight, zero, features, N * K, K, FORMAT, TILE)
        if MATRIX.HAS_BIAS:
            result += tl.load(matrix.bias + tl.minimum(offs_n, N - 1)).to(tl.float32)[:, None]
        out_ptrs = matrix.out + starts[:, None] * N + offs_n[None, :]
        mask = live[:, None] & (offs_n < N)[None, :]
        tl.store(out_ptrs, tl.trans(result).to(matrix.out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def few_rows_kernel(
    a,  # (T, K)
    first,  # MatrixTensors
    second,  # MatrixTensors, or the first again
    third,  # MatrixTensors, or the first again
    num_rows,  # T
    K: tl.constexpr,
    FIRST: tl.constexpr,  # MatrixLayout
    SECOND: tl.constexpr,  # MatrixLayout, without columns where there is no second matrix
    THIRD: tl.constexpr,
    TILE: tl.constexpr,  # FewRowsTile
):
    """out = a · weightᵀ + bias for each matrix. Grid: (the column tiles of all matrices, those of the first first,)."""
    WIDTH: tl.constexpr = TILE.PARTS * TILE.N
    BEFORE_SECOND: tl.constexpr = (FIRST.N + WIDTH - 1) // WIDTH
    BEFORE_THIRD: tl.constexpr = BEFORE_SECOND + (SECOND.N + WIDTH - 1) // WIDTH
    tile = tl.program_id(0)
    if tile < BEFORE_SECOND:
        _few_rows_of(a, first, tile, num_rows, K, FIRST, TILE)
    if SECOND.N > 0:
        if (tile >= BEFORE_SECOND) & (tile < BEFORE_THIRD):
            _few_rows_of(a, second, tile - BEFORE_SECOND, num_rows, K, SECOND, TILE)
    if THIRD.N > 0:
        if tile >= BEFORE_THIRD:
            _few_rows_of(a, third, tile - BEFORE_THIRD, num_rows, K, THIRD, TILE)
