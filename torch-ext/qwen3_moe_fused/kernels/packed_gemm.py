"""Grouped GEMM over 4-bit weights that decodes them on the way to the tensor cores.

Eight weights to a 32-bit word lie side by side along the in features. Tensor cores that read weights from shared memory (row
tiles from 64 on) get them in that order, one product a step of the loop (``decode_in_order``). Small tiles multiply from
registers, where even and odd in features apart, with the rows split alike, are cheaper. A gate's column and its up's are
neighbours in one product, which the tensor cores leave in one thread.

An absmax is a chain of three loads, too narrow for the pipeline's asynchronous copies. The scales of the next step are
loaded during this one, and the nested absmax before the loop: a row of weights lies in at most two groups.

What sets the pace on an H100 is the pipe to shared memory, three quarters busy at 4096 tokens with what tensor cores, copies
and stores of decoded weights move. Hence tables in registers: shuffles, which are as fast to issue, go through that pipe.
Two programs share a multiprocessor, so that one decodes while the other multiplies. The up projection of a Qwen3-30B-A3B
layer, in µs at 32, 512 and 4096 tokens: 130, 191, 615; its bytes would take 70, 105 and 105, dense experts take 503 at 4096.
What lost there:

- even and odd apart in large tiles: 830 against 700 at 4096 tokens, with shuffles; in order in small ones: 141 at 32;
- nibbles looked up by shuffles: 168, 213, 705; by ``tl.gather``, through shared memory: 276 at 512 where shuffles took 239;
- all absmaxes' chains in the loop: 761 at 4096 where 698 was; absmaxes loaded two steps ahead gained 2 % of that in these
  tiles and lost 5 to 10 % in others;
- one program a multiprocessor, of tiles 128 columns wide: 751 at 4096; of 256 rows: 833;
- the weights as the left operand, where they may stay in registers: 312 against 276 at 512, with a gather.
"""

import triton
import triton.language as tl

from .common import apply_gate
from .grouped_gemm import fill_rows
from .low_rank import add_low_rank
from .packed import block_scale, decode, decode_in_order, elements, load_code


@triton.jit
def _groups(
    nested_absmax_ptr, nested_offset_ptr, expert, start, K: tl.constexpr, BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr, GROUPS: tl.constexpr, PROJECTIONS: tl.constexpr,
):  # fmt: skip
    """What the absmaxes of K ≤ 256·BLOCKSIZE weights from each of ``start`` (rows,) share, each (rows, 1).

    The nested absmax of their first group and of their last, which is the next or the same; its first block; the offset.
    """
    projection = start // BLOCKSIZE // BLOCKS
    first = (start // BLOCKSIZE - projection * BLOCKS) // 256
    last = ((start + K - 1) // BLOCKSIZE - projection * BLOCKS) // 256
    nested_absmax_ptr += expert * (PROJECTIONS * GROUPS) + projection * GROUPS
    near = tl.load(nested_absmax_ptr + first)
    if 256 * BLOCKSIZE % K == 0:
        far = near  # a group is of whole rows
    else:
        far = tl.load(nested_absmax_ptr + last)
    offset = tl.load(nested_offset_ptr + expert * PROJECTIONS + projection)
    return near[:, None], far[:, None], (projection * BLOCKS + last * 256)[:, None], offset[:, None]


@triton.jit
def _scales(
    absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, start, groups, BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr, GROUPS: tl.constexpr, PROJECTIONS: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """(rows, SCALES) absmaxes of the 64·SCALES weights of the expert from each of ``start`` (rows,).

    ``groups``: of ``_groups`` for these rows, or None.
    """
    block = (start[:, None] + 64 * tl.arange(0, SCALES)[None, :]) // BLOCKSIZE
    if groups is None:
        scale = block_scale(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, block, BLOCKS, GROUPS,
            PROJECTIONS, DOUBLE_QUANT,
        )  # fmt: skip
    else:
        near, far, border, offset = groups
        scale = tl.load(absmax_ptr + expert * (PROJECTIONS * BLOCKS) + block)
        nested = tl.where(block < border, near, far)
        scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * nested + offset
    return scale


@triton.jit(do_not_specialize=["num_rows", "fill"])
def packed_gemm_kernel(
    a_ptr,  # (S, K), or (T, K) with GATHER
    packed_ptr,  # (E, COLUMNS·K/2) uint8
    absmax_ptr,  # (E, PROJECTIONS·BLOCKS) uint8 with DOUBLE_QUANT, else fp32
    nested_absmax_ptr,  # (E, PROJECTIONS·GROUPS) fp32
    nested_offset_ptr,  # (E, PROJECTIONS) fp32
    nested_code_ptr,  # (256,) fp32
    code_ptr,  # (16,) fp32
    bias_ptr,  # (E, COLUMNS)
    left_ptr,  # (S, RANK), or (S, 2·RANK): the gate's, then the up's
    right_ptr,  # (E, COLUMNS, RANK)
    out_ptr,  # (S, N) out, with SAVE_OUT
    gate_up_ptr,  # (S, COLUMNS) out, with SAVE_GATE_UP
    offsets_ptr,  # (E+1,)
    row_to_slot_ptr,  # (S,), read with GATHER
    tile_expert_ptr,  # (tiles,)
    tile_row_ptr,  # (tiles,)
    num_rows,  # S
    fill,  # of rows that belong to no expert
    NUM_EXPERTS: tl.constexpr,
    K: tl.constexpr,  # a multiple of BLOCK_K
    N: tl.constexpr,  # of the output
    COLUMNS: tl.constexpr,  # 2·N when gated, else N
    COLUMN_STRIDE: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "none": a plain linear layer
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LOW_RANK: tl.constexpr,  # an adapter's product, left · right[expert]ᵀ, is added
    SAVE_OUT: tl.constexpr,
    SAVE_GATE_UP: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    PTX: tl.constexpr,  # the quant type to decode in PTX, or ""
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = gate(a[row or token] · w[expert]ᵀ + bias[expert]). Grid: (tiles · ⌈N / BLOCK_N⌉,), column tiles fastest."""
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    SCALES: tl.constexpr = BLOCK_K // 64
    tile = tl.program_id(0) // N_TILES
    n = (tl.program_id(0) % N_TILES) * BLOCK_N
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    row = tl.load(tile_row_ptr + tile)
    if expert == NUM_EXPERTS:
        if SAVE_OUT:
            fill_rows(out_ptr, row, num_rows, n, fill, N, N, BLOCK_M, BLOCK_N)
        if SAVE_GATE_UP:
            fill_rows(gate_up_ptr, row, num_rows, n, 0.0, COLUMNS, COLUMNS, BLOCK_M, BLOCK_N)
            if GATED:
                fill_rows(gate_up_ptr, row, num_rows, n + N, 0.0, COLUMNS, COLUMNS, BLOCK_M, BLOCK_N)
        return
    end = tl.load(offsets_ptr + expert + 1)
    offs_m = tl.arange(0, BLOCK_M)
    live = row + offs_m < end
    if GATHER:
        source = tl.load(row_to_slot_ptr + row + offs_m, mask=live, other=0) // TOP_K
    else:
        source = tl.where(live, row + offs_m, row)
    expert64 = expert.to(tl.int64)  # int64: T·K and E·out·in pass 2³¹ in real models
    a_ptrs = a_ptr + source.to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    offs_n = n + tl.arange(0, BLOCK_N)
    # Columns past the last one are computed from it and not stored.
    columns = tl.minimum(offs_n, N - 1) * COLUMN_STRIDE
    # A gate's column and its up's are neighbours in one product, so that a thread has both of the result.
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    IN_ORDER: tl.constexpr = BLOCK_M >= 64
    in_n = offs_n < N
    if GATED:
        pairs = tl.arange(0, WIDTH)
        multiplied = tl.minimum(n + pairs // 2, N - 1) * COLUMN_STRIDE + pairs % 2 * UP_OFFSET
        in_width = n + pairs // 2 < N
    else:
        multiplied = columns
        in_width = in_n
    PER_ELEMENT: tl.constexpr = 8 if PTX != "" else 2  # weights
    w_ptrs = elements(packed_ptr, PTX) + expert64 * (COLUMNS * K // PER_ELEMENT)
    w_ptrs = w_ptrs + multiplied[:, None] * (K // PER_ELEMENT) + tl.arange(0, BLOCK_K // PER_ELEMENT)[None, :]
    code = load_code(code_ptr, PTX)
    starts = multiplied * K
    if DOUBLE_QUANT and K <= 256 * BLOCKSIZE:
        groups = _groups(
            nested_absmax_ptr, nested_offset_ptr, expert64, starts, K, BLOCKSIZE, BLOCKS, GROUPS, PROJECTIONS
        )
    else:
        groups = None
    scale = _scales(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert64, starts, groups, BLOCKSIZE, BLOCKS,
        GROUPS, PROJECTIONS, DOUBLE_QUANT, SCALES,
    )  # fmt: skip
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs)
        ahead = starts + tl.minimum(k + BLOCK_K, K - BLOCK_K)
        next_scale = _scales(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert64, ahead, groups, BLOCKSIZE,
            BLOCKS, GROUPS, PROJECTIONS, DOUBLE_QUANT, SCALES,
        )  # fmt: skip
        packed = tl.load(w_ptrs)
        if IN_ORDER:
            w = decode_in_order(code, packed, scale, dtype, WIDTH, BLOCK_K // PER_ELEMENT, SCALES, PTX, False)
            acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
        else:
            a_even, a_odd = tl.split(tl.reshape(a, (BLOCK_M, BLOCK_K // 2, 2)))
            even, odd = decode(code, packed, scale, dtype, WIDTH, BLOCK_K // PER_ELEMENT, SCALES, PTX)
            acc = tl.dot(a_even, tl.trans(even), acc, input_precision=PRECISION)
            acc = tl.dot(a_odd, tl.trans(odd), acc, input_precision=PRECISION)
        scale = next_scale
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K // PER_ELEMENT
    SHARED: tl.constexpr = LOW_RANK[0] > 0 and LOW_RANK[3] == 0  # of gate and up is one product with the left factor
    if SHARED:
        acc = add_low_rank(
            acc, left_ptr, right_ptr, expert, row, live, multiplied, in_width, LOW_RANK, PRECISION, BLOCK_M
        )
    if GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
    else:
        gate = acc
        up = acc
    if LOW_RANK[0] > 0 and not SHARED:
        gate = add_low_rank(gate, left_ptr, right_ptr, expert, row, live, columns, in_n, LOW_RANK, PRECISION, BLOCK_M)
        left_ptr += LOW_RANK[3]
        up_columns = columns + UP_OFFSET
        up = add_low_rank(up, left_ptr, right_ptr, expert, row, live, up_columns, in_n, LOW_RANK, PRECISION, BLOCK_M)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert * COLUMNS + columns
        gate += tl.load(bias_ptrs).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptrs + UP_OFFSET).to(tl.float32)[None, :]
    mask = live[:, None] & in_n[None, :]
    row64 = row.to(tl.int64)
    if SAVE_GATE_UP:
        # Columns clamped to the last would be written one by one: 1.4 ms at 4096 tokens, without saving 0.8.
        saved = gate_up_ptr + row64 * COLUMNS + offs_m[:, None] * COLUMNS + (offs_n * COLUMN_STRIDE)[None, :]
        tl.store(saved, gate.to(gate_up_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(saved + UP_OFFSET, up.to(gate_up_ptr.dtype.element_ty), mask=mask)
    if SAVE_OUT:
        if ACTIVATION != "none":
            gate = apply_gate(gate, up, ALPHA, LIMIT, ACTIVATION, GATED)
        out = out_ptr + row64 * N + offs_m[:, None] * N + offs_n[None, :]
        tl.store(out, gate.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def multiply_transposed(
    a_ptrs,  # (BLOCK_M, BLOCK_K), the first of K columns
    packed_ptr,  # (E, K·N/2) uint8
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    nested_code_ptr,
    code_ptr,
    expert,  # int64
    n,  # first column of w
    K: tl.constexpr,
    N: tl.constexpr,  # a multiple of BLOCK_N
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    PTX: tl.constexpr,  # the quant type to decode in PTX, or ""
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """a · w[expert] (BLOCK_M, BLOCK_N) fp32, w stored (K, N)."""
    SCALES: tl.constexpr = BLOCK_N // 64
    PER_ELEMENT: tl.constexpr = 8 if PTX != "" else 2  # weights
    offs_k = tl.arange(0, BLOCK_K)
    w_base = elements(packed_ptr, PTX) + expert * (K * N // PER_ELEMENT)
    w_base = w_base + n // PER_ELEMENT + tl.arange(0, BLOCK_N // PER_ELEMENT)[None, :]
    code = load_code(code_ptr, PTX)
    scale = _scales(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, tl.minimum(offs_k, K - 1) * N + n,
        None, BLOCKSIZE, BLOCKS, GROUPS, PROJECTIONS, DOUBLE_QUANT, SCALES,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        # Weights past the last one count nothing: there a is zero.
        if K % BLOCK_K == 0:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
        packed = tl.load(w_base + (tl.minimum(k + offs_k, K - 1) * (N // PER_ELEMENT))[:, None])
        ahead = tl.minimum(k + BLOCK_K + offs_k, K - 1) * N + n
        next_scale = _scales(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, ahead, None, BLOCKSIZE, BLOCKS,
            GROUPS, PROJECTIONS, DOUBLE_QUANT, SCALES,
        )  # fmt: skip
        # Transposed twice: Triton 3.6 does not compile the plain way in fp32 for compute capability 10.0.
        w = decode_in_order(code, packed, scale, dtype, BLOCK_K, BLOCK_N // PER_ELEMENT, SCALES, PTX, True)
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
        scale = next_scale
        a_ptrs += BLOCK_K
    return acc


@triton.jit(do_not_specialize=["num_rows", "fill"])
def packed_transposed_kernel(
    a_ptr,  # (S, K)
    packed_ptr,  # (E, K·N/2) uint8
    absmax_ptr,  # (E, PROJECTIONS·BLOCKS) uint8 with DOUBLE_QUANT, else fp32
    nested_absmax_ptr,  # (E, PROJECTIONS·GROUPS) fp32
    nested_offset_ptr,  # (E, PROJECTIONS) fp32
    nested_code_ptr,  # (256,) fp32
    code_ptr,  # (16,) fp32
    left_ptr,  # (S, RANK)
    right_ptr,  # (E, N, RANK)
    out_ptr,  # (S, N) out
    offsets_ptr,  # (E+1,)
    tile_expert_ptr,  # (tiles,)
    tile_row_ptr,  # (tiles,)
    num_rows,  # S
    fill,  # of rows that belong to no expert
    NUM_EXPERTS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,  # a multiple of BLOCK_N
    LOW_RANK: tl.constexpr,  # an adapter's product, left · right[expert]ᵀ, is added
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    PTX: tl.constexpr,  # the quant type to decode in PTX, or ""
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[row] = a[row] · w[expert], w stored (K, N). Grid: (tiles · N / BLOCK_N,), column tiles fastest."""
    N_TILES: tl.constexpr = N // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    n = (tl.program_id(0) % N_TILES) * BLOCK_N
    expert = tl.load(tile_expert_ptr + tile)
    if expert < 0:
        return
    row = tl.load(tile_row_ptr + tile)
    if expert == NUM_EXPERTS:
        fill_rows(out_ptr, row, num_rows, n, fill, N, N, BLOCK_M, BLOCK_N)
        return
    end = tl.load(offsets_ptr + expert + 1)
    offs_m = tl.arange(0, BLOCK_M)
    live = row + offs_m < end
    # int64: S·K and E·out·in pass 2³¹ in real models.
    a_ptrs = a_ptr + tl.where(live, row + offs_m, row).to(tl.int64)[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    acc = multiply_transposed(
        a_ptrs, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, code_ptr,
        expert.to(tl.int64), n, K, N, BLOCKSIZE, BLOCKS, GROUPS, PROJECTIONS, DOUBLE_QUANT, PTX, PRECISION, BLOCK_M,
        BLOCK_N, BLOCK_K, a_ptr.dtype.element_ty,
    )  # fmt: skip
    offs_n = n + tl.arange(0, BLOCK_N)
    if LOW_RANK[0] > 0:
        acc = add_low_rank(
            acc, left_ptr, right_ptr, expert, row, live, offs_n, offs_n < N, LOW_RANK, PRECISION, BLOCK_M
        )
    out = out_ptr + row.to(tl.int64) * N + offs_m[:, None] * N + offs_n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
