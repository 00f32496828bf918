"""Back through combine, the down projection and the gate in one grouped GEMM.

With g = grad_y[token] · w_down[expert], a tile of g is all the epilogue needs next to the saved gate_up: the gradient of
gate_up, the weighted h that the down projection's weight gradient reads, and this tile's share of the routing weight's
gradient rowsum(g · h). Neither g nor the down projection's output ever reaches memory.

The epilogue works on slices of the tile: all of it at once spills 1 KiB a thread at 128×128 and 8 warps, which took 2.0 ms
at 16384 tokens on an H100 against 1.0 ms. Gathering grad_y into expert order first, to read it through a descriptor, gained
nothing: the epilogue, not the gather, is the rest.
"""

import triton
import triton.language as tl

from .common import apply_gate, apply_gate_backward
from .grouped_gemm import load_weight
from .low_rank import add_low_rank


@triton.jit
def backward_epilogue(
    g,  # (BLOCK_M, WIDTH) fp32 slice of the tile
    n,  # its first column
    gate_up_ptr,  # of the tile's first row, as are the other two
    grad_gate_up_ptr,
    weighted_h_ptr,
    live,
    weight,
    I: tl.constexpr,  # noqa: E741
    COLUMNS: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SAVE_WEIGHTED_H: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
    H_STRIDE: tl.constexpr,
):
    """Stores grad_gate_up and weighted h of (BLOCK_M, WIDTH) columns in SLICES slices; returns rowsum(g · h) of them."""
    if SLICES > 1:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(tl.reshape(g, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        return backward_epilogue(
            left, n, gate_up_ptr, grad_gate_up_ptr, weighted_h_ptr, live, weight, I, COLUMNS, COLUMN_STRIDE,
            UP_OFFSET, ACTIVATION, GATED, ALPHA, LIMIT, SAVE_WEIGHTED_H, IN_PLACE, BLOCK_M, HALF, SLICES // 2,
            H_STRIDE,
        ) + backward_epilogue(
            right, n + HALF, gate_up_ptr, grad_gate_up_ptr, weighted_h_ptr, live, weight, I, COLUMNS,
            COLUMN_STRIDE, UP_OFFSET, ACTIVATION, GATED, ALPHA, LIMIT, SAVE_WEIGHTED_H, IN_PLACE, BLOCK_M, HALF,
            SLICES // 2, H_STRIDE,
        )  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, WIDTH)
    mask = live[:, None] & (offs_n < I)[None, :]
    columns = offs_m[:, None] * COLUMNS + (offs_n * COLUMN_STRIDE)[None, :]
    gate = tl.load(gate_up_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(gate_up_ptr + columns + UP_OFFSET, mask=mask, other=0.0).to(tl.float32)
    else:
        up = gate
    h = apply_gate(gate, up, ALPHA, LIMIT, ACTIVATION, GATED)
    # Beyond the last column g holds products with the next expert's weights.
    dots = tl.sum(tl.where(mask, g * h, 0.0), axis=1)
    if IN_PLACE:
        tl.debug_barrier()  # before another thread of the program overwrites what this one reads
    if SAVE_WEIGHTED_H:
        out = weighted_h_ptr + offs_m[:, None] * H_STRIDE + offs_n[None, :]
        tl.store(out, (h * weight).to(weighted_h_ptr.dtype.element_ty), mask=mask)
    grad_gate, grad_up = apply_gate_backward(gate, up, g * weight, ALPHA, LIMIT, ACTIVATION, GATED)
    tl.store(grad_gate_up_ptr + columns, grad_gate.to(grad_gate_up_ptr.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(grad_gate_up_ptr + columns + UP_OFFSET, grad_up.to(grad_gate_up_ptr.dtype.element_ty), mask=mask)
    return dots


@triton.jit
def _tile(
    grad_y_ptr,
    w,
    left_ptr,
    right_ptr,
    gate_up_ptr,
    weights_ptr,
    grad_gate_up_ptr,
    weighted_h_ptr,
    grad_weights_ptr,
    row_to_slot_ptr,
    expert,
    row,
    end,
    n_tile,
    STRIDE_WE: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    COLUMNS: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    H_STRIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    FIRST_PART: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    LOW_RANK: tl.constexpr,
    SAVE_WEIGHTED_H: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One tile of ``down_backward_kernel``: rows row…min(row + BLOCK_M, end) of ``expert``, column tile n_tile."""
    n = n_tile * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    live = row + offs_m < end
    slots = tl.load(row_to_slot_ptr + row + offs_m, mask=live, other=0)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    y_ptrs = grad_y_ptr + (slots // TOP_K).to(tl.int64)[:, None] * H + offs_k[None, :]
    if WEIGHTS == "pointer":
        w_tile = w + expert.to(tl.int64) * STRIDE_WE + offs_n[None, :] * STRIDE_WN + offs_k[:, None] * STRIDE_WK
        first = 0
    else:
        w_tile = w
        first = expert * (I if WEIGHTS == "rows" else H)

    g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            y = tl.load(y_ptrs)
        else:
            y = tl.load(y_ptrs, mask=offs_k[None, :] < H - k, other=0.0)
        wt = load_weight(w_tile, first, n, k, offs_n, offs_k, I, H, WEIGHTS, BLOCK_N, BLOCK_K)
        g = tl.dot(y, wt, g, input_precision=PRECISION)
        y_ptrs += BLOCK_K
        if WEIGHTS == "pointer":
            w_tile += BLOCK_K * STRIDE_WK

    if LOW_RANK[0] > 0:
        g = add_low_rank(g, left_ptr, right_ptr, expert, row, live, offs_n, offs_n < I, LOW_RANK, PRECISION, BLOCK_M)
    weight = tl.load(weights_ptr + slots, mask=live, other=0.0).to(tl.float32)[:, None]
    # The tile's base in int64, offsets inside it in int32: half the registers.
    row64 = row.to(tl.int64)
    gate_up_ptr += row64 * COLUMNS
    grad_gate_up_ptr += row64 * COLUMNS
    weighted_h_ptr += row64 * H_STRIDE
    dots = backward_epilogue(
        g, n, gate_up_ptr, grad_gate_up_ptr, weighted_h_ptr, live, weight, I, COLUMNS, COLUMN_STRIDE,
        UP_OFFSET, ACTIVATION, GATED, ALPHA, LIMIT, SAVE_WEIGHTED_H, IN_PLACE, BLOCK_M, BLOCK_N, SLICES, H_STRIDE,
    )  # fmt: skip
    tl.store(grad_weights_ptr + slots.to(tl.int64) * PARTS + FIRST_PART + n_tile, dots, mask=live)


@triton.jit
def down_backward_kernel(
    grad_y_ptr,  # (T, H)
    w,  # (E, I, H) view of the down projection: element pointer, or descriptor of (E·I, H) or (E·H, I)
    left_ptr,  # (S, RANK)
    right_ptr,  # (E, I, RANK)
    gate_up_ptr,  # (S, COLUMNS)
    weights_ptr,  # (S,) routing weights by slot
    grad_gate_up_ptr,  # (S, COLUMNS) out
    weighted_h_ptr,  # (S, I) out
    grad_weights_ptr,  # (S, PARTS) fp32 out, by slot: parts of the routing weights' gradient
    offsets_ptr,  # (E+1,)
    row_to_slot_ptr,  # (S,)
    tile_expert_ptr,  # (tiles,)
    tile_row_ptr,  # (tiles,)
    NUM_EXPERTS: tl.constexpr,
    STRIDE_WE: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    COLUMNS: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    H_STRIDE: tl.constexpr,  # of the rows of weighted_h, which may have more columns than w computes
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    FIRST_PART: tl.constexpr,  # the part of this launch's first column tile
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    LOW_RANK: tl.constexpr,  # an adapter's product, left · right[expert]ᵀ, is added to g
    SAVE_WEIGHTED_H: tl.constexpr,
    IN_PLACE: tl.constexpr,  # grad_gate_up is gate_up
    WEIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,  # a power of two
    HALF_TILES: tl.constexpr,  # an expert's last tile is half as high where that is enough
):
    """Grid: (tiles · ⌈I / BLOCK_N⌉,), column tiles fastest."""
    N_TILES: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    n_tile = tl.program_id(0) % N_TILES
    expert = tl.load(tile_expert_ptr + tile)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    row = tl.load(tile_row_ptr + tile)
    end = tl.load(offsets_ptr + expert + 1)
    if HALF_TILES and end - row <= BLOCK_M // 2:
        _tile(
            grad_y_ptr, w, left_ptr, right_ptr, gate_up_ptr, weights_ptr, grad_gate_up_ptr, weighted_h_ptr,
            grad_weights_ptr, row_to_slot_ptr, expert, row, end, n_tile, STRIDE_WE, STRIDE_WN, STRIDE_WK, H, I, COLUMNS,
            COLUMN_STRIDE, UP_OFFSET, H_STRIDE, TOP_K, PARTS, FIRST_PART, ACTIVATION, GATED, ALPHA, LIMIT, LOW_RANK,
            SAVE_WEIGHTED_H, IN_PLACE, WEIGHTS, PRECISION, BLOCK_M // 2, BLOCK_N, BLOCK_K, SLICES,
        )  # fmt: skip
    else:
        _tile(
            grad_y_ptr, w, left_ptr, right_ptr, gate_up_ptr, weights_ptr, grad_gate_up_ptr, weighted_h_ptr,
            grad_weights_ptr, row_to_slot_ptr, expert, row, end, n_tile, STRIDE_WE, STRIDE_WN, STRIDE_WK, H, I, COLUMNS,
            COLUMN_STRIDE, UP_OFFSET, H_STRIDE, TOP_K, PARTS, FIRST_PART, ACTIVATION, GATED, ALPHA, LIMIT, LOW_RANK,
            SAVE_WEIGHTED_H, IN_PLACE, WEIGHTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, SLICES,
        )  # fmt: skip


@triton.jit
def bias_dots_kernel(
    grad_y_ptr,  # (T, H)
    bias_ptr,  # (E, H) of the down projection
    grad_weights_ptr,  # (S, PARTS) fp32 out, by slot: the last part
    offsets_ptr,  # (E+1,)
    row_to_slot_ptr,  # (S,)
    tile_expert_ptr,  # (tiles,)
    tile_row_ptr,  # (tiles,)
    NUM_EXPERTS: tl.constexpr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A biased down projection's share of the routing weights' gradient, grad_y[token] · bias[expert]. Grid: (tiles,).

    Not in the GEMM above: a branch on the column tile in its pipelined loop gave wrong sums (Triton 3.6, sm_90).
    """
    expert = tl.load(tile_expert_ptr + tl.program_id(0))
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    rows = tl.load(tile_row_ptr + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(offsets_ptr + expert + 1)
    slots = tl.load(row_to_slot_ptr + rows, mask=live, other=0)
    y_ptrs = grad_y_ptr + (slots // TOP_K).to(tl.int64)[:, None] * H
    dots = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        y = tl.load(y_ptrs + offs_k[None, :], mask=(offs_k < H)[None, :], other=0.0).to(tl.float32)
        dots += y * tl.load(bias_ptr + expert * H + offs_k, mask=offs_k < H, other=0.0).to(tl.float32)[None, :]
    tl.store(grad_weights_ptr + slots.to(tl.int64) * PARTS + PARTS - 1, tl.sum(dots, axis=1), mask=live)


@triton.jit(do_not_specialize=["num_slots"])
def sum_parts_kernel(
    parts_ptr,  # (S, PARTS) fp32 by slot; undefined for slots of no expert
    slot_to_row_ptr,  # (S,)
    grad_weights_ptr,  # (S,) out
    num_slots,
    PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The routing weights' gradient from its parts, in their order; zero for slots of no expert. Grid: (⌈S / BLOCK_S⌉,)."""
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mine = tl.load(slot_to_row_ptr + slots, mask=slots < num_slots, other=-1) >= 0
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(parts_ptr + slots.to(tl.int64) * PARTS + part, mask=mine, other=0.0)
    tl.store(grad_weights_ptr + slots, total.to(grad_weights_ptr.dtype.element_ty), mask=slots < num_slots)
