"""What grouped GEMMs add to a tile for an adapter: a product over the rank, between their loop and their epilogue.

The thin products around it run at the memory's pace: on an H100, 16384 tokens of a Qwen3-30B-A3B layer and rank 16,
reading the 403 MB of gate_up's gradient takes 142 µs in the shrink and 147 µs in the weight-gradient product, rows
gathered from the L2 116 and 100 µs. All eight of a training step take 0.9 ms there, 0.3 ms at 4096 tokens, 85 µs at 512.
Turning the weight-gradient products, so that the rank is the narrow side of the tensor cores' tile, changed nothing (76
against 76 µs, 102 against 99).
"""

import triton
import triton.language as tl


@triton.jit
def add_low_rank(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    left,  # LowRankTensors.left, from the first column of this product on
    right,  # LowRankTensors.right
    expert,
    row,  # of the tile, of S
    live,  # (BLOCK_M,) which rows count
    columns,  # (BLOCK_N,) of N
    in_n,  # (BLOCK_N,) which columns count
    LOW_RANK: tl.constexpr,  # LowRankLayout
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """acc + left[row…] · right[expert, columns]ᵀ."""
    offs_r = tl.arange(0, LOW_RANK.BLOCK_R)
    # int64: S·RANK and E·N·RANK pass 2³¹ in real models.
    rows = row.to(tl.int64) * LOW_RANK.LEFT_STRIDE + tl.arange(0, BLOCK_M)[:, None] * LOW_RANK.LEFT_STRIDE
    left_ptrs = left + rows + offs_r[None, :]
    right_ptrs = right + expert.to(tl.int64) * LOW_RANK.STRIDE_E
    right_ptrs = right_ptrs + columns[None, :] * LOW_RANK.STRIDE_N + offs_r[:, None] * LOW_RANK.STRIDE_R
    # One stage: the loop is short, and shared memory is full of the main loop's tiles.
    for r in tl.range(0, LOW_RANK.RANK, LOW_RANK.BLOCK_R, num_stages=1):
        in_r = offs_r < LOW_RANK.RANK - r
        x = tl.load(left_ptrs, mask=live[:, None] & in_r[None, :], other=0.0)
        w = tl.load(right_ptrs, mask=in_r[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=TILE.PRECISION)
        left_ptrs += LOW_RANK.BLOCK_R
        right_ptrs += LOW_RANK.BLOCK_R * LOW_RANK.STRIDE_R
    return acc


@triton.jit
def add_low_rank_to_both(
    gate,
    up,
    term,  # LowRankTensors
    expert,
    row,
    live,
    columns,  # (BLOCK_N,) the gate features
    in_n,
    UP_OFFSET: tl.constexpr,  # from a gate feature to its up feature, in right
    GATED: tl.constexpr,
    LOW_RANK: tl.constexpr,  # LowRankLayout
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``add_low_rank`` for the gate features and, where there are any, the up features."""
    gate = add_low_rank(
        gate, term.left, term.right, expert, row, live, columns, in_n, LOW_RANK, TILE, BLOCK_M
    )  # fmt: skip
    if GATED:
        up = add_low_rank(
            up, term.left + LOW_RANK.UP_COLUMN, term.right, expert, row, live, columns + UP_OFFSET, in_n, LOW_RANK,
            TILE, BLOCK_M,
        )  # fmt: skip
    return gate, up
