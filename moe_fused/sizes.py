"""The sizes of a model that determine the memory and the time of training it.

``skeleton`` makes a model of a config, without weights, and ``sizes_of`` reads the sizes of a model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .quantized import PUBLISHED
from .recurrent import Recurrent, recurrent_layers, uncounted_types


@dataclass(frozen=True)
class Stack:
    """A stacked weight of a layer's experts.

    Attributes:
        experts, out_features, in_features: its shape.
        projections: the number of matrices of one expert in it, 2 for gate and up.
        packable: whether it can be held in 4 bits as bitsandbytes has them.
        transposed: whether its out features are contiguous, as those of gpt-oss.
        in_rows: the formats of published checkpoints that it can be held in, whose blocks lie along the in features.
    """

    experts: int
    out_features: int
    in_features: int
    projections: int
    packable: bool
    transposed: bool = False
    in_rows: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return self.experts * self.out_features * self.in_features


@dataclass(frozen=True)
class Linear:
    """A linear layer.

    Attributes:
        name: its name in the model.
        out_features, in_features: its shape.
        packable: whether it can be held in 4 bits as bitsandbytes has them.
    """

    name: str
    out_features: int
    in_features: int
    packable: bool = True

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Whole:
    """A tensor of the model that is trained in full, in a copy of its own.

    Attributes:
        numel: its number of elements.
        embeds, scores: whether it belongs to the embedding, or to the head.
    """

    numel: int
    embeds: bool = False
    scores: bool = False


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model.

    Attributes:
        stacks: all stacked weights of experts, up and down projections.
        linears: all linear layers except the head.
        others: the number of elements of all other parameters, including the embeddings and the head.
        layers, hidden, heads: the number of decoder layers, the hidden size, and the number of attention heads.
        queries, keys: the number of features of the queries and of the keys, of all heads.
        norms_queries: whether queries and keys are normalized.
        experts, top_k: the number of experts of a layer and of experts for each token; 0 for a model without experts.
        vocabulary: the number of rows of the head.
        mlp: the output features of all linear layers of a decoder layer, without those of attention, recurrent mixers and
            experts; the maximum over the layers.
        recurrent: the recurrent layers. All other layers count as attention.
        uncounted: the types of other layers that may have a state. The plan does not count what they keep for it.
        embedding: the number of elements of the input embedding, 0 if the head shares it or it is more than a table.
    """

    stacks: tuple[Stack, ...]
    linears: tuple[Linear, ...]
    others: int
    layers: int
    hidden: int
    heads: int
    queries: int
    keys: int
    norms_queries: bool
    experts: int
    top_k: int
    vocabulary: int
    mlp: int
    recurrent: tuple[Recurrent, ...] = ()
    uncounted: tuple[str, ...] = ()
    embedding: int = 0


def skeleton(config: Any, attention: str | None = None) -> Any:
    """Makes the causal language model that a config of Transformers describes, on meta, without memory for its weights.

    Args:
        attention: Transformers' name for an attention implementation. None lets Transformers choose.

    Raises:
        ValueError, ImportError: there is no such model, or it does not support that attention.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise ValueError(f"Transformers has no causal language model of type {config.model_type}")
    chosen = copy.deepcopy(config)  # because Transformers writes the attention that it chooses into the config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            chosen, **({} if attention is None else {"attn_implementation": attention})
        )


def is_named(path: str, names: Iterable[str]) -> bool:
    """Whether one of ``names`` is ``path`` or the last parts of it, which is how PEFT matches the names of modules."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def sizes_of(model: Any, dense: Collection[str] = ()) -> Sizes:
    """Reads the sizes of a causal language model of Transformers with dense weights, on any device, including meta.

    Args:
        dense: the names of parameters of experts and of linear layers that stay dense, whatever they could be held in.

    Raises:
        ValueError: the config lacks the sizes of a decoder.
    """
    text = model.config.get_text_config()
    hidden, heads = _setting(text, "hidden_size"), _setting(text, "num_attention_heads")
    if not hidden or not heads:
        raise ValueError(
            f"no memory plan for {type(model).__name__}: its config lacks hidden_size or num_attention_heads"
        )
    queries, keys = _attention_features(text)
    experts = 0
    stacks: list[Stack] = []
    inside = set()
    for path, module in model.named_modules():
        if hasattr(type(module), "_apply_gate"):
            found = list(_stacks(path, module, dense))
            experts, stacks = found[0].experts, [*stacks, *found]
            inside |= {id(getattr(module, name)) for name in _projections(module)}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    modules = linear_modules(model)
    linears = tuple(
        Linear(name, module.out_features, module.in_features, packable=name not in dense)
        for name, module in modules.items()
    )
    weights = {id(module.weight) for module in modules.values()}
    others = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside | weights)
    recurrent = recurrent_layers(model)
    apart = type(embedding) is nn.Embedding and head is not None and head.weight is not embedding.weight
    return Sizes(
        stacks=tuple(stacks),
        linears=linears,
        others=others,
        layers=text.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        queries=queries,
        keys=keys,
        norms_queries=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        experts=experts,
        top_k=(_setting(text, "num_experts_per_tok") or _setting(text, "top_k_experts")) if experts else 0,
        vocabulary=text.vocab_size,
        mlp=most_beside_mixers(linears, recurrent, lambda linear: linear.out_features),
        recurrent=recurrent,
        uncounted=uncounted_types(text, recurrent),
        embedding=embedding.weight.numel() if apart else 0,
    )


def linear_modules(model: Any) -> dict[str, nn.Linear]:
    """Returns the linear layers of a model by name, without the head, which no format holds in 4 bits."""
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def _setting(text: Any, name: str) -> int:
    """Returns a number in the config of a decoder: the largest if layers differ, and 0 if there is none."""
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    values = [getattr(layer, name, None) or 0 for layer in layers]
    return max(int(max(value) if isinstance(value, (list, tuple)) else value) for value in values)


def _attention_features(text: Any) -> tuple[int, int]:
    """Returns the number of features of the queries of all heads, and of the keys."""
    heads = _setting(text, "num_attention_heads")
    if latent := _setting(text, "qk_nope_head_dim"):  # multi-head latent attention has keys for each head
        features = heads * (latent + _setting(text, "qk_rope_head_dim"))
        return features, features
    head_dim = _setting(text, "head_dim") or text.hidden_size // heads
    return heads * head_dim, (_setting(text, "num_key_value_heads") or heads) * head_dim


def _projections(module: nn.Module) -> tuple[str, ...]:
    from .integrations.transformers.experts_module import projections_of

    return projections_of(module)


def _stacks(path: str, module: nn.Module, dense: Collection[str]) -> Iterator[Stack]:
    from .integrations.quantizer.packed_experts import packing_refusal

    packable = packing_refusal(module) is None
    in_rows = tuple(quant_type for quant_type in PUBLISHED if packing_refusal(module, quant_type) is None)
    for name in _projections(module):
        experts, rows, columns = getattr(module, name).shape
        transposed = bool(getattr(module, "is_transposed", False))
        if transposed:
            rows, columns = columns, rows
        stack = Stack(experts, rows, columns, 2 if name == "gate_up_proj" else 1, packable, transposed, in_rows)
        yield replace(stack, packable=False, in_rows=()) if f"{path}.{name}" in dense else stack


def most_beside_mixers(
    linears: Iterable[Linear], recurrent: Iterable[Recurrent], count: Callable[[Linear], int]
) -> int:
    """Counts something of the linear layers beside attention, recurrent mixers and experts, in the layer with the most."""
    layers: dict[str, int] = {}
    for linear in linears:
        layer, _, rest = linear.name.partition(".layers.")[2].partition(".")
        if "attn" not in rest and "attention" not in rest and not any(kind.has(linear.name) for kind in recurrent):
            layers[layer] = layers.get(layer, 0) + count(linear)
    return max(layers.values(), default=0)
