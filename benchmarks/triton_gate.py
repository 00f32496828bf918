"""The gate that ``triton_kernels`` applies to the up projection: device code, so this file needs triton."""

import triton
import triton.language as tl


@triton.jit
def silu_and_multiply(tile):
    """silu(gate) · up of a tile (M, 2·N) whose columns are gate and up in turns."""
    gate, up = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))
    return gate * tl.sigmoid(gate) * up
