"""4-bit storage that does not fit is refused in one line: which tensor, of which expert and projection, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernel.bad_calls import BadCall
from tests.kernel.machine import module
from tests.kernel.test_quantization import SMALL, Format4bit, Packed4bitWeights, example, interchange


def pieces_with(index: int, **parts: Any) -> list[Any]:
    weights = example()
    pieces = [interchange.piece_of(weights, expert, projection) for expert in range(2) for projection in range(2)]
    pieces[index] = replace(pieces[index], **parts)
    return pieces


def from_pieces(index: int, **parts: Any) -> Callable[[], object]:
    return lambda: interchange.stack_of_pieces(pieces_with(index, **parts), example().format)


def quantized(weight: Any = None, **options: Any) -> Callable[[], object]:
    return lambda: Packed4bitWeights.quantize(torch.zeros(SMALL) if weight is None else weight, **options)


def stored(**parts: Any) -> Callable[[], object]:
    return lambda: Packed4bitWeights(example().format, **{**example().tensors(), **parts})


BAD = [
    BadCall(
        "quant-type",
        lambda: Format4bit(SMALL, "int5"),
        ValueError,
        f"quant_type must be one of {', '.join(module('formats').names())}, got 'int5'",
    ),
    BadCall(
        "blocksize",
        lambda: Format4bit(SMALL, blocksize=16),
        ValueError,
        "blocksize must be one of 32, 64, 128, 256, 512, 1024, 2048, 4096, got 16",
    ),
    BadCall(
        "format-dtype",
        lambda: Format4bit(SMALL, dtype=torch.float64),
        ValueError,
        "dtype must be bfloat16, float16 or float32, got torch.float64",
    ),
    BadCall(
        "flat-shape",
        lambda: Format4bit((8, 64)),
        ValueError,
        "shape must be (E, out, in), all positive, got (8, 64)",
    ),
    BadCall(
        "empty-shape",
        lambda: Format4bit((0, 8, 64)),
        ValueError,
        "shape must be (E, out, in), all positive, got (0, 8, 64)",
    ),
    BadCall(
        "projections",
        lambda: Format4bit(SMALL, projections=3),
        ValueError,
        "projections must divide the 8 out features, got 3",
    ),
    BadCall(
        "no-projections",
        quantized(projections=0),
        ValueError,
        "projections must divide the 8 out features, got 0",
    ),
    BadCall(
        "part-of-a-block",
        quantized(blocksize=512, projections=2),
        ValueError,
        "an expert's 4 x 64 weights must be a multiple of the blocksize 512",
    ),
    BadCall("weight-list", quantized([[1.0]]), TypeError, "weight must be a tensor, got list"),
    BadCall(
        "weight-matrix", quantized(torch.zeros(8, 64)), ValueError, "weight must have shape (E, out, in), got (8, 64)"
    ),
    BadCall(
        "weight-float64",
        quantized(torch.zeros(SMALL, dtype=torch.float64)),
        TypeError,
        "weight must be bfloat16 or float16 or float32, got float64",
    ),
    BadCall(
        "weight-integer",
        quantized(torch.zeros(SMALL, dtype=torch.uint8)),
        TypeError,
        "weight must be bfloat16 or float16 or float32, got uint8",
    ),
    BadCall(
        "dequantize-to-integer",
        lambda: example().dequantize(torch.int32),
        TypeError,
        "dtype must be bfloat16 or float16 or float32 or float64, got int32",
    ),
    BadCall(
        "absmax-missing", stored(absmax=None), TypeError, "absmax must be a tensor with double_quant=True, got NoneType"
    ),
    BadCall(
        "nested-missing",
        stored(nested_offset=None),
        TypeError,
        "nested_offset must be a tensor with double_quant=True, got NoneType",
    ),
    BadCall(
        "nested-superfluous",
        lambda: example(False).replaced(nested_absmax=torch.zeros(2, 8, dtype=torch.uint8)),
        TypeError,
        "nested_absmax must be None with double_quant=False, got Tensor",
    ),
    BadCall("packed-dtype", stored(packed=torch.zeros(2, 256)), TypeError, "packed must be uint8, got float32"),
    BadCall(
        "packed-shape",
        stored(packed=torch.zeros((2, 4, 64), dtype=torch.uint8)),
        ValueError,
        "packed must have shape (2, 256), got (2, 4, 64)",
    ),
    BadCall(
        "every-second-expert",
        stored(packed=torch.zeros((4, 256), dtype=torch.uint8)[::2]),
        ValueError,
        "packed must be contiguous, got strides (512, 1)",
    ),
    BadCall(
        "two-dtypes",
        lambda: example().to(torch.float16, torch.float32),
        TypeError,
        "device must be a device, got torch.float16",
    ),
    BadCall(
        "absmax-device",
        stored(absmax=torch.zeros((2, 8), dtype=torch.uint8, device="meta")),
        ValueError,
        f"absmax must be on {example().device} like packed, got meta",
    ),
    BadCall(
        "too-few-pieces",
        lambda: interchange.stack_of_pieces(pieces_with(0)[:3], example().format),
        ValueError,
        "pieces must be 4, of each expert and projection, got 3",
    ),
    BadCall(
        "too-many-pieces",
        lambda: interchange.stack_of_pieces(pieces_with(0) * 2, example().format),
        ValueError,
        "pieces must be 4, of each expert and projection, got more",
    ),
    BadCall(
        "not-a-piece",
        lambda: interchange.stack_of_pieces([*pieces_with(0)[:3], torch.zeros(1)], example().format),
        TypeError,
        "piece of expert 1, projection 1 must be a Piece, got Tensor",
    ),
    BadCall(
        "truncated-piece",
        from_pieces(1, packed=torch.zeros((100, 1), dtype=torch.uint8)),
        ValueError,
        "piece of expert 0, projection 1.packed must have 128 bytes for 256 weights, got 100",
    ),
    BadCall(
        "dense-piece",
        from_pieces(2, packed=torch.zeros(256, dtype=torch.bfloat16)),
        ValueError,
        "piece of expert 1, projection 0.packed must have 128 bytes for 256 weights, got 512",
    ),
    BadCall(
        "integer-piece",
        from_pieces(2, packed=torch.zeros(32, dtype=torch.int32)),
        TypeError,
        "piece of expert 1, projection 0.packed must be uint8, got int32",
    ),
    BadCall(
        "piece-absmax-dtype",
        from_pieces(3, absmax=torch.zeros(4)),
        TypeError,
        "piece of expert 1, projection 1.absmax must be uint8, got float32",
    ),
    BadCall(
        "piece-absmax-size",
        from_pieces(3, absmax=torch.zeros(5, dtype=torch.uint8)),
        ValueError,
        "piece of expert 1, projection 1.absmax must have 4 values for 256 weights, got 5",
    ),
    BadCall(
        "piece-without-offset",
        from_pieces(3, nested_offset=None),
        TypeError,
        "piece of expert 1, projection 1.nested_offset must be a tensor with double_quant=True, got NoneType",
    ),
    BadCall(
        "plain-stack-of-double-pieces",
        lambda: interchange.stack_of_pieces(pieces_with(0), replace(example().format, double_quant=False)),
        TypeError,
        "piece of expert 0, projection 0.absmax must be float32, got uint8",
    ),
    BadCall(
        "too-few-fused",
        lambda: interchange.stack_of_fused_pieces(pieces_with(0)[:1], example().format),
        ValueError,
        "pieces must be 2, one for each projection, got 1",
    ),
    BadCall(
        "fused-of-one-expert",
        lambda: interchange.stack_of_fused_pieces(pieces_with(0)[:2], example().format),
        ValueError,
        "piece of projection 0.packed must have 256 bytes for 512 weights, got 128",
    ),
    BadCall(
        "fused-not-pieces",
        lambda: interchange.stack_of_fused_pieces([None, None], example().format),
        TypeError,
        "piece of projection 0 must be a Piece, got NoneType",
    ),
    BadCall("expert", lambda: interchange.piece_of(example(), 2), ValueError, "expert must be from 0 to 1, got 2"),
    BadCall(
        "projection",
        lambda: interchange.piece_of(example(), 0, -1),
        ValueError,
        "projection must be from 0 to 1, got -1",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.id)
def test_bad_input(case: BadCall) -> None:
    case.check()
