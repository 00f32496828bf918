"""4-bit weights on the device: from bytes to values, and whole experts into a dense workspace.

``quantization`` describes the format. Decoding gives bit for bit what bitsandbytes dequantizes to, provided multiplications
and additions are not fused: launch these with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl


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


@triton.jit
def load_code(code_ptr, SHUFFLE: tl.constexpr):
    """The 16 values of the nibbles: (16,) fp32, or with SHUFFLE one number, in each lane of a warp value lane % 16."""
    if SHUFFLE:
        code = tl.inline_asm_elementwise(
            """
            {
                .reg .u32 lane;
                .reg .u64 address;
                mov.u32 lane, %laneid;
                and.b32 lane, lane, 15;
                mad.wide.u32 address, lane, 4, $1;
                ld.global.nc.f32 $0, [address];
            }
            """,
            "=f,l",
            [code_ptr.to(tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        code = tl.load(code_ptr + tl.arange(0, 16))
    return code


# Nibbles by register and half, counted from the lowest of four bytes: the even weight of a byte is in its high nibble.
_EVEN_ODD = ((1, 3), (5, 7), (0, 2), (4, 6))
_PAIRS = ((1, 0), (3, 2), (5, 4), (7, 6))


def _shuffled(convert: str, registers: tuple[tuple[int, int], ...]) -> str:
    """PTX from 4 bytes, code (4 times) and 4 scales to 8 weights, two to a register.

    A shuffle within 16 lanes takes the low four bits of a lane number, so that nibbles need no mask.
    """
    look_up = "".join(
        f"""
        shr.u32 n, $4, {4 * nibble};
        shfl.sync.idx.b32 w{nibble}, $5, n, 0x101f, 0xffffffff;
        mul.rn.f32 w{nibble}, w{nibble}, ${9 + nibble // 2};"""
        for nibble in range(8)
    )
    pack = "".join(
        f"""
        {convert} ${register}, w{upper}, w{lower};"""
        for register, (lower, upper) in enumerate(registers)
    )
    return f"""
    {{
        .reg .u32 n;
        .reg .f32 w<8>;{look_up}{pack}
    }}
    """


_EVEN_ODD_BF16 = tl.constexpr(_shuffled("cvt.rn.bf16x2.f32", _EVEN_ODD))
_EVEN_ODD_FP16 = tl.constexpr(_shuffled("cvt.rn.f16x2.f32", _EVEN_ODD))
_PAIRS_BF16 = tl.constexpr(_shuffled("cvt.rn.bf16x2.f32", _PAIRS))
_PAIRS_FP16 = tl.constexpr(_shuffled("cvt.rn.f16x2.f32", _PAIRS))
_SHUFFLED_OPERANDS = tl.constexpr("=r,=r,=r,=r,r,f,f,f,f,f,f,f,f")


@triton.jit
def look_up(code, nibbles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """code[nibbles] for (ROWS, COLUMNS) nibbles. Flat: a gather along one axis of a broadcast table was 15 % slower."""
    flat = tl.reshape(nibbles.to(tl.int32), (ROWS * COLUMNS,))
    return tl.reshape(tl.gather(code, flat, 0), (ROWS, COLUMNS))


@triton.jit
def _spread(scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALES: tl.constexpr):
    """(ROWS, SCALES) scales for (ROWS, COLUMNS) bytes."""
    if SCALES == 1:
        spread = tl.broadcast_to(scale, (ROWS, COLUMNS))
    else:
        spread = tl.reshape(tl.broadcast_to(scale[:, :, None], (ROWS, SCALES, COLUMNS // SCALES)), (ROWS, COLUMNS))
    return spread


@triton.jit
def decode(
    code,
    packed,  # (ROWS, COLUMNS) bytes
    scale,  # (ROWS, SCALES)
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALES: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """The weights at even and at odd places, each (ROWS, COLUMNS).

    A gather goes through shared memory and takes six instructions a weight, shuffles in registers take three and a half.
    """
    spread = _spread(scale, ROWS, COLUMNS, SCALES)
    if SHUFFLE and dtype == tl.bfloat16:
        even, odd = tl.inline_asm_elementwise(
            _EVEN_ODD_BF16,
            _SHUFFLED_OPERANDS,
            [packed, tl.broadcast_to(code, (ROWS, COLUMNS)), spread],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    elif SHUFFLE and dtype == tl.float16:
        even, odd = tl.inline_asm_elementwise(
            _EVEN_ODD_FP16,
            _SHUFFLED_OPERANDS,
            [packed, tl.broadcast_to(code, (ROWS, COLUMNS)), spread],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        even = (look_up(code, packed >> 4, ROWS, COLUMNS) * spread).to(dtype)
        odd = (look_up(code, packed & 15, ROWS, COLUMNS) * spread).to(dtype)
    return even, odd


@triton.jit
def decode_in_order(
    code,
    packed,  # (ROWS, COLUMNS) bytes
    scale,  # (ROWS, SCALES)
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALES: tl.constexpr,
    SHUFFLE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The weights, (ROWS, 2·COLUMNS), or (2·COLUMNS, ROWS) if TRANSPOSED.

    Both weights of a byte come in one register, where neighbours are to be: interleaving what ``decode`` gives moves each.
    """
    if SHUFFLE:
        PTX: tl.constexpr = _PAIRS_BF16 if dtype == tl.bfloat16 else _PAIRS_FP16
        pairs = tl.inline_asm_elementwise(
            PTX,
            _SHUFFLED_OPERANDS,
            [packed, tl.broadcast_to(code, (ROWS, COLUMNS)), _spread(scale, ROWS, COLUMNS, SCALES)],
            dtype=tl.uint32,
            is_pure=True,
            pack=4,
        )
        even = pairs.to(tl.uint16).to(dtype, bitcast=True)
        odd = (pairs >> 16).to(tl.uint16).to(dtype, bitcast=True)
    else:
        even, odd = decode(code, packed, scale, dtype, ROWS, COLUMNS, SCALES, SHUFFLE)
    weights = tl.join(even, odd)
    if TRANSPOSED:
        weights = tl.reshape(tl.permute(weights, (1, 2, 0)), (2 * COLUMNS, ROWS))
    else:
        weights = tl.reshape(weights, (ROWS, 2 * COLUMNS))
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
    code = load_code(code_ptr, False)
    even = tl.gather(code, (packed >> 4).to(tl.int32), 0) * scale
    odd = tl.gather(code, (packed & 15).to(tl.int32), 0) * scale
    # int64: an expert may have 2³¹ weights, of 2³⁰ bytes.
    start = (tl.program_id(0) % PROGRAMS).to(tl.int64) * (2 * BLOCK)
    places = tl.arange(0, 2 * BLOCK)
    out = out_ptr + local.to(tl.int64) * (2 * OUT) + start + places
    tl.store(out, tl.interleave(even, odd).to(out_ptr.dtype.element_ty), mask=places < 2 * OUT - start)
