"""A model of any family by its config: shorter or tiny versions of it, and the work of a step.

Nothing here has weights. ``full_model`` makes them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from moe_fused.integrations.transformers.experts_module import is_experts, projections_of
from moe_fused.memory import Stack, sizes_of, skeleton

# Names that config classes have for one number, and its value in a tiny model. Matrices of experts have 128² weights, so
# that no group of scales of bitsandbytes belongs to two of them.
_TINY = {
    128: (
        "hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
        "shared_intermediate_size",
    ),
    512: ("vocab_size",),
    4: ("num_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        "linear_num_value_heads", "mamba_n_heads"),
    2: ("num_hidden_layers", "num_key_value_heads", "num_experts_per_tok", "moe_k", "linear_num_key_heads"),
    32: ("head_dim", "kv_lora_rank", "q_lora_rank", "linear_key_head_dim", "linear_value_head_dim"),
    16: ("v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "mamba_d_state", "sliding_window"),
    64: ("mamba_d_head",),
    8: ("mamba_chunk_size",),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Model:
    """A causal language model with experts.

    Attributes:
        name: What rows call it.
        published: Its config, of Transformers. It may be that of a model with a vision tower, which is left out.
    """

    name: str
    published: Any

    def config(self) -> Any:
        """A copy of the config, for those who write into it."""
        return copy.deepcopy(self.published)

    @cached_property
    def skeleton(self) -> Any:
        """The model on the meta device."""
        return skeleton(self.published)

    @property
    def _text(self) -> Any:
        return self.published.get_text_config()

    @property
    def layers(self) -> int:
        return int(self._text.num_hidden_layers)

    @property
    def vocabulary(self) -> int:
        return int(self._text.vocab_size)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model knows positions for."""
        return int(self._text.max_position_embeddings)

    def shortened(self, layers: int) -> Model:
        """The same with fewer decoder layers."""
        return Model(f"{self.name}-{layers}-layers", _with_layers(self.config(), list(range(layers))))

    def tiny(self) -> Model:
        """The same architecture in a model for tests: two layers, one of each type if there are two types."""
        config = self.config()
        text = config.get_text_config()
        types = _types(text)
        other = next((index for index, kind in enumerate(types) if kind != types[0]), 1)
        config = _with_layers(config, [0, other])
        for value, names in _TINY.items():
            for name in names:
                if getattr(text, name, None) is not None:
                    setattr(text, name, value)
        if hasattr(text, "qk_nope_head_dim"):
            text.head_dim, text.qk_head_dim, text.num_key_value_heads = 16, 32, 4
        return Model(f"{self.name}-tiny", config)

    @cached_property
    def _stacks(self) -> tuple[Stack, ...]:
        return sizes_of(self.skeleton).stacks

    @cached_property
    def _chosen(self) -> float:
        """The share of a layer's experts that a token is multiplied with."""
        sizes = sizes_of(self.skeleton)
        return sizes.top_k / sizes.experts

    @property
    def head_parameters(self) -> int:
        return int(self.skeleton.get_output_embeddings().weight.numel())

    @property
    def down_parameters(self) -> int:
        """Parameters of experts' down projections that a token is multiplied with."""
        return round(self._chosen * sum(stack.numel for stack in self._stacks[1::2]))

    @cached_property
    def multiplied_parameters(self) -> int:
        """Parameters that a token is multiplied with: all linear layers, convolutions, routers, its experts, the head.

        Not the embedding, which is looked up: of the 3.35 B active parameters of Qwen3-30B-A3B these are 3.04 B.
        """
        experts = self._chosen * sum(stack.numel for stack in self._stacks)
        head = self.skeleton.get_output_embeddings()
        others = 0
        for module in self.skeleton.modules():
            if module is head or isinstance(module, nn.Embedding) or is_experts(module):
                continue
            others += sum(value.numel() for value in module.parameters(recurse=False) if value.dim() >= 2)
        return round(experts) + others + self.head_parameters

    def attention_flops(self, tokens: int) -> int:
        """Operations of attention in a causal sequence's forward, without its linear layers.

        Softmax attention has two products, over the pairs of tokens that are not masked. Recurrent layers have a state
        for each head, which every token changes and reads.

        Raises:
            ValueError: a layer of a type that has no count here.
        """
        return sum(self._mixer_flops(kind, tokens) for kind in _types(self._text))

    def _mixer_flops(self, kind: str, tokens: int) -> int:
        text = self._text
        if kind in ("full_attention", "sliding_attention"):
            window = min(tokens, text.sliding_window) if kind == "sliding_attention" else tokens
            pairs = window * (window + 1) // 2 + (tokens - window) * window
            return int(2 * text.num_attention_heads * sum(_head_features(text)) * pairs)
        if kind == "linear_attention" and hasattr(text, "linear_num_value_heads"):
            # The delta rule reads the state for the key, adds a product to it, and reads it for the query.
            state = text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim
            return int(3 * 2 * state * tokens)
        if kind == "linear_attention" and hasattr(text, "mamba_n_heads"):
            # Mamba adds a product to the state, and reads it.
            state = text.mamba_n_heads * text.mamba_d_head * text.mamba_d_state
            return int(2 * 2 * state * tokens)
        raise ValueError(f"{self.name} has layers of type {kind}, whose operations are not counted")


def composed_refusal(model: Model) -> str | None:
    """Why experts in plain torch (``experts_lora.composed``) cannot compute those of a model; None if they can."""
    for module in model.skeleton.modules():
        if not is_experts(module):
            continue
        experts: Any = module
        if not experts.has_gate or not experts.is_concatenated or experts.is_transposed or experts.has_bias:
            return f"{type(module).__name__} has biases, or gate and up that are not one after the other"
        if getattr(experts.config, "hidden_act", None) != "silu":
            return f"{type(module).__name__} has another activation than SiLU"
        if any(not quantized_as_one(getattr(module, name).shape, name) for name in projections_of(module)):
            return f"a stack of {type(module).__name__} cannot be one matrix of bitsandbytes"
    return None


def quantized_as_one(shape: tuple[int, ...], name: str) -> bool:
    """Whether bitsandbytes can quantize a stack of experts (E, out, in) as one matrix with scales apart by projection."""
    experts, rows, columns = shape
    projection = rows * columns // (2 if name == "gate_up_proj" else 1)
    # Groups of 256 scales, each of 64 weights, and bitsandbytes counts weights in 32 bits.
    return projection % (64 * 256) == 0 and experts * rows * columns < 2**31


def _types(text: Any) -> list[str]:
    """The type of each layer, by Transformers' names."""
    return list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)


def _head_features(text: Any) -> tuple[int, int]:
    """Features of a head's queries, and of its values."""
    if hasattr(text, "qk_nope_head_dim"):
        return text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    features = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return features, features


def _with_layers(config: Any, chosen: list[int]) -> Any:
    """``config``, changed in place, with only the layers of these indices."""
    text = config.get_text_config()
    number = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == number:
            setattr(text, name, [value[index] for index in chosen])
    text.num_hidden_layers = len(chosen)
    return config
