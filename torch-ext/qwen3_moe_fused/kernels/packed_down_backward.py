"""``down_backward`` over 4-bit weights that it decodes on the way to the tensor cores.

Decoding first writes the down projection to a workspace and reads it again. Of a Qwen3-30B-A3B layer on an H100 that takes
176 µs at any number of tokens; with it ``down_backward`` takes 388, 358, 385, 467 and 568 µs at 128, 512, 1024, 2048 and
4096 tokens, and this kernel 109, 184, 228, 339 and 583. The epilogue all at once, not in slices: 253 at 512 tokens.
"""

import triton
import triton.language as tl

from .down_backward import backward_epilogue
from .low_rank import add_low_rank
from .packed_gemm import multiply_transposed


@triton.jit
def packed_down_backward_kernel(
    grad_y_ptr,  # (T, H)
    packed_ptr,  # (E, H·I/2) uint8
    absmax_ptr,  # (E, PROJECTIONS·BLOCKS) uint8 with DOUBLE_QUANT, else fp32
    nested_absmax_ptr,  # (E, PROJECTIONS·GROUPS) fp32
    nested_offset_ptr,  # (E, PROJECTIONS) fp32
    nested_code_ptr,  # (256,) fp32
    code_ptr,  # (16,) fp32
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
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - a multiple of BLOCK_N
    COLUMNS: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    LOW_RANK: tl.constexpr,  # an adapter's product, left · right[expert]ᵀ, is added to g
    SAVE_WEIGHTED_H: tl.constexpr,
    IN_PLACE: tl.constexpr,  # grad_gate_up is gate_up
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
    SLICES: tl.constexpr,  # a power of two
):
    """Grid: (tiles · I / BLOCK_N,), column tiles fastest."""
    N_TILES: tl.constexpr = I // BLOCK_N
    tile = tl.program_id(0) // N_TILES
    n_tile = tl.program_id(0) % N_TILES
    expert = tl.load(tile_expert_ptr + tile)
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    row = tl.load(tile_row_ptr + tile)
    end = tl.load(offsets_ptr + expert + 1)
    n = n_tile * BLOCK_N
    live = row + tl.arange(0, BLOCK_M) < end
    slots = tl.load(row_to_slot_ptr + row + tl.arange(0, BLOCK_M), mask=live, other=0)
    y_ptrs = grad_y_ptr + (slots // TOP_K).to(tl.int64)[:, None] * H + tl.arange(0, BLOCK_K)[None, :]
    g = multiply_transposed(
        y_ptrs, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, code_ptr,
        expert.to(tl.int64), n, H, I, BLOCKSIZE, BLOCKS, GROUPS, PROJECTIONS, DOUBLE_QUANT, PTX, PRECISION, BLOCK_M,
        BLOCK_N, BLOCK_K, grad_y_ptr.dtype.element_ty,
    )  # fmt: skip
    if LOW_RANK[0] > 0:
        offs_n = n + tl.arange(0, BLOCK_N)
        g = add_low_rank(g, left_ptr, right_ptr, expert, row, live, offs_n, offs_n < I, LOW_RANK, PRECISION, BLOCK_M)
    weight = tl.load(weights_ptr + slots, mask=live, other=0.0).to(tl.float32)[:, None]
    row64 = row.to(tl.int64)
    dots = backward_epilogue(
        g, n, gate_up_ptr + row64 * COLUMNS, grad_gate_up_ptr + row64 * COLUMNS, weighted_h_ptr + row64 * I, live, weight,
        I, COLUMNS, COLUMN_STRIDE, UP_OFFSET, ACTIVATION, GATED, ALPHA, LIMIT, SAVE_WEIGHTED_H, IN_PLACE, BLOCK_M, BLOCK_N,
        SLICES, I,
    )  # fmt: skip
    tl.store(grad_weights_ptr + slots.to(tl.int64) * PARTS + n_tile, dots, mask=live)
