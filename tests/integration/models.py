"""Tiny random models of the architectures that the experts interface serves, and what makes each one special."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

VOCABULARY = 64
# No size is a power of two or a multiple of a tile.
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 40, 12, 6, 3

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "moe_intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": False,
}


@dataclass(frozen=True)
class ModelCase:
    """A model to compare with itself under Transformers' eager experts.

    Attributes:
        id: readable name.
        reason: why the row exists.
        model: class name in Transformers.
        config: class name in Transformers.
        options: of the config, over the common ones.
        moe_layers: how many of the ``num_hidden_layers`` have experts.
    """

    id: str
    reason: str
    model: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    moe_layers: int = 2

    def build(self, seed: int = 0, **options: Any) -> PreTrainedModel:
        """The model on the CPU in float32 under eager experts, with weights so large that every expert counts."""
        config = getattr(transformers, self.config)(**{**_COMMON, **self.options, **options})
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, self.model)(config)
        model.set_experts_implementation("eager")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()


QWEN3_MOE = ModelCase("qwen3_moe", "the model this project is named after", "Qwen3MoeForCausalLM", "Qwen3MoeConfig")

MODELS = (
    QWEN3_MOE,
    ModelCase(
        "qwen2_moe",
        "a shared expert beside the routed ones",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {"shared_expert_intermediate_size": 20},
    ),
    ModelCase(
        "mixtral",
        "experts as wide as a dense layer",
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": EXPERTS},
    ),
    ModelCase("olmoe", "routing weights that are not normalized", "OlmoeForCausalLM", "OlmoeConfig", {"head_dim": 10}),
    ModelCase(
        "deepseek_v3",
        "sigmoid routing in expert groups with float32 weights, a dense first layer, MLA",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "n_routed_experts": EXPERTS,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
        },
        moe_layers=1,
    ),
    ModelCase(
        "glm4_moe",
        "sigmoid routing with a correction bias, scaled routing weights",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 2.5},
    ),
    ModelCase(
        "qwen3_next",
        "linear attention in between, a shared expert with a gate",
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            "shared_expert_intermediate_size": 20,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    ModelCase(
        "qwen3_5_moe",
        "the text model of a vision-language model",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {"shared_expert_intermediate_size": 20, "layer_types": ["full_attention", "full_attention"]},
    ),
    ModelCase(
        "qwen3_5_moe_linear",
        "the same with linear attention in between, whose projections have names of their own",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {
            "shared_expert_intermediate_size": 20,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    ModelCase(
        "dots1",
        "a dense first layer, norms of queries and keys",
        "Dots1ForCausalLM",
        "Dots1Config",
        {
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        moe_layers=1,
    ),
    ModelCase(
        "ernie4_5_moe",
        "other names of sizes, a router with a correction of its statistics",
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 0,
        },
    ),
    ModelCase(
        "hunyuan_v1_moe",
        "a router around a linear layer, experts to a token by layer",
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        {"moe_topk": [TOP_K, TOP_K], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    ModelCase(
        "minimax_m2",
        "sigmoid routing, norms over all heads",
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {"num_local_experts": EXPERTS},
    ),
    ModelCase(
        "deepseek_v2",
        "softmax routing with MLA",
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
        },
        moe_layers=1,
    ),
    ModelCase(
        "glm4_moe_lite",
        "MLA with a latent of the queries, too",
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        {
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "mlp_layer_types": ["sparse", "sparse"],
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
        },
    ),
    ModelCase(
        "flex_olmo", "norms behind attention and experts", "FlexOlmoForCausalLM", "FlexOlmoConfig", {"head_dim": 10}
    ),
    ModelCase(
        "phimoe",
        "routing by a rule of its own with jitter in training",
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "head_dim": 10,
        },
    ),
    ModelCase(
        "lfm2_moe",
        "short convolutions in between",
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0, "head_dim": 10},
    ),
    ModelCase(
        "granitemoe",
        "its own router, scaled residuals",
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {"num_local_experts": EXPERTS},
    ),
    ModelCase(
        "granitemoeshared",
        "the same with a shared expert",
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {"num_local_experts": EXPERTS, "shared_intermediate_size": 20},
    ),
    ModelCase(
        "granitemoehybrid",
        "a shared expert, attention layers among state-space ones",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            "num_local_experts": EXPERTS,
            "layer_types": ["attention", "attention"],
            "shared_intermediate_size": 20,
            "mamba_n_heads": 8,
        },
    ),
    ModelCase(
        "nemotron_h",
        "experts without a gate",
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            "layers_block_type": ["attention", "moe"],
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 32,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
        },
        moe_layers=1,
    ),
    ModelCase(
        "gpt_oss",
        "transposed, biased, interleaved experts with a clamped gate of their own",
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            "num_local_experts": EXPERTS,
            "intermediate_size": INTERMEDIATE,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
)
(GPT_OSS,) = (case for case in MODELS if case.id == "gpt_oss")
# Those whose checkpoints have the stacks of all experts, and no layer of linear layers for each.
STACKED = ("granitemoe", "granitemoeshared", "granitemoehybrid", "gpt_oss")


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """The modules under Transformers' experts interface."""
    return [module for module in model.modules() if hasattr(type(module), "_apply_gate")]


def tokens(batch: int = 2, length: int = 9, device: str = "cpu") -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def with_derived_blocks(model: PreTrainedModel) -> PreTrainedModel:
    """A Qwen3-MoE, changed in place, whose blocks are of a derived class that computes something else."""

    class Tripled(Qwen3MoeSparseMoeBlock):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 3 * super().forward(hidden_states)

    for layer in model.model.layers:
        layer.mlp.__class__ = Tripled
    return model
