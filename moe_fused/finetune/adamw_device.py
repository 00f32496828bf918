"""The kernel that ``adamw`` launches: device code and nothing else."""

from __future__ import annotations

import triton
import triton.language as tl

# The elements of a block of state.
BLOCK = tl.constexpr(256)
# How the code books are searched, as ``adamw.Book`` says: how far a place is shifted to be an index, the smallest
# magnitude that has a place of its own, the index of that place, and the number of entries.
SHIFT1, LOWEST1, FIRST1, ENTRIES1 = tl.constexpr(18), tl.constexpr(2.0**-22), tl.constexpr(0x1CE0), tl.constexpr(1024)
SHIFT2, LOWEST2, FIRST2, ENTRIES2 = tl.constexpr(17), tl.constexpr(2.0**-23), tl.constexpr(0x3980), tl.constexpr(2048)
# The first code book has 1, but no negative value below -0.993. What is below this number counts as this number.
MOST_NEGATIVE = tl.constexpr(-0.996)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def adamw_kernel(
    rows, gradients, programs, values1, values2, entries1, entries2, decay, size, eps, beta1, rest1, beta2, rest2,
    DTYPE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Updates ``BLOCKS`` blocks of one parameter and of its states.

    Args:
        rows: (R, 6) int64, of each parameter the addresses of its elements, of state1, state2, absmax1 and absmax2, and
            its number of elements, which is a multiple of 8. The addresses of elements and states are multiples of 16.
        gradients: (R,) int64, the addresses of the gradients, multiples of 16. Parameters with 0 are left out.
        programs: (P, 2) int32, of each program the row of its parameter and its first block.
        values1, values2: (256,) fp32, the code books.
        entries1, entries2: (ENTRIES1,) and (ENTRIES2,) int32, the tables by which they are searched.
        decay: what parameters are multiplied with.
        size, eps: the size of the step and the epsilon, both with the correction of the bias.
        beta1, rest1, beta2, rest2: what the states are multiplied with, and the gradients or their squares.
        DTYPE: the dtype of parameters and gradients.
    """
    program = tl.program_id(0)
    row = tl.load(programs + 2 * program)
    first = tl.load(programs + 2 * program + 1)
    gradient = tl.load(gradients + row)
    if gradient == 0:
        return
    # A thread takes 16 bytes of neighbours, and as many codes: with more, the compiler would move elements among threads.
    SIDE: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    gradient_ptr = tl.multiple_of(gradient.to(tl.pointer_type(DTYPE)), 16)
    parameter_ptr = tl.multiple_of(tl.load(rows + 6 * row).to(tl.pointer_type(DTYPE)), 16)
    codes1_ptr = tl.multiple_of(tl.load(rows + 6 * row + 1).to(tl.pointer_type(tl.int32)), SIDE)
    codes2_ptr = tl.multiple_of(tl.load(rows + 6 * row + 2).to(tl.pointer_type(tl.int32)), SIDE)
    absmax1_ptr = tl.load(rows + 6 * row + 3).to(tl.pointer_type(tl.float32))
    absmax2_ptr = tl.load(rows + 6 * row + 4).to(tl.pointer_type(tl.float32))
    eights = tl.load(rows + 6 * row + 5) // 8

    blocks = first + tl.arange(0, BLOCKS)
    begin = first.to(tl.int64) + tl.arange(0, BLOCKS)[:, None]
    elements = begin * BLOCK + tl.arange(0, BLOCK)[None, :]
    words = begin * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    # Written as multiples, so that the compiler sees that neighbours are all there or not at all.
    has_element = elements < eights * 8
    has_word = words < eights * 2
    has_block = blocks * (BLOCK // 8) < eights

    g = tl.load(gradient_ptr + elements, mask=has_element, other=0.0).to(tl.float32)
    codes1 = tl.load(codes1_ptr + words, mask=has_word, other=0)
    codes2 = tl.load(codes2_ptr + words, mask=has_word, other=0)
    p = tl.load(parameter_ptr + elements, mask=has_element, other=0.0).to(tl.float32)
    absmax1 = tl.load(absmax1_ptr + blocks, mask=has_block, other=0.0)
    absmax2 = tl.load(absmax2_ptr + blocks, mask=has_block, other=0.0)
    value1 = _gathered(tl.load(values1 + tl.arange(0, 256)), _bytes(codes1, BLOCKS), BLOCKS)
    value2 = _gathered(tl.load(values2 + tl.arange(0, 256)), _bytes(codes2, BLOCKS), BLOCKS)

    # As in bitsandbytes' kernel, a gradient that is not finite clears its state and leaves its parameter as it is.
    is_finite = tl.abs(g) < float("inf")
    state1 = tl.where(is_finite, value1 * (absmax1 * beta1)[:, None] + rest1 * g, 0.0)
    state2 = tl.where(is_finite, value2 * (absmax2 * beta2)[:, None] + rest2 * g * g, 0.0)
    # The square of 1/sqrt(x) is two instructions, a division is nine.
    root = tl.rsqrt(tl.sqrt(state2) + eps)
    p = p * tl.where(is_finite, decay, 1.0) - size * (state1 * (root * root))
    tl.store(parameter_ptr + elements, p.to(DTYPE), mask=has_element)

    absmax1 = _largest(tl.abs(state1), SIDE, BLOCKS)
    absmax2 = _largest(state2, SIDE, BLOCKS)
    tl.store(absmax1_ptr + blocks, absmax1, mask=has_block)
    tl.store(absmax2_ptr + blocks, absmax2, mask=has_block)

    scaled = tl.maximum(state1 * _inverse(absmax1)[:, None], MOST_NEGATIVE)
    code = _nearest(entries1, tl.abs(scaled), SHIFT1, LOWEST1, FIRST1, ENTRIES1, BLOCKS)
    # The highest byte is 127 + j, for negative states it becomes 127 - j: -1 - x, and -1 from the byte.
    negative = state1.to(tl.int32, bitcast=True) >> 31
    code = (code ^ negative) + (negative << 24)
    tl.store(codes1_ptr + words, _highest_bytes(code, BLOCKS), mask=has_word)
    scaled = state2 * _inverse(absmax2)[:, None]
    code = _nearest(entries2, scaled, SHIFT2, LOWEST2, FIRST2, ENTRIES2, BLOCKS)
    tl.store(codes2_ptr + words, _highest_bytes(code, BLOCKS), mask=has_word)


@triton.jit
def _largest(x, SIDE: tl.constexpr, BLOCKS: tl.constexpr):
    """Returns the largest of each block of (BLOCKS, 256) values that are not negative, (BLOCKS,).

    Among threads, values are compared as integers, whose order is the same and for which GPUs have one instruction.
    """
    of_threads = tl.max(tl.reshape(x, (BLOCKS, BLOCK // SIDE, SIDE)), 2)
    return tl.max(of_threads.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(absmax):
    """Returns what the states of blocks are multiplied with so that the largest becomes 1.

    It is 0 for a block of zeros, and where the inverse is too large for fp32.
    """
    return tl.where(absmax < SMALLEST_NORMAL, 0.0, 1.0 / absmax)


@triton.jit
def _nearest(
    entries, x,
    SHIFT: tl.constexpr, LOWEST: tl.constexpr, FIRST: tl.constexpr, ENTRIES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Returns the codes of the nearest values in the highest byte of int32 words, (BLOCKS, 256).

    Args:
        entries: (ENTRIES,) int32, the table of ``adamw.Book``.
        x: (BLOCKS, 256) fp32, at most 1 but for roundings. NaN and negative numbers count as 0.
    """
    place = tl.maximum(x, LOWEST).to(tl.int32, bitcast=True) + tl.maximum(x, 0.5).to(tl.int32, bitcast=True)
    index = tl.reshape((place >> SHIFT) - FIRST, (BLOCKS * BLOCK,))
    return (place << (24 - SHIFT)) + _gathered(tl.load(entries + tl.arange(0, ENTRIES)), index, BLOCKS)


@triton.jit
def _gathered(table, index, BLOCKS: tl.constexpr):
    """Returns entries of a table in the shape of blocks, (BLOCKS, 256). The table goes through shared memory."""
    return tl.reshape(tl.gather(table, index, 0), (BLOCKS, BLOCK))


@triton.jit
def _bytes(words, BLOCKS: tl.constexpr):
    """Returns the bytes of (BLOCKS, 64) int32 words as int32, (BLOCKS * 256,)."""
    words = words.to(tl.uint32, bitcast=True)
    even = tl.join(words & 255, (words >> 16) & 255)
    odd = tl.join((words >> 8) & 255, words >> 24)
    return tl.reshape(tl.join(even, odd), (BLOCKS * BLOCK,)).to(tl.int32, bitcast=True)


@triton.jit
def _highest_bytes(words, BLOCKS: tl.constexpr):
    """Returns the highest bytes of (BLOCKS, 256) int32 words, as (BLOCKS, 64) int32 words.

    Shifting one word while it takes over the highest bits of another is a single instruction.
    """
    words = words.to(tl.uint32, bitcast=True)
    even, odd = tl.split(tl.reshape(words, (BLOCKS, BLOCK // 4, 2, 2)))
    byte0, byte2 = tl.split(even)
    byte1, byte3 = tl.split(odd)
    result = byte3 >> 24
    result = (result << 8) | (byte2 >> 24)
    result = (result << 8) | (byte1 >> 24)
    result = (result << 8) | (byte0 >> 24)
    return result.to(tl.int32, bitcast=True)
