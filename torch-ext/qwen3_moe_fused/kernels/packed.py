"""4-bit weights on the device: from bytes to values, and whole experts into a dense workspace.

``quantization`` describes the format. Decoding gives bit for bit what bitsandbytes dequantizes to, provided multiplications
and additions are not fused: launch these with ``enable_fp_fusion=False``.
"""

import struct

import triton
import triton.language as tl

from ..quantization import CODES


@triton.jit
def block_scale(
    absmax_ptr,  # (E, PROJECTIONS·BLOCKS) uint8 with DOUBLE_QUANT, else fp32
    nested_absmax_ptr,  # (E, PROJECTIONS·GROUPS) fp32
    nested_offset_ptr,  # (E, PROJECTIONS) fp32
    nested_code_ptr,  # (256,) fp32
    expert,  # int64
    block,  # indices of blocks of the expert, any shape
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
    """The fp32 absmax of each ``block``."""
    scale = tl.load(absmax_ptr + expert * (PROJECTIONS * BLOCKS) + block)
    if DOUBLE_QUANT:
        if PROJECTIONS == 1:
            projection = block * 0
            group = block // 256
        else:
            projection = block // BLOCKS
            group = projection * GROUPS + (block - projection * BLOCKS) // 256
        nested = tl.load(nested_absmax_ptr + expert * (PROJECTIONS * GROUPS) + group)
        offset = tl.load(nested_offset_ptr + expert * PROJECTIONS + projection)
        scale = tl.load(nested_code_ptr + scale.to(tl.int32)) * nested + offset
    return scale


# Kernels decode in PTX where they are told a quant type as PTX: eight weights a 32-bit word, looked up by byte permutations
# in a table of the 16 that a scale allows, which a thread keeps in registers.


@triton.jit
def load_code(code_ptr, PTX: tl.constexpr):
    """The 16 values of the nibbles, (16,) fp32, where they are needed."""
    if PTX == "":
        code = tl.load(code_ptr + tl.arange(0, 16))
    else:
        code = 0
    return code


@triton.jit
def elements(packed_ptr, PTX: tl.constexpr):
    """A pointer to bytes, of two weights each, or to words of eight."""
    if PTX != "":
        packed_ptr = packed_ptr.to(tl.pointer_type(tl.uint32))
    return packed_ptr


def _table_ptx(code: tuple[float, ...], convert: str) -> str:
    """PTX from a scale to its 16 weights: in four registers their lower bytes, in four the upper ones."""
    values = [struct.unpack("<I", struct.pack("<f", value))[0] for value in code]
    products = "".join(f"mul.rn.f32 p{i}, $8, 0f{value:08X};\n" for i, value in enumerate(values))
    pairs = "".join(f"{convert} q{i}, p{2 * i + 1}, p{2 * i};\n" for i in range(8))
    lower = "".join(f"prmt.b32 ${i}, q{2 * i}, q{2 * i + 1}, 0x6420;\n" for i in range(4))
    upper = "".join(f"prmt.b32 ${4 + i}, q{2 * i}, q{2 * i + 1}, 0x7531;\n" for i in range(4))
    return f"{{\n.reg .f32 p<16>;\n.reg .b32 q<8>;\n{products}{pairs}{lower}{upper}}}"


def _look_up_ptx(registers: tuple[tuple[int, str], ...]) -> str:
    """PTX from a word of nibbles and a table to 8 weights, two to a register.

    A permutation takes three bits of a nibble to choose from half a table; the fourth bit then chooses the half.

    Args:
        registers: which, and how to make it of four weights' lower and upper bytes, for each two of the word in turn.
    """
    halves = "".join(
        f"""
        prmt.b32 a, $5, $6, low;
        prmt.b32 b, $7, $8, low;
        prmt.b32 l, a, b, top;
        prmt.b32 a, $9, $10, low;
        prmt.b32 b, $11, $12, low;
        prmt.b32 u, a, b, top;
        prmt.b32 ${first}, l, u, {order};
        prmt.b32 ${second}, l, u, {next_order};
        shr.u32 low, low, 16;
        shr.u32 top, top, 16;"""
        for (first, order), (second, next_order) in zip(registers[::2], registers[1::2], strict=True)
    )
    return f"""
    {{
        .reg .b32 low, top, a, b, l, u;
        and.b32 low, $4, 0x77777777;
        shr.u32 top, $4, 1;
        lop3.b32 top, top, 0x44444444, 0x32103210, 0xEA;{halves}
    }}
    """


# The even weight of a byte is in its high nibble, so that of four weights the second comes first.
_IN_ORDER = tl.constexpr(_look_up_ptx(((0, "0x4051"), (1, "0x6273"), (2, "0x4051"), (3, "0x6273"))))
_EVEN_ODD = tl.constexpr(_look_up_ptx(((0, "0x7351"), (2, "0x6240"), (1, "0x7351"), (3, "0x6240"))))
_LOOK_UP_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r")
_NF4_BF16 = tl.constexpr(_table_ptx(CODES["nf4"], "cvt.rn.bf16x2.f32"))
_NF4_FP16 = tl.constexpr(_table_ptx(CODES["nf4"], "cvt.rn.f16x2.f32"))
_FP4_BF16 = tl.constexpr(_table_ptx(CODES["fp4"], "cvt.rn.bf16x2.f32"))
_FP4_FP16 = tl.constexpr(_table_ptx(CODES["fp4"], "cvt.rn.f16x2.f32"))
_TABLE_OPERANDS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,f")


@triton.jit
def _decode_words(words, scale, dtype: tl.constexpr, PTX: tl.constexpr, LOOK_UP: tl.constexpr):
    """What LOOK_UP makes of each of ``words`` with its fp32 ``scale``: four uint32, two weights each."""
    NF4: tl.constexpr = _NF4_BF16 if dtype == tl.bfloat16 else _NF4_FP16
    FP4: tl.constexpr = _FP4_BF16 if dtype == tl.bfloat16 else _FP4_FP16
    TABLE: tl.constexpr = NF4 if PTX == "nf4" else FP4
    # A scale's words have one table: the compiler sees that those of the same thread are the same.
    t0, t1, t2, t3, t4, t5, t6, t7 = tl.inline_asm_elementwise(
        TABLE,
        _TABLE_OPERANDS,
        [scale],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )
    return tl.inline_asm_elementwise(
        LOOK_UP,
        _LOOK_UP_OPERANDS,
        [words, t0, t1, t2, t3, t4, t5, t6, t7],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _halves(pairs, dtype: tl.constexpr):
    """The lower and the upper value of each word."""
    return pairs.to(tl.uint16).to(dtype, bitcast=True), (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _unpacked(pairs, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The two values in each of (ROWS, COLUMNS) words, side by side: (ROWS, 2·COLUMNS)."""
    lower, upper = _halves(pairs, dtype)
    return tl.reshape(tl.join(lower, upper), (ROWS, 2 * COLUMNS))


@triton.jit
def look_up(code, nibbles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """code[nibbles] for (ROWS, COLUMNS) nibbles. Flat: a gather along one axis of a broadcast table was 15 % slower."""
    flat = tl.reshape(nibbles.to(tl.int32), (ROWS * COLUMNS,))
    return tl.reshape(tl.gather(code, flat, 0), (ROWS, COLUMNS))


@triton.jit
def _spread(scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALES: tl.constexpr):
    """(ROWS, SCALES) scales for (ROWS, COLUMNS) elements."""
    if SCALES == 1:
        spread = tl.broadcast_to(scale, (ROWS, COLUMNS))
    else:
        spread = tl.reshape(tl.broadcast_to(scale[:, :, None], (ROWS, SCALES, COLUMNS // SCALES)), (ROWS, COLUMNS))
    return spread


@triton.jit
def decode(
    code,
    packed,  # (ROWS, COLUMNS) elements
    scale,  # (ROWS, SCALES)
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALES: tl.constexpr,
    PTX: tl.constexpr,
):
    """The weights at even and at odd places, each (ROWS, COLUMNS) of bytes or (ROWS, 4·COLUMNS) of words."""
    spread = _spread(scale, ROWS, COLUMNS, SCALES)
    if PTX != "":
        a, b, c, d = _decode_words(packed, spread, dtype, PTX, _EVEN_ODD)
        even = _unpacked(tl.reshape(tl.join(a, b), (ROWS, 2 * COLUMNS)), dtype, ROWS, 2 * COLUMNS)
        odd = _unpacked(tl.reshape(tl.join(c, d), (ROWS, 2 * COLUMNS)), dtype, ROWS, 2 * COLUMNS)
    else:
        even = (look_up(code, packed >> 4, ROWS, COLUMNS) * spread).to(dtype)
        odd = (look_up(code, packed & 15, ROWS, COLUMNS) * spread).to(dtype)
    return even, odd


@triton.jit
def decode_in_order(
    code,
    packed,  # (ROWS, COLUMNS) elements
    scale,  # (ROWS, SCALES)
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALES: tl.constexpr,
    PTX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The weights, (ROWS, 2·COLUMNS) of bytes or (ROWS, 8·COLUMNS) of words, or the transpose if TRANSPOSED.

    Of words both weights of a byte come in one register, where neighbours are to be: interleaving what ``decode`` gives
    moves each.
    """
    PAIRS: tl.constexpr = 4 * COLUMNS if PTX != "" else COLUMNS
    if PTX != "":
        a, b, c, d = _decode_words(packed, _spread(scale, ROWS, COLUMNS, SCALES), dtype, PTX, _IN_ORDER)
        pairs = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, PAIRS))
        even, odd = _halves(pairs, dtype)
    else:
        even, odd = decode(code, packed, scale, dtype, ROWS, COLUMNS, SCALES, PTX)
    weights = tl.join(even, odd)
    if TRANSPOSED:
        weights = tl.reshape(tl.permute(weights, (1, 2, 0)), (2 * PAIRS, ROWS))
    else:
        weights = tl.reshape(weights, (ROWS, 2 * PAIRS))
    return weights


@triton.jit(do_not_specialize=["first"])
def dequantize_kernel(
    packed_ptr,  # (E, SIZE/2) uint8
    absmax_ptr,  # (E, PROJECTIONS·BLOCKS) uint8 with DOUBLE_QUANT, else fp32
    nested_absmax_ptr,  # (E, PROJECTIONS·GROUPS) fp32
    nested_offset_ptr,  # (E, PROJECTIONS) fp32
    nested_code_ptr,  # (256,) fp32
    code_ptr,  # (16,) fp32
    offsets_ptr,  # (E+1,), read with SKIP
    out_ptr,  # (experts, 2·OUT) out
    first,  # expert that goes to the front of out
    SIZE: tl.constexpr,  # weights of an expert
    OUT: tl.constexpr,  # bytes of an expert that are decoded, in runs of RUN
    RUN: tl.constexpr,
    RUNS: tl.constexpr,  # that make up a group
    START: tl.constexpr,  # byte of the first run
    RUN_STRIDE: tl.constexpr,  # bytes from a run to the next of its group
    GROUP_STRIDE: tl.constexpr,  # bytes from a group to the next
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    SKIP: tl.constexpr,  # experts without rows
    BLOCK: tl.constexpr,  # bytes a program
):
    """out[e] = the weights of expert first + e that are asked for, in their order. Grid: (experts · ⌈OUT / BLOCK⌉,)."""
    PROGRAMS: tl.constexpr = (OUT + BLOCK - 1) // BLOCK
    local = tl.program_id(0) // PROGRAMS
    expert = (first + local).to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
    if SKIP:
        if tl.load(offsets_ptr + expert) == tl.load(offsets_ptr + expert + 1):
            return
    byte = (tl.program_id(0) % PROGRAMS) * BLOCK + tl.arange(0, BLOCK)
    run = byte // RUN
    source = START + (run // RUNS) * GROUP_STRIDE + (run % RUNS) * RUN_STRIDE + byte % RUN
    inside = byte < OUT
    packed = tl.load(packed_ptr + expert * (SIZE // 2) + source, mask=inside, other=0)
    block = tl.where(inside, source // (BLOCKSIZE // 2), 0)
    scale = block_scale(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, block, BLOCKS, GROUPS, PROJECTIONS,
        DOUBLE_QUANT,
    )  # fmt: skip
    code = load_code(code_ptr, "")
    even = tl.gather(code, (packed >> 4).to(tl.int32), 0) * scale
    odd = tl.gather(code, (packed & 15).to(tl.int32), 0) * scale
    # int64: an expert may have 2³¹ weights, of 2³⁰ bytes.
    start = (tl.program_id(0) % PROGRAMS).to(tl.int64) * (2 * BLOCK)
    places = tl.arange(0, 2 * BLOCK)
    out = out_ptr + local.to(tl.int64) * (2 * OUT) + start + places
    tl.store(out, tl.interleave(even, odd).to(out_ptr.dtype.element_ty), mask=places < 2 * OUT - start)
