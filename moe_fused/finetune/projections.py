"""Linear layers with LoRA, and those that share an input together, with fewer passes over their outputs.

PEFT copies the output of a 4-bit layer. Then it makes the adapter's output, multiplies it with alpha / rank and adds it,
each in a pass of its own over numbers of the size of the output. Autograd adds the gradients of the input that queries,
keys and values share in further passes. In an attention layer of Qwen3-30B-A3B, a step with recomputation moves 1.2 GB for
this at 4096 tokens, beyond what the functions below move.

Here one autograd function computes queries, keys and values, and another one the projection after attention. The product
of an adapter adds to the output of the base layer in place, with alpha / rank as a part of it. The thin products with
lora_A are one for all three layers, and so are those backward. The gradient of the input is a sum that the products add
up. Each weight in 4 bits is dequantized when it is needed, as bitsandbytes does it. Results differ from PEFT's by roundings
only, of which there are fewer.

The layers keep their classes and weights. Within ``joined``, each has a forward function of its own. The first of a group
that is called computes the outputs of all, and the others return theirs if they are called with the same tensor. PEFT's own
forward runs where these functions do not serve: with dropout, variants of LoRA such as DoRA, merged or disabled adapters,
another dtype, or autocast.

With ``MOE_FUSED_QKV=1`` in the environment, ``finetune`` trains within ``joined``. No GPU has run it yet, so it is off by
default.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import layer as lora_layers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# The environment variable that, if it is 1, turns this on.
VARIABLE = "MOE_FUSED_QKV"
# Layers that share their input: these names side by side in one module.
_SHARING = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class _Part:
    """A layer in one call: its base layer, and the ranks and factors of its active adapters."""

    base: nn.Module
    ranks: tuple[int, ...]
    factors: tuple[float, ...]

    @property
    def rank(self) -> int:
        """The rank of all adapters together."""
        return sum(self.ranks)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The base layer's weight, (out, in), dequantized if it is in 4 bits."""
        weight: Any = self.base.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            plain: Tensor = weight.detach()
            return plain
        from bitsandbytes.functional import dequantize_4bit

        made: Tensor = dequantize_4bit(weight.detach().view(-1, 1), state).to(dtype)
        return made


class _Projections(torch.autograd.Function):
    """Computes layers over one input x (..., in). The weights lora_A and lora_B of their adapters follow, layer by layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[_Part], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.parts = parts
        ctx.set_materialize_grads(False)
        rows, thin = x.reshape(-1, x.shape[-1]), list(weights[0::2])
        low = rows @ _stacked(thin).T
        outputs, column = [], 0
        seconds = iter(weights[1::2])
        for part in parts:
            output = part.base(x)
            flat = output.view(-1, output.shape[-1])
            for rank, factor in zip(part.ranks, part.factors, strict=True):
                flat.addmm_(low[:, column : column + rank], next(seconds).T, alpha=factor)
                column += rank
            outputs.append(output)
        ctx.save_for_backward(x, low, *weights)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, low, *weights = ctx.saved_tensors
        rows, of_low = x.reshape(-1, x.shape[-1]), torch.zeros_like(low) if None in grads else torch.empty_like(low)
        of_rows: Tensor | None = None
        of_weights: list[Tensor | None] = [None] * len(weights)
        column, index = 0, 0
        for part, grad in zip(ctx.parts, grads, strict=True):
            if grad is None:
                column, index = column + part.rank, index + 2 * len(part.ranks)
                continue
            flat = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[0]:
                dense = part.dense(flat.dtype)
                of_rows = flat @ dense if of_rows is None else of_rows.addmm_(flat, dense)
                del dense
            for rank, factor in zip(part.ranks, part.factors, strict=True):
                place = slice(column, column + rank)
                of_low[:, place] = (flat @ weights[index + 1]).mul_(factor)
                if ctx.needs_input_grad[2 + index + 1]:
                    of_weights[index + 1] = (flat.T @ low[:, place]).mul_(factor)
                column, index = column + rank, index + 2
        thin = weights[0::2]
        if of_rows is not None:
            of_rows = of_rows.addmm_(of_low, _stacked(thin)).view(x.shape)
        if any(ctx.needs_input_grad[2::2]):
            parts = (of_low.T @ rows).split([len(weight) for weight in thin])
            of_weights[0::2] = [
                part if needed else None for part, needed in zip(parts, ctx.needs_input_grad[2::2], strict=True)
            ]
        return of_rows, None, *of_weights


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


class _Group:
    """Layers of PEFT that are called with the same tensor, one after the other."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._forwards: list[Callable[..., Tensor]] = [layer.forward for layer in layers]
        self._input: Tensor | None = None
        # The outputs for this input that were not asked for yet.
        self._waiting: dict[int, Tensor] = {}

    def call(self, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the layer of that number."""
        if x is self._input and index in self._waiting and not args and not kwargs:
            output = self._waiting.pop(index)
            if not self._waiting:
                self._input = None
            return output
        self._input, self._waiting = None, {}
        parts = None if args or kwargs or torch.is_autocast_enabled(x.device.type) else _parts(self._layers, x)
        if parts is None:
            return self._forwards[index](x, *args, **kwargs)
        weights = [
            weight
            for layer in self._layers
            for name in _active(layer)
            for weight in (layer.lora_A[name].weight, layer.lora_B[name].weight)
        ]
        outputs: tuple[Tensor, ...] = _Projections.apply(x, parts, *weights)
        self._waiting = {number: output for number, output in enumerate(outputs) if number != index}
        if self._waiting:
            self._input = x
        return outputs[index]


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _parts(layers: Sequence[Any], x: Tensor) -> list[_Part] | None:
    """Describes layers for a call with x, or returns None if PEFT must compute one of them."""
    parts = []
    for layer in layers:
        names = _active(layer)
        if layer.disable_adapters or layer.merged or not names or not x.numel():
            return None
        base = layer.base_layer
        if getattr(base, "compute_dtype", None) not in (None, x.dtype):
            return None
        if not hasattr(base, "quant_state") and base.weight.dtype is not x.dtype:
            return None
        for name in names:
            pair: list[Any] = [layer.lora_A[name], layer.lora_B[name]]
            if name in layer.lora_variant or not isinstance(layer.lora_dropout[name], nn.Identity):
                return None
            if any(one.bias is not None or one.weight.dtype is not x.dtype for one in pair):
                return None
        ranks = tuple(len(layer.lora_A[name].weight) for name in names)
        parts.append(_Part(base, ranks, tuple(float(layer.scaling[name]) for name in names)))
    return parts


def _is_known(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT with LoRA over a frozen linear layer, and both are of the known classes."""
    kind = _kinds().get(type(module))
    base = getattr(module, "base_layer", None)
    if kind is None or not isinstance(base, nn.Module) or type(base) is not kind:
        return False
    trains = any(parameter.requires_grad for parameter in base.parameters())
    return not trains and not getattr(module, "fan_in_fan_out", False) and "forward" not in vars(module)


@functools.cache
def _kinds() -> dict[type, type]:
    """The classes of PEFT's layers that are known, each with the class of its base layer."""
    kinds: dict[type, type] = {lora_layers.Linear: nn.Linear}
    with contextlib.suppress(ImportError, AttributeError):  # without bitsandbytes
        nn_4bit: Any = importlib.import_module("bitsandbytes.nn")
        adapted: Any = importlib.import_module("peft.tuners.lora.bnb")
        kinds[adapted.Linear4bit] = nn_4bit.Linear4bit
    return kinds


def groups_of(model: nn.Module) -> list[list[nn.Module]]:
    """Returns the layers of a model that can be joined: those that share an input together, and each other one by itself."""
    found: list[list[nn.Module]] = []
    taken: set[nn.Module] = set()
    for module in model.modules():
        layers = [getattr(module, name, None) for name in _SHARING]
        known: list[Any] = [layer for layer in layers if isinstance(layer, nn.Module) and _is_known(layer)]
        if len(known) == len(_SHARING) and len({layer.in_features for layer in known}) == 1:
            found.append(known)
            taken.update(known)
    found += [[module] for module in model.modules() if module not in taken and _is_known(module)]
    return found


def wanted() -> bool:
    """Whether the environment asks for this."""
    return os.environ.get(VARIABLE) == "1"


@contextlib.contextmanager
def joined(model: nn.Module) -> Iterator[int]:
    """Lets layers with LoRA, within the block, compute as this module has it.

    Args:
        model: The model with adapters. Its layers keep their classes and weights.

    Yields:
        The number of layers that do so.
    """
    layers = []
    try:
        for members in groups_of(model):
            group = _Group(members)
            for index, layer in enumerate(members):
                layers.append(layer)
                layer.forward = functools.partial(group.call, index)
        yield len(layers)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
