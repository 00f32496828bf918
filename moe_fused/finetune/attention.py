"""Computes causal attention over sequences that TRL has packed, without a mask.

Transformers' ``"sdpa"`` checks on the GPU whether a batch needs a mask, and waits for the answer. For documents side by
side, and for layers with a sliding window, it makes a mask of all pairs of tokens. Neither is needed here. Padding comes
after the tokens, so a causal pass never attends to it. TRL gives the boundaries of documents (``cu_seq_lens_q``). The
kernels of ``varlen`` take such boundaries, and some of them windows. Where none can be had, a mask is made from the
boundaries.

Models with attention sinks, such as gpt-oss, have no SDPA in Transformers. Their eager attention makes numbers for each
pair of tokens and head. A sink is a logit of each head that takes part in the softmax and has no value. With the
log-sum-exp L of a query's scores and the sink s, attention with the sink is attention without it, times σ(L - s), and its
log-sum-exp is log(exp(L) + exp(s)). Flash attention's backward computes the probabilities again, from the log-sum-exp, and
reads the output. Given those with the sink, it returns the gradients with the sink. So torch's kernels compute all of it
(``_FlashWithSinks``).
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from moe_fused import recurrent

from . import varlen

NAME = "packed_causal"
# What --attn takes beside Transformers' names: kernels for documents, for models that otherwise have what "auto" means.
KERNELS = (varlen.TORCH, varlen.CUDNN)
# Transformers' names for the types of layers in which masks keep documents apart.
APART = recurrent.STATELESS
# The types of layers whose attention this module computes.
_SERVED = frozenset({"full_attention", "sliding_attention"})
# The name that Transformers' attention layers give to their sinks.
_SINKS = "sinks"


def chosen(attn: str, config: Any) -> str:
    """Returns Transformers' name for ``attn``: for "auto" and our kernels what it chooses for a model of this config."""
    if attn not in ("auto", *KERNELS):
        return attn
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if model is None or model._supports_sdpa else "eager"


def name_refusal(attn: str, device: torch.device) -> str | None:
    """Why a run cannot have ``attn``, whatever its model is, or None if it depends on the model.

    Args:
        attn: A value of ``--attn``.
        device: The device of the run.
    """
    names = {name for name in AttentionInterface() if "|" not in name and not name.startswith(NAME)}
    known = (*KERNELS, *sorted({"eager", "sdpa", *names}))
    if attn not in ("auto", *known) and ("|" in attn or not varlen.is_hub_id(attn)):
        return f"it must be one of {', '.join(known)}, or a kernel of the Hub as org/name"
    if attn == "flex_attention" and device.type == "cpu":
        return "it has no backward pass on a CPU"
    return None


def layer_types(config: Any) -> frozenset[str]:
    """Returns the types of a model's layers, by Transformers' names for them."""
    return frozenset(recurrent.layer_types(config.get_text_config()) or ("full_attention",))


def has_sinks(model: nn.Module) -> bool:
    """Whether attention layers of a model have sinks."""
    return any(name.rpartition(".")[2] == _SINKS for name, _ in model.named_parameters())


def has_windows(config: Any) -> bool:
    """Whether layers of a model attend to the last tokens alone."""
    text = config.get_text_config()
    if types := getattr(text, "layer_types", None):
        return "sliding_attention" in types
    return bool(getattr(text, "sliding_window", None))


def _hands_over_windows(model: nn.Module) -> bool:
    """Whether all causal attention layers of a model hand their windows over to the implementation of attention.

    Those of Qwen2-MoE and Phi-MoE do not. Their windows are in their masks alone.
    """
    kinds = {type(module) for module in model.modules() if getattr(module, "is_causal", False)}
    return all("sliding_window=" in inspect.getsource(kind) for kind in kinds)


def serves(attn: str, model: Any, device: torch.device, dtype: torch.dtype, *, packed: bool) -> bool:
    """Whether the attention of this module computes the same as ``attn`` in a model, and is better.

    The arguments are those of ``refusal``.
    """
    return refusal(attn, model, device, dtype, packed=packed) is None


def refusal(attn: str, model: Any, device: torch.device, dtype: torch.dtype, *, packed: bool) -> str | None:
    """Why the attention of this module does not take the place of ``attn`` in a model, or None if it does.

    Args:
        attn: A value of ``--attn``.
        model: The causal language model, on any device, meta included.
        device: The device of the run.
        dtype: The data type of the computation.
        packed: Whether documents lie side by side. Only a kernel for documents is better than a mask for these.
    """
    config, sinks = model.config, has_sinks(model)
    is_hub = varlen.is_hub_id(attn)
    if not (is_hub or chosen(attn, config) == "sdpa" or (attn in ("auto", *KERNELS) and sinks)):
        return f"its attention is {chosen(attn, config)}"
    if device.type != "cuda":
        return "it needs a GPU"
    if others := sorted(layer_types(config) - _SERVED):
        return f"its layers of type {' and '.join(others)} take no boundaries of rows"
    if not _is_causal(model):
        return "its attention looks at later tokens, too"
    if not is_hub and not takes_flash(model, packed=packed):
        return None
    windows, text = has_windows(config), config.get_text_config()
    # Transformers' own flash attention needs windows and sinks to be handed over, too.
    if (sinks or windows) and not getattr(model, "_supports_flash_attn", False):
        return "its windows or sinks are not known to reach a kernel"
    if windows and not _hands_over_windows(model):
        return "its layers have a sliding window in their masks alone"
    if getattr(text, "attention_dropout", None):
        return "its attention has dropout"
    if dtype.itemsize != 2:
        return "it needs --dtype bfloat16 or float16"
    return kernel_refusal(attn, model)


def kernel_refusal(attn: str, model: Any) -> str | None:
    """Why the kernel that ``attn`` means cannot compute a model's documents, windows and sinks, or None if it can.

    Args:
        attn: A value of ``--attn``.
        model: The causal language model, on any device, meta included.
    """
    text, named = model.config.get_text_config(), attn in KERNELS or varlen.is_hub_id(attn)
    name = attn if named else varlen.TORCH
    if has_sinks(model):
        if name != varlen.TORCH:
            return "its attention has sinks"
        # The operators below are those of torch's flash attention.
        runs = _sinks_run() and all(varlen.takes(*pair) for pair in _features(text))
        return None if runs else "this torch has no flash attention for its sinks"
    if (kernel := varlen.kernel_of(name)) is None:
        return "it needs a torch newer than 2.10" if name == varlen.TORCH else "there is no such kernel"
    if not kernel.windows and has_windows(model.config):
        return "layers of it have a sliding window"
    if not all(kernel.fits(*pair) for pair in _features(text)):
        return f"its heads have more than {kernel.most_features} features, or a number that is no multiple of 8"
    return None


def kernel_for(attn: str, model: Any, device: torch.device, tokens: int, *, packed: bool) -> str | None:
    """Returns the name of the kernel with which a run computes attention that ``serves`` says is served.

    Args:
        attn: A value of ``--attn``.
        model: The causal language model, on any device, meta included.
        device: The device of the run.
        tokens: The number of tokens of a batch.
        packed: Whether documents lie side by side.

    Returns:
        The name of a kernel of ``varlen``. None if causal attention over whole sequences is all that is needed.
    """
    if varlen.is_hub_id(attn):
        return attn
    if not takes_flash(model, packed=packed):
        return None
    if attn in KERNELS:
        return attn

    def runs(name: str) -> bool:
        return (
            name in KERNELS
            and (name != varlen.CUDNN or varlen.cudnn_refusal(device) is None)
            and kernel_refusal(name, model) is None
        )

    features = _features(model.config.get_text_config())
    return varlen.fastest(device, tokens, max(pair[0] for pair in features), runs)


def _is_causal(model: nn.Module) -> bool:
    """Whether no attention layer of a model says that it also looks at later tokens."""
    return all(getattr(module, "is_causal", True) is not False for module in model.modules())


def takes_flash(model: Any, *, packed: bool) -> bool:
    """Whether a model needs flash attention over sequences of several lengths, and not just causal attention."""
    return packed or has_sinks(model) or has_windows(model.config)


def _sinks_run() -> bool:
    """Whether torch has the operators of flash attention that sinks need."""
    return varlen.operators_run()


def _features(text: Any) -> list[tuple[int, int]]:
    """Returns the numbers of features of a head's queries and of its values, of every layer if layers differ."""
    if getattr(text, "is_heterogeneous", False):
        return [pair for layer in text.per_layer_config for pair in _features(layer)]
    features = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if (latent := getattr(text, "qk_nope_head_dim", None)) is not None:  # multi-head latent attention
        features = latent + text.qk_rope_head_dim
    return [(features, getattr(text, "v_head_dim", None) or features)]


def use(model: Any, kernel: str | None = None) -> None:
    """Makes ``model`` use the attention of this module. Transformers makes no masks for implementations of others.

    Args:
        model: The causal language model.
        kernel: The kernel for documents and windows, by its name in ``varlen``. None for torch's.
    """
    name = NAME if kernel in (None, varlen.TORCH) else f"{NAME}_{_number_of(kernel)}"
    AttentionInterface.register(name, functools.partial(attention, kernel=kernel or varlen.TORCH))
    model.config.get_text_config()._attn_implementation = name


_numbers: dict[str | None, int] = {}


def _number_of(kernel: str | None) -> int:
    """Numbers the kernels, because Transformers reads the names of implementations, and takes some for its own."""
    return _numbers.setdefault(kernel, len(_numbers) + 1)


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
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    kernel: str = varlen.TORCH,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes causal attention, with Transformers' interface for implementations of attention.

    Args:
        module: The attention layer.
        query: (B, heads, T, D).
        key, value: (B, groups, T, D) and (B, groups, T, V).
        attention_mask: A mask, which is ignored.
        dropout: The dropout probability.
        scaling: The factor of the scores.
        cu_seq_lens_q: (N + 1,) int32, where the documents of a batch of one begin and end. Documents may have no
            tokens. None if each sequence is one document.
        max_length_q: The number of tokens of the longest document, or more.
        sliding_window: The number of tokens that a token attends to, itself included. None for all before it.
        s_aux: (heads,) the sinks of the heads, logits that take part in the softmax. None for no sinks.
        kernel: The kernel for documents and windows, by its name in ``varlen``.

    Returns:
        The output, (B, T, heads, V), and None for the attention weights.
    """
    batch, tokens = query.shape[0], query.shape[2]
    window = None if sliding_window is None or sliding_window >= tokens else sliding_window
    if cu_seq_lens_q is None and window is None and s_aux is None and kernel in KERNELS:
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, **kwargs)
    found = varlen.kernel_of(kernel) if s_aux is None else None
    features, values = query.shape[-1], value.shape[-1]
    if found is not None:
        fits = found.fits(features, values) and (found.windows or window is None)
    else:
        fits = s_aux is not None and _sinks_run() and varlen.takes(features, values)
    if not fits or dropout or not _is_on_gpu(query):
        mask = causal_mask(cu_seq_lens_q, tokens, window, query.device)
        return _with_mask(module, query, key, value, mask, s_aux, dropout, scaling, **kwargs)
    if cu_seq_lens_q is None:
        boundaries = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
        length = tokens
    else:
        boundaries, length = cu_seq_lens_q, tokens if max_length_q is None else max_length_q
    if found is not None and not found.groups:  # needs keys and values for each head
        key, value = (repeat_kv(tensor, query.shape[1] // tensor.shape[1]) for tensor in (key, value))
    if values < features:  # multi-head latent attention
        value = nn.functional.pad(value, (0, features - values))
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    if found is not None:
        out = found.attend(query, key, value, boundaries, length, scaling, window)
    else:
        out = _FlashWithSinks.apply(query, key, value, s_aux, boundaries, length, scaling, window)
    if values < features:
        out = out[..., :values]
    return out.unflatten(0, (batch, tokens)), None


def _is_on_gpu(query: Tensor) -> bool:
    """Whether kernels for documents take such a tensor."""
    return query.device.type == "cuda" and query.itemsize == 2


def _with_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes ``attention`` where flash attention cannot run, with a mask of all pairs of tokens."""
    if sinks is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    return attention_with_sinks(query, key, value, sinks, mask, scaling, dropout), None


class _FlashWithSinks(torch.autograd.Function):
    """Computes flash attention over documents whose heads have sinks, with gradients also for the sinks.

    The arguments are query (S, heads, D), key and value (S, groups, D), the sinks (heads,), boundaries (N + 1,), the largest
    number of tokens of a document, the factor of the scores, and the window or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        boundaries: Tensor,
        length: int,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        out, lse, state, unused = varlen.flash_forward(ctx, query, key, value, boundaries, length, scale, window)
        # (heads, S) in fp32, like the log-sum-exp that flash attention returns.
        with_sinks = torch.logaddexp(lse, sinks.float()[:, None])
        # Not in place, because ``kept_attention`` keeps what the operator returned. A product alone would be in fp32.
        out = torch.mul(out, (lse - with_sinks).exp_().T[..., None], out=torch.empty_like(out))
        ctx.save_for_backward(query, key, value, sinks, boundaries, out, with_sinks, state, unused)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, boundaries, out, lse, state, unused = ctx.saved_tensors
        grads = varlen.flash_backward(ctx, grad, query, key, value, boundaries, out, lse, state, unused)
        of_sinks = None
        if ctx.needs_input_grad[3]:
            # The gradient of a score is its probability times (gradient of the probability - mean of these gradients). The
            # probability of a sink has no gradient, because a sink has no value.
            means = (grad.float() * out.float()).sum(-1).T
            of_sinks = -((sinks.float()[:, None] - lse).exp() * means).sum(1).to(sinks.dtype)
        return *grads, of_sinks, None, None, None, None


def attention_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Computes attention whose heads have sinks, in plain torch, as the reference and where flash attention cannot run.

    Args:
        query: (B, heads, T, D).
        key, value: (B, groups, T, D).
        sinks: (heads,).
        mask: Booleans, (1, 1, T, T).
        scaling: The factor of the scores; None for 1 / √D.
        dropout: The dropout probability.

    Returns:
        (B, T, heads, D).
    """
    key, value = (repeat_kv(tensor, query.shape[1] // tensor.shape[1]) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~mask, float("-inf"))
    of_sinks = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
    weights = torch.cat((scores, of_sinks), dim=-1).softmax(dim=-1)[..., :-1]
    weights = nn.functional.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous()


def causal_mask(boundaries: Tensor | None, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Makes the mask of documents, (1, 1, T, T). A token attends to itself and to earlier tokens of its document.

    Args:
        boundaries: (N + 1,) where documents begin and end. None for one document.
        tokens: The number of tokens.
        window: The number of tokens that a token attends to, itself included. None for all.
        device: The device of the mask.
    """
    place = torch.arange(tokens, device=device)
    mask = place[:, None] >= place
    if window is not None:
        mask &= place[:, None] < place + window
    if boundaries is not None:
        document = torch.searchsorted(boundaries[1:].contiguous(), place, right=True)
        mask &= document[:, None] == document
    return mask[None, None]
