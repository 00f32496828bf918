"""Attention of one token per sequence over a static cache, instead of Transformers' while a decoding step is recorded.

Transformers copies the keys and values of the whole cache for each query head where a mask is given, and the attention then
reads the whole cache, also its empty part. ``attend`` reads what the mask keeps, once for all query heads of a KV head.

The keys are divided among programs, because the heads of one sequence alone are too few for a GPU. Each program takes every
n-th block, so that all have as much to do however full the cache is. A second kernel combines what they found. The last
program to end could do that instead, but its atomic additions and its reads wait as long as a launch in a graph takes.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton
from torch import Tensor, nn

from moe_fused.cuda_graphs import registered

from .alike import DTYPES, alike, is_recording, random_values

__all__ = ["Attention", "attend"]

# The largest head size that is served, and the most query heads of a KV head.
LARGEST_HEAD, LARGEST_GROUP = 256, 64
# The fewest rows of a matrix product.
ROWS = 16
# How many programs a multiprocessor gets, and the most for the keys of a KV head.
PROGRAMS, MOST_SPLITS = 4, 64
# The arguments of a model's attention function, beside tensors, that do not change a single token's result. A window is in
# the mask as well.
WITHOUT_EFFECT = frozenset(
    {
        "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "past_key_values", "logits_to_keep",
        "num_items_in_batch", "output_router_logits", "output_hidden_states", "return_dict", "layer_idx",
    }
)  # fmt: skip


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Returns the attention of one token a sequence, (B, 1, query heads, value size), contiguous.

    Scores, the softmax and sums are fp32. A sequence that attends to nothing gets zeros.

    Args:
        query: (B, query heads, 1, head size), in fp32, fp16 or bf16.
        keys: (B, KV heads, S, head size), in the dtype of the query.
        values: (B, KV heads, S, value size), likewise.
        mask: (B or 1, 1, 1, S), booleans of which True keeps, or numbers that are added to scores, where the lower half of
            the dtype's range leaves out. None keeps all.
        scaling: What products of queries and keys are multiplied with.
        softcap: The number c, if scores s are to become c·tanh(s/c).
        sinks: (query heads,), scores that take part in the softmax and have no value.

    Raises:
        ValueError: ``is_served`` is False for these.
    """
    if not is_served(query, keys, values, mask):
        raise ValueError(
            f"one token a sequence is served, not a query of {tuple(query.shape)} with these keys and values"
        )
    from . import attention_device as device_code

    batch, heads, _, qk_size = query.shape
    kv_heads, tokens, v_size = keys.shape[1], keys.shape[2], values.shape[-1]
    block = 64 if query.element_size() == 2 and max(qk_size, v_size) <= 128 else 32 if query.element_size() == 2 else 16
    blocks = -(-tokens // block)
    splits = min(blocks, MOST_SPLITS, -(-PROGRAMS * _multiprocessors(query.device) // (batch * kv_heads)))
    splits = -(-blocks // -(-blocks // splits))  # as few as take the same time
    out = query.new_empty(batch, 1, heads, v_size)
    partial = query.new_empty((batch, heads, splits, v_size) if splits > 1 else (1,), dtype=torch.float32)
    extremes = query.new_empty((2, batch, heads, splits) if splits > 1 else (1,), dtype=torch.float32)
    is_added = mask is not None and mask.dtype is not torch.bool
    lowest = torch.finfo(mask.dtype).min / 2 if mask is not None and is_added else 0.0
    if mask is not None:
        mask = mask.expand(batch, 1, 1, tokens)
        mask = mask if is_added else mask.view(torch.uint8)
    block_v = max(ROWS, triton.next_power_of_2(v_size))
    constants = {"HEADS": heads, "V_SIZE": v_size, "HAS_SINKS": sinks is not None, "SPLITS": splits, "BLOCK_V": block_v}
    device_code.attention_kernel[(splits, kv_heads, batch)](
        query, keys, values, mask, sinks, out, partial, extremes,
        query.stride(0), query.stride(1), *keys.stride()[:3], *values.stride()[:3],
        0 if mask is None else mask.stride(0), 1 if mask is None else mask.stride(3), tokens,
        scaling, softcap or 1.0, lowest,
        **constants, GROUP=heads // kv_heads, QK_SIZE=qk_size, HAS_MASK=mask is not None, IS_ADDED=is_added,
        HAS_SOFTCAP=softcap is not None, BLOCKS=triton.next_power_of_2(-(-blocks // splits)),
        ROWS=max(ROWS, triton.next_power_of_2(heads // kv_heads)), BLOCK=block,
        BLOCK_QK=max(ROWS, triton.next_power_of_2(qk_size)),
        PRECISION="ieee" if query.dtype is torch.float32 else "tf32", num_warps=4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        device_code.combine_kernel[(heads, batch)](
            partial, extremes, sinks, out, **constants, BLOCK_SPLITS=triton.next_power_of_2(splits), num_warps=4
        )
    return out


def is_served(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> bool:
    """Whether ``attend`` serves these: one token a sequence, and shapes, dtypes and strides that its kernels take."""
    if not (query.dim() == keys.dim() == values.dim() == 4 and query.shape[2] == 1 and query.dtype in DTYPES):
        return False
    batch, heads, _, qk_size = query.shape
    kv_heads, tokens = keys.shape[1:3]
    return (
        query.dtype is keys.dtype is values.dtype
        and keys.shape == (batch, kv_heads, tokens, qk_size)
        and values.shape[:3] == keys.shape[:3]
        and heads % kv_heads == 0
        and heads // kv_heads <= LARGEST_GROUP
        and max(qk_size, values.shape[-1]) <= LARGEST_HEAD
        and all(each.stride(-1) == 1 for each in (query, keys, values))
        and (
            mask is None
            or (
                mask.dim() == 4
                and mask.shape[0] in (1, batch)
                and mask.shape[1:] == (1, 1, tokens)
                and (mask.dtype is torch.bool or mask.is_floating_point())
            )
        )
    )


def are_without_effect(options: Mapping[str, Any]) -> bool:
    """Whether options that a model gives its attention do not change what it computes for one token."""
    others = [value for name, value in options.items() if name not in WITHOUT_EFFECT]
    return all(value is None or (isinstance(value, (bool, float)) and not value) for value in others)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class Attention:
    """Attention functions of Transformers, replaced by ``attend`` where that gives the same for a model's modules.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {id(module) for module in model.modules()}
        files = {type(module).__module__: sys.modules[type(module).__module__] for module in model.modules()}
        found = [getattr(file, "ALL_ATTENTION_FUNCTIONS", None) for file in files.values()]
        self._registries = list({id(each): each for each in found if each is not None}.values())
        self._same: dict[tuple[Any, ...], bool] = {}

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Replaces the functions ``sdpa`` and ``eager`` within the block."""
        with contextlib.ExitStack() as stack:
            for registry in self._registries:
                functions = {
                    name: functools.partial(self._call, name, registry.get(name)) for name in ("sdpa", "eager")
                }
                stack.enter_context(registered(registry, functions))
            yield

    def _call(
        self,
        name: str,
        before: Any,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # A model has an eager function of its own.
        before = before or sys.modules[type(module).__module__].eager_attention_forward
        options = self._options(module, query, key, value, attention_mask, kwargs)
        if options is not None and self._is_same(
            name, before, module, (query, key, value, attention_mask), kwargs, options
        ):
            return attend(query, key, value, attention_mask, **options), None
        found: tuple[Tensor, Tensor | None] = before(module, query, key, value, attention_mask, **kwargs)
        return found

    def _options(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any] | None:
        """Returns the options of ``attend`` for a call, or None if it does not serve it."""
        if id(module) not in self._modules or not is_served(query, key, value, mask):
            return None
        if not are_without_effect({name: kwargs[name] for name in kwargs.keys() - {"scaling", "softcap", "s_aux"}}):
            return None
        scaling = kwargs.get("scaling")
        return {
            "scaling": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            "softcap": kwargs.get("softcap"),
            "sinks": kwargs.get("s_aux"),
        }

    def _is_same(
        self,
        name: str,
        before: Callable[..., Any],
        module: nn.Module,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> bool:
        """Whether ``attend`` gives what the module's function gives on random values.

        They are compared before the step is recorded, for each kind of module and of call.
        """
        query, key, value, mask = tensors
        shapes = (query.shape, key.shape[1:], value.shape[1:], None if mask is None else mask.dtype)
        kind = name, type(module), shapes, options["scaling"], options["softcap"], options["sinks"] is not None
        if kind not in self._same:
            if is_recording(query):
                return False
            count, tokens = min(len(query), 2), min(key.shape[2], 160)
            values = [
                random_values((count, *each.shape[1:2], length, each.shape[-1]), each, seed)
                for seed, (each, length) in enumerate(((query, 1), (key, tokens), (value, tokens)))
            ]
            some = None if mask is None else part_of(mask, count, tokens)

            def theirs(*values: Tensor) -> Tensor:
                found: Tensor = before(module, *values, some, **kwargs)[0]
                return found

            def ours(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
                return attend(query, keys, values, some, **options)

            self._same[kind] = alike(theirs, ours, *values)
        return self._same[kind]


def part_of(mask: Tensor, count: int, tokens: int) -> Tensor:
    """Returns a mask of the same dtype that leaves out the first tokens of the last row, and the last ones of all."""
    keeps = torch.arange(tokens, device=mask.device).expand(count, 1, 1, tokens) < tokens - tokens // 4
    keeps = keeps.clone()
    keeps[-1, ..., : tokens // 8] = False
    if mask.dtype is torch.bool:
        return keeps
    return torch.zeros_like(keeps, dtype=mask.dtype).masked_fill_(~keeps, torch.finfo(mask.dtype).min)
