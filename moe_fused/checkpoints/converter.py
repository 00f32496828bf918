"""Experts on their way from a checkpoint into the model, as a converter in Transformers' loading loop.

Transformers gives every tensor of a checkpoint to the converter that claims its name, and asks each to convert once it has
everything for a parameter. ``ExpertsConverter`` claims whatever belongs to an experts parameter, in any layout, decides by
what it got, and takes the tensors one at a time: a matrix is read from the file when it is to be quantized, and not before.

It raises what is wrong at once instead of noting it for Transformers' report, so that nothing half loaded is returned.
"""

from __future__ import annotations

from concurrent.futures import Future
from copy import copy, deepcopy
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.core_model_loading import MergeModulelist, WeightConverter

from moe_fused.hub import get_kernel

from .entries import Entry, by_matrix, by_projection, layout_of, load_dense, load_matrix, read_packed
from .names import Names, Place, Target
from .quant_state import quantize_matrix

if TYPE_CHECKING:
    from qwen3_moe_fused.quantization import Packed4bitWeights


class Quantization(NamedTuple):
    """What is asked for.

    Attributes:
        pre_quantized: the checkpoint says that it is quantized; 4-bit experts are read as they are, dense ones stay dense.
            Otherwise dense experts are quantized.
        quant_type, blocksize, double_quant: of what is quantized.
        compute_dtype: of products with the weights.
    """

    pre_quantized: bool
    quant_type: str
    blocksize: int
    double_quant: bool
    compute_dtype: torch.dtype


def attach(module: nn.Module, name: str, weights: Packed4bitWeights, dtype: torch.dtype) -> None:
    """Makes ``weights`` the parameter ``name`` of an experts module.

    Args:
        dtype: of the weights before they were quantized; what checkpoints say, whatever the products compute in.
    """
    weights.attach(module, name)
    setattr(module, f"{name}_source_dtype", dtype)


class _Pattern(str):
    """A source pattern that carries the place of a tensor from one call by Transformers to the next."""

    __slots__ = ("place",)
    place: Place


class ExpertsConverter(WeightConverter):
    """Converts all tensors of ``names.targets``; see the module's docstring.

    Attributes:
        names: what it claims.
        quantization: what to do with it.
        loaded: names of the targets that were converted; shared by all copies.
    """

    def __init__(self, names: Names, quantization: Quantization) -> None:
        # A pattern that equals no other converter's, and an operation, because there must be some: `convert` does it all.
        super().__init__(["moe_fused"], ["moe_fused"], [MergeModulelist()])
        self.names = names
        self.quantization = quantization
        self.loaded: set[str] = set()
        self.entries: list[Entry] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertsConverter:
        # Transformers copies the converter for every tensor of a checkpoint.
        fresh = copy(self)
        fresh.entries = []
        return fresh

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        place = self.names.locate(source_key)
        if place is None:
            return source_key, None
        pattern = _Pattern(self.source_patterns[0])
        pattern.place = place
        return place.target, pattern

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        assert isinstance(source_pattern, _Pattern)
        # Where tensors are not read by threads, it is a function that reads it.
        load = future.result if isinstance(future, Future) else future
        self.entries.append(Entry(source_key, source_pattern.place, load))

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Tensor]:
        """The parameter ``layer_name`` and its companions, which the module has from now on.

        Raises:
            ValueError: names the tensor that is missing, superfluous, or does not fit.
            NotImplementedError: the parameter is sharded.
        """
        entries, self.entries = self.entries, []
        target = self.names.targets[layer_name]
        path, _, name = layer_name.rpartition(".")
        module = model.get_submodule(path)
        placeholder = getattr(module, name)
        if hasattr(placeholder, "device_mesh"):
            raise NotImplementedError(
                f"{layer_name} is sharded: 4-bit experts cannot be loaded with a tp_plan or ep_plan"
            )
        self.loaded.add(layer_name)
        layout = layout_of(layer_name, entries)
        if any(entry.place.part for entry in entries):
            if not self.quantization.pre_quantized:
                key = next(entry.key for entry in entries if entry.place.part)
                raise ValueError(f"{key} is of 4-bit weights, but the checkpoint's config has no quantization_config")
            dtype, weights = read_packed(self.names, target, layout, entries)
        elif self.quantization.pre_quantized:
            return {layer_name: self._dense(target, layout, entries, model).to(placeholder.dtype)}
        else:
            dtype, weights = self._quantize(target, layout, entries, model)
        attach(module, name, weights.to(dtype=self.quantization.compute_dtype), dtype)
        return {
            layer_name if part == "packed" else f"{layer_name}_{part}": value
            for part, value in weights.tensors().items()
        }

    def _dense(self, target: Target, layout: str, entries: list[Entry], model: Any) -> Tensor:
        """The dense stack, put together as Transformers does."""
        if layout == "fused":
            stack = load_dense(entries[0])
        elif layout == "stacked":
            stack = torch.cat([load_dense(entry) for entry in by_projection(self.names, target, entries)], dim=1)
        else:
            if layout == "per expert":
                by_matrix(self.names, target, entries)  # all are there
            converter = deepcopy(self.names.converters[entries[0].place.converter])
            for entry in entries:
                load: Any = partial(load_dense, entry)
                converter.add_tensor(target.name, entry.key, entry.place.pattern, load)
            stack = converter.convert(target.name, model=model, config=model.config)[target.name]
        if tuple(stack.shape) != target.shape:
            raise ValueError(f"{entries[0].key} must make up shape {target.shape}, got {tuple(stack.shape)}")
        return stack

    def _quantize(
        self, target: Target, layout: str, entries: list[Entry], model: Any
    ) -> tuple[torch.dtype, Packed4bitWeights]:
        if layout == "per expert":
            table = by_matrix(self.names, target, entries)
            matrices = (load_matrix(parts[""], target) for parts in table)
        else:
            stack = self._dense(target, layout, entries, model)
            matrices = (matrix for expert in stack for matrix in expert.chunk(target.projections))
        first = next(matrices)
        wanted = self.quantization
        form = get_kernel().quantization.Format4bit(
            target.shape, wanted.quant_type, wanted.blocksize, wanted.double_quant, target.projections, first.dtype
        )
        pieces = (
            quantize_matrix(matrix, wanted.quant_type, wanted.blocksize, wanted.double_quant)
            for matrix in chain([first], matrices)
        )
        return first.dtype, get_kernel().quantization.Packed4bitWeights.from_pieces(pieces, form)
