"""mxfp4 weights of the kernel against what Transformers makes of the same checkpoint tensors."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_fused import get_kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mxfp4_dequantizes_as_in_transformers(dtype: torch.dtype) -> None:
    """Every byte with every scale but 255, which Transformers takes for 2^128 and the specification for NaN."""
    kernel = get_kernel()
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).repeat(1, 1, 16)
    layout = kernel.Format4bit((1, 256, 512), "mxfp4", dtype=dtype)
    weights = kernel.interchange.stack_of_published({"blocks": blocks, "scales": scales}, layout)
    ours, theirs = weights.dequantize(), convert_moe_packed_tensors(blocks, scales, dtype=dtype).mT.contiguous()
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(ours[:, :255].view(bits), theirs[:, :255].view(bits))
    assert ours[:, 255].isnan().all()
    assert not theirs[:, 255].isnan().any()
