"""Reads and writes our own layout: the parameters of an experts module as they are, and their format as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_fused.hub import get_kernel

from .quant_state import check_fields, dtype_of, read_json, write_json

if TYPE_CHECKING:
    from qwen3_moe_fused import Packed4bitWeights

_FIELDS = {
    "shape": list,
    "quant_type": str,
    "blocksize": int,
    "double_quant": bool,
    "projections": int,
    "dtype": str,
}
PARTS = ("absmax", "nested_absmax", "nested_offset", "format")


def read_fused(
    name: str,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int, int],
    projections: int,
    experts: int | None = None,
) -> tuple[torch.dtype, Packed4bitWeights]:
    """Reads the parameter ``name``, and returns the dtype of its weights before they were quantized, and the weights.

    Args:
        parts: its tensors, by the part of their names after ``name_``; the packed weights are ``""``.
        shape, projections: the shape and the number of projections that it must have in the checkpoint.
        experts: the number of experts that ``parts`` hold, if these are not all.

    Raises:
        ValueError: a tensor is missing or does not fit. The message names it.
    """
    key = f"{name}_format"
    if "format" not in parts:
        raise ValueError(f"{key} is missing, without which 4-bit weights cannot be read")
    fields = read_json(key, parts["format"])
    check_fields(key, fields, _FIELDS)
    if (tuple(fields["shape"]), fields["projections"]) != (shape, projections):
        raise ValueError(
            f"{key} must hold shape {shape} and {projections} projections, got {tuple(fields['shape'])} and "
            f"{fields['projections']}"
        )
    dtype = dtype_of(key, fields["dtype"])
    kernel = get_kernel()
    try:
        form = kernel.Format4bit(
            (shape[0] if experts is None else experts, *shape[1:]),
            fields["quant_type"],
            fields["blocksize"],
            fields["double_quant"],
            projections,
            dtype,
        )
    except ValueError as error:
        raise ValueError(f"{key} must hold a format that exists: {error}") from None
    storage = {"" if part == "packed" else part: want for part, want in form.storage().items()}
    for part in parts:
        if part not in storage and part != "format":
            raise ValueError(f"{name}_{part} is not a tensor of weights with double_quant={form.double_quant}")
    for part, want in storage.items():
        key = f"{name}_{part}" if part else name
        if part not in parts:
            raise ValueError(f"{key} is missing, without which 4-bit weights cannot be read")
        if parts[part].dtype != torch.uint8 or tuple(parts[part].shape) != want:
            raise ValueError(
                f"{key} must be uint8 of shape {want}, got {str(parts[part].dtype).removeprefix('torch.')} of shape "
                f"{tuple(parts[part].shape)}"
            )
    return dtype, kernel.Packed4bitWeights(form, **{part or "packed": parts[part] for part in storage})


def write_fused(weights: Packed4bitWeights, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the tensors that ``read_fused`` reads. ``format`` is on the CPU.

    Args:
        dtype: the dtype of the weights before they were quantized.
    """
    form = weights.format
    fields = {field: getattr(form, field) for field in _FIELDS}
    fields["dtype"] = str(dtype).removeprefix("torch.")
    parts = {"" if part == "packed" else part: value.detach() for part, value in weights.tensors().items()}
    return parts | {"format": write_json(fields)}
