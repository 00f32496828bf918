"""Checkpoints with experts in mxfp4 and nvfp4, as gpt-oss and compressed-tensors publish them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Mxfp4Config

import moe_fused

from .four_bit import build
from .models import GPT_OSS as UNFITTING
from .models import ModelCase

pytest.importorskip("compressed_tensors", minversion="0.20")

# With in features that are a multiple of 32.
GPT_OSS = dataclasses.replace(UNFITTING, options={**UNFITTING.options, "intermediate_size": 96})
# The scheme of compressed-tensors for each format, with what quantizes activations, too, and without.
SCHEMES = {"nvfp4": ("NVFP4", "NVFP4A16"), "mxfp4": ("MXFP4", "MXFP4A16")}


def rewrite(source: Path, target: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> Path:
    """Saves a checkpoint of other tensors with the config of ``source`` and a ``quantization_config``."""
    target.mkdir(parents=True, exist_ok=True)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = quantization
    (target / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def gpt_oss_checkpoint(path: Path, case: ModelCase = GPT_OSS, **options: Any) -> Path:
    """Saves a model as gpt-oss is published: ``*_blocks`` and ``*_scales``, with random bytes for values."""
    generator = torch.Generator().manual_seed(3)

    def number(*shape: int, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    build(case, **options).save_pretrained(path / "dense")
    tensors: dict[str, Tensor] = {}
    for key, value in load_file(path / "dense" / "model.safetensors").items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inside, outside = value.shape
            tensors[f"{key}_blocks"] = number(experts, outside, inside // 32, 16)
            tensors[f"{key}_scales"] = number(experts, outside, inside // 32, low=118, high=123)
        else:
            tensors[key] = value
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return rewrite(path / "dense", path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})


def compressed(weight: Tensor, scheme: Any, beside: Tensor | None = None) -> dict[str, Tensor]:
    """What compressed-tensors makes of a matrix, by the part of the name after that of its module.

    Args:
        beside: the matrix with which it has one global scale, if it has.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = scheme.weights
    parts = {"weight": weight}
    if args.strategy == "tensor_group":
        parts["weight_global_scale"] = generate_gparam(weight.min(), weight.max()).reshape(1)
        if beside is not None:
            other = generate_gparam(beside.min(), beside.max()).reshape(1)
            parts["weight_global_scale"] = torch.minimum(parts["weight_global_scale"], other)
    blocks = weight.view(len(weight), -1, args.group_size)
    extremes = blocks.amin(-1), blocks.amax(-1)
    parts["weight_scale"], _ = calculate_qparams(*extremes, args, global_scale=parts.get("weight_global_scale"))
    name = f"{'nvfp4' if args.group_size == 16 else 'mxfp4'}-pack-quantized"
    result: dict[str, Tensor] = BaseCompressor.get_value_from_registry(name).compress(parts, scheme)
    if scheme.input_activations is not None and scheme.input_activations.dynamic is not True:
        result["input_global_scale"] = weight.abs().amax().float().reshape(1) + 1
    return {part: value.contiguous() for part, value in result.items()}


def is_linear(key: str) -> bool:
    """Whether a tensor of a dense checkpoint is the weight of a linear layer, but of no router and no head."""
    return key.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


def compressed_checkpoint(
    path: Path,
    quant_type: str,
    case: ModelCase,
    *,
    activations: bool = False,
    only: Callable[[str], bool] = is_linear,
    ignore: Collection[str] = ("lm_head", "re:.*gate$"),
    **options: Any,
) -> Path:
    """Saves a model as compressed-tensors does. The dense model is in ``path / "dense"``."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme

    scheme: Any = preset_name_to_scheme(SCHEMES[quant_type][not activations], ["Linear"])
    build(case, **options).save_pretrained(path / "dense")
    tensors: dict[str, Tensor] = {}
    for key, value in load_file(path / "dense" / "model.safetensors").items():
        if only(key):
            tensors |= {key.removesuffix("weight") + part: each for part, each in compressed(value, scheme).items()}
        else:
            tensors[key] = value
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=f"{quant_type}-pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    return rewrite(path / "dense", path, tensors, json.loads(config.model_dump_json()))


def on_the_fly(quant_type: str, case: ModelCase) -> Any:
    """The ``quantization_config`` that makes a dense checkpoint one of ``quant_type``."""
    from moe_fused.integrations.quantizer.published import compressed_config

    return Mxfp4Config() if case is GPT_OSS else compressed_config(quant_type)


def tensors_of(path: Path, file: str = "model.safetensors") -> dict[str, Tensor]:
    return load_file(path / file)


def quantized(weight: Tensor, quant_type: str, projections: int = 1) -> Any:
    """The kernel's own stack of dense weights (E, out, in)."""
    return moe_fused.get_kernel().Packed4bitWeights.quantize(weight, quant_type=quant_type, projections=projections)
