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
def look_up(code, nibbles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """code[nibbles] for (ROWS, COLUMNS) nibbles. Flat: a gather along one axis of a broadcast table was 15 % slower."""
    flat = tl.reshape(nibbles.to(tl.int32), (ROWS * COLUMNS,))
    return tl.reshape(tl.gather(code, flat, 0), (ROWS, COLUMNS))


@triton.jit
def decode(code, packed, scale, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALES: tl.constexpr):
    """The weights at even and at odd places of ``packed`` (ROWS, COLUMNS) bytes, SCALES (ROWS, SCALES) to a row."""
    if SCALES == 1:
        spread = scale
    else:
        spread = tl.reshape(tl.broadcast_to(scale[:, :, None], (ROWS, SCALES, COLUMNS // SCALES)), (ROWS, COLUMNS))
    even = look_up(code, packed >> 4, ROWS, COLUMNS) * spread
    odd = look_up(code, packed & 15, ROWS, COLUMNS) * spread
    return even.to(dtype), odd.to(dtype)


@triton.jit(do_not_specialize=["first"])
def dequantize_kernel(
    packed_ptr,  # (E, SIZE/2) uint8
    absmax_ptr,  # (E, PROJECTIONS·BLOCKS) uint8 with DOUBLE_QUANT, else fp32
    nested_absmax_ptr,  # (E, PROJECTIONS·GROUPS) fp32
    nested_offset_ptr,  # (E, PROJECTIONS) fp32
    nested_code_ptr,  # (256,) fp32
    code_ptr,  # (16,) fp32
    offsets_ptr,  # (E+1,), read with SKIP
    out_ptr,  # (experts, SIZE) out
    first,  # expert that goes to the front of out
    SIZE: tl.constexpr,  # weights of an expert
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    SKIP: tl.constexpr,  # experts without rows
    BLOCK: tl.constexpr,  # bytes a program
):
    """out[e] = the weights of expert first + e. Grid: (experts · ⌈SIZE/2 / BLOCK⌉,)."""
    PROGRAMS: tl.constexpr = (SIZE // 2 + BLOCK - 1) // BLOCK
    local = tl.program_id(0) // PROGRAMS
    expert = (first + local).to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
    if SKIP:
        if tl.load(offsets_ptr + expert) == tl.load(offsets_ptr + expert + 1):
            return
    byte = (tl.program_id(0) % PROGRAMS) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < SIZE // 2
    packed = tl.load(packed_ptr + expert * (SIZE // 2) + byte, mask=inside, other=0)
    block = tl.where(inside, byte // (BLOCKSIZE // 2), 0)
    scale = block_scale(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, block, BLOCKS, GROUPS, PROJECTIONS,
        DOUBLE_QUANT,
    )  # fmt: skip
    code = tl.load(code_ptr + tl.arange(0, 16))
    even = tl.gather(code, (packed >> 4).to(tl.int32), 0) * scale
    odd = tl.gather(code, (packed & 15).to(tl.int32), 0) * scale
    places = (tl.program_id(0) % PROGRAMS) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    out = out_ptr + local.to(tl.int64) * SIZE + places
    tl.store(out, tl.interleave(even, odd).to(out_ptr.dtype.element_ty), mask=places < SIZE)
