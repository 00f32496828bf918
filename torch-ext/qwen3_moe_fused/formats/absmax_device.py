"""The Triton half of ``absmax``: from blocks to their scales, and the reciprocal with which NVIDIA GPUs quantize."""

import triton
import triton.language as tl


@triton.jit
def block_scale(
    scales,  # AbsmaxTensors
    expert,  # int64
    block,  # indices of blocks of the expert, any shape
    prepared,  # what ``prepare`` gave for the rows of ``block``, or None
    FORMAT: tl.constexpr,
):
    """The fp32 scale of each ``block``."""
    L: tl.constexpr = FORMAT.LAYOUT
    scale = tl.load(scales.absmax + expert * (L.PROJECTIONS * L.BLOCKS) + block)
    if L.DOUBLE_QUANT:
        if prepared is None:
            if L.PROJECTIONS == 1:
                projection = block * 0
                group = block // L.GROUP
            else:
                projection = block // L.BLOCKS
                group = projection * L.GROUPS + (block - projection * L.BLOCKS) // L.GROUP
            nested = tl.load(scales.nested_absmax + expert * (L.PROJECTIONS * L.GROUPS) + group)
            offset = tl.load(scales.nested_offset + expert * L.PROJECTIONS + projection)
        else:
            near, far, border, offset = prepared
            nested = tl.where(block < border, near, far)
        scale = tl.load(scales.nested_code + scale.to(tl.int32)) * nested + offset
    return scale


@triton.jit
def prepare(
    scales,  # AbsmaxTensors
    expert,  # int64
    start,  # (rows,) index of each row's first weight
    K: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """What the absmaxes of K weights from each of ``start`` share, each (rows, 1); None if that is nothing.

    A row of K weights lies in at most two groups: the nested absmax of the first and of the last, the first block of the
    last, and the offset.
    """
    L: tl.constexpr = FORMAT.LAYOUT
    if L.DOUBLE_QUANT and K <= L.GROUP * L.BLOCK:
        projection = start // L.BLOCK // L.BLOCKS
        first = (start // L.BLOCK - projection * L.BLOCKS) // L.GROUP
        last = ((start + K - 1) // L.BLOCK - projection * L.BLOCKS) // L.GROUP
        nested_absmax = scales.nested_absmax + expert * (L.PROJECTIONS * L.GROUPS) + projection * L.GROUPS
        near = tl.load(nested_absmax + first)
        if L.GROUP * L.BLOCK % K == 0:
            far = near  # a group is of whole rows
        else:
            far = tl.load(nested_absmax + last)
        offset = tl.load(scales.nested_offset + expert * L.PROJECTIONS + projection)
        border = projection * L.BLOCKS + last * L.GROUP
        prepared = (near[:, None], far[:, None], border[:, None], offset[:, None])
    else:
        prepared = None
    return prepared


@triton.jit(do_not_specialize=["num_values"])
def reciprocal_kernel(
    values_ptr,  # (num_values,) fp32
    out_ptr,  # (num_values,) fp32 out
    num_values,
    BLOCK: tl.constexpr,
):
    """The reciprocal of CUDA's --use_fast_math, which torch has no operator for.

    out = 1 / values, to within one unit in the last place, subnormal numbers flushed. Grid: (blocks,).
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_values
    values = tl.load(values_ptr + index, mask=mask, other=1.0)
    out = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(out_ptr + index, out, mask=mask)
