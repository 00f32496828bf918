"""Reads and writes a 4-bit matrix as bitsandbytes has it in a checkpoint.

A matrix may also be a stack of matrices that were quantized as one. Beside the packed ``weight``, the checkpoint has
``weight.absmax`` and ``weight.quant_map``, and with double quantization also ``weight.nested_absmax`` and
``weight.nested_quant_map``. ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``) holds everything else as JSON.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from math import ceil, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_fused.hub import get_kernel

if TYPE_CHECKING:
    from qwen3_moe_fused import Format4bit, Packed4bitWeights, Piece

_STATE = "quant_state.bitsandbytes__"
_FIELDS = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
_NESTED_FIELDS = {"nested_blocksize": int, "nested_offset": float}
# How many absmaxes share a second-level scale. bitsandbytes has no other number.
NESTED_BLOCKSIZE = 256
# bitsandbytes computes its code books, and versions of it may differ by a rounding.
_CODE_TOLERANCE = 1e-6


@functools.cache
def _code(quant_type: str) -> Tensor:
    """Returns bitsandbytes' 16 values for 4 bits on the CPU, which checkpoints have as ``quant_map``."""
    from bitsandbytes.functional import get_4bit_type

    values: Tensor = get_4bit_type(quant_type, device="cpu")
    return values


@functools.cache
def _nested_code() -> Tensor:
    """Returns bitsandbytes' values for 8-bit absmaxes on the CPU, which checkpoints have as ``nested_quant_map``."""
    from bitsandbytes.functional import create_dynamic_map

    values: Tensor = create_dynamic_map()
    return values


class MatrixFormat(NamedTuple):
    """How a matrix is quantized. ``dtype`` is the dtype of the weights before they were quantized."""

    quant_type: str
    blocksize: int
    double_quant: bool
    dtype: torch.dtype


def read_json(name: str, tensor: Tensor) -> dict[str, Any]:
    """Reads the JSON object in the bytes of ``tensor``.

    Raises:
        ValueError: the bytes do not hold a JSON object.
    """
    try:
        value = json.loads(bytes(tensor.cpu().view(torch.uint8).tolist()))
    except ValueError as error:  # the bytes are not UTF-8 or not JSON
        raise ValueError(f"{name} must hold JSON, which it does not: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, got a {type(value).__name__}")
    return value


def write_json(value: Mapping[str, Any]) -> Tensor:
    """Returns ``value`` as uint8 bytes that ``read_json`` can read."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def check_fields(name: str, value: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    """Raises ValueError unless ``value`` has all ``fields``, with values of these types."""
    for field, wanted in fields.items():
        if not isinstance(value.get(field), wanted):
            raise ValueError(f"{name} must hold {field}, a {wanted.__name__}, got {value.get(field)!r}")


def dtype_of(name: str, value: str) -> torch.dtype:
    """Returns the dtype that bitsandbytes calls ``value``.

    Raises:
        ValueError: it is not a dtype that weights can have before they are quantized.
    """
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if value not in dtypes:
        raise ValueError(f"{name} must hold a dtype of {', '.join(dtypes)}, got {value!r}")
    return dtypes[value]


def read_format(name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[MatrixFormat, float | None]:
    """Reads the format of the matrix ``name``, and its nested offset if it is double-quantized.

    Raises:
        ValueError: a tensor does not fit. The message names it.
    """
    states = [part for part in parts if part.startswith(_STATE)]
    if not states:
        raise ValueError(f"{name}.{_STATE}nf4 (or fp4) is missing, without which 4-bit weights cannot be read")
    if len(states) > 1:
        raise ValueError(f"{name} must have one quant_state, got {' and '.join(sorted(states))}")
    key, quant_type = f"{name}.{states[0]}", states[0].removeprefix(_STATE)
    state = read_json(key, parts[states[0]])
    check_fields(key, state, _FIELDS)
    if state["quant_type"] != quant_type or quant_type not in ("nf4", "fp4"):
        raise ValueError(f"{key} must hold the quant_type of its name, nf4 or fp4, got {state['quant_type']!r}")
    if tuple(state["shape"]) != shape:
        raise ValueError(f"{key} must hold shape {shape}, got {tuple(state['shape'])}")
    if state["blocksize"] not in get_kernel().formats.named(state["quant_type"]).blocksizes:
        raise ValueError(f"{key} must hold a blocksize of bitsandbytes, got {state['blocksize']}")
    double_quant = "nested_blocksize" in state
    if double_quant:
        check_fields(key, state, _NESTED_FIELDS)
        if not math.isfinite(state["nested_offset"]):
            raise ValueError(f"{key} must hold a finite nested_offset, got {state['nested_offset']}")
        if state["nested_blocksize"] != NESTED_BLOCKSIZE:
            raise ValueError(
                f"{key} must hold a nested_blocksize of {NESTED_BLOCKSIZE}, got {state['nested_blocksize']}"
            )
    form = MatrixFormat(quant_type, state["blocksize"], double_quant, dtype_of(key, state["dtype"]))
    return form, state["nested_offset"] if double_quant else None


def _check_code(name: str, got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape or not torch.allclose(got.float().cpu(), want, rtol=_CODE_TOLERANCE, atol=0.0):
        raise ValueError(f"{name} must hold bitsandbytes' own values, which it does not")


def read_matrix(name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[MatrixFormat, Piece]:
    """Reads a matrix, or a stack of matrices that were quantized as one.

    Args:
        name: the key of its packed weights.
        parts: its tensors, by the part of their keys after ``name.``; the packed weights are ``""``.
        shape: the shape that it must have.

    Raises:
        ValueError: a tensor is missing, unknown, of the wrong size or dtype, or has wrong values. The message names it.
    """
    form, offset = read_format(name, parts, shape)
    kernel = get_kernel()
    weights = prod(shape)
    blocks = weights // form.blocksize
    wanted = {
        "": (torch.uint8, weights // 2),
        "absmax": (torch.uint8 if form.double_quant else torch.float32, blocks),
        "quant_map": (torch.float32, 16),
    }
    if form.double_quant:
        wanted["nested_absmax"] = (torch.float32, ceil(blocks / NESTED_BLOCKSIZE))
        wanted["nested_quant_map"] = (torch.float32, 256)
    for part in parts:
        if part not in wanted and not part.startswith(_STATE):
            raise ValueError(
                f"{name}.{part} is not a tensor of {form.quant_type} weights, double_quant={form.double_quant}"
            )
    flat: dict[str, Tensor] = {}
    for part, (dtype, size) in wanted.items():
        key = f"{name}.{part}" if part else name
        if part not in parts:
            raise ValueError(f"{key} is missing, without which 4-bit weights cannot be read")
        value = parts[part].reshape(-1)
        if not part:
            value = value.view(torch.uint8)  # bnb_4bit_quant_storage may be another dtype
        if value.dtype != dtype or value.numel() != size:
            raise ValueError(
                f"{key} must have {size} values of {str(dtype).removeprefix('torch.')}, got {value.numel()} of "
                f"{str(value.dtype).removeprefix('torch.')}"
            )
        flat[part] = value
    _check_code(f"{name}.quant_map", flat["quant_map"], _code(form.quant_type))
    if not form.double_quant:
        return form, kernel.Piece(flat[""], flat["absmax"])
    _check_code(f"{name}.nested_quant_map", flat["nested_quant_map"], _nested_code())
    nested_offset = torch.tensor(offset, dtype=torch.float32, device=flat[""].device)
    return form, kernel.Piece(flat[""], flat["absmax"], flat["nested_absmax"], nested_offset)


def write_matrix(weights: Packed4bitWeights, expert: int, projection: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the CPU tensors that bitsandbytes would save for one matrix.

    Their keys are what follows the name of the matrix; the packed weights are ``""``.

    Args:
        dtype: the dtype of the weights before they were quantized.
    """
    form = weights.format
    shape = (form.shape[1] // form.projections, form.shape[2])
    return write_piece(get_kernel().interchange.piece_of(weights, expert, projection), shape, form, dtype)


def write_piece(piece: Piece, shape: tuple[int, ...], form: Format4bit, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the tensors that bitsandbytes would save for ``piece``, as ``write_matrix`` does. Meta tensors stay on meta.

    Args:
        shape: the shape of the matrix or stack that was quantized as one.
        form: how it was quantized.
    """
    from bitsandbytes.functional import QuantState

    nested: dict[str, Any] = {}
    if piece.nested_absmax is not None:
        nested["offset"] = piece.nested_offset
        nested["state2"] = QuantState(
            absmax=piece.nested_absmax,
            code=_nested_code(),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
    state = QuantState(
        absmax=piece.absmax,
        shape=torch.Size(shape),
        code=_code(form.quant_type),
        blocksize=form.blocksize,
        quant_type=form.quant_type,
        dtype=dtype,
        **nested,
    )
    parts = {"": piece.packed} | state.as_dict(packed=True)
    # The tensors are copied, because safetensors does not write tensors that share memory.
    return {
        part: value if value.is_meta else torch.empty_like(value, device="cpu").copy_(value)
        for part, value in parts.items()
    }


def quantize_matrix(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> Piece:
    """Quantizes ``weight`` (out, in) with bitsandbytes, on its device."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type
    )
    piece = get_kernel().Piece
    if not double_quant:
        return piece(packed, state.absmax)
    return piece(packed, state.absmax, state.state2.absmax, state.offset)
