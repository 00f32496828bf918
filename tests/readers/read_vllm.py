"""Reads an adapter as vLLM does, and writes what its layers get: ``python read_vllm.py ADAPTER MODEL RANK FORMAT RESULT``.

vLLM's own code runs from the files to the buffers that its kernels for experts read: the checks of the config, the names
that Qwen3-MoE expects, the packing of the experts, the scaling, and the copy into the buffers. Its model cannot be made
without a GPU, so a skeleton with the names of its layers stands in. The kernels are not run.

RANK is vLLM's max_lora_rank. FORMAT is "2d" for a matrix per expert, or "3d" for the stacks of all experts, which vLLM reads
with enable_mixed_moe_lora_format. RESULT gets (E, out, in) by ``layer.gate_proj`` and so on, and (out, in) of attention.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stubs import stub

stub(
    *("vllm.entrypoints", "vllm.multimodal", "vllm.parser", "vllm.reasoning", "vllm.renderers", "vllm.tool_parsers"),
    *("vllm.v1.structured_output.backend_guidance", "vllm.v1.structured_output.backend_xgrammar"),
    *(
        "fastapi",
        "llguidance",
        "lmformatenforcer",
        "openai_harmony",
        "outlines_core",
        "starlette",
        "uvloop",
        "xgrammar",
    ),
)

import torch  # noqa: E402
import vllm.platforms  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402

vllm.platforms._current_platform = CpuPlatform()

from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.lora.layers import FusedMoEWithLoRA  # noqa: E402
from vllm.lora.lora_model import LoRAModel  # noqa: E402
from vllm.lora.model_manager import LoRAModelManager  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.lora.utils import get_supported_lora_modules, process_packed_modules_mapping  # noqa: E402
from vllm.lora.worker_manager import WorkerLoRAManager  # noqa: E402
from vllm.model_executor.layers.fused_moe import MoERunner  # noqa: E402
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase  # noqa: E402
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM  # noqa: E402


def bare(kind: type, **attributes: Any) -> Any:
    """An instance of a class of vLLM whose ``__init__``, which needs a GPU or a running engine, was not called."""
    instance = kind.__new__(kind)
    if isinstance(instance, nn.Module):
        nn.Module.__init__(instance)
    for name, value in attributes.items():
        setattr(instance, name, value)
    return instance


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The layers of vLLM's Qwen3-MoE by name, without weights, and the class's own tables."""
    linear = type("Linear", (LinearBase,), {"forward": None})

    def mapping(self: Any) -> Any:
        return RoutedExperts.make_expert_params_mapping(
            nn.Module(), "gate_proj", "down_proj", "up_proj", config["num_experts"]
        )

    experts = type("Experts", (MoERunner,), {"get_expert_mapping": mapping, "__abstractmethods__": frozenset()})
    tables = (
        "hf_to_vllm_mapper",
        "packed_modules_mapping",
        "embedding_modules",
        "is_3d_moe_weight",
        "is_non_gated_moe",
    )
    model = nn.Module()
    model.config = SimpleNamespace(architectures=config["architectures"])
    for table in tables:
        setattr(model, table, getattr(Qwen3MoeForCausalLM, table))
    model.model = nn.Module()
    model.model.layers = nn.ModuleList()
    for _ in range(config["num_hidden_layers"]):
        layer = nn.Module()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        layer.self_attn.qkv_proj, layer.self_attn.o_proj = bare(linear), bare(linear)
        layer.mlp.gate, layer.mlp.experts = bare(linear), bare(experts)
        model.model.layers.append(layer)
    return model


def experts_layer(config: dict[str, Any], lora: LoRAConfig) -> FusedMoEWithLoRA:
    """vLLM's layer for LoRA on experts with its buffers, on a single device."""
    experts = config["num_experts"]
    moe = SimpleNamespace(
        hidden_dim=config["hidden_size"],
        num_experts=experts,
        num_local_experts=experts,
        intermediate_size_per_partition=config["moe_intermediate_size"],
        intermediate_size_per_partition_unpadded=None,
        moe_parallel_config=SimpleNamespace(use_ep=False, ep_rank=0),
    )
    layer = bare(FusedMoEWithLoRA, moe_config=moe, tp_size=1, tp_rank=0, device=torch.device("cpu"), _w13_slices=2)
    layer.create_lora_weights(lora.max_loras, lora)
    return layer


def manager(config: dict[str, Any], lora: LoRAConfig) -> LoRAModelManager:
    model = skeleton(config)
    names = [f"model.layers.{number}" for number in range(config["num_hidden_layers"])]
    mixed = lora.enable_mixed_moe_lora_format
    result = bare(
        LoRAModelManager,
        model=model,
        lora_config=lora,
        supported_lora_modules=get_supported_lora_modules(model),
        packed_modules_mapping=process_packed_modules_mapping(model, force_2d_moe=mixed),
        packed_modules={},
        modules={f"{name}.mlp.experts": experts_layer(config, lora) for name in names},
        is_pooling_model=False,
        supports_mm=False,
        moe_ep_load_spec=None,
        lora_index_to_id=[None],
        _registered_adapters=OrderedDict(),
        _active_adapters=OrderedDict(),
        _classification_head=None,
        _enable_mixed_moe_lora_format=mixed,
        _enable_moe_shared_loras=False,
        _is_3d_moe_model=False,
        _is_moe=True,
        _is_non_gated_moe=False,
    )
    for name in names:
        result._register_packed_modules(f"{name}.self_attn.qkv_proj")
        result._register_packed_modules(f"{name}.mlp.experts")
    return result


def main(adapter: str, model: str, rank: str, layout: str, result: str) -> None:
    config = json.loads((Path(model) / "config.json").read_text())
    config["num_experts"] = config.get("num_experts") or config["num_local_experts"]  # by the version of Transformers
    lora = LoRAConfig(
        max_lora_rank=int(rank),
        max_loras=1,
        max_cpu_loras=1,
        lora_dtype=torch.float32,
        enable_mixed_moe_lora_format=layout == "3d",
    )
    owner = manager(config, lora)
    worker = bare(
        WorkerLoRAManager,
        lora_config=lora,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        _adapter_manager=owner,
        _lora_model_cls=LoRAModel,
    )
    loaded = worker._load_adapter(LoRARequest("adapter", 1, adapter, is_3d_lora_weight=layout == "3d"))
    owner.add_adapter(loaded)
    owner.activate_adapter(1)

    deltas: dict[str, torch.Tensor] = {}
    for name, layer in owner.modules.items():
        number = name.split(".")[2]
        places = {
            "gate_proj": (layer.w13_lora_a_stacked[0], layer.w13_lora_b_stacked[0]),
            "up_proj": (layer.w13_lora_a_stacked[1], layer.w13_lora_b_stacked[1]),
            "down_proj": (layer.w2_lora_a_stacked[0], layer.w2_lora_b_stacked[0]),
        }
        for leaf, (a, b) in places.items():
            deltas[f"{number}.{leaf}"] = b[0].double() @ a[0].double()
    for name, weights in loaded.loras.items():
        parts = name.split(".")
        if parts[-1] == "experts":
            continue
        packed = owner.packed_modules_mapping.get(parts[-1])
        factors = (weights.lora_a, weights.lora_b) if packed else ([weights.lora_a], [weights.lora_b])
        for leaf, a, b in zip(packed or [parts[-1]], *factors, strict=True):
            if a is not None:  # the scaling is in b by now
                deltas[f"{parts[2]}.{leaf}"] = b.double() @ a.double()
    save_file(deltas, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
