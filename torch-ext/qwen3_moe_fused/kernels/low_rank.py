"""What grouped GEMMs add to a tile for an adapter: a product over the rank, between their loop and their epilogue.

The thin products around it run at the memory's pace: on an H100, 16384 tokens of a Qwen3-30B-A3B layer and rank 16, reading
the 403 MB of gate_up's gradient takes 142 µs in the shrink and 147 µs in the Gram product, rows gathered from the L2 116 and
100 µs. All eight of a training step take 0.9 ms there, 0.3 ms at 4096 tokens, 85 µs at 512. Turning the Gram products, so
that the rank is the narrow side of the tensor cores' tile, changed nothing (76 against 76 µs, 102 against 99).
"""

import triton
import triton.language as tl


@triton.jit
def add_low_rank(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    left_ptr,  # (S, …), at the first column of this product
    right_ptr,  # (E, N, RANK)
    expert,
    row,  # of the tile, of S
    live,  # (BLOCK_M,) which rows count
    columns,  # (BLOCK_N,) of N
    in_n,  # (BLOCK_N,) which columns count
    LOW_RANK: tl.constexpr,  # launch.low_rank.constants
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """acc + left[row…] · right[expert, columns]ᵀ."""
    RANK: tl.constexpr = LOW_RANK[0]
    BLOCK_R: tl.constexpr = LOW_RANK[1]
    LEFT_STRIDE: tl.constexpr = LOW_RANK[2]
    STRIDE_E: tl.constexpr = LOW_RANK[4]
    STRIDE_N: tl.constexpr = LOW_RANK[5]
    STRIDE_R: tl.constexpr = LOW_RANK[6]
    offs_r = tl.arange(0, BLOCK_R)
    # int64: S·RANK and E·N·RANK pass 2³¹ in real models.
    left = left_ptr + row.to(tl.int64) * LEFT_STRIDE + tl.arange(0, BLOCK_M)[:, None] * LEFT_STRIDE + offs_r[None, :]
    right = right_ptr + expert.to(tl.int64) * STRIDE_E + columns[None, :] * STRIDE_N + offs_r[:, None] * STRIDE_R
    # One stage: short, and shared memory is full of the main loop's.
    for r in tl.range(0, RANK, BLOCK_R, num_stages=1):
        in_r = offs_r < RANK - r
        x = tl.load(left, mask=live[:, None] & in_r[None, :], other=0.0)
        w = tl.load(right, mask=in_r[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        left += BLOCK_R
        right += BLOCK_R * STRIDE_R
    return acc
