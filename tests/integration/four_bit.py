"""Tiny models with experts that fit 4 bits, and checkpoints of them as bitsandbytes, not this package, writes them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

import moe_fused
from moe_fused.integrations.quantizer.packed_experts import packed_modules
from moe_fused.integrations.transformers.experts_module import projections_of
from tests.bits import dequantize_4bit

from .conftest import DEVICE
from .models import MODELS, QWEN3_MOE, ModelCase, tokens

# Modules that import this one are skipped where these are missing.
pytest.importorskip("accelerate")
bnb: Any = pytest.importorskip("bitsandbytes", minversion="0.50").functional

# An expert's matrices have 2048 weights, 32 blocks of 64.
SIZES = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 16}

BY_ID = {case.id: case for case in MODELS}
MIXTRAL = ModelCase(
    "mixtral", "", "MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 6, "intermediate_size": 32}
)
NEMOTRON_H = BY_ID["nemotron_h"]


def fitting(case: ModelCase) -> ModelCase:
    """``case`` for the sizes of ``build``, whose heads are wider."""
    options = dict(case.options)
    if options.get("head_dim", 8) != 8:
        del options["head_dim"]
    return dataclasses.replace(case, options=options)


# Every family in the tests, with experts that fit 4 bits.
FOUR_BIT = tuple(map(fitting, MODELS))


def config(**options: Any) -> BitsAndBytesConfig:
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | options
    return BitsAndBytesConfig(load_in_4bit=True, **options)


def build(case: ModelCase = QWEN3_MOE, dtype: torch.dtype = torch.bfloat16, **options: Any) -> PreTrainedModel:
    return case.build(**{**SIZES, **case.options, **options}).to(dtype)


def load(path: Path, case: ModelCase = QWEN3_MOE, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = getattr(transformers, case.model).from_pretrained(path, **options)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    values: Tensor = model(tokens(device=str(model.device))).logits
    return values


def packed(model: nn.Module) -> dict[str, Any]:
    """The packed weights of all experts by the name of their parameter."""
    weights_of = moe_fused.get_kernel().modules.weights_of
    return {
        f"{path}.{name}": weights_of(module, name)
        for path, module in packed_modules(model)
        for name in projections_of(module)
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    # As bytes, for packed weights may be stored as a floating dtype, and some of those are no numbers.
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether all tensors are equal, bit for bit, and the formats of packed weights."""
    left, right = a.state_dict(), b.state_dict()
    formats = [{name: weights.format for name, weights in packed(model).items()} for model in (a, b)]
    return (
        left.keys() == right.keys()
        and formats[0] == formats[1]
        and all(same_bits(left[key], right[key]) for key in left)
    )


def quantize(weight: Tensor, **options: Any) -> tuple[Tensor, Any]:
    """On the device of the tests, for bitsandbytes' bits are not the same on all."""
    options = {"quant_type": "nf4", "compress_statistics": True, "blocksize": 64} | options
    result: tuple[Tensor, Any] = bnb.quantize_4bit(weight.detach().contiguous().to(DEVICE), **options)
    return result


def through_4bit(weight: Tensor, **options: Any) -> Tensor:
    """What bitsandbytes makes of a matrix on the way into 4 bits and back."""
    result = dequantize_4bit(*quantize(weight, **options))
    return result.cpu()


def quantized_tensors(name: str, weight: Tensor, **options: Any) -> dict[str, Tensor]:
    """A matrix as bitsandbytes writes it into a checkpoint."""
    data, state = quantize(weight, **options)
    parts = {f"{name}.{part}": value.cpu().clone() for part, value in state.as_dict(packed=True).items()}
    return {name: data.cpu()} | parts


def rewrite(
    source: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **quantization: Any
) -> None:
    """A checkpoint with other tensors, and with a quantization_config if one is given."""
    target.mkdir(exist_ok=True)
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if quantization:
        values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True} | quantization
    (target / "config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", {"format": "pt"})


def v4_checkpoint(source: Path, target: Path, only: str = r".*", **options: Any) -> None:
    """What Transformers 4 saved: 4-bit matrices for all linear layers but the head, routers and experts among them."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for key, value in tensors.items():
            linear = re.search(r"(_proj|\.gate|\.w[123])\.weight$", key) and re.search(only, key)
            result |= quantized_tensors(key, value, **options) if linear else {key: value}
        return result

    rewrite(
        source,
        target,
        change,
        bnb_4bit_quant_type=options.get("quant_type", "nf4"),
        bnb_4bit_use_double_quant=options.get("compress_statistics", True),
    )


def stacks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The experts' matrices of a dense Qwen3-MoE checkpoint as one stack for each layer and projection."""
    found: dict[str, list[Tensor]] = {}
    keys = [re.fullmatch(r"(.+\.mlp)\.experts\.(\d+)\.(\w+_proj)\.weight", key) for key in tensors]
    for match in sorted((key for key in keys if key), key=lambda match: int(match[2])):
        found.setdefault(f"{match[1]}.{match[3]}.weight", []).append(tensors[match[0]])
    return {name: torch.stack(matrices) for name, matrices in found.items()}


def stacked_checkpoint(source: Path, target: Path, **options: Any) -> None:
    """What the original project saved: all experts of a projection quantized as one."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        result = {key: value for key, value in tensors.items() if ".experts." not in key}
        for name, stack in stacks(tensors).items():
            result |= quantized_tensors(name, stack, **options)
        return result

    rewrite(
        source,
        target,
        change,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["proj"],
    )
