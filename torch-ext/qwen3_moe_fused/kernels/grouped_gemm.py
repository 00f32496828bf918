"""Grouped GEMM: rows of one expert against that expert's dense weights, plain and with the gate in the epilogue.

One program computes one tile of TILE.M rows, all of one expert, and TILE.N output features. The column tiles of a row tile
are neighbours in the grid, so they share the rows of x through the L2. The routing kernel wrote which expert and which first
row a tile has. Rows past the end of the expert are computed on whatever is there (always valid memory) and not stored.
"""

import triton
import triton.language as tl

from .low_rank import add_low_rank, add_low_rank_to_both
from .tiles import fill_outputs, load_weight, store_outputs, token_rows


@triton.jit
def _up_tile(
    x,
    w,
    bias,
    term,
    out,
    routing,
    expert,
    row,
    end,
    n,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    OUT: tl.constexpr,
    LOW_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One tile of ``grouped_up_kernel``: rows row…min(row + BLOCK_M, end) of ``expert``, columns from n."""
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    live = row + tl.arange(0, BLOCK_M) < end
    tokens = token_rows(routing, row, live, TOP_K, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # int64: T·H and E·out·in pass 2³¹ in real models.
    x_ptrs = x + tokens.to(tl.int64)[:, None] * H + offs_k[None, :]
    # Where gate and up features alternate, one product has both, of columns that lie side by side. Apart, each would read
    # every second column: 9.7 ms for the up projection of gpt-oss-20b at 1024 tokens on an H200.
    ALTERNATE: tl.constexpr = GATE.GATED and GATE.COLUMN_STRIDE == 2
    WIDTH: tl.constexpr = 2 * BLOCK_N if ALTERNATE else BLOCK_N
    FEATURES: tl.constexpr = GATE.COLUMNS if ALTERNATE else GATE.I
    n_w = n * GATE.COLUMN_STRIDE
    offs_w = n_w + tl.arange(0, WIDTH)
    if WEIGHT.MODE == "pointer":
        w_ptr = w + expert.to(tl.int64) * WEIGHT.STRIDE_E
        gate_w = w_ptr + offs_w[None, :] * WEIGHT.STRIDE_N + offs_k[:, None] * WEIGHT.STRIDE_K
        up_w = gate_w + GATE.UP_OFFSET * WEIGHT.STRIDE_N
        first = 0
    else:
        gate_w = w
        up_w = w
        first = expert * (GATE.COLUMNS if WEIGHT.MODE == "rows" else H)

    gate = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            x_tile = tl.load(x_ptrs)
        else:
            x_tile = tl.load(x_ptrs, mask=offs_k[None, :] < H - k, other=0.0)
        wg = load_weight(gate_w, first, n_w, k, offs_w, offs_k, FEATURES, H, WEIGHT, WIDTH, BLOCK_K)
        gate = tl.dot(x_tile, wg, gate, input_precision=TILE.PRECISION)
        if GATE.GATED and not ALTERNATE:
            up_n = n + GATE.UP_OFFSET
            wu = load_weight(up_w, first, up_n, k, offs_n, offs_k, GATE.I, H, WEIGHT, BLOCK_N, BLOCK_K)
            up = tl.dot(x_tile, wu, up, input_precision=TILE.PRECISION)
        x_ptrs += BLOCK_K
        if WEIGHT.MODE == "pointer":
            gate_w += BLOCK_K * WEIGHT.STRIDE_K
            up_w += BLOCK_K * WEIGHT.STRIDE_K
    if ALTERNATE:
        gate, up = tl.split(tl.reshape(gate, (BLOCK_M, BLOCK_N, 2)))

    if LOW_RANK.RANK > 0:
        gate, up = add_low_rank_to_both(
            gate, up, term, expert, row, live, offs_n * GATE.COLUMN_STRIDE, offs_n < GATE.I, OUT.GATE_UP_OFFSET,
            GATE.GATED, LOW_RANK, TILE, BLOCK_M,
        )  # fmt: skip
    store_outputs(gate, up, bias, out, expert, row, live, n, offs_n, GATE, OUT, HAS_BIAS, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["num_rows"])
def grouped_up_kernel(
    x,  # (T, H)
    w,  # (E, COLUMNS, H): element pointer, or descriptor of (E·COLUMNS, H) or (E·H, COLUMNS)
    bias,  # (E, COLUMNS)
    term,  # LowRankTensors: an adapter's product that is added
    out,  # Outputs: h (S, I), gate_up (S, COLUMNS)
    routing,  # RoutingTensors
    num_rows,  # S
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    WEIGHT: tl.constexpr,  # DenseLayout
    GATE: tl.constexpr,  # GateLayout
    OUT: tl.constexpr,  # OutputLayout
    LOW_RANK: tl.constexpr,  # LowRankLayout
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,  # N columns of h; the program multiplies twice as many when gated
):
    """h = gate(x[token] · w[expert]ᵀ + bias[expert]). Grid: (tiles · ⌈I / TILE.N⌉,), column tiles fastest."""
    N_TILES: tl.constexpr = (GATE.I + TILE.N - 1) // TILE.N
    tile = tl.program_id(0) // N_TILES
    n = (tl.program_id(0) % N_TILES) * TILE.N
    expert = tl.load(routing.tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(routing.tile_row + tile)
    if expert == NUM_EXPERTS:
        fill_outputs(out, row, num_rows, n, 0.0, GATE, OUT, TILE)
        return
    end = tl.load(routing.offsets + expert + 1)
    if TILE.HALF and end - row <= TILE.M // 2:
        _up_tile(
            x, w, bias, term, out, routing, expert, row, end, n, TOP_K, H, WEIGHT, GATE, OUT, LOW_RANK, HAS_BIAS, TILE,
            TILE.M // 2,
        )  # fmt: skip
    else:
        _up_tile(
            x, w, bias, term, out, routing, expert, row, end, n, TOP_K, H, WEIGHT, GATE, OUT, LOW_RANK, HAS_BIAS, TILE,
            TILE.M,
        )  # fmt: skip


@triton.jit
def _gemm_tile(
    a,
    w,
    bias,
    term,
    out,
    routing,
    scale,
    expert,
    row,
    end,
    n,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    A: tl.constexpr,
    WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    OUT: tl.constexpr,
    LOW_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One tile of ``grouped_gemm_kernel``: rows row…min(row + BLOCK_M, end) of ``expert``, columns from n."""
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    live = row + offs_m < end
    if not A.DESCRIPTOR:
        if A.GATHER:
            source = token_rows(routing, row, live, TOP_K, BLOCK_M)
        else:
            source = tl.where(live, row + offs_m, row)
        a_ptrs = a + source.to(tl.int64)[:, None] * A.STRIDE + offs_k[None, :]
    if WEIGHT.MODE == "pointer":
        w_tile = w + expert.to(tl.int64) * WEIGHT.STRIDE_E
        w_tile = w_tile + offs_n[None, :] * WEIGHT.STRIDE_N + offs_k[:, None] * WEIGHT.STRIDE_K
        first = 0
    else:
        w_tile = w
        first = expert * (GATE.I if WEIGHT.MODE == "rows" else K)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if A.DESCRIPTOR:
            x = a.load([row, k])
        elif K % BLOCK_K == 0:
            x = tl.load(a_ptrs)
        else:
            x = tl.load(a_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
        wt = load_weight(w_tile, first, n, k, offs_n, offs_k, GATE.I, K, WEIGHT, BLOCK_N, BLOCK_K)
        acc = tl.dot(x, wt, acc, input_precision=TILE.PRECISION)
        if not A.DESCRIPTOR:
            a_ptrs += BLOCK_K
        if WEIGHT.MODE == "pointer":
            w_tile += BLOCK_K * WEIGHT.STRIDE_K
    if LOW_RANK.RANK > 0:
        acc = add_low_rank(
            acc, term.left, term.right, expert, row, live, offs_n, offs_n < GATE.I, LOW_RANK, TILE, BLOCK_M
        )
    if A.SCALED:
        acc *= scale
    store_outputs(acc, acc, bias, out, expert, row, live, n, offs_n, GATE, OUT, HAS_BIAS, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["num_rows"])
def grouped_gemm_kernel(
    a,  # (S, K), or (T, K) where rows are gathered: element pointer, or descriptor
    a_half,  # the same; a descriptor has blocks of half the height
    w,  # (E, N, K): element pointer, or descriptor of (E·N, K) or (E·K, N)
    bias,  # (E, N)
    term,  # LowRankTensors: an adapter's product that is added
    out,  # Outputs: h (S, N)
    routing,  # RoutingTensors
    num_rows,  # S
    fill,  # of rows that belong to no expert
    scale,  # of the product, where A.SCALED
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    K: tl.constexpr,
    A: tl.constexpr,  # RowsLayout
    WEIGHT: tl.constexpr,  # DenseLayout
    GATE: tl.constexpr,  # GateLayout of a plain product
    OUT: tl.constexpr,  # OutputLayout
    LOW_RANK: tl.constexpr,  # LowRankLayout
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
):
    """out[row] = a[row or token] · w[expert]ᵀ + bias[expert]. Grid: (tiles · ⌈N / TILE.N⌉,), column tiles fastest."""
    N_TILES: tl.constexpr = (GATE.I + TILE.N - 1) // TILE.N
    tile = tl.program_id(0) // N_TILES
    n = (tl.program_id(0) % N_TILES) * TILE.N
    expert = tl.load(routing.tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(routing.tile_row + tile)
    if expert == NUM_EXPERTS:
        fill_outputs(out, row, num_rows, n, fill, GATE, OUT, TILE)
        return
    end = tl.load(routing.offsets + expert + 1)
    if TILE.HALF and end - row <= TILE.M // 2:
        _gemm_tile(
            a_half, w, bias, term, out, routing, scale, expert, row, end, n, TOP_K, K, A, WEIGHT, GATE, OUT, LOW_RANK,
            HAS_BIAS, TILE, TILE.M // 2,
        )  # fmt: skip
    else:
        _gemm_tile(
            a, w, bias, term, out, routing, scale, expert, row, end, n, TOP_K, K, A, WEIGHT, GATE, OUT, LOW_RANK,
            HAS_BIAS, TILE, TILE.M,
        )  # fmt: skip
