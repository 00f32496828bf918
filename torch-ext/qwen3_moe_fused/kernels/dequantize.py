"""4-bit weights on the device: from bytes to values in a tile, and whole experts into a dense workspace.

Everything that belongs to one format comes in a ``FormatCode``. Dequantizing gives bit for bit what the format's reference
gives, provided multiplications and additions are not fused: launch these kernels with ``enable_fp_fusion=False``.

Formats whose weights are one of 16 values times a scale share ``pair_by_table`` and ``in_order_by_table``. On NVIDIA GPUs
these work in PTX: eight weights a 32-bit word, looked up by byte permutations in a table of the 16 that a scale allows,
which a thread keeps in registers. Elsewhere they gather from the values.
"""

import triton
import triton.language as tl


@triton.jit
def load_code(code, FORMAT: tl.constexpr):
    """The 16 values of the nibbles, (16,) fp32, where they are needed."""
    if FORMAT.TABLE == "":
        values = tl.load(code + tl.arange(0, 16))
    else:
        values = 0
    return values


@triton.jit
def elements(packed, FORMAT: tl.constexpr):
    """A pointer to what is loaded at a time: bytes of two weights, or words of eight."""
    if FORMAT.PER_ELEMENT == 8:
        packed = packed.to(tl.pointer_type(tl.uint32))
    return packed


@triton.jit
def tile_scales(
    scales,
    expert,  # int64
    start,  # (rows,) index of each row's first weight in the expert
    prepared,  # what FORMAT.prepare gave for these rows, or None
    FORMAT: tl.constexpr,
    COUNT: tl.constexpr,
):
    """(rows, COUNT) fp32: the scales of the COUNT runs of weights from each of ``start`` on."""
    block = (start[:, None] + FORMAT.RUN * tl.arange(0, COUNT)[None, :]) // FORMAT.BLOCK
    return FORMAT.block_scale(scales, expert, block, prepared, FORMAT)


@triton.jit
def nothing_to_prepare(scales, expert, start, K: tl.constexpr, FORMAT: tl.constexpr):
    """``FormatCode.prepare`` of a format whose scales share nothing."""
    nothing = None  # Triton returns a name that holds None, but not None itself
    return nothing  # noqa: RET504


@triton.jit
def spread(scale, COLUMNS: tl.constexpr):
    """(rows, scales) for (rows, COLUMNS) elements."""
    ROWS: tl.constexpr = scale.shape[0]
    SCALES: tl.constexpr = scale.shape[1]
    if SCALES == 1:
        wide = tl.broadcast_to(scale, (ROWS, COLUMNS))
    else:
        wide = tl.reshape(tl.broadcast_to(scale[:, :, None], (ROWS, SCALES, COLUMNS // SCALES)), (ROWS, COLUMNS))
    return wide


@triton.jit
def _words_by_table(words, scale, FORMAT: tl.constexpr, IN_ORDER: tl.constexpr):
    """Four uint32 of two weights each for each of ``words``, from the table of its fp32 ``scale``.

    The weights are in order, or even and odd places apart.
    """
    LOOK_UP: tl.constexpr = FORMAT.IN_ORDER_PTX if IN_ORDER else FORMAT.PAIR_PTX
    # A scale's words have one table: the compiler sees that those of the same thread are the same.
    t0, t1, t2, t3, t4, t5, t6, t7 = tl.inline_asm_elementwise(
        FORMAT.TABLE,
        "=r,=r,=r,=r,=r,=r,=r,=r,f",
        [scale],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )
    return tl.inline_asm_elementwise(
        LOOK_UP,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [words, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def halves(pairs, dtype: tl.constexpr):
    """The lower and the upper value of each word."""
    return pairs.to(tl.uint16).to(dtype, bitcast=True), (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _side_by_side(a, b, dtype: tl.constexpr):
    """The four values in each of two (rows, columns) words, in order: (rows, 4·columns)."""
    ROWS: tl.constexpr = a.shape[0]
    COLUMNS: tl.constexpr = a.shape[1]
    lower, upper = halves(tl.reshape(tl.join(a, b), (ROWS, 2 * COLUMNS)), dtype)
    return tl.reshape(tl.join(lower, upper), (ROWS, 4 * COLUMNS))


@triton.jit
def _look_up(code, nibbles):
    """code[nibbles] for nibbles (n,) or (rows, columns).

    They are looked up flat: a gather along one axis of a broadcast table was 15 % slower.
    """
    if len(nibbles.shape) == 1:
        values = tl.gather(code, nibbles.to(tl.int32), 0)
    else:
        ROWS: tl.constexpr = nibbles.shape[0]
        COLUMNS: tl.constexpr = nibbles.shape[1]
        flat = tl.reshape(nibbles.to(tl.int32), (ROWS * COLUMNS,))
        values = tl.reshape(tl.gather(code, flat, 0), (ROWS, COLUMNS))
    return values


@triton.jit
def nibbles_of(packed, FORMAT: tl.constexpr):
    """The nibbles of each byte's first and second weight."""
    if FORMAT.HIGH_FIRST:
        first, second = packed >> 4, packed & 15
    else:
        first, second = packed & 15, packed >> 4
    return first, second


@triton.jit
def pair_by_table(
    code,
    packed,  # elements: bytes (n,) or (rows, columns), or words (rows, columns)
    scale,  # fp32 of each element
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The weights at even and at odd places: as many as bytes, or (rows, 4·columns) of words."""
    if FORMAT.TABLE != "":
        a, b, c, d = _words_by_table(packed, scale, FORMAT, False)
        even = _side_by_side(a, b, dtype)
        odd = _side_by_side(c, d, dtype)
    else:
        first, second = nibbles_of(packed, FORMAT)
        even = (_look_up(code, first) * scale).to(dtype)
        odd = (_look_up(code, second) * scale).to(dtype)
    return even, odd


@triton.jit
def in_order_by_table(
    code,
    packed,  # (rows, columns) elements
    scale,  # fp32 of each element
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The weights, (rows, 2·columns) of bytes or (rows, 8·columns) of words, or the transpose if TRANSPOSED.

    In words both weights of a byte come in one register, where neighbours are to be: interleaving what ``pair_by_table``
    gives moves each.
    """
    if FORMAT.TABLE != "":
        ROWS: tl.constexpr = packed.shape[0]
        COLUMNS: tl.constexpr = packed.shape[1]
        a, b, c, d = _words_by_table(packed, scale, FORMAT, True)
        pairs = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, 4 * COLUMNS))
        even, odd = halves(pairs, dtype)
    else:
        even, odd = pair_by_table(code, packed, scale, dtype, FORMAT)
    return interleaved(even, odd, TRANSPOSED)


@triton.jit
def interleaved(even, odd, TRANSPOSED: tl.constexpr):
    """Even and odd places (rows, pairs) in order: (rows, 2·pairs), or the transpose if TRANSPOSED."""
    ROWS: tl.constexpr = even.shape[0]
    PAIRS: tl.constexpr = even.shape[1]
    weights = tl.join(even, odd)
    if TRANSPOSED:
        weights = tl.reshape(tl.permute(weights, (1, 2, 0)), (2 * PAIRS, ROWS))
    else:
        weights = tl.reshape(weights, (ROWS, 2 * PAIRS))
    return weights


@triton.jit(do_not_specialize=["first"])
def dequantize_kernel(
    w,  # PackedTensors
    offsets,  # (E+1,), read with SKIP
    out,  # (experts, 2·RUNS.TOTAL) out
    first,  # expert that goes to the front of out
    SIZE: tl.constexpr,  # weights of an expert
    RUNS: tl.constexpr,  # ByteRuns: which bytes of an expert
    FORMAT: tl.constexpr,  # FormatCode
    SKIP: tl.constexpr,  # experts without rows
    BLOCK: tl.constexpr,  # bytes a program
):
    """out[e] = the weights of expert first + e that are asked for, in their order.

    Grid: (experts · ⌈RUNS.TOTAL / BLOCK⌉,).
    """
    PROGRAMS: tl.constexpr = (RUNS.TOTAL + BLOCK - 1) // BLOCK
    local = tl.program_id(0) // PROGRAMS
    expert = (first + local).to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
    if SKIP:
        if tl.load(offsets + expert) == tl.load(offsets + expert + 1):
            return
    byte = (tl.program_id(0) % PROGRAMS) * BLOCK + tl.arange(0, BLOCK)
    run = byte // RUNS.SIZE
    source = RUNS.START + (run // RUNS.PER_GROUP) * RUNS.GROUP_STRIDE + (run % RUNS.PER_GROUP) * RUNS.STRIDE
    source = source + byte % RUNS.SIZE
    inside = byte < RUNS.TOTAL
    packed = tl.load(w.packed + expert * (SIZE // 2) + source, mask=inside, other=0)
    block = tl.where(inside, source // (FORMAT.BLOCK // 2), 0)
    scale = FORMAT.block_scale(w.scales, expert, block, None, FORMAT)
    code = load_code(w.code, FORMAT)
    even, odd = FORMAT.pair(code, packed, scale, tl.float32, FORMAT)
    # int64: an expert may have 2³¹ weights, of 2³⁰ bytes.
    start = (tl.program_id(0) % PROGRAMS).to(tl.int64) * (2 * BLOCK)
    places = tl.arange(0, 2 * BLOCK)
    out_ptrs = out + local.to(tl.int64) * (2 * RUNS.TOTAL) + start + places
    weights = tl.interleave(even, odd).to(out.dtype.element_ty)
    tl.store(out_ptrs, weights, mask=places < 2 * RUNS.TOTAL - start)
