"""The kernels that ``decoding.attention`` launches: device code and nothing else."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_kernel(
    q, k, v, mask, sinks, out, partial, extremes,
    q_batch, q_head, k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch, mask_token, tokens,
    scale, softcap, lowest,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QK_SIZE: tl.constexpr, V_SIZE: tl.constexpr,
    HAS_MASK: tl.constexpr, IS_ADDED: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    SPLITS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attends with the query heads of one KV head to every ``SPLITS``-th block of the keys.

    The grid is (SPLITS, KV heads, B).

    Args:
        q: (B, HEADS, 1, QK_SIZE), of which the last dimension is contiguous, as it is in k and v.
        k, v: (B, KV heads, tokens, QK_SIZE or V_SIZE). A KV head has ``GROUP`` query heads.
        mask: (B, tokens), booleans of which False leaves out, or numbers that are added to scores where ``IS_ADDED``.
        sinks: (HEADS,), the scores of what has no value.
        out: (B, HEADS, V_SIZE), contiguous. It is written if there is one split.
        partial: (B, HEADS, SPLITS, V_SIZE) fp32, contiguous, the sums of values of each split, which are not yet divided.
        extremes: (2, B, HEADS, SPLITS) fp32, contiguous, of each split the largest score times log2(e), and the sum of
            weights.
        lowest: what is added to scores and is no larger than this leaves out.
        BLOCKS: at least the number of blocks of a split, a power of two.
        ROWS, BLOCK_QK, BLOCK_V: at least ``GROUP``, ``QK_SIZE`` and ``V_SIZE``, powers of two.
    """
    split, kv_head = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    rows, at = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    in_qk, in_v = tl.arange(0, BLOCK_QK), tl.arange(0, BLOCK_V)
    heads = kv_head * GROUP + rows
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head

    # The split's first and last block in which something is attended to. Only blocks between them are read.
    blocks = split + SPLITS * tl.arange(0, BLOCKS)
    if HAS_MASK:
        mask += batch * mask_batch
        places = blocks[:, None] * BLOCK + at[None, :]
        counts = _counts(mask, places, mask_token, tokens, lowest, IS_ADDED)
        is_needed = tl.max(counts.to(tl.int32), 1) > 0
    else:
        is_needed = blocks * BLOCK < tokens
    first = tl.min(tl.where(is_needed, tl.arange(0, BLOCKS), BLOCKS), 0)
    last = tl.max(tl.where(is_needed, tl.arange(0, BLOCKS), -1), 0)

    query = tl.load(
        q + batch * q_batch + heads[:, None] * q_head + in_qk[None, :],
        mask=(rows < GROUP)[:, None] & (in_qk < QK_SIZE)[None, :],
        other=0.0,
    )
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for index in range(first, last + 1):
        token = (split + SPLITS * index) * BLOCK + at
        exists = token < tokens
        keys = tl.load(
            k + token.to(tl.int64)[None, :] * k_token + in_qk[:, None],
            mask=exists[None, :] & (in_qk < QK_SIZE)[:, None],
            other=0.0,
        )
        values = tl.load(
            v + token.to(tl.int64)[:, None] * v_token + in_v[None, :],
            mask=exists[:, None] & (in_v < V_SIZE)[None, :],
            other=0.0,
        )
        scores = tl.dot(query, keys, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * LOG2E / softcap))) - 1.0)
        if HAS_MASK:
            exists = _counts(mask, token, mask_token, tokens, lowest, IS_ADDED)
            if IS_ADDED:
                added = tl.load(mask + token * mask_token, mask=token < tokens, other=0.0)
                scores += added.to(tl.float32)[None, :]
        scores = tl.where(exists[None, :], scores * LOG2E, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(scores, 1))
        # A block between two others may have nothing to attend to.
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        scores = tl.exp2(scores - finite[:, None])
        shrinks = tl.exp2(before - finite)
        weights = weights * shrinks + tl.sum(scores, 1)
        sums = sums * shrinks[:, None] + tl.dot(scores.to(values.dtype), values, input_precision=PRECISION)

    if SPLITS == 1:
        if HAS_SINKS:
            sink = tl.load(sinks + heads, mask=rows < GROUP, other=0.0).to(tl.float32) * LOG2E
            both = tl.maximum(largest, sink)
            shrinks = tl.exp2(largest - both)
            weights = weights * shrinks + tl.exp2(sink - both)
            sums = sums * shrinks[:, None]
        found = sums / tl.where(weights == 0.0, 1.0, weights)[:, None]
        place = (batch * HEADS + heads)[:, None] * V_SIZE + in_v[None, :]
        tl.store(out + place, found.to(out.dtype.element_ty), mask=(rows < GROUP)[:, None] & (in_v < V_SIZE)[None, :])
    else:
        place = (batch * HEADS + heads) * SPLITS + split
        tl.store(extremes + place, largest, mask=rows < GROUP)
        tl.store(extremes + tl.num_programs(2) * HEADS * SPLITS + place, weights, mask=rows < GROUP)
        # The sums of a split that has nothing are not read.
        is_stored = (rows < GROUP) & (largest > float("-inf"))
        tl.store(
            partial + place[:, None] * V_SIZE + in_v[None, :], sums, mask=is_stored[:, None] & (in_v < V_SIZE)[None, :]
        )


@triton.jit
def _counts(mask, token, mask_token, tokens, lowest, IS_ADDED: tl.constexpr):
    """Whether tokens are attended to, in the shape of ``token``."""
    if IS_ADDED:
        return tl.load(mask + token * mask_token, mask=token < tokens, other=float("-inf")).to(tl.float32) > lowest
    return tl.load(mask + token * mask_token, mask=token < tokens, other=0) != 0


@triton.jit
def combine_kernel(
    partial, extremes, sinks, out,
    HEADS: tl.constexpr, V_SIZE: tl.constexpr, HAS_SINKS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Makes one output of those of all splits. The grid is (HEADS, B), the arguments are those of ``attention_kernel``."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * HEADS + head
    splits, in_v = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_V)
    place = row * SPLITS + splits
    largest = tl.load(extremes + place, mask=splits < SPLITS, other=float("-inf"))
    ones = tl.num_programs(1).to(tl.int64) * HEADS * SPLITS
    weights = tl.load(extremes + ones + place, mask=splits < SPLITS, other=0.0)
    sums = tl.load(
        partial + place[:, None] * V_SIZE + in_v[None, :],
        mask=(largest > float("-inf"))[:, None] & (in_v < V_SIZE)[None, :],
        other=0.0,
    )
    top = tl.max(largest, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    shrinks = tl.exp2(largest - top)
    total = tl.sum(weights * shrinks, 0)
    if HAS_SINKS:
        total += tl.exp2(sink - top)
    found = tl.sum(sums * shrinks[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * V_SIZE + in_v, found.to(out.dtype.element_ty), mask=in_v < V_SIZE)
