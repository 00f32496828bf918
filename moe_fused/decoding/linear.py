"""Linear layers of bitsandbytes in 4 bits as one launch for all that share an input, while a decoding step is recorded.

bitsandbytes launches a kernel for each layer, and for more than a few rows it may dequantize the whole matrix before torch
multiplies it. ``linear_4bit`` of the kernel package reads the same bytes. The projections to queries, keys and values are
one launch: that to queries computes all of them, and the others return their part if they get the very same input. Layers
of PEFT hand their input on to their base layer, so nothing more has to be done for adapters.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_fused.hub import get_kernel, submodule

from .alike import DTYPES, alike, random_values

# Layers of one module that its forward calls with the same input, the first of them first.
SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# The most rows that are multiplied so: the most sequences whose steps are recorded.
MOST_ROWS = 64
# Scales that share a second-level scale; bitsandbytes has no other number.
NESTED_BLOCK = 256


@contextlib.contextmanager
def fewer_launches(model: nn.Module) -> Iterator[int]:
    """Lets a model, within the block, compute its 4-bit linear layers as the kernel package does, without gradients.

    Args:
        model: Any module. Layers of bitsandbytes in 4 bits whose ``forward`` somebody replaced stay as they are.

    Yields:
        How many layers compute otherwise within the block.
    """
    undo: list[Callable[[], object]] = []
    try:
        for layers in _groups(model):
            group = _Group(layers)
            for index, layer in enumerate(layers):
                layer.forward = _Forward(group, index, layer.forward)
                undo.append(functools.partial(delattr, layer, "forward"))
        yield len(undo)
    finally:
        for each in undo:
            each()


def _groups(model: nn.Module) -> Iterator[list[Any]]:
    """Yields the layers that are replaced, those that share an input together."""
    same: dict[tuple[Any, ...], bool] = {}
    found: dict[int, Any] = {
        id(module): module for module in model.modules() if _is_served(module) and _is_same(module, same)
    }
    for module in model.modules():
        for names in SHARING:
            layers = [_base(getattr(module, name, None)) for name in names]
            together = [layer for layer in layers if id(layer) in found]
            if len(together) > 1 and len({_kind(layer) for layer in together}) == 1:
                yield [found.pop(id(layer)) for layer in together]
    for layer in found.values():
        yield [layer]


def _base(layer: Any) -> Any:
    """Returns the layer inside of PEFT's, or the layer itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _kind(layer: Any) -> tuple[Any, ...]:
    """What layers must have in common to be one launch."""
    return layer.in_features, layer.weight.device, layer.compute_dtype


def _is_served(module: Any) -> bool:
    """Whether a module is a 4-bit layer of bitsandbytes whose bytes the kernel package reads as they are."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    layer_type = getattr(getattr(bitsandbytes, "nn", None), "Linear4bit", None)
    if layer_type is None or not isinstance(module, layer_type) or type(module).forward is not layer_type.forward:
        return False
    if torch.version.hip is not None:  # where nobody has run these kernels
        return False
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None or "forward" in vars(module) or getattr(state, "packing_format_for_cpu", False):
        return False
    if tuple(state.shape) != (module.out_features, module.in_features) or not module.compute_type_is_set:
        return False
    weights = module.out_features * module.in_features
    # Other rows are read only once they are dequantized.
    if module.in_features % submodule(get_kernel(), "tuning").ROW_UNIT or weights % state.blocksize:
        return False
    return module.compute_dtype in (*DTYPES, None) and _has_our_codes(state)


def _is_same(layer: Any, same: dict[tuple[Any, ...], bool]) -> bool:
    """Whether the kernel package computes what bitsandbytes computes for a layer, on random rows.

    Args:
        layer: The layer.
        same: What was found for other layers. It is asked of one of each kind.
    """
    state = layer.weight.quant_state
    quantized = state.quant_type, state.blocksize, state.nested, layer.weight.dtype
    kind = *_kind(layer), layer.out_features, layer.bias is None, *quantized
    if kind not in same:
        like = torch.empty(0, dtype=layer.compute_dtype or torch.bfloat16, device=layer.weight.device)
        group = _Group([layer])
        rows = random_values((3, layer.in_features), like)
        same[kind] = alike(layer.forward, lambda x: group.output(0, x), rows)
    return same[kind]


def _has_our_codes(state: Any) -> bool:
    """Whether the values of nibbles, and those of scales' bytes, are the ones that the kernel package has."""
    formats = submodule(get_kernel(), "formats")
    if state.quant_type not in formats.names():
        return False
    codes = torch.tensor(formats.named(state.quant_type).codes)
    if not torch.equal(state.code.detach().float().cpu(), codes):
        return False
    if not state.nested:
        return True
    nested_code = submodule(get_kernel(), "formats.absmax").nested_code(torch.device("cpu"))
    second = state.state2
    return bool(second.blocksize == NESTED_BLOCK and torch.equal(second.code.detach().float().cpu(), nested_code))


def _matrix(layer: Any, dtype: torch.dtype) -> Any:
    """Returns the weight of a layer as the kernel package takes it, in the memory of bitsandbytes."""
    kernel, state = get_kernel(), layer.weight.quant_state
    shape = (1, layer.out_features, layer.in_features)
    form = kernel.Format4bit(shape, state.quant_type, state.blocksize, state.nested, dtype=dtype)
    packed = layer.weight.data
    if packed.dtype is not torch.uint8:
        packed = packed.view(torch.uint8)  # bnb_4bit_quant_storage
    nested = (state.state2.absmax, state.offset) if state.nested else (None, None)
    matrix: Any = kernel.interchange.matrix_of_piece(kernel.Piece(packed, state.absmax, *nested), form)
    return matrix


class _Group:
    """Layers that share an input, and what was computed for those that have not been called yet.

    Args:
        layers: Layers of bitsandbytes.
    """

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._matrices: dict[torch.dtype, list[Any]] = {}
        self._input: Tensor | None = None
        self._version: int | None = None
        self._waiting: dict[int, Tensor] = {}

    def output(self, index: int, x: Tensor) -> Tensor:
        """Returns the output of a layer. All are computed with the first; one with another input is computed alone."""
        if index == 0:
            self._waiting = dict(enumerate(self._compute(x, slice(None))))
            self._input, self._version = x, _version(x)
        elif self._input is not x or self._version != _version(x) or index not in self._waiting:
            return self._compute(x, slice(index, index + 1))[0]
        output = self._waiting.pop(index)
        if not self._waiting:
            self._input = None
        return output

    def _compute(self, x: Tensor, which: slice) -> list[Tensor]:
        """Computes the outputs of some of the layers."""
        dtype: torch.dtype = self._layers[0].compute_dtype or x.dtype
        if dtype not in self._matrices:
            self._matrices[dtype] = [_matrix(layer, dtype) for layer in self._layers]
        biases = [None if layer.bias is None else layer.bias.to(dtype) for layer in self._layers[which]]
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        outputs = get_kernel().linear_4bit(rows, self._matrices[dtype][which], biases)
        return [each.view(*x.shape[:-1], each.shape[-1]).to(x.dtype) for each in outputs]


class _Forward:
    """The forward of one layer of a group.

    Args:
        group: The group.
        index: The place of the layer in it.
        before: The forward of bitsandbytes, which serves what the kernel does not.
    """

    def __init__(self, group: _Group, index: int, before: Callable[..., Tensor]) -> None:
        self._group, self._index, self._before = group, index, before

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_large = x.numel() > MOST_ROWS * x.shape[-1]
        if args or kwargs or is_large or x.numel() == 0 or torch.is_grad_enabled() or x.dtype not in DTYPES:
            return self._before(x, *args, **kwargs)
        return self._group.output(self._index, x)


def _version(x: Tensor) -> int | None:
    """How often a tensor was written in place. Tensors of an inference mode do not count that."""
    return None if x.is_inference() else x._version
