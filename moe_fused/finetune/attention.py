"""Computes causal attention over sequences that TRL has packed, with torch's kernels and without a mask.

Transformers' ``"sdpa"`` checks on the GPU whether a batch needs a mask, and waits for the answer. For documents side by
side it makes a mask of all pairs of tokens. Neither is needed here. Padding comes after the tokens, so a causal pass
never attends to it. TRL gives the boundaries of documents (``cu_seq_lens_q``), and torch's flash attention over
sequences of several lengths takes such boundaries. If torch does not have that attention, a mask is made from the
boundaries.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

NAME = "sdpa_packed"
# The largest number of features of a head that flash attention supports.
_MOST_FEATURES = 256
# Transformers' names for the types of layers in which masks keep documents apart: attention over all earlier tokens or
# over the last of them, and layers that see one token at a time.
APART = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention", "mlp", "moe"})


def chosen(attn: str, config: Any) -> str:
    """Returns ``attn``, or for "auto" the attention that Transformers chooses for a causal model of this config."""
    if attn != "auto":
        return attn
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if model is None or model._supports_sdpa else "eager"


def layer_types(config: Any) -> frozenset[str]:
    """Returns the types of a model's layers, by Transformers' names for them."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    return frozenset(types or ("full_attention",))


@functools.cache
def _flash() -> tuple[Callable[..., Any], bool] | None:
    """Returns torch's causal flash attention over sequences of several lengths, or None if this torch has none.

    The second value is whether the function takes fewer heads for keys and values than for queries.
    """
    try:
        from torch.nn.attention import varlen
    except ImportError:  # torch 2.9
        return None
    function: Any = varlen.varlen_attn
    known = inspect.signature(function).parameters
    if not {"scale", "window_size"} <= known.keys():  # torch 2.10
        return None
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    return functools.partial(function, window_size=(-1, 0), **grouped), bool(grouped)


def serves(attn: str, config: Any, device: torch.device, dtype: torch.dtype, *, packed: bool) -> bool:
    """Whether the attention of this module computes the same as ``attn`` in a model of this config, and is better.

    Args:
        attn: Transformers' name for an implementation of attention, or "auto".
        config: The model's config.
        device: The device of the run.
        dtype: The data type of the computation.
        packed: Whether documents lie side by side. Only flash attention is better than a mask for these.
    """
    text = config.get_text_config()
    everything = layer_types(config) == {"full_attention"}
    if (
        chosen(attn, config) != "sdpa"
        or device.type != "cuda"
        or not everything
        or getattr(text, "sliding_window", None)
    ):
        return False
    return not packed or (_flash() is not None and dtype.itemsize == 2 and _flash_takes(text))


def _flash_takes(text: Any) -> bool:
    """Whether flash attention supports heads of the model's size."""
    features = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if (values := getattr(text, "v_head_dim", None)) is not None:  # multi-head latent attention
        features = text.qk_nope_head_dim + text.qk_rope_head_dim
        if features != values:
            return False
    return bool(features <= _MOST_FEATURES and features % 8 == 0)


def use(model: Any) -> None:
    """Makes ``model`` use the attention of this module. Transformers makes no masks for implementations of others."""
    AttentionInterface.register(NAME, attention)
    model.config.get_text_config()._attn_implementation = NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes causal attention, with Transformers' interface for implementations of attention.

    Args:
        module: The attention layer.
        query: (B, heads, T, D).
        key, value: (B, groups, T, D).
        attention_mask: A mask, which is ignored.
        dropout: The dropout probability.
        scaling: The factor of the scores.
        cu_seq_lens_q: (N + 1,) int32, where the documents of a batch of one begin and end. Documents may have no
            tokens. None if each sequence is one document.
        max_length_q: The number of tokens of the longest document, or more.

    Returns:
        The output, (B, T, heads, D), and None for the attention weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, **kwargs)
    flash, tokens = _flash(), query.shape[2]
    fits = query.device.type == "cuda" and query.itemsize == 2 and query.shape[-1] == value.shape[-1]
    if flash is None or not fits or dropout:
        mask = documents_mask(cu_seq_lens_q, tokens)
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    run, is_grouped = flash
    if not is_grouped:
        key, value = (repeat_kv(tensor, query.shape[1] // tensor.shape[1]) for tensor in (key, value))
    length = tokens if max_length_q is None else max_length_q
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return run(*rows, cu_seq_lens_q, cu_seq_lens_q, length, length, scale=scaling)[None], None


def documents_mask(boundaries: Tensor, tokens: int) -> Tensor:
    """Makes the mask of documents, (1, 1, T, T). A token attends to itself and to earlier tokens of its document."""
    place = torch.arange(tokens, device=boundaries.device)
    document = torch.searchsorted(boundaries[1:].contiguous(), place, right=True)
    return ((document[:, None] == document) & (place[:, None] >= place))[None, None]
