"""Adapters for the conversion's tests, and what they compute according to each layout's own formula."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_fused.checkpoints.adapters import Layout
from tests.integration.models import EXPERTS, HIDDEN, INTERMEDIATE, QWEN3_MOE, tokens

PREFIX = "base_model.model.model.layers"
SIZES = {"gate": (INTERMEDIATE, HIDDEN), "up": (INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
Config = dict[str, Any]


def read(directory: Path) -> tuple[dict[str, Tensor], Config]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return load_file(directory / "adapter_model.safetensors"), config


def write(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def edit(directory: Path, **changes: Any) -> None:
    """Changes the config; None removes an entry."""
    path = directory / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two adapters hold the same tensors under the same names, bit for bit."""
    one, other = read(first)[0], read(second)[0]
    return one.keys() == other.keys() and all(
        tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]) for key, tensor in one.items()
    )


def peft_adapter(directory: Path, **options: Any) -> tuple[Path, Tensor]:
    """An adapter that stock PEFT makes and saves, with no factor zero, and its logits."""
    defaults: Config = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "gate"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "modules_to_save": ["lm_head"],
        "task_type": "CAUSAL_LM",
    }
    model = get_peft_model(QWEN3_MOE.build(), LoraConfig(**{**defaults, **options}))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
            elif "modules_to_save" in name:
                parameter.mul_(1.5)
        logits = model.eval()(tokens()).logits
    model.save_pretrained(directory)
    return directory, logits


def peft_logits(directory: Path) -> Tensor:
    """Logits of a small Qwen3-MoE with the adapter in ``directory``, as stock PEFT loads it."""
    model = PeftModel.from_pretrained(QWEN3_MOE.build(), directory)
    with torch.no_grad():
        return model.eval()(tokens()).logits


def per_expert_adapter(
    directory: Path,
    shared: bool = False,
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """An adapter of every expert's projections and of attention, as PEFT saved it under Transformers 4.

    Args:
        shared: whether gate and up have the same A.
        ranks: by projection; without one a projection is not adapted.
    """
    rank = config.get("r", 4)
    ranks = {"gate": rank, "up": rank, "down": rank} if ranks is None else ranks
    torch.manual_seed(3)
    tensors = {}
    for layer in range(2):
        attention = f"{PREFIX}.{layer}.self_attn.q_proj"
        tensors[f"{attention}.lora_A.weight"] = torch.randn(rank, HIDDEN, dtype=dtype) * 0.2
        tensors[f"{attention}.lora_B.weight"] = torch.randn(32, rank, dtype=dtype) * 0.2
        for expert in range(EXPERTS):
            for projection, projection_rank in ranks.items():
                module = f"{PREFIX}.{layer}.mlp.experts.{expert}.{projection}_proj"
                outs, ins = SIZES[projection]
                tensors[f"{module}.lora_A.weight"] = torch.randn(projection_rank, ins, dtype=dtype) * 0.2
                tensors[f"{module}.lora_B.weight"] = torch.randn(outs, projection_rank, dtype=dtype) * 0.2
                if shared and projection == "up":
                    gate = tensors[f"{module.replace('up_proj', 'gate_proj')}.lora_A.weight"]
                    tensors[f"{module}.lora_A.weight"] = gate.clone()
    content: Config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", *(f"{name}_proj" for name in ranks)],
    }
    return write(directory, tensors, {**content, **config})


def _effective(config: Config, name: str, option: str, pattern: str) -> float:
    """The value of ``option`` that PEFT's ``pattern`` gives to a module."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return float(value)
    return float(config[option])


def scaling(config: Config, name: str) -> float:
    rank = _effective(config, name, "r", "rank_pattern")
    alpha = _effective(config, name, "lora_alpha", "alpha_pattern")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fused_formula(layout: Layout) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The function that makes (E, out, in) of lora_A and lora_B, as the library that trains in that layout does."""

    def delta(a: Tensor, b: Tensor, experts: int) -> Tensor:
        stack_a = a.reshape(experts, -1, a.shape[1])
        if layout in (Layout.UNSLOTH_GROUPED, Layout.UNSLOTH_SWAPPED):
            stack_b = b.reshape(b.shape[0], experts, -1).transpose(1, 2)
        else:
            stack_b = b.reshape(b.shape[0], -1, experts)
        if layout in (Layout.PEFT_FUSED, Layout.UNSLOTH_GROUPED):
            return torch.einsum("ore,eri->eoi", stack_b, stack_a)
        if layout is Layout.GPT_OSS_INVERTED:  # gives (E, in, out), as the model's weights are
            return torch.einsum("ore,eri->eoi", stack_b, stack_a).transpose(1, 2)
        return torch.einsum("ore,eri->eio", stack_b, stack_a)

    return delta


def deltas(directory: Path, layout: Layout, experts: int = EXPERTS) -> dict[str, Tensor]:
    """What an adapter adds to the experts' weights, in float64: (E, out, in) by ``layer.projection``."""
    tensors, config = read(directory)
    result: dict[str, Tensor] = {}
    for key in tensors:
        match = re.fullmatch(rf"{re.escape(PREFIX)}\.(\d+)\.mlp\.(.+)\.lora_A\.weight", key)
        if not match or match[2] in ("gate", "shared_expert.down_proj"):
            continue
        layer, module = match.groups()
        a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        name = f"model.layers.{layer}.mlp.{module}"
        if layout is Layout.PER_EXPERT:
            expert, leaf = module.removeprefix("experts.").split(".")
            slot = result.setdefault(
                f"{layer}.{leaf}", torch.zeros(experts, b.shape[0], a.shape[1], dtype=torch.float64)
            )
            slot[int(expert)] = scaling(config, name) * b @ a
        elif layout is Layout.ORIGINAL:
            result[f"{layer}.{module}"] = scaling(config, name) * b @ a
        else:
            inner = f"{PREFIX}.{layer}.mlp.experts.base_layer.lora_A.weight" in tensors
            targets = config["target_parameters"]
            only = next(leaf for leaf in ("gate_up_proj", "down_proj") if any(name.endswith(leaf) for name in targets))
            leaf = "gate_up_proj" if module.endswith("base_layer") else "down_proj" if inner else only
            value = scaling(config, f"model.layers.{layer}.mlp.experts.{leaf}") * _fused_formula(layout)(a, b, experts)
            if leaf == "gate_up_proj":
                gate, up = value.chunk(2, 1)
                result |= {f"{layer}.gate_proj": gate, f"{layer}.up_proj": up}
            else:
                result[f"{layer}.{leaf}"] = value
    return result
