"""Norms and rotary embeddings in one launch each, in place of a model's own while a decoding step is recorded.

A layer of Qwen3-MoE launches some 55 small kernels for its four norms and its rotary embedding, which take half of a step of
one token. Liger has both as single kernels. Nothing is changed for good: a graph keeps what it was recorded with.

A model's function is replaced only if Liger's gives the same on random values, up to rounding: norms of some families add
one to their weight, and some rotary embeddings turn neighbours instead of halves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .alike import alike, random_values

ROTARY = "apply_rotary_pos_emb"


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device: on a GPU of NVIDIA or AMD, and on a CPU in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return device.type == "cuda" or (device.type == "cpu" and bool(triton.knobs.runtime.interpret))


@contextlib.contextmanager
def fewer_launches(model: nn.Module) -> Iterator[None]:
    """Lets a model, within the block, compute norms and rotary embeddings in one launch each, where they are known."""
    undo: list[Callable[[], object]] = []
    attention = _attention(model)
    try:
        for norm, function in _norms(model):
            norm.forward = function
            undo.append(functools.partial(delattr, norm, "forward"))
        for module, before, function in _rotations(model):
            setattr(module, ROTARY, function)
            undo.append(functools.partial(setattr, module, ROTARY, before))
        with attention:
            yield
    finally:
        for each in undo:
            each()


def _attention(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    if not runs_on(next(model.parameters()).device):
        return contextlib.nullcontext()
    from .attention import Attention

    return Attention(model).replaced()


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Yields the norms that Liger has, each with a function for it."""
    same: dict[tuple[type, torch.dtype, torch.device], bool] = {}
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), _eps(module)
        if weight is None or eps is None or "forward" in vars(module):
            continue
        function = functools.partial(_norm, weight=weight, eps=eps)
        kind = type(module), weight.dtype, weight.device
        if kind not in same:
            same[kind] = alike(module, function, random_values((3, len(weight)), weight))
        if same[kind]:
            yield module, function


def _eps(module: nn.Module) -> float | None:
    """The term that keeps a norm finite, if a module looks like a norm over its last dimension with a weight alone."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if not type(module).__name__.endswith("RMSNorm") or names != ["weight"] or list(module.children()):
        return None
    weight: Any = module.weight
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(eps) if weight.dim() == 1 and isinstance(eps, float) else None


def _norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    found: Tensor = _liger().liger_rms_norm(values, weight, eps, in_place=False)
    return found


def _rotations(model: nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """Yields the files of Transformers whose rotary embedding Liger has, with the function before and after."""
    like = next(each for each in model.parameters() if each.is_floating_point())
    modules: dict[str, Any] = {
        type(module).__module__: sys.modules[type(module).__module__] for module in model.modules()
    }
    for module in modules.values():
        before = getattr(module, ROTARY, None)
        if not callable(before):
            continue
        angles = random_values((2, 1, 32), like)
        cos, sin = (torch.cat([half, half], dim=-1) for half in (angles.cos(), angles.sin()))
        rotate = functools.partial(_rotate, before)
        if alike(
            _both(before),
            _both(rotate),
            random_values((2, 4, 1, 64), like),
            random_values((2, 2, 1, 64), like),
            cos,
            sin,
        ):
            yield module, before, rotate


def _both(rotate: Callable[..., Any]) -> Callable[..., Tensor]:
    """Makes one tensor of queries and keys. Liger may rotate in place."""
    return lambda q, k, cos, sin: torch.cat(rotate(q.clone(), k.clone(), cos, sin), dim=1)


def _rotate(before: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Rotates queries and keys (B, heads, T, head size); those of which a part is rotated as the model does."""
    if args or kwargs or not q.shape[-1] == k.shape[-1] == cos.shape[-1] or q.dim() != 4:
        return before(q, k, cos, sin, *args, **kwargs)
    return _liger().liger_rope(q, k, cos, sin)


@functools.cache
def _liger() -> Any:
    # It logs a warning for each of its back ends that is not installed here.
    logger = logging.getLogger("liger_kernel")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from liger_kernel.transformers import functional
    finally:
        logger.setLevel(level)
    return functional
