"""Merges LoRA into the weights of a model in 4 bits, quantizes them again, and measures what that loses."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from .targets import unwrapped
from .wrapper import ParamWrapper


@dataclass(frozen=True)
class Requantized:
    """A weight that was merged and quantized again.

    Attributes:
        name: the name of the parameter in the model, without ``.weight`` for a linear layer.
        error: the Frobenius norm of the difference from the exact merged weights, as a share of their norm.
    """

    name: str
    error: float


class _Norms:
    """Adds up the squares of exact weights and of their errors, a part of a weight at a time."""

    def __init__(self) -> None:
        self.exact = self.error = 0.0

    def add(self, exact: Tensor, rounded: Tensor) -> None:
        self.exact += float(torch.linalg.vector_norm(exact, dtype=torch.float64)) ** 2
        self.error += float(torch.linalg.vector_norm(rounded - exact, dtype=torch.float64)) ** 2

    def result(self, name: str) -> Requantized:
        """Raises ValueError if some weights are not finite."""
        if not math.isfinite(self.exact + self.error):
            raise ValueError(f"{name} merged with the adapter holds NaN or infinite values")
        return Requantized(name, math.sqrt(self.error / self.exact) if self.exact else 0.0)


def merge_in_format(
    adapted: Any, progress: Callable[[int, int], None] | None = None
) -> tuple[nn.Module, list[Requantized], int]:
    """Merges the active LoRA adapters of a ``PeftModel`` and quantizes 4-bit weights again, in the format that they have.

    Experts are merged by ``ParamWrapper.merge``, and linear layers of bitsandbytes by PEFT.

    Args:
        adapted: the model. PEFT's layers are removed from it.
        progress: called with the number of 4-bit weights that have been merged, and the number in total.

    Returns:
        The merged model, what quantizing again has lost of each adapted 4-bit weight, and the number of adapted layers that
        are dense.

    Raises:
        ValueError: some merged weights are NaN or infinite. The message names the parameter.
    """
    layers = list(_adapted(adapted.base_model.model))
    packed = [(name, layer) for name, layer in layers if _is_packed(layer)]
    results = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module to 4-bit linear may get different generations")
        warnings.filterwarnings("ignore", message="All adapters are already merged, nothing to do")
        for index, (name, layer) in enumerate(packed):
            merge = _merge_experts if isinstance(layer, ParamWrapper) else _merge_linear
            results.append(merge(name, layer))
            if progress is not None:
                progress(index + 1, len(packed))
        return adapted.merge_and_unload(), results, len(layers) - len(packed)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the layers with active adapters, by the names of what they adapt."""
    for path, layer in model.named_modules():
        if isinstance(layer, lora.LoraLayer) and _active(layer):
            name = unwrapped(path)
            yield (f"{name}.{layer.parameter_name}" if isinstance(layer, lora.ParamWrapper) else name), layer


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in (*layer.lora_A, *layer.lora_embedding_A)]


def _is_packed(layer: Any) -> bool:
    if isinstance(layer, ParamWrapper):
        return not isinstance(layer.get_param(), Tensor)
    return not isinstance(layer, lora.ParamWrapper) and hasattr(layer.get_base_layer().weight, "quant_state")


def _merge_experts(name: str, layer: ParamWrapper) -> Requantized:
    before: Any = layer.get_param()
    deltas = [layer.expert_deltas(adapter) for adapter in _active(layer)]
    layer.merge()
    layer.unmerged = None  # nothing will be unmerged, and these are copies of all weights
    after: Any = layer.get_param()
    norms = _Norms()
    for expert in range(before.shape[0]):
        exact = before.narrow(expert, 1).dequantize(torch.float32)[0]
        for delta in deltas:
            exact += delta(expert)
        norms.add(exact, after.narrow(expert, 1).dequantize(torch.float32)[0])
    return norms.result(name)


def _merge_linear(name: str, layer: Any) -> Requantized:
    base = layer.get_base_layer()
    exact, dtype = _dense(base.weight), base.weight.quant_state.dtype
    for adapter in _active(layer):
        if adapter in layer.lora_variant:
            exact = layer.lora_variant[adapter].merge_safe(layer, adapter, exact)
        else:
            exact += layer.get_delta_weight(adapter).float()
    layer.merge()
    base.weight.quant_state.dtype = dtype  # PEFT's sum may be wider, and checkpoints record its dtype
    norms = _Norms()
    norms.add(exact, _dense(base.weight))
    return norms.result(name)


def _dense(weight: Any) -> Tensor:
    """Returns the values of a linear layer of bitsandbytes in fp32."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    values: Tensor = dequantize_4bit(weight.data, state)
    return values
