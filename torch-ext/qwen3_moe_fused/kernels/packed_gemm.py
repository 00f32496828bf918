"""Grouped GEMM over 4-bit weights that dequantizes them on the way to the tensor cores.

Eight weights to a 32-bit word lie side by side along the in features. Tensor cores that read weights from shared memory
(row tiles from 64 on) get them in that order, one product a step of the loop (``FormatCode.in_order``). Small tiles
multiply from registers, where even and odd in features apart, with the rows split alike, are cheaper
(``FormatCode.pair``). A gate's column and its up's are neighbours in one product, which the tensor cores leave in one
thread.

A scale with two levels is a chain of three loads, too narrow for the pipeline's asynchronous copies. The scales of the next
step are loaded during this one, and what the scales of a row share is loaded before the loop (``FormatCode.prepare``).

What sets the pace on an H100 is the pipe to shared memory, three quarters busy at 4096 tokens with what tensor cores,
copies and stores of dequantized weights move. Hence tables in registers: shuffles, which are as fast to issue, go
through that pipe. Two programs share a multiprocessor, so that one dequantizes while the other multiplies. The up
projection of a Qwen3-30B-A3B layer takes 130, 191 and 615 µs at 32, 512 and 4096 tokens; its bytes would take 70, 105
and 105, and dense experts take 503 at 4096. These alternatives lost there:

- even and odd apart in large tiles: 830 against 700 at 4096 tokens, with shuffles; in order in small ones: 141 at 32;
- nibbles looked up by shuffles: 168, 213, 705; by ``tl.gather``, through shared memory: 276 at 512 where shuffles took 239;
- all scales' chains in the loop: 761 at 4096 where 698 was; scales loaded two steps ahead gained 2 % of that in these tiles
  and lost 5 to 10 % in others;
- one program a multiprocessor, of tiles 128 columns wide: 751 at 4096; of 256 rows: 833;
- the weights as the left operand, where they may stay in registers: 312 against 276 at 512, with a gather.
"""

import triton
import triton.language as tl

from .dequantize import elements, load_code, spread, tile_scales
from .low_rank import add_low_rank, add_low_rank_to_both
from .tiles import fill_outputs, store_outputs, token_rows


@triton.jit(do_not_specialize=["num_rows", "fill"])
def packed_gemm_kernel(
    a,  # (S, K), or (T, K) where rows are gathered
    w,  # PackedTensors of a stack (E, COLUMNS, K)
    bias,  # (E, COLUMNS)
    term,  # LowRankTensors: an adapter's product that is added
    out,  # Outputs: h (S, I), gate_up (S, COLUMNS)
    routing,  # RoutingTensors
    num_rows,  # S
    fill,  # of rows that belong to no expert
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    K: tl.constexpr,  # a multiple of TILE.K
    A: tl.constexpr,  # RowsLayout
    FORMAT: tl.constexpr,  # FormatCode
    GATE: tl.constexpr,  # GateLayout; of a plain product where its activation is "none"
    OUT: tl.constexpr,  # OutputLayout
    LOW_RANK: tl.constexpr,  # LowRankLayout
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
):
    """h = gate(a[row or token] · w[expert]ᵀ + bias[expert]). Grid: (tiles · ⌈I / TILE.N⌉,), column tiles fastest."""
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    N_TILES: tl.constexpr = (GATE.I + BLOCK_N - 1) // BLOCK_N
    SCALES: tl.constexpr = BLOCK_K // FORMAT.RUN
    tile = tl.program_id(0) // N_TILES
    n = (tl.program_id(0) % N_TILES) * BLOCK_N
    expert = tl.load(routing.tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(routing.tile_row + tile)
    if expert == NUM_EXPERTS:
        fill_outputs(out, row, num_rows, n, fill, GATE, OUT, TILE)
        return
    end = tl.load(routing.offsets + expert + 1)
    offs_m = tl.arange(0, BLOCK_M)
    live = row + offs_m < end
    if A.GATHER:
        source = token_rows(routing, row, live, TOP_K, BLOCK_M)
    else:
        source = tl.where(live, row + offs_m, row)
    expert64 = expert.to(tl.int64)  # int64: T·K and E·out·in pass 2³¹ in real models
    a_ptrs = a + source.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    offs_n = n + tl.arange(0, BLOCK_N)
    # A gate's column and its up's are neighbours in one product, so that a thread has both of the result. Columns past the
    # last one are computed from it and not stored.
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATE.GATED else BLOCK_N
    IN_ORDER: tl.constexpr = BLOCK_M >= 64
    if GATE.GATED:
        pairs = tl.arange(0, WIDTH)
        features = tl.minimum(n + pairs // 2, GATE.I - 1) * GATE.COLUMN_STRIDE + pairs % 2 * GATE.UP_OFFSET
        in_width = n + pairs // 2 < GATE.I
    else:
        features = tl.minimum(offs_n, GATE.I - 1) * GATE.COLUMN_STRIDE
        in_width = offs_n < GATE.I
    w_ptrs = elements(w.packed, FORMAT) + expert64 * (GATE.COLUMNS * K // FORMAT.PER_ELEMENT)
    w_ptrs = (
        w_ptrs + features[:, None] * (K // FORMAT.PER_ELEMENT) + tl.arange(0, BLOCK_K // FORMAT.PER_ELEMENT)[None, :]
    )
    code = load_code(w.code, FORMAT)
    starts = features * K
    prepared = FORMAT.prepare(w.scales, expert64, starts, K, FORMAT)
    scale = tile_scales(w.scales, expert64, starts, prepared, FORMAT, SCALES)
    dtype: tl.constexpr = a.dtype.element_ty
    acc = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(a_ptrs)
        ahead = starts + tl.minimum(k + BLOCK_K, K - BLOCK_K)
        next_scale = tile_scales(w.scales, expert64, ahead, prepared, FORMAT, SCALES)
        packed = tl.load(w_ptrs)
        wide = spread(scale, BLOCK_K // FORMAT.PER_ELEMENT)
        if IN_ORDER:
            weights = FORMAT.in_order(code, packed, wide, dtype, FORMAT, False)
            acc = tl.dot(x, tl.trans(weights), acc, input_precision=TILE.PRECISION)
        else:
            x_even, x_odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
            even, odd = FORMAT.pair(code, packed, wide, dtype, FORMAT)
            acc = tl.dot(x_even, tl.trans(even), acc, input_precision=TILE.PRECISION)
            acc = tl.dot(x_odd, tl.trans(odd), acc, input_precision=TILE.PRECISION)
        scale = next_scale
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K // FORMAT.PER_ELEMENT
    SHARED: tl.constexpr = (
        LOW_RANK.RANK > 0 and LOW_RANK.UP_COLUMN == 0
    )  # gate and up have one product with the left factor
    if SHARED:
        acc = add_low_rank(acc, term.left, term.right, expert, row, live, features, in_width, LOW_RANK, TILE, BLOCK_M)
    if GATE.GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
    else:
        gate = acc
        up = acc
    if LOW_RANK.RANK > 0 and not SHARED:
        gate, up = add_low_rank_to_both(
            gate, up, term, expert, row, live, offs_n * GATE.COLUMN_STRIDE, offs_n < GATE.I, GATE.UP_OFFSET, GATE.GATED,
            LOW_RANK, TILE, BLOCK_M,
        )  # fmt: skip
    store_outputs(gate, up, bias, out, expert, row, live, n, offs_n, GATE, OUT, HAS_BIAS, BLOCK_M, BLOCK_N)


@triton.jit
def multiply_transposed(
    a_ptrs,  # (TILE.M, TILE.K), the first of K columns
    w,  # PackedTensors of a stack (E, K, N)
    expert,  # int64
    n,  # first column of w
    K: tl.constexpr,
    N: tl.constexpr,  # a multiple of TILE.N
    FORMAT: tl.constexpr,
    TILE: tl.constexpr,
    dtype: tl.constexpr,
):
    """a · w[expert] (TILE.M, TILE.N) fp32, w stored (K, N)."""
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    SCALES: tl.constexpr = BLOCK_N // FORMAT.RUN
    offs_k = tl.arange(0, BLOCK_K)
    w_base = elements(w.packed, FORMAT) + expert * (K * N // FORMAT.PER_ELEMENT)
    w_base = w_base + n // FORMAT.PER_ELEMENT + tl.arange(0, BLOCK_N // FORMAT.PER_ELEMENT)[None, :]
    code = load_code(w.code, FORMAT)
    scale = tile_scales(w.scales, expert, tl.minimum(offs_k, K - 1) * N + n, None, FORMAT, SCALES)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        # Weights past the last one count nothing: there a is zero.
        if K % BLOCK_K == 0:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
        packed = tl.load(w_base + (tl.minimum(k + offs_k, K - 1) * (N // FORMAT.PER_ELEMENT))[:, None])
        ahead = tl.minimum(k + BLOCK_K + offs_k, K - 1) * N + n
        next_scale = tile_scales(w.scales, expert, ahead, None, FORMAT, SCALES)
        # Transposed twice: Triton 3.6 does not compile the plain way in fp32 for compute capability 10.0.
        wide = spread(scale, BLOCK_N // FORMAT.PER_ELEMENT)
        weights = FORMAT.in_order(code, packed, wide, dtype, FORMAT, True)
        acc = tl.dot(a, tl.trans(weights), acc, input_precision=TILE.PRECISION)
        scale = next_scale
        a_ptrs += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["num_rows", "fill"])
def packed_transposed_kernel(
    a,  # (S, K)
    w,  # PackedTensors of a stack (E, K, N)
    term,  # LowRankTensors: an adapter's product that is added
    out,  # Outputs: h (S, N)
    routing,  # RoutingTensors
    num_rows,  # S
    fill,  # of rows that belong to no expert
    NUM_EXPERTS: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,  # FormatCode
    GATE: tl.constexpr,  # GateLayout of a plain product; I is a multiple of TILE.N
    OUT: tl.constexpr,  # OutputLayout
    LOW_RANK: tl.constexpr,  # LowRankLayout
    TILE: tl.constexpr,
):
    """out[row] = a[row] · w[expert], w stored (K, N). Grid: (tiles · N / TILE.N,), column tiles fastest."""
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    N_TILES: tl.constexpr = GATE.I // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    n = (tl.program_id(0) % N_TILES) * BLOCK_N
    expert = tl.load(routing.tile_expert + tile)
    if expert < 0:
        return
    row = tl.load(routing.tile_row + tile)
    if expert == NUM_EXPERTS:
        fill_outputs(out, row, num_rows, n, fill, GATE, OUT, TILE)
        return
    end = tl.load(routing.offsets + expert + 1)
    rows = row + tl.arange(0, BLOCK_M)
    live = rows < end
    # int64: S·K and E·out·in pass 2³¹ in real models.
    a_ptrs = a + tl.where(live, rows, row).to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    acc = multiply_transposed(a_ptrs, w, expert.to(tl.int64), n, K, GATE.I, FORMAT, TILE, a.dtype.element_ty)
    offs_n = n + tl.arange(0, BLOCK_N)
    if LOW_RANK.RANK > 0:
        acc = add_low_rank(
            acc, term.left, term.right, expert, row, live, offs_n, offs_n < GATE.I, LOW_RANK, TILE, BLOCK_M
        )
    store_outputs(acc, acc, out.h, out, expert, row, live, n, offs_n, GATE, OUT, False, BLOCK_M, BLOCK_N)
