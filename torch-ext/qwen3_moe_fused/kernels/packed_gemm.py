"""Grouped GEMM over 4-bit weights that decodes them on the way to the tensor cores.

A byte holds two neighbours along the in features. Tensor cores that read weights from shared memory (row tiles from 64 on)
get them in their order: both of a byte are decoded into one register (``decode_in_order``), so a step of the loop is one
product. Small tiles multiply from registers, where even and odd in features apart, with the rows split alike, are cheaper:
168 against 221 µs for the up projection of a Qwen3-30B-A3B layer at 32 tokens on an H100, where large tiles lose by that
(830 against 700 µs at 4096 tokens): two products a step, each with a wait of its own. A gate's column and its up's are
neighbours in one product, which the tensor cores leave in one thread.

An absmax is a chain of three loads, too narrow for the pipeline's asynchronous copies. The scales of the next step are
loaded during this one, and the nested absmax before the loop: a row of weights lies in at most two groups (of the up
projection at 4096 tokens 698 against 761 µs, of the down projection 368 against 378).

Decoding sets the pace: at 32 tokens the bytes would take 70 of the 168 µs, and at 4096 dense experts take 503 of the 700.
A shuffle a weight is the most that a multiprocessor does, so two programs share one, whose decoding and multiplying
overlap: one of tiles 128 columns wide takes 795 µs. Of four warps they take 688, but spill with an adapter. Lost, some of
it before weights came in order: nibbles looked up by ``tl.gather``, through shared memory (571 against 508 µs at 2048
tokens, 276 against 239 at 512); the weights as the left operand of the product, where they may stay in registers (312
against 276 at 512 tokens); tiles of 32 rows (16 rows are 11 % faster at 8 rows to an expert, 64 rows 5 % at 16); tiles of
256 rows (2297 against 2217 µs at 16384 tokens, and half empty with fewer).
"""

import triton
import triton.language as tl

from .common import apply_gate
from .grouped_gemm import fill_rows
from .low_rank import add_low_rank
from .packed import block_scale, decode, decode_in_order, load_code


@triton.jit
def _scales(
    absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, start, BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr, GROUPS: tl.constexpr, PROJECTIONS: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """(rows, SCALES) absmaxes of the 64·SCALES weights of the expert from each of ``start`` (rows,)."""
    block = (start[:, None] + 64 * tl.arange(0, SCALES)[None, :]) // BLOCKSIZE
    return block_scale(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, block, BLOCKS, GROUPS, PROJECTIONS,
        DOUBLE_QUANT,
    )  # fmt: skip


@triton.jit
def _groups(
    nested_absmax_ptr, nested_offset_ptr, expert, start, K: tl.constexpr, BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr, GROUPS: tl.constexpr, PROJECTIONS: tl.constexpr,
):  # fmt: skip
    """What the absmaxes of K < 256·BLOCKSIZE weights from each of ``start`` (rows,) share, each (rows, 1).

    The nested absmax of their first group and of their last, which is the next or the same; its first block; the offset.
    """
    projection = start // BLOCKSIZE // BLOCKS
    first = (start // BLOCKSIZE - projection * BLOCKS) // 256
    last = ((start + K - 1) // BLOCKSIZE - projection * BLOCKS) // 256
    nested_absmax_ptr += expert * (PROJECTIONS * GROUPS) + projection * GROUPS
    near = tl.load(nested_absmax_ptr + first)
    far = tl.load(nested_absmax_ptr + last)
    offset = tl.load(nested_offset_ptr + expert * PROJECTIONS + projection)
    return near[:, None], far[:, None], (projection * BLOCKS + last * 256)[:, None], offset[:, None]


@triton.jit
def _scales_in_groups(
    absmax_ptr, nested_code_ptr, near, far, border, offset, expert, start, BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr, PROJECTIONS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """As ``_scales``, of rows of which ``_groups`` has told the rest."""
    block = (start[:, None] + 64 * tl.arange(0, SCALES)[None, :]) // BLOCKSIZE
    scale = tl.load(absmax_ptr + expert * (PROJECTIONS * BLOCKS) + block)
    nested = tl.where(block < border, near, far)
    return tl.load(nested_code_ptr + scale.to(tl.int32)) * nested + offset


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
    SHUFFLE: tl.constexpr,
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
    if GATED:
        pairs = tl.arange(0, WIDTH)
        multiplied = tl.minimum(n + pairs // 2, N - 1) * COLUMN_STRIDE + pairs % 2 * UP_OFFSET
    else:
        multiplied = columns
    w_ptrs = packed_ptr + expert64 * (COLUMNS * K // 2) + multiplied[:, None] * (K // 2)
    w_ptrs += tl.arange(0, BLOCK_K // 2)[None, :]
    code = load_code(code_ptr, SHUFFLE)
    starts = multiplied * K
    IN_GROUPS: tl.constexpr = DOUBLE_QUANT and K < 256 * BLOCKSIZE
    if IN_GROUPS:
        near, far, border, offset = _groups(
            nested_absmax_ptr, nested_offset_ptr, expert64, starts, K, BLOCKSIZE, BLOCKS, GROUPS, PROJECTIONS
        )
        if 256 * BLOCKSIZE % K == 0:
            far = near  # a group is of whole rows
        scale = _scales_in_groups(
            absmax_ptr, nested_code_ptr, near, far, border, offset, expert64, starts, BLOCKSIZE, BLOCKS, PROJECTIONS,
            SCALES,
        )  # fmt: skip
    else:
        scale = _scales(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert64, starts, BLOCKSIZE, BLOCKS,
            GROUPS, PROJECTIONS, DOUBLE_QUANT, SCALES,
        )  # fmt: skip
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs)
        ahead = starts + tl.minimum(k + BLOCK_K, K - BLOCK_K)
        if IN_GROUPS:
            next_scale = _scales_in_groups(
                absmax_ptr, nested_code_ptr, near, far, border, offset, expert64, ahead, BLOCKSIZE, BLOCKS,
                PROJECTIONS, SCALES,
            )  # fmt: skip
        else:
            next_scale = _scales(
                absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert64, ahead, BLOCKSIZE, BLOCKS,
                GROUPS, PROJECTIONS, DOUBLE_QUANT, SCALES,
            )  # fmt: skip
        packed = tl.load(w_ptrs)
        if IN_ORDER:
            w = decode_in_order(code, packed, scale, dtype, WIDTH, BLOCK_K // 2, SCALES, SHUFFLE, False)
            acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
        else:
            a_even, a_odd = tl.split(tl.reshape(a, (BLOCK_M, BLOCK_K // 2, 2)))
            even, odd = decode(code, packed, scale, dtype, WIDTH, BLOCK_K // 2, SCALES, SHUFFLE)
            acc = tl.dot(a_even, tl.trans(even), acc, input_precision=PRECISION)
            acc = tl.dot(a_odd, tl.trans(odd), acc, input_precision=PRECISION)
        scale = next_scale
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K // 2
    if GATED:
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
    else:
        gate = acc
        up = acc
    in_n = offs_n < N
    if LOW_RANK[0] > 0:
        gate = add_low_rank(gate, left_ptr, right_ptr, expert, row, live, columns, in_n, LOW_RANK, PRECISION, BLOCK_M)
        if GATED:
            left_ptr += LOW_RANK[3]
            up_columns = columns + UP_OFFSET
            up = add_low_rank(
                up, left_ptr, right_ptr, expert, row, live, up_columns, in_n, LOW_RANK, PRECISION, BLOCK_M
            )
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
    SHUFFLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[row] = a[row] · w[expert], w stored (K, N). Grid: (tiles · N / BLOCK_N,), column tiles fastest."""
    N_TILES: tl.constexpr = N // BLOCK_N
    SCALES: tl.constexpr = BLOCK_N // 64
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
    offs_k = tl.arange(0, BLOCK_K)
    live = row + offs_m < end
    expert64 = expert.to(tl.int64)  # int64: S·K and E·out·in pass 2³¹ in real models
    a_ptrs = a_ptr + tl.where(live, row + offs_m, row).to(tl.int64)[:, None] * K + offs_k[None, :]
    w_base = packed_ptr + expert64 * (K * N // 2) + n // 2 + tl.arange(0, BLOCK_N // 2)[None, :]
    code = load_code(code_ptr, SHUFFLE)
    scale = _scales(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert64, tl.minimum(offs_k, K - 1) * N + n,
        BLOCKSIZE, BLOCKS, GROUPS, PROJECTIONS, DOUBLE_QUANT, SCALES,
    )  # fmt: skip
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        # Weights past the last one count nothing: there a is zero.
        if K % BLOCK_K == 0:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
        packed = tl.load(w_base + (tl.minimum(k + offs_k, K - 1) * (N // 2))[:, None])
        ahead = tl.minimum(k + BLOCK_K + offs_k, K - 1) * N + n
        next_scale = _scales(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert64, ahead, BLOCKSIZE, BLOCKS,
            GROUPS, PROJECTIONS, DOUBLE_QUANT, SCALES,
        )  # fmt: skip
        # Transposed twice: Triton 3.6 does not compile the plain way in fp32 for compute capability 10.0.
        w = decode_in_order(code, packed, scale, dtype, BLOCK_K, BLOCK_N // 2, SCALES, SHUFFLE, True)
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
        scale = next_scale
        a_ptrs += BLOCK_K
    offs_n = n + tl.arange(0, BLOCK_N)
    if LOW_RANK[0] > 0:
        acc = add_low_rank(
            acc, left_ptr, right_ptr, expert, row, live, offs_n, offs_n < N, LOW_RANK, PRECISION, BLOCK_M
        )
    out = out_ptr + row.to(tl.int64) * N + offs_m[:, None] * N + offs_n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
