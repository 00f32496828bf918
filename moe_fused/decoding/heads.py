"""Rotary embeddings and the write into the cache in one launch each, or in one launch together with the norms of heads.

Transformers launches ten kernels for a rotary embedding, and five to write a token into a static cache.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor, nn

from .alike import DTYPES, alike, random_values
from .norms import Norm

__all__ = ["Place", "Rotation", "norm_and_rotate", "rotate", "rotations", "write"]

ROTARY = "apply_rotary_pos_emb"
LARGEST_HEAD = 1024
# How many heads a program takes.
BLOCK_HEADS = 4


@dataclass(frozen=True)
class Place:
    """Where a token is written into a cache.

    Attributes:
        keys, values: (B, heads, tokens, head size) and (B, heads, tokens, value size), the cache of a layer.
        position: One int64 on the device: the place of the token, counted from 0.
        length: One int64 on the device: the number of tokens in the cache, which the write sets to position + 1.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    length: Tensor


def write(key: Tensor, value: Tensor, place: Place) -> None:
    """Writes one token of each sequence into a cache.

    Args:
        key: (B, heads, 1, head size), in the dtype of the cache.
        value: (B, heads, 1, value size), likewise.
        place: Where it is written.
    """
    _launch(None, key, value, None, place.keys, place)


def can_write(key: Tensor, value: Tensor, place: Place) -> bool:
    """Whether ``write`` serves these: one token a sequence, and shapes, dtypes and strides that the kernel takes."""
    return all(
        new.dim() == held.dim() == 4
        and new.shape == (len(held), held.shape[1], 1, held.shape[3])
        and new.dtype is held.dtype
        and new.dtype in DTYPES
        and new.stride(3) == held.stride(3) == 1
        and new.shape[3] <= LARGEST_HEAD
        for new, held in ((key, place.keys), (value, place.values))
    )


def wrote(layer: Any, key: Tensor, value: Tensor) -> bool:
    """Writes one token of each sequence into a layer of the cache, if ``write`` serves it, and says whether it did.

    Args:
        layer: A layer of ``generation.StepCache`` that knows the place of the token.
        key, value: As in ``write``.
    """
    place = Place(layer.keys, layer.values, layer.position, layer.cumulative_length)
    if not can_write(key, value, place):
        return False
    write(key, value, place)
    return True


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_half: bool = False) -> tuple[Tensor, Tensor]:
    """Returns the rotary embedding of one token a sequence, (B, heads, 1, head size), contiguous.

    The first and the second half of the numbers that turn belong together.

    Args:
        q, k: (B, heads, 1, head size), of one dtype, which cos and sin have as well.
        cos, sin: (B or 1, 1, R), contiguous. The first R numbers of a head turn, and others stay.
        is_half: Whether R is half of the head size, and each number of cos and sin serves both halves, so that all of a
            head turns.
    """
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(q, k, None, q_out, k_out, None, (cos, sin), is_half=is_half)
    return q_out, k_out


def can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether ``rotate`` takes these shapes, dtypes and strides. ``Rotation`` says whether it turns as a model does."""
    return (
        q.dim() == k.dim() == 4
        and (len(q), q.shape[2:]) == (len(k), k.shape[2:])
        and q.shape[2] == 1
        and q.dtype in DTYPES
        and q.dtype is k.dtype is cos.dtype is sin.dtype
        and q.stride(3) == k.stride(3) == 1
        and q.shape[3] <= LARGEST_HEAD
        and cos.shape == sin.shape
        and cos.dim() == 3
        and cos.shape[:2] in ((1, 1), (len(q), 1))
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


def norm_and_rotate(
    q: Tensor,
    k: Tensor,
    value: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    place: Place,
    *,
    weights: tuple[Tensor, Tensor] | None = None,
    norm: Norm | None = None,
    is_half: bool = False,
) -> Tensor:
    """Norms and rotates queries and keys, and writes keys and values into a cache.

    Args:
        q, k, value: (B, heads, 1, head size or value size).
        angles: cos and sin as in ``rotate``, or None if nothing turns.
        place: Where keys and values are written.
        weights: (head size,), those of the norms of queries and keys, or None if there are none.
        norm: What these do.
        is_half: As in ``rotate``.

    Returns:
        The queries (B, heads, 1, head size), contiguous.
    """
    turned = q.new_empty(q.shape)
    _launch(q, k, value, turned, place.keys, place, angles, weights=weights, norm=norm, is_half=is_half)
    return turned


def _launch(
    q: Tensor | None,
    k: Tensor,
    value: Tensor | None,
    q_out: Tensor | None,
    k_out: Tensor,
    place: Place | None,
    angles: tuple[Tensor, Tensor] | None = None,
    *,
    weights: tuple[Tensor, Tensor] | None = None,
    norm: Norm | None = None,
    is_half: bool = False,
) -> None:
    from . import heads_device as device_code

    batch, kv_heads, _, size = k.shape
    q_heads = 0 if q is None else q.shape[1]
    v_size = 1 if value is None else value.shape[3]
    cos, sin = angles or (None, None)
    rotated = 0 if cos is None else cos.shape[-1] * (2 if is_half else 1)
    blocks = -(-q_heads // BLOCK_HEADS) + (1 if value is None else 2) * -(-kv_heads // BLOCK_HEADS)
    device_code.heads_kernel[(blocks, batch)](
        q, k, value, q_out, k_out, None if place is None else place.values, *(weights or (None, None)), cos, sin,
        None if place is None else place.position, None if place is None else place.length,
        0.0 if norm is None else norm.eps,
        *((0, 0) if q is None else q.stride()[:2]), *k.stride()[:2], *((0, 0) if value is None else value.stride()[:2]),
        *k_out.stride()[:3], *((0, 0, 0) if place is None else place.values.stride()[:3]),
        0 if cos is None or len(cos) == 1 else cos.stride(0),
        Q_HEADS=q_heads, KV_HEADS=kv_heads, SIZE=size, V_SIZE=v_size, ROTATED=rotated, HAS_VALUES=value is not None,
        HAS_NORMS=norm is not None, IS_OFFSET=norm is not None and norm.is_offset, IS_HALF=is_half, BLOCK_HEADS=BLOCK_HEADS,
        BLOCK_HALF=triton.next_power_of_2(max(1, rotated // 2)), BLOCK_REST=triton.next_power_of_2(max(1, size - rotated)),
        BLOCK_V=triton.next_power_of_2(v_size), num_warps=2,
    )  # fmt: skip


@dataclass(frozen=True)
class Rotation:
    """How the rotary embedding of a model turns.

    Attributes:
        before: The model's function.
        whole: Whether ``rotate`` gives the same as that function if cos and sin are as wide as a head.
        narrow: What that function does if they are narrower. "part": it turns the first numbers of a head and leaves the
            rest. "half": it turns the whole head, as ``is_half`` of ``rotate``. Empty: ``rotate`` cannot do it.
    """

    before: Any
    whole: bool
    narrow: str

    def is_half(self, q: Tensor, cos: Tensor) -> bool | None:
        """Whether cos and sin are half as wide as what turns, or None if ``rotate`` does not have this."""
        width, size = cos.shape[-1], q.shape[-1]
        if width == size:
            return False if self.whole and width % 2 == 0 else None
        if self.narrow == "half" and 2 * width == size:
            return True
        return False if self.narrow == "part" and width < size and width % 2 == 0 else None

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Rotates queries and keys as ``rotate`` does, or as the model does where that is not the same."""
        is_half = self.is_half(q, cos) if not args and not kwargs and can_rotate(q, k, cos, sin) else None
        if is_half is None:
            return self.before(q, k, cos, sin, *args, **kwargs)
        return rotate(q, k, cos, sin, is_half=is_half)


def rotations(model: nn.Module) -> Iterator[tuple[Any, Rotation]]:
    """Yields the files of Transformers whose rotary embedding ``rotate`` has, each with a function in its place."""
    like = next(each for each in model.parameters() if each.is_floating_point())
    files = {type(module).__module__: sys.modules[type(module).__module__] for module in model.modules()}
    q, k = random_values((2, 4, 1, 64), like), random_values((2, 2, 1, 64), like, 1)
    for file in files.values():
        before = getattr(file, ROTARY, None)
        if not callable(before):
            continue
        same = {}
        for width, is_half in ((64, False), (32, False), (32, True)):
            angles = random_values((2, 1, width), like, 2)
            ours = functools.partial(rotate, is_half=is_half)
            same[width, is_half] = alike(_copying(before), ours, q, k, angles.cos(), angles.sin())
        narrow = "half" if same[32, True] else "part" if same[32, False] else ""
        if same[64, False] or narrow:
            yield file, Rotation(before, same[64, False], narrow)


def _copying(rotate: Any) -> Any:
    """A function that may rotate in place, for copies."""
    return lambda q, k, cos, sin: tuple(rotate(q.clone(), k.clone(), cos, sin))
