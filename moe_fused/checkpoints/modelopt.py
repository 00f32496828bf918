"""Reads checkpoints in NVFP4 of NVIDIA's ModelOpt as if compressed-tensors had written them.

Both hold the same 4-bit values and the same scales of blocks. ModelOpt calls them ``weight`` and ``weight_scale``. It also
has ``weight_scale_2`` and ``input_scale``, scalars in fp32. compressed-tensors has the reciprocals of these,
``weight_global_scale`` and ``input_global_scale``, in tensors of one element. A reciprocal is rounded, so a dequantized
weight may differ from ModelOpt's in the last bits of fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_fused.quantized import (
    COMPRESSED_TENSORS,
    CheckpointQuantization,
    compressed_content,
    content_of,
    find_modelopt_config,
    is_modelopt_nvfp4,
    modelopt_content,
    with_content,
)

from .finite import check_of_scales
from .names import ACTIVATION_SCALE, MATRIX_PARTS
from .safetensors_file import as_bytes
from .tensor_files import Stored

_PACKED, _SCALE, _GLOBAL = MATRIX_PARTS[:3]
_NAMES = {"weight": _PACKED, "weight_scale": _SCALE, "weight_scale_2": _GLOBAL, "input_scale": ACTIVATION_SCALE}
_CACHE_SCALES = ("k_scale", "v_scale")


@dataclass(frozen=True)
class Reciprocal(Stored):
    """A scale of ModelOpt, read as the reciprocal of it that compressed-tensors has.

    Attributes:
        key: the name of the scale in the checkpoint of ModelOpt.
    """

    key: str

    def chunks(self, size: int = 4) -> Iterator[Any]:
        (data,) = super().chunks(4)
        scale = torch.frombuffer(data, dtype=torch.float32)
        reciprocal = scale.reciprocal()
        is_scale = check_of_scales(_GLOBAL, torch.float32)
        assert is_scale is not None
        if not is_scale(reciprocal.view(torch.uint8)):  # nor are the reciprocals of 0, NaN, and what is negative or Inf
            raise ValueError(f"{self.key} must be a positive finite number, got {scale.item()}")
        yield as_bytes(reciprocal)


def is_nvfp4(directory: Path, config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is in NVFP4 of ModelOpt.

    Args:
        config: the content of ``config.json`` in the directory.
    """
    content = content_of(config)
    if content is None and (path := find_modelopt_config(str(directory))) is not None:
        content = modelopt_content(path)
    return content is not None and is_modelopt_nvfp4(content)


def as_compressed(
    config: dict[str, Any], tensors: Mapping[str, Stored]
) -> tuple[dict[str, Any], dict[str, Stored], CheckpointQuantization, tuple[str, ...]]:
    """Returns a checkpoint of ModelOpt as compressed-tensors has it: config, tensors, quantization, and notes for the user.

    Raises:
        ValueError: a tensor is missing, or is not as ModelOpt writes it. The message names it.
    """
    modules = {key.removesuffix(".weight_scale_2") for key in tensors if key.endswith(".weight_scale_2")}
    if not modules:
        raise ValueError(
            "the checkpoint has no weight_scale_2, although its config says that it is in NVFP4 of ModelOpt"
        )
    result: dict[str, Stored] = {}
    dense, left_out = [], []
    for key, stored in tensors.items():
        module, _, part = key.rpartition(".")
        if part in _CACHE_SCALES:
            left_out.append(key)
        elif module not in modules or part not in _NAMES:
            result[key] = stored
            if part == "weight" and len(stored.shape) == 2:
                dense.append(module)
        elif part in ("weight_scale_2", "input_scale"):
            if stored.dtype != "F32" or stored.nbytes != 4:
                raise ValueError(f"{key} must be a number in float32, got {stored.dtype} of shape {stored.shape}")
            result[f"{module}.{_NAMES[part]}"] = Reciprocal(stored.path, "F32", (1,), stored.start, 4, key)
        else:
            result[f"{module}.{_NAMES[part]}"] = stored
    for module in sorted(modules):
        for part in ("weight", "weight_scale"):
            if f"{module}.{part}" not in tensors:
                raise ValueError(f"{module}.{part} is missing, without which nvfp4 weights cannot be read")
    notes = ["weight_scale_2 becomes weight_global_scale = 1/weight_scale_2, rounded to fp32"]
    activations = [key for key in result if key.endswith(f".{ACTIVATION_SCALE}")]
    if activations:
        notes.append(
            f"{len(activations)} scales of activations, as {activations[0]}, are kept, but the config of the result says "
            "that activations are not quantized (input_activations is null)"
        )
    if left_out:
        notes.append(f"{left_out[0]} and {len(left_out) - 1} more scales of the FP8 KV cache are left out")
    changed = with_content(config, compressed_content("nvfp4", sorted(dense)))
    return changed, result, CheckpointQuantization(COMPRESSED_TENSORS, "nvfp4"), tuple(notes)
