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

from .activations import apply_gate, apply_gate_backward
from .low_rank import add_low_rank
from .records import BackwardTensors
from .tiles import load_weight


@triton.jit
def _slice_gradients(
    g,  # (BLOCK_M, WIDTH) fp32 slice of the tile
    n,  # its first column
    tensors,  # BackwardTensors, those by row at the tile's first row
    live,
    weight,
    GATE: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Stores grad_gate_up and weighted h of (BLOCK_M, WIDTH) columns in SLICES slices; returns rowsum(g · h) of them."""
    if SLICES > 1:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(tl.reshape(g, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        return _slice_gradients(
            left, n, tensors, live, weight, GATE, LAYOUT, BLOCK_M, HALF, SLICES // 2
        ) + _slice_gradients(
            right, n + HALF, tensors, live, weight, GATE, LAYOUT, BLOCK_M, HALF, SLICES // 2
        )  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, WIDTH)
    mask = live[:, None] & (offs_n < GATE.I)[None, :]
    columns = offs_m[:, None] * GATE.COLUMNS + (offs_n * GATE.COLUMN_STRIDE)[None, :]
    gate = tl.load(tensors.gate_up + columns, mask=mask, other=0.0).to(tl.float32)
    if GATE.GATED:
        up = tl.load(tensors.gate_up + columns + GATE.UP_OFFSET, mask=mask, other=0.0).to(tl.float32)
    else:
        up = gate
    h = apply_gate(gate, up, GATE)
    # Beyond the last column g holds products with the next expert's weights.
    dots = tl.sum(tl.where(mask, g * h, 0.0), axis=1)
    if LAYOUT.IN_PLACE:
        tl.debug_barrier()  # before another thread of the program overwrites what this one reads
    if LAYOUT.SAVE_WEIGHTED_H:
        out = tensors.weighted_h + offs_m[:, None] * LAYOUT.H_STRIDE + offs_n[None, :]
        tl.store(out, (h * weight).to(tensors.weighted_h.dtype.element_ty), mask=mask)
    grad_gate, grad_up = apply_gate_backward(gate, up, g * weight, GATE)
    out = tensors.grad_gate_up + columns
    tl.store(out, grad_gate.to(tensors.grad_gate_up.dtype.element_ty), mask=mask)
    if GATE.GATED:
        tl.store(out + GATE.UP_OFFSET, grad_up.to(tensors.grad_gate_up.dtype.element_ty), mask=mask)
    return dots


@triton.jit
def store_gradients(
    g,  # (BLOCK_M, TILE.N) fp32
    n_tile,
    slots,  # (BLOCK_M,)
    live,
    row,
    tensors,  # BackwardTensors
    GATE: tl.constexpr,  # GateLayout
    LAYOUT: tl.constexpr,  # BackwardLayout
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The epilogue: what goes on from a tile of g, with the gate_up of its rows and columns."""
    weight = tl.load(tensors.weights + slots, mask=live, other=0.0).to(tl.float32)[:, None]
    # The tile's base is int64, offsets inside the tile are int32: this takes half the registers.
    row64 = row.to(tl.int64)
    of_tile = BackwardTensors(
        tensors.gate_up + row64 * GATE.COLUMNS,
        tensors.weights,
        tensors.grad_gate_up + row64 * GATE.COLUMNS,
        tensors.weighted_h + row64 * LAYOUT.H_STRIDE,
        tensors.grad_weights,
    )
    dots = _slice_gradients(
        g, n_tile * TILE.N, of_tile, live, weight, GATE, LAYOUT, BLOCK_M, TILE.N, TILE.SLICES
    )  # fmt: skip
    parts = tensors.grad_weights + slots.to(tl.int64) * LAYOUT.PARTS + LAYOUT.FIRST_PART
    tl.store(parts + n_tile, dots, mask=live)


@triton.jit
def _tile(
    grad_y,
    w,
    term,
    tensors,
    routing,
    expert,
    row,
    end,
    n_tile,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    LAYOUT: tl.constexpr,
    LOW_RANK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One tile of ``down_backward_kernel``: rows row…min(row + BLOCK_M, end) of ``expert``, column tile n_tile."""
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    n = n_tile * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    live = row + offs_m < end
    slots = tl.load(routing.row_to_slot + row + offs_m, mask=live, other=0)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    y_ptrs = grad_y + (slots // TOP_K).to(tl.int64)[:, None] * H + offs_k[None, :]
    if WEIGHT.MODE == "pointer":
        w_tile = w + expert.to(tl.int64) * WEIGHT.STRIDE_E
        w_tile = w_tile + offs_n[None, :] * WEIGHT.STRIDE_N + offs_k[:, None] * WEIGHT.STRIDE_K
        first = 0
    else:
        w_tile = w
        first = expert * (GATE.I if WEIGHT.MODE == "rows" else H)

    g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            y = tl.load(y_ptrs)
        else:
            y = tl.load(y_ptrs, mask=offs_k[None, :] < H - k, other=0.0)
        wt = load_weight(w_tile, first, n, k, offs_n, offs_k, GATE.I, H, WEIGHT, BLOCK_N, BLOCK_K)
        g = tl.dot(y, wt, g, input_precision=TILE.PRECISION)
        y_ptrs += BLOCK_K
        if WEIGHT.MODE == "pointer":
            w_tile += BLOCK_K * WEIGHT.STRIDE_K

    if LOW_RANK.RANK > 0:
        g = add_low_rank(g, term.left, term.right, expert, row, live, offs_n, offs_n < GATE.I, LOW_RANK, TILE, BLOCK_M)
    store_gradients(g, n_tile, slots, live, row, tensors, GATE, LAYOUT, TILE, BLOCK_M)


@triton.jit
def down_backward_kernel(
    grad_y,  # (T, H)
    w,  # (E, I, H) view of the down projection: element pointer, or descriptor of (E·I, H) or (E·H, I)
    term,  # LowRankTensors: an adapter's product that is added to g
    tensors,  # BackwardTensors
    routing,  # RoutingTensors
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    WEIGHT: tl.constexpr,  # DenseLayout
    GATE: tl.constexpr,  # GateLayout; I is that of this launch, the columns are those of the whole
    LAYOUT: tl.constexpr,  # BackwardLayout
    LOW_RANK: tl.constexpr,  # LowRankLayout
    TILE: tl.constexpr,
):
    """Grid: (tiles · ⌈I / TILE.N⌉,), column tiles fastest."""
    N_TILES: tl.constexpr = (GATE.I + TILE.N - 1) // TILE.N
    tile = tl.program_id(0) // N_TILES
    n_tile = tl.program_id(0) % N_TILES
    expert = tl.load(routing.tile_expert + tile)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    row = tl.load(routing.tile_row + tile)
    end = tl.load(routing.offsets + expert + 1)
    if TILE.HALF and end - row <= TILE.M // 2:
        _tile(
            grad_y, w, term, tensors, routing, expert, row, end, n_tile, TOP_K, H, WEIGHT, GATE, LAYOUT, LOW_RANK, TILE,
            TILE.M // 2,
        )  # fmt: skip
    else:
        _tile(
            grad_y, w, term, tensors, routing, expert, row, end, n_tile, TOP_K, H, WEIGHT, GATE, LAYOUT, LOW_RANK, TILE,
            TILE.M,
        )  # fmt: skip


@triton.jit
def bias_dots_kernel(
    grad_y,  # (T, H)
    bias,  # (E, H) of the down projection
    grad_weights,  # (S, PARTS) fp32 out, by slot: the last part
    routing,  # RoutingTensors
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
    expert = tl.load(routing.tile_expert + tl.program_id(0))
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    rows = tl.load(routing.tile_row + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(routing.offsets + expert + 1)
    slots = tl.load(routing.row_to_slot + rows, mask=live, other=0)
    y_ptrs = grad_y + (slots // TOP_K).to(tl.int64)[:, None] * H
    dots = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        y = tl.load(y_ptrs + offs_k[None, :], mask=(offs_k < H)[None, :], other=0.0).to(tl.float32)
        dots += y * tl.load(bias + expert * H + offs_k, mask=offs_k < H, other=0.0).to(tl.float32)[None, :]
    tl.store(grad_weights + slots.to(tl.int64) * PARTS + PARTS - 1, tl.sum(dots, axis=1), mask=live)


@triton.jit(do_not_specialize=["num_slots"])
def sum_parts_kernel(
    parts,  # (S, PARTS) fp32 by slot; undefined for slots of no expert
    slot_to_row,  # (S,)
    grad_weights,  # (S,) out
    num_slots,
    PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The routing weights' gradient from its parts, in their order; zero for slots of no expert. Grid: (⌈S / BLOCK_S⌉,)."""
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mine = tl.load(slot_to_row + slots, mask=slots < num_slots, other=-1) >= 0
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + slots.to(tl.int64) * PARTS + part, mask=mine, other=0.0)
    tl.store(grad_weights + slots, total.to(grad_weights.dtype.element_ty), mask=slots < num_slots)
