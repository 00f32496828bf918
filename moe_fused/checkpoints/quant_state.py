"""One 4-bit matrix, or stack of matrices quantized as one, as bitsandbytes writes it into a checkpoint.

Beside the packed ``weight`` stand ``weight.absmax``, ``weight.quant_map``, with double quantization ``weight.nested_absmax``
and ``weight.nested_quant_map``, and in ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``) what is not a tensor, as JSON.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from math import ceil, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moe_fused.hub import get_kernel

if TYPE_CHECKING:
    from qwen3_moe_fused.quantization import Format4bit, Packed4bitWeights, Piece

_STATE = "quant_state.bitsandbytes__"
_FIELDS = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
_NESTED_FIELDS = {"nested_blocksize": int, "nested_offset": float}
# Absmaxes that share a second-level scale; bitsandbytes knows no other number.
NESTED_BLOCKSIZE = 256
# bitsandbytes' code books come from arithmetic that may differ by a rounding between its versions.
_CODE_TOLERANCE = 1e-6


@functools.cache
def _code(quant_type: str) -> Tensor:
    """The values of 4 bits, ``quant_map`` in checkpoints, as bitsandbytes has them on the CPU."""
    from bitsandbytes.functional import get_4bit_type

    values: Tensor = get_4bit_type(quant_type, device="cpu")
    return values


@functools.cache
def _nested_code() -> Tensor:
    """The values of an absmax of 8 bits, ``nested_quant_map`` in checkpoints, as bitsandbytes has them on the CPU."""
    from bitsandbytes.functional import create_dynamic_map

    values: Tensor = create_dynamic_map()
    return values


class MatrixFormat(NamedTuple):
    """How a matrix is quantized; ``dtype`` is that of the weights before."""

    quant_type: str
    blocksize: int
    double_quant: bool
    dtype: torch.dtype


def read_json(name: str, tensor: Tensor) -> dict[str, Any]:
    """The JSON object in the bytes of ``tensor``.

    Raises:
        ValueError: there is none.
    """
    try:
        value = json.loads(bytes(tensor.cpu().view(torch.uint8).tolist()))
    except ValueError as error:  # not UTF-8, not JSON
        raise ValueError(f"{name} must hold JSON, which it does not: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold a JSON object, got a {type(value).__name__}")
    return value


def write_json(value: Mapping[str, Any]) -> Tensor:
    """``value`` as uint8 bytes, as ``read_json`` takes it."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def check_fields(name: str, value: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    """Raises ValueError unless ``value`` has the ``fields``, of these types."""
    for field, wanted in fields.items():
        if not isinstance(value.get(field), wanted):
            raise ValueError(f"{name} must hold {field}, a {wanted.__name__}, got {value.get(field)!r}")


def dtype_of(name: str, value: str) -> torch.dtype:
    """The dtype that bitsandbytes calls ``value``.

    Raises:
        ValueError: 4-bit weights cannot come from it.
    """
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if value not in dtypes:
        raise ValueError(f"{name} must hold a dtype of {', '.join(dtypes)}, got {value!r}")
    return dtypes[value]


def read_format(name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[MatrixFormat, float | None]:
    """The format of the matrix ``name`` of that shape, and its nested offset if it is double-quantized.

    Raises:
        ValueError: names the tensor that does not fit.
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
    if state["blocksize"] not in get_kernel().quantization.BLOCKSIZES:
        raise ValueError(f"{key} must hold a blocksize of bitsandbytes, got {state['blocksize']}")
    double_quant = "nested_blocksize" in state
    if double_quant:
        check_fields(key, state, _NESTED_FIELDS)
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
    """A matrix, or stack of matrices quantized as one.

    Args:
        name: the key of its packed weights.
        parts: its tensors by what follows ``name.``; the packed weights are ``""``.
        shape: what it must have.

    Raises:
        ValueError: names the tensor that is missing, unknown, of the wrong size or dtype, or holds the wrong values.
    """
    form, offset = read_format(name, parts, shape)
    quantization = get_kernel().quantization
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
        return form, quantization.Piece(flat[""], flat["absmax"])
    _check_code(f"{name}.nested_quant_map", flat["nested_quant_map"], _nested_code())
    nested_offset = torch.tensor(offset, dtype=torch.float32, device=flat[""].device)
    return form, quantization.Piece(flat[""], flat["absmax"], flat["nested_absmax"], nested_offset)


def write_matrix(weights: Packed4bitWeights, expert: int, projection: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What bitsandbytes would save for one matrix, on the CPU, by what follows its name; the packed weights are ``""``.

    Args:
        dtype: of the weights before they were quantized.
    """
    form = weights.format
    shape = (form.shape[1] // form.projections, form.shape[2])
    return write_piece(weights.piece(expert, projection), shape, form, dtype)


def write_piece(piece: Piece, shape: tuple[int, ...], form: Format4bit, dtype: torch.dtype) -> dict[str, Tensor]:
    """What bitsandbytes would save for ``piece``, as ``write_matrix``; meta tensors stay what they are.

    Args:
        shape: of what was quantized as one.
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
    # Copies, for safetensors does not write tensors that share memory.
    return {
        part: value if value.is_meta else torch.empty_like(value, device="cpu").copy_(value)
        for part, value in parts.items()
    }


def quantize_matrix(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> Piece:
    """``weight`` (out, in) as bitsandbytes quantizes it, on its device."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type
    )
    piece = get_kernel().quantization.Piece
    if not double_quant:
        return piece(packed, state.absmax)
    return piece(packed, state.absmax, state.state2.absmax, state.offset)
