"""Causal attention of torch over sequences as TRL packs them, without a mask.

Transformers' ``"sdpa"`` looks on the GPU whether a batch needs a mask, and waits for the answer; documents side by side
get one of all pairs of tokens. Neither is needed here. Padding is behind the tokens, where the causal flag already hides
it. Documents side by side come with their boundaries (``cu_seq_lens_q``), which is what flash attention over sequences of
several lengths takes; where torch has none, a mask is made of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

NAME = "sdpa_packed"
# Of flash attention.
_MOST_FEATURES = 256


@functools.cache
def _flash() -> tuple[Callable[..., Any], bool] | None:
    """Torch's causal flash attention over several lengths, and whether it takes fewer keys than queries; None without it."""
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
    """Whether ``NAME`` computes what ``attn`` does in a model of this config.

    Args:
        packed: whether documents lie side by side, which takes flash attention to be better than a mask.
    """
    text = config.get_text_config()
    everything = set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    if attn != "sdpa" or device.type != "cuda" or not everything or getattr(text, "sliding_window", None):
        return False
    return not packed or (_flash() is not None and dtype.itemsize == 2 and _flash_takes(text))


def _flash_takes(text: Any) -> bool:
    """Whether heads are of a size that flash attention has."""
    features = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if (values := getattr(text, "v_head_dim", None)) is not None:  # multi-head latent attention
        features = text.qk_nope_head_dim + text.qk_rope_head_dim
        if features != values:
            return False
    return bool(features <= _MOST_FEATURES and features % 8 == 0)


def use(model: Any) -> None:
    """Makes ``model`` attend by ``NAME``; Transformers makes no masks for an implementation that it does not know."""
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
    """Transformers' interface: query (B, heads, T, D), key and value (B, groups, T, D) to (B, T, heads, D).

    Args:
        cu_seq_lens_q: (N + 1,) int32, where documents of a batch of one begin and end; None if sequences are whole.
            Documents may have no tokens.
        max_length_q: tokens of the longest, at least.
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
        key, value = (repeat_kv(own, query.shape[1] // own.shape[1]) for own in (key, value))
    length = tokens if max_length_q is None else max_length_q
    rows = (own[0].transpose(0, 1) for own in (query, key, value))
    return run(*rows, cu_seq_lens_q, cu_seq_lens_q, length, length, scale=scaling)[None], None


def documents_mask(boundaries: Tensor, tokens: int) -> Tensor:
    """Which token attends to which: (1, 1, T, T), true for those before it in its document and for itself."""
    place = torch.arange(tokens, device=boundaries.device)
    document = torch.searchsorted(boundaries[1:].contiguous(), place, right=True)
    return ((document[:, None] == document) & (place[:, None] >= place))[None, None]
