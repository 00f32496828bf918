"""The Triton half of ``nvfp4``: from blocks to their scales."""

import triton
import triton.language as tl


@triton.jit
def _divisors(
    scales,  # Nvfp4Tensors
    expert,  # int64
    block,  # indices of blocks of the expert, any shape
    FORMAT: tl.constexpr,
):
    """The divisor and factor of each ``block``, the same for all where there is one projection."""
    L: tl.constexpr = FORMAT.LAYOUT
    PROJECTIONS: tl.constexpr = L.PROJECTIONS
    pointer = scales.global_scale + expert * PROJECTIONS
    # A division for each projection, not for each block.
    divisor, factor = _divisor(tl.load(pointer), FORMAT)
    for projection in tl.static_range(1, PROJECTIONS):
        next_divisor, next_factor = _divisor(tl.load(pointer + projection), FORMAT)
        divisor = tl.where(block >= projection * L.BLOCKS, next_divisor, divisor)
        factor = tl.where(block >= projection * L.BLOCKS, next_factor, factor)
    return divisor, factor


@triton.jit
def _divisor(global_scale, FORMAT: tl.constexpr):
    """The divisor and factor of ``nvfp4.SCALE_PTX``, or outside of PTX the global scale, twice."""
    if FORMAT.PER_ELEMENT == 8:
        divisor = global_scale * 0.25
        factor = tl.div_rn(1.0, divisor)
        # The quotients of 0 and Inf have no remainder: with this divisor the correction leaves them as they are.
        divisor = tl.where((factor == 0.0) | (tl.abs(factor) == float("inf")), -1.0, divisor)
    else:
        divisor = global_scale
        factor = global_scale
    return divisor, factor


@triton.jit
def prepare(
    scales,  # Nvfp4Tensors
    expert,  # int64
    start,  # (rows,) index of each row's first weight
    K: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The divisors of the scales of each row, (rows, 1): all of its blocks belong to one projection."""
    return _divisors(scales, expert, (start // FORMAT.BLOCK)[:, None], FORMAT)


@triton.jit
def block_scale(
    scales,  # Nvfp4Tensors
    expert,  # int64
    block,  # indices of blocks of the expert, any shape
    prepared,  # what ``prepare`` gave for the rows of ``block``, or None
    FORMAT: tl.constexpr,
):
    """The fp32 scale of each ``block``: its byte, which is an E4M3, over the global scale, correctly rounded."""
    L: tl.constexpr = FORMAT.LAYOUT
    if prepared is None:
        divisor, factor = _divisors(scales, expert, block, FORMAT)
    else:
        divisor, factor = prepared
    byte = tl.load(scales.block_scale + expert * (L.PROJECTIONS * L.BLOCKS) + block)
    byte = byte.to(tl.int8, bitcast=True).to(tl.int32)
    if FORMAT.PER_ELEMENT == 8:
        scale = tl.inline_asm_elementwise(
            L.SCALE_PTX, "=f,r,f,f", [byte, divisor, factor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        # The exponent of E4M3 as one of fp32 is 120 too small. -0x78100000 keeps the sign, exponent and mantissa.
        value = ((byte << 20) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
        value = tl.where(tl.abs(value) == 480.0, float("nan"), value)
        scale = tl.div_rn(value, tl.broadcast_to(divisor, value.shape))
    return scale
