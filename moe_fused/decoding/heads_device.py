"""The kernels that ``decoding.heads`` and ``decoding.norms`` launch: device code and nothing else."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_kernel(
    values, weight, out, values_row, rows, eps,
    SIZE: tl.constexpr, IS_OFFSET: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Divides rows by their root mean square, and multiplies them with a weight. The grid is (blocks of rows,).

    Args:
        values: (rows, SIZE), of which the last dimension is contiguous.
        weight: (SIZE,), contiguous.
        out: (rows, SIZE), contiguous.
        IS_OFFSET: as in ``_normed``.
    """
    row, at = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK)
    exists = (row < rows)[:, None] & (at < SIZE)[None, :]
    x = tl.load(values + row[:, None] * values_row + at[None, :], mask=exists, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps)
    x = _normed(x, inverse, weight, at, SIZE, IS_OFFSET, out.dtype.element_ty)
    tl.store(out + row[:, None] * SIZE + at[None, :], x.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _normed(x, inverse, weight, at, SIZE: tl.constexpr, IS_OFFSET: tl.constexpr, DTYPE: tl.constexpr):
    """Returns rows times their inverse root mean square and a weight, in fp32, rounded as models round it.

    Args:
        x: (rows, block) fp32.
        inverse: (rows,) fp32.
        at: (block,), the places in the weight.
        IS_OFFSET: whether weights lack 1. Then they are not rounded to ``DTYPE`` before the product.
    """
    w = tl.load(weight + at, mask=at < SIZE, other=0.0).to(tl.float32)[None, :]
    x *= inverse[:, None]
    if IS_OFFSET:
        x *= 1.0 + w
    else:
        x = x.to(DTYPE).to(tl.float32) * w
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def heads_kernel(
    q, k, v, q_out, k_out, v_out, q_weight, k_weight, cos, sin, position, length, eps,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, k_out_batch, k_out_head, k_out_token,
    v_out_batch, v_out_head, v_out_token, angle_batch,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, V_SIZE: tl.constexpr, ROTATED: tl.constexpr,
    HAS_VALUES: tl.constexpr, HAS_NORMS: tl.constexpr, IS_OFFSET: tl.constexpr, IS_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Norms and rotates the heads of queries and keys of one token a sequence, and writes keys and values into a cache.

    The grid is (blocks of query heads, then of key heads, then of value heads; B).

    Args:
        q, k, v: (B, Q_HEADS or KV_HEADS, 1, SIZE or V_SIZE), of which the last dimension is contiguous. Without query heads
            there are no queries, and without ``HAS_VALUES`` no values.
        q_out: (B, Q_HEADS, SIZE), contiguous.
        k_out, v_out: (B, KV_HEADS, tokens, SIZE or V_SIZE), of which the last dimension is contiguous.
        q_weight, k_weight: (SIZE,), if ``HAS_NORMS``.
        cos, sin: (B or 1, ROTATED), or half of that if ``IS_HALF``. Only the first ``ROTATED`` numbers of a head turn.
        position: an int64, at which token keys and values are written if ``HAS_VALUES``. Otherwise they are the first.
        length: an int64, which becomes one more than the position.
        IS_OFFSET: as in ``_normed``.
    """
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    heads = tl.arange(0, BLOCK_HEADS)
    if HAS_VALUES:
        token = tl.load(position)
        # Nobody reads the length before the next launch.
        if (block == 0) & (batch == 0):
            tl.store(length, token + 1)
    else:
        token = tl.full((), 0, tl.int64)
    if ROTATED > 0:
        cos += batch * angle_batch
        sin += batch * angle_batch
    if Q_HEADS > 0:  # noqa: SIM102  known when the kernel is compiled
        if block < Q_BLOCKS:
            head = block * BLOCK_HEADS + heads
            _turn(
                q + batch * q_batch, head * q_head, q_out + batch * Q_HEADS * SIZE, head * SIZE, head < Q_HEADS,
                q_weight, cos, sin, eps, SIZE, ROTATED, HAS_NORMS, IS_OFFSET, IS_HALF, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
    if (block >= Q_BLOCKS) & (block < Q_BLOCKS + KV_BLOCKS):
        head = (block - Q_BLOCKS) * BLOCK_HEADS + heads
        _turn(
            k + batch * k_batch, head * k_head, k_out + batch * k_out_batch + token * k_out_token, head * k_out_head,
            head < KV_HEADS, k_weight, cos, sin, eps, SIZE, ROTATED, HAS_NORMS, IS_OFFSET, IS_HALF, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    if HAS_VALUES:  # noqa: SIM102
        if block >= Q_BLOCKS + KV_BLOCKS:
            head, at = (block - Q_BLOCKS - KV_BLOCKS) * BLOCK_HEADS + heads, tl.arange(0, BLOCK_V)
            exists = (head < KV_HEADS)[:, None] & (at < V_SIZE)[None, :]
            x = tl.load(v + batch * v_batch + head[:, None] * v_head + at[None, :], mask=exists)
            target = v_out + batch * v_out_batch + token * v_out_token
            tl.store(target + head[:, None] * v_out_head + at[None, :], x, mask=exists)


@triton.jit
def _turn(
    source, source_rows, target, target_rows, exists, weight, cos, sin, eps,
    SIZE: tl.constexpr, ROTATED: tl.constexpr, HAS_NORMS: tl.constexpr, IS_OFFSET: tl.constexpr, IS_HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Norms and rotates some heads: the first ``ROTATED`` numbers of each turn, whose halves belong together.

    Args:
        source, target: where the sequence's heads are and become.
        source_rows, target_rows: (heads,), the places of the heads.
        exists: (heads,), which of them there are.
    """
    DTYPE: tl.constexpr = target.dtype.element_ty
    HALF: tl.constexpr = ROTATED // 2
    REST: tl.constexpr = SIZE - ROTATED
    at, further = tl.arange(0, BLOCK_HALF), ROTATED + tl.arange(0, BLOCK_REST)
    source, target = source + source_rows[:, None], target + target_rows[:, None]
    in_half = exists[:, None] & (at < HALF)[None, :]
    in_rest = exists[:, None] & (further < SIZE)[None, :]
    if HALF > 0:
        a = tl.load(source + at[None, :], mask=in_half, other=0.0).to(tl.float32)
        b = tl.load(source + HALF + at[None, :], mask=in_half, other=0.0).to(tl.float32)
    if REST > 0:
        c = tl.load(source + further[None, :], mask=in_rest, other=0.0).to(tl.float32)
    if HAS_NORMS:
        squares = tl.zeros((exists.shape[0],), tl.float32)
        if HALF > 0:
            squares += tl.sum(a * a + b * b, 1)
        if REST > 0:
            squares += tl.sum(c * c, 1)
        inverse = tl.rsqrt(squares / SIZE + eps)
        if HALF > 0:
            a = _normed(a, inverse, weight, at, HALF, IS_OFFSET, DTYPE)
            b = _normed(b, inverse, weight + HALF, at, HALF, IS_OFFSET, DTYPE)
        if REST > 0:
            c = _normed(c, inverse, weight, further, SIZE, IS_OFFSET, DTYPE)
    if HALF > 0:
        cos_a = tl.load(cos + at, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
        sin_a = tl.load(sin + at, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
        if IS_HALF:
            cos_b, sin_b = cos_a, sin_a
        else:
            cos_b = tl.load(cos + HALF + at, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
            sin_b = tl.load(sin + HALF + at, mask=at < HALF, other=0.0).to(tl.float32)[None, :]
        # Models round both products.
        turned_a = (a * cos_a).to(DTYPE).to(tl.float32) - (b * sin_a).to(DTYPE).to(tl.float32)
        turned_b = (b * cos_b).to(DTYPE).to(tl.float32) + (a * sin_b).to(DTYPE).to(tl.float32)
        tl.store(target + at[None, :], turned_a.to(DTYPE), mask=in_half)
        tl.store(target + HALF + at[None, :], turned_b.to(DTYPE), mask=in_half)
    if REST > 0:
        tl.store(target + further[None, :], c.to(DTYPE), mask=in_rest)
