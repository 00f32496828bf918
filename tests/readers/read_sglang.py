"""Reads an adapter as SGLang does, and writes what its layers get: ``python read_sglang.py ADAPTER MODEL RANK RESULT``.

SGLang's own config, adapter and memory pool run: names and stacking of the projections, the scaling, and the copy into the
buffers that its kernels for experts read. Its model, its layers and its loader of files need a GPU's libraries, so stand-ins
give the names of the layers and the tensors of the file. Layers cut nothing off, as on a single device. RANK is SGLang's
max_lora_rank. RESULT is as for ``read_vllm.py``.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stubs import stub

for package in ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.lora"):
    # Their __init__ files import servers; the modules below them are the wheel's.
    module = types.ModuleType(package)
    module.__path__ = [str(Path(entry, *package.split("."))) for entry in sys.path if Path(entry, "sglang").is_dir()]
    sys.modules[package] = module
LAYERS = ("sglang.srt.layers.moe", "sglang.srt.layers.vocab_parallel_embedding")
stub(
    *(
        "sglang.srt." + name
        for name in ("configs", "distributed", "environ", "managers", "model_executor", "model_loader")
    ),
    *("sglang.srt.runtime_context", "sglang.srt.utils", "sglang.srt.lora.backend", "sglang.srt.lora.layers"),
    *("sglang.srt.lora.lora_registry", *LAYERS),
)

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402


class Experts(nn.Module):
    """The experts of a layer on a single device, which cut nothing off their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = SimpleNamespace(is_shared_fused_moe=False, moe_tp_rank=0)
        self.moe_runner_config = SimpleNamespace(is_gated=True)

    def slice_moe_lora_a_weights(self, weights: Any, *_: Any) -> Any:
        return weights

    slice_moe_lora_b_weights = slice_moe_lora_a_weights


class Linear(nn.Module):
    """A linear layer on a single device."""

    def slice_lora_a_weights(self, weights: Any) -> Any:
        return weights

    slice_lora_b_weights = slice_lora_a_weights


importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.layer").FusedMoE = Experts
importlib.import_module("sglang.srt.lora.layers").FusedMoEWithLoRA = Experts

from sglang.srt.lora import mem_pool  # noqa: E402
from sglang.srt.lora.lora import LoRAAdapter  # noqa: E402
from sglang.srt.lora.lora_config import LoRAConfig  # noqa: E402
from sglang.srt.lora.utils import get_normalized_target_modules  # noqa: E402

mem_pool._SGLANG_EXPERIMENTAL_LORA_OPTI = False


def main(adapter: str, model: str, rank: str, result: str) -> None:
    raw = json.loads((Path(model) / "config.json").read_text())
    raw["num_experts"] = raw.get("num_experts") or raw["num_local_experts"]  # by the version of Transformers
    config = SimpleNamespace(**raw)
    lora = LoRAConfig(adapter, base_vocab_size=config.vocab_size)
    loaded = LoRAAdapter("adapter", lora, config, None, None)
    loaded.initialize_weights_from_tensors(load_file(Path(adapter) / "adapter_model.safetensors"))

    base = nn.Module()
    base.config, base.weight, base.experts = config, nn.Parameter(torch.zeros(1)), Experts()
    targets = get_normalized_target_modules(lora.target_modules)
    pool = mem_pool.LoRAMemoryPool.__new__(mem_pool.LoRAMemoryPool)
    vars(pool).update(
        base_hf_config=config,
        num_layer=config.num_hidden_layers,
        max_loras_per_batch=1,
        dtype=torch.float32,
        max_lora_rank=int(rank),
        target_modules=targets,
        experts_shared_outer_loras=False,
        strict_loading=True,
        enable_lora_overlap_loading=False,
        pin_memory_available=False,
        moe_use_local_expert_ids=False,
        lora_added_tokens_size=0,
        **{name: {} for name in ("embedding_A_buffer", "embedding_B_buffer", "lm_head_A_buffer", "lm_head_B_buffer")},
        A_buffer={},
        B_buffer={},
        **dict.fromkeys(("tp_size", "moe_tp_size", "attn_tp_size", "moe_ep_size"), 1),
        **dict.fromkeys(("tp_rank", "moe_tp_rank", "moe_ep_rank"), 0),
    )
    pool.init_buffers(base)
    if not pool.can_support(lora):
        raise ValueError("the memory pool does not support the adapter")
    modules: list[dict[str, nn.Module]] = [
        {
            **{
                f"model.layers.{number}.self_attn.{name}": Linear()
                for name in ("qkv_proj", "o_proj")
                if name in targets
            },
            # SGLang puts its layer around experts only if both are targets.
            **({f"model.layers.{number}.mlp.experts": Experts()} if {"gate_up_proj", "down_proj"} <= targets else {}),
        }
        for number in range(config.num_hidden_layers)
    ]
    pool.load_lora_weight_to_buffer("adapter", 0, loaded, modules, None, None)

    size, half = int(rank), config.moe_intermediate_size
    deltas: dict[str, torch.Tensor] = {}
    for number in range(config.num_hidden_layers):
        a, b = (buffer["gate_up_proj_moe"][number][0].double() for buffer in (pool.A_buffer, pool.B_buffer))
        deltas[f"{number}.gate_proj"] = b[:, :half] @ a[:, :size]
        deltas[f"{number}.up_proj"] = b[:, half:] @ a[:, size:]
        a, b = (buffer["down_proj_moe"][number][0].double() for buffer in (pool.A_buffer, pool.B_buffer))
        deltas[f"{number}.down_proj"] = b @ a
    save_file({name: delta.contiguous() for name, delta in deltas.items()}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
