"""``down_backward`` over 4-bit weights that it dequantizes on the way to the tensor cores.

Dequantizing first writes the down projection to a workspace and reads it again. For a Qwen3-30B-A3B layer on an H100 that
takes 176 µs at any number of tokens; with it ``down_backward`` takes 388, 358, 385, 467 and 568 µs at 128, 512, 1024, 2048
and 4096 tokens, and this kernel takes 109, 184, 228, 339 and 583. The epilogue all at once, not in slices, took 253 at 512
tokens.
"""

import triton
import triton.language as tl

from .down_backward import store_gradients
from .low_rank import add_low_rank
from .packed_gemm import multiply_transposed


@triton.jit
def packed_down_backward_kernel(
    grad_y,  # (T, H)
    w,  # PackedTensors of the down projection (E, H, I)
    term,  # LowRankTensors: an adapter's product that is added to g
    tensors,  # BackwardTensors
    routing,  # RoutingTensors
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    FORMAT: tl.constexpr,  # FormatCode
    GATE: tl.constexpr,  # GateLayout; I is a multiple of TILE.N
    LAYOUT: tl.constexpr,  # BackwardLayout
    LOW_RANK: tl.constexpr,  # LowRankLayout
    TILE: tl.constexpr,
):
    """Grid: (tiles · I / TILE.N,), column tiles fastest."""
    N_TILES: tl.constexpr = GATE.I // TILE.N
    tile = tl.program_id(0) // N_TILES
    n_tile = tl.program_id(0) % N_TILES
    expert = tl.load(routing.tile_expert + tile)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    row = tl.load(routing.tile_row + tile)
    end = tl.load(routing.offsets + expert + 1)
    n = n_tile * TILE.N
    live = row + tl.arange(0, TILE.M) < end
    slots = tl.load(routing.row_to_slot + row + tl.arange(0, TILE.M), mask=live, other=0)
    y_ptrs = grad_y + (slots // TOP_K).to(tl.int64)[:, None] * H + tl.arange(0, TILE.K)[None, :]
    g = multiply_transposed(y_ptrs, w, expert.to(tl.int64), n, H, GATE.I, FORMAT, TILE, grad_y.dtype.element_ty)
    if LOW_RANK.RANK > 0:
        offs_n = n + tl.arange(0, TILE.N)
        g = add_low_rank(g, term.left, term.right, expert, row, live, offs_n, offs_n < GATE.I, LOW_RANK, TILE, TILE.M)
    store_gradients(g, n_tile, slots, live, row, tensors, GATE, LAYOUT, TILE, TILE.M)
