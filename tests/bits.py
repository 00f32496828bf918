"""What bitsandbytes' 4 bits mean, whatever processor runs the tests.

bitsandbytes' own CPU kernel is no oracle: where a row is not a whole number of blocks its values are wrong. Its plain
implementation, which it uses on devices without a kernel, is right everywhere. On a GPU its kernel is the oracle.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def absmax_of(state: Any) -> Tensor:
    """(blocks,) fp32 scales of a QuantState, with or without double quantization."""
    if not state.nested:
        plain: Tensor = state.absmax.float()
        return plain
    scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    nested: Tensor = state.state2.code[state.absmax.int()] * scales + state.offset
    return nested


def dequantize_4bit(packed: Tensor, state: Any) -> Tensor:
    """``bitsandbytes.functional.dequantize_4bit`` for a matrix of ``state.shape``, in ``state.dtype``."""
    if packed.device.type != "cpu":
        from bitsandbytes.functional import dequantize_4bit as dequantize

        on_gpu: Tensor = dequantize(packed, state)
        return on_gpu
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as compute
    from bitsandbytes.backends.utils import _get_4bit_code

    plain = getattr(compute, "__wrapped__", compute)  # without torch.compile, which takes a C++ compiler
    code = _get_4bit_code(state.quant_type, packed.device)
    nibbles = packed.reshape(-1).view(torch.uint8)
    values: Tensor = plain(nibbles, absmax_of(state), code, state.blocksize, tuple(state.shape), state.dtype)
    return values
