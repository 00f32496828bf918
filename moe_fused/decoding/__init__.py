"""Replaces parts of a model while a decoding step is recorded, so that the step launches fewer kernels.

A layer of Qwen3-MoE launches some 60 kernels for one token, most of which do very little. These have kernels here:

- ``attention``: the attention of one token a sequence over a static cache.
- ``router``: the product, the softmax and the choice of a router.
- ``linear``: linear layers of bitsandbytes in 4 bits, those that share an input together.
- ``norms``: RMS norms.
- ``heads``: rotary embeddings, and the write of a token into the cache.
- ``layers``: norms of heads, rotary embeddings and the write into the cache in one launch, in attention modules that do
  nothing else between their projections and the attention.

A decoder layer also adds its input to what its two parts return. These two additions stay as they are. If the kernel of the
next norm made them, each layer would save two launches of 1.1 µs on an H200. But the additions are in the ``forward`` of the
whole layer, which would have to be replaced, and layers differ more among families than their parts do.

The model is changed only while a step is recorded, because the graph keeps the kernels that it was recorded with. A function
of the model is replaced only if ours gives the same on random values, up to rounding. That it need not do: norms of some
families add one to their weight, for example, and some rotary embeddings turn pairs of neighbours instead of halves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device: on a GPU of NVIDIA or AMD, and on a CPU in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return device.type == "cuda" or (device.type == "cpu" and bool(triton.knobs.runtime.interpret))


@contextlib.contextmanager
def fewer_launches(model: nn.Module) -> Iterator[None]:
    """Lets a model compute in fewer launches within the block, where that is the same.

    Args:
        model: A model of Transformers, on a device for which ``runs_on`` is True.
    """
    from .attention import Attention
    from .heads import ROTARY, rotations
    from .layers import layers
    from .linear import fewer_launches as fewer_products
    from .norms import norms
    from .router import routers

    attention = Attention(model)
    found, turns = list(norms(model)), list(rotations(model))
    modules: list[tuple[Any, Any]] = [*routers(model), *((module, function) for module, _, function in found)]
    by_file = {file.__name__: rotation for file, rotation in turns}
    modules += layers(model, {module: norm for module, norm, _ in found}, by_file)
    undo: list[Callable[[], object]] = []
    try:
        for module, function in modules:
            module.forward = function
            undo.append(functools.partial(delattr, module, "forward"))
        for file, rotation in turns:
            setattr(file, ROTARY, rotation)
            undo.append(functools.partial(setattr, file, ROTARY, rotation.before))
        with attention.replaced(), fewer_products(model):
            yield
    finally:
        for each in undo:
            each()
