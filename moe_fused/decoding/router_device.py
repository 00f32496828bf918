"""The kernels that ``decoding.router`` launches: device code and nothing else."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def products_kernel(
    hidden, weight, products, hidden_row, weight_row, rows, size,
    EXPERTS: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiplies some tokens with some experts' rows of a router, over a part of the features.

    The grid is (blocks of experts, PARTS, blocks of rows).

    Args:
        hidden: (rows, size), of which the last dimension is contiguous, as it is in the weight.
        weight: (EXPERTS, size).
        products: (PARTS, rows, EXPERTS) fp32, contiguous.
        STEPS: how many blocks of ``BLOCK`` features a part has.
    """
    part = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    expert = tl.program_id(0) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    at = part * STEPS * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK_ROWS, BLOCK_EXPERTS), tl.float32)
    for _ in range(STEPS):
        x = tl.load(
            hidden + row[:, None] * hidden_row + at[None, :],
            mask=(row < rows)[:, None] & (at < size)[None, :],
            other=0,
        )
        w = tl.load(
            weight + expert[None, :] * weight_row + at[:, None],
            mask=(expert < EXPERTS)[None, :] & (at < size)[:, None],
            other=0,
        )
        if x.dtype != w.dtype:
            x, w = x.to(tl.float32), w.to(tl.float32)
        found = tl.dot(x, w, found, input_precision=PRECISION)
        at += BLOCK
    place = products + (part * rows + row)[:, None] * EXPERTS + expert[None, :]
    tl.store(place, found, mask=(row < rows)[:, None] & (expert < EXPERTS)[None, :])


@triton.jit
def choose_kernel(
    products, bias, correction, logits, weights, indices, rows, factor,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, SCORES: tl.constexpr, IS_NORMALIZED: tl.constexpr,
    ROUNDED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CORRECTION: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_TOP_K: tl.constexpr,
):  # fmt: skip
    """Chooses the experts of one token. The grid is (rows,).

    Args:
        products: as ``products_kernel`` leaves them.
        bias: (EXPERTS,), is added to the logits before they are rounded.
        correction: (EXPERTS,), is added to scores where they are compared.
        logits: (rows, EXPERTS), contiguous, is written.
        weights: (rows, TOP_K), contiguous, is written.
        indices: (rows, TOP_K) int64, contiguous, is written. Of equal scores, the one with the lowest index comes first.
        factor: what weights are multiplied with.
        SCORES: "softmax" or "sigmoid".
        IS_NORMALIZED: whether the weights of a token are divided by their sum, before they are multiplied.
        ROUNDED: the dtype that logits are rounded to.
    """
    row = tl.program_id(0)
    expert, slot = tl.arange(0, BLOCK_EXPERTS), tl.arange(0, BLOCK_TOP_K)
    exists = expert < EXPERTS
    logit = tl.zeros((BLOCK_EXPERTS,), tl.float32)
    for part in tl.static_range(PARTS):
        logit += tl.load(products + (part * rows + row) * EXPERTS + expert, mask=exists, other=0.0)
    if HAS_BIAS:
        logit += tl.load(bias + expert, mask=exists, other=0.0).to(tl.float32)
    logit = logit.to(ROUNDED).to(tl.float32)
    tl.store(logits + row * EXPERTS + expert, logit.to(logits.dtype.element_ty), mask=exists)
    logit = tl.where(exists, logit, float("-inf"))
    if SCORES == "softmax":
        score = tl.exp(logit - tl.max(logit, 0))
        score = score / tl.sum(score, 0)
    else:
        score = 1.0 / (1.0 + tl.exp(-logit))
    key = score
    if HAS_CORRECTION:
        key = score + tl.load(correction + expert, mask=exists, other=0.0).to(tl.float32)
    # As integers, numbers have the same order, and a warp has one instruction for the largest or the smallest of them.
    bits = tl.where(exists, key, float("-inf")).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = tl.zeros((BLOCK_TOP_K,), tl.int32)
    weight = tl.zeros((BLOCK_TOP_K,), tl.float32)
    for number in tl.static_range(TOP_K):
        best = tl.max(bits, 0)
        of_best = tl.min(tl.where(bits == best, expert, BLOCK_EXPERTS), 0)
        if HAS_CORRECTION:
            value = tl.sum(tl.where(expert == of_best, score, 0.0), 0)
        else:
            value = (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        index = tl.where(slot == number, of_best, index)
        weight = tl.where(slot == number, value, weight)
        bits = tl.where(expert == of_best, -0x80000000, bits)
    if IS_NORMALIZED:
        # What is added is lost in any sum but that of scores which all are 0.
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    weight *= factor
    tl.store(weights + row * TOP_K + slot, weight.to(weights.dtype.element_ty), mask=slot < TOP_K)
    tl.store(indices + row * TOP_K + slot, index.to(tl.int64), mask=slot < TOP_K)
