"""The model of the demo: Transformers' Qwen3-MoE at a size that learns to spell English in a minute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

_HEAD_DIM = 32


@dataclass(frozen=True)
class Size:
    """The size of the model, and how long it is trained and fine-tuned."""

    hidden_size: int
    intermediate_size: int  # the intermediate size of one expert
    num_layers: int
    num_experts: int
    top_k: int
    batch_size: int
    sequence_length: int
    steps: int
    learning_rate: float
    finetuning_steps: int  # steps of the adapter, on batches of the same size
    finetuning_rate: float


# Batches are small, because a new model learns more from many small updates, and the demo has a minute on two cores.
CPU_SIZE = Size(
    128, 128, 2, 8, 2, batch_size=8, sequence_length=128, steps=500, learning_rate=5e-3,
    finetuning_steps=150, finetuning_rate=1e-2,
)  # fmt: skip
# Seven passes over the text. With more passes or a larger model, it would learn the text by heart.
GPU_SIZE = Size(
    256, 128, 4, 16, 4, batch_size=16, sequence_length=256, steps=600, learning_rate=3e-3,
    finetuning_steps=200, finetuning_rate=5e-3,
)  # fmt: skip


def new_model(size: Size, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> Qwen3MoeForCausalLM:
    """Makes a randomly initialised float32 model with fused experts. ``moe_fused.enable()`` must be called before."""
    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.hidden_size // _HEAD_DIM,
        "num_key_value_heads": size.hidden_size // _HEAD_DIM // 2,
        "head_dim": _HEAD_DIM,
        "num_experts": size.num_experts,
        "num_experts_per_tok": size.top_k,
        "moe_intermediate_size": size.intermediate_size,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "experts_implementation": "moe_fused",
    }
    config = Qwen3MoeConfig(**options)
    return Qwen3MoeForCausalLM(config).to(device)  # type: ignore[arg-type]


@contextlib.contextmanager
def experts(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Gives ``model`` another experts implementation within the block."""
    before = model.get_experts_implementation()
    model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
