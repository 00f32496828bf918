"""The Triton half of ``mxfp4``: from blocks to their scales."""

import triton
import triton.language as tl


@triton.jit
def block_scale(
    scales,  # Mxfp4Tensors
    expert,  # int64
    block,  # indices of blocks of the expert, any shape
    prepared,  # None
    FORMAT: tl.constexpr,
):
    """The fp32 scale of each ``block``: its byte as an exponent, with 0 for a subnormal number and 255 for NaN."""
    exponent = tl.load(scales.block_scale + expert * FORMAT.LAYOUT.BLOCKS + block).to(tl.int32)
    bits = tl.maximum(exponent << 23, 0x00400000)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
