"""The reciprocal of CUDA's --use_fast_math, which torch has no operator for."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_values"])
def reciprocal_kernel(
    values_ptr,  # (num_values,) fp32
    out_ptr,  # (num_values,) fp32 out
    num_values,
    BLOCK: tl.constexpr,
):
    """out = 1 / values, to within one unit in the last place, subnormal numbers flushed. Grid: (blocks,)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_values
    values = tl.load(values_ptr + index, mask=mask, other=1.0)
    out = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(out_ptr + index, out, mask=mask)
