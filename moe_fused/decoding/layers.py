"""The attention of a layer with one launch for everything between its projections and the attention itself.

Norms of heads, the rotary embedding and the write into the cache are one kernel, in attention modules whose ``forward`` does
just this. Whether it does is found by comparing, for each module, the output and what is written into a cache of random keys
and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import attention
from .alike import alike, is_recording, random_values
from .heads import Place, Rotation, can_rotate, can_write, norm_and_rotate
from .norms import Norm

__all__ = ["Layer", "layers"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
# The most tokens of a cache with which layers are compared, and the place of the one that is written.
TRIED, PLACE = 96, 60


def layers(
    model: nn.Module, norms: Mapping[nn.Module, Norm], rotations: Mapping[str, Rotation]
) -> Iterator[tuple[nn.Module, Layer]]:
    """Yields the attention modules of a model that look like those that ``Layer`` computes.

    Args:
        model: The model.
        norms: What its norms do.
        rotations: The rotary embeddings, by the names of the files whose modules use them.
    """
    for module in model.modules():
        rotation = rotations.get(type(module).__module__)
        if rotation is None or "forward" in vars(module) or not _looks_like_attention(module):
            continue
        pair = [norms.get(getattr(module, name)) for name in NORMS if hasattr(module, name)]
        if len(set(pair)) <= 1 and len(pair) in (0, 2) and None not in pair:
            yield module, Layer(module, pair[0] if pair else None, rotation)


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether a module has nothing but projections of queries, keys, values and outputs, and norms of heads."""
    children = {name for name, _ in module.named_children()}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    head_size = getattr(module, "head_dim", None)
    return (
        children >= set(PROJECTIONS)
        and children <= {*PROJECTIONS, *NORMS}
        and own <= {"sinks"}
        and isinstance(head_size, int)
        and isinstance(getattr(module, "layer_idx", None), int)
        and isinstance(getattr(module, "scaling", None), float)
        and all(getattr(module, name).weight.shape == (head_size,) for name in NORMS if name in children)
    )


class Layer:
    """Computes one token a sequence as an attention module does, in the place of its ``forward``.

    Args:
        module: The module.
        norm: What the norms of its heads do, if it has them.
        rotation: Its rotary embedding.
    """

    def __init__(self, module: nn.Module, norm: Norm | None, rotation: Rotation) -> None:
        self._module: Any = module
        self._norm, self._rotation = norm, rotation
        self._before = type(module).forward
        self._is_same: bool | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the output (B, 1, features) and None, or what the module returns if it is not served."""
        inputs = {
            "position_embeddings": position_embeddings, "attention_mask": attention_mask, "past_key_values": past_key_values,
        }  # fmt: skip
        if hidden_states.dim() == 3 and hidden_states.shape[1] == 1 and not self._module.training:
            place = _place(past_key_values, self._module.layer_idx)
            if place is not None and attention.are_without_effect(kwargs):
                if self._is_same is None and not is_recording(hidden_states):
                    self._is_same = self._compare(hidden_states, place, inputs, kwargs)
                if self._is_same:
                    found = self._compute(hidden_states, position_embeddings, attention_mask, place)
                    if found is not None:
                        return found, None
        return self._before(self._module, hidden_states, **inputs, **kwargs)

    def _compute(self, hidden: Tensor, angles: Any, mask: Tensor | None, place: Place) -> Tensor | None:
        """Returns the output, or None if the kernels do not serve these inputs. Nothing has been written then."""
        module = self._module
        shape = (len(hidden), 1, -1, module.head_dim)
        query, key, value = (
            projection(hidden).view(shape).transpose(1, 2)
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        if not (isinstance(angles, tuple) and len(angles) == 2 and can_rotate(query, key, *angles)):
            return None
        is_half = self._rotation.is_half(query, angles[0])
        if is_half is None or not can_write(key, value, place):
            return None
        if not attention.is_served(query, place.keys, place.values, mask):
            return None
        weights = (module.q_norm.weight, module.k_norm.weight) if self._norm is not None else None
        query = norm_and_rotate(query, key, value, angles, place, weights=weights, norm=self._norm, is_half=is_half)
        sinks = getattr(module, "sinks", None)
        found = attention.attend(query, place.keys, place.values, mask, module.scaling, sinks=sinks)
        output: Tensor = module.o_proj(found.reshape(len(hidden), 1, -1))
        return output

    def _compare(self, hidden: Tensor, place: Place, inputs: Mapping[str, Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the module gives the same for random hidden states, over a cache of random keys and values."""
        count, tokens = min(len(hidden), 2), min(place.keys.shape[2], TRIED)
        mask, angles = inputs["attention_mask"], inputs["position_embeddings"]
        some = None if mask is None else attention.part_of(mask, count, tokens)
        if not isinstance(angles, tuple) or any(len(each) not in (1, len(hidden)) for each in angles):
            return False
        angles = tuple(each[:count] for each in angles)

        def filled() -> _Cache:
            held = [
                random_values((count, each.shape[1], tokens, each.shape[3]), each, seed)
                for seed, each in enumerate((place.keys, place.values), 1)
            ]
            position = torch.full_like(place.position, min(PLACE, tokens - 1))
            return _Cache(Place(held[0], held[1], position, position.clone()))

        def theirs(values: Tensor) -> tuple[Tensor, ...]:
            cache = filled()
            options = {"position_embeddings": angles, "attention_mask": some, "past_key_values": cache, **kwargs}
            output, _ = self._before(self._module, values, **options)
            return output, cache.place.keys, cache.place.values

        def ours(values: Tensor) -> tuple[Tensor, ...]:
            cache = filled()
            output = self._compute(values, angles, some, cache.place)
            if output is None:
                raise ValueError("the kernels do not serve this")
            return output, cache.place.keys, cache.place.values

        return alike(theirs, ours, random_values((count, *hidden.shape[1:]), hidden))


class _Cache:
    """A static cache whose every layer is the same one, to compare with."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        at = self.place.position.reshape(1)
        self.place.keys.index_copy_(2, at, key)
        self.place.values.index_copy_(2, at, value)
        return self.place.keys, self.place.values


def _place(cache: Any, index: int) -> Place | None:
    """Where a layer of ``generation.StepCache`` writes the next token, or None if it does not know."""
    held: Any = getattr(cache, "layers", None)
    layer: Any = held[index] if held is not None and index < len(held) else None
    position = getattr(layer, "position", None)
    return None if position is None else Place(layer.keys, layer.values, position, layer.cumulative_length)
