"""What ``finetune`` chooses for the tiny models of each family, and those models with a tokenizer and chats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .finetuning import save_tokenizer
from .four_bit import FOUR_BIT, build
from .models import ModelCase

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@dataclass(frozen=True)
class Choice:
    """What a run has for itself.

    Attributes:
        modules: linear layers of attention that get adapters.
        attn: the implementation of attention.
        packing: of chats.
    """

    modules: tuple[str, ...] = ATTENTION
    attn: str = "sdpa"
    packing: str = "bfd"


_CHOICES = {
    "deepseek_v2": Choice(("q_proj", *_LATENT)),
    "deepseek_v3": Choice(("q_a_proj", "q_b_proj", *_LATENT)),
    "glm4_moe_lite": Choice(("q_a_proj", "q_b_proj", *_LATENT)),
    "qwen3_next": Choice(("in_proj_qkvz", "in_proj_ba", "out_proj", *ATTENTION), packing="none"),
    "qwen3_5_moe_linear": Choice(
        ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", *ATTENTION), packing="none"
    ),
    # out_proj alone would be that of the short convolution, too.
    "lfm2_moe": Choice(("q_proj", "k_proj", "v_proj", "self_attn.out_proj"), packing="none"),
    # Transformers makes their masks without positions.
    "gpt_oss": Choice(attn="eager", packing="none"),
    "granitemoehybrid": Choice(packing="none"),
}
CHOICES = {case.id: _CHOICES.get(case.id, Choice()) for case in FOUR_BIT}
# What differs on a GPU, whose flash attention needs no mask. It takes the place of what "auto" stands for.
CHOICES_ON_GPU = CHOICES | {"gpt_oss": Choice(attn="auto"), "granitemoehybrid": Choice()}
# What docs/models.md calls them.
NAMES = {
    "Qwen3-MoE": ("qwen3_moe",),
    "Qwen2-MoE": ("qwen2_moe",),
    "Qwen3-Next": ("qwen3_next",),
    "Qwen3.5-MoE": ("qwen3_5_moe_linear", "qwen3_5_moe"),
    "DeepSeek-V2": ("deepseek_v2",),
    "DeepSeek-V3": ("deepseek_v3",),
    "dots.1": ("dots1",),
    "ERNIE-4.5-MoE": ("ernie4_5_moe",),
    "FlexOlmo": ("flex_olmo",),
    "GLM-4-MoE": ("glm4_moe",),
    "GLM-4-MoE-lite": ("glm4_moe_lite",),
    "Hunyuan-MoE": ("hunyuan_v1_moe",),
    "OLMoE": ("olmoe",),
    "LFM2-MoE": ("lfm2_moe",),
    "MiniMax-M2": ("minimax_m2",),
    "Mixtral": ("mixtral",),
    "Phi-MoE": ("phimoe",),
    "Nemotron-H": ("nemotron_h",),
    "Granite-MoE": ("granitemoe",),
    "Granite-MoE-shared": ("granitemoeshared",),
    "Granite-MoE-hybrid": ("granitemoehybrid",),
    "gpt-oss": ("gpt_oss",),
}


def save_family(case: ModelCase, path: Path, **options: object) -> Path:
    """A tiny model of a family with a tokenizer of bytes and a chat template."""
    build(case, vocab_size=272, max_position_embeddings=128, **options).save_pretrained(path)
    save_tokenizer(path)
    return path
