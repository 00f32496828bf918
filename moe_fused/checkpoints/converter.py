"""Reads experts from a checkpoint into the model, as a converter in Transformers' loading loop.

Transformers gives every tensor of a checkpoint to the converter that claims its name, and asks the converter to convert once
it has all tensors of a parameter. ``ExpertsConverter`` claims every tensor that belongs to an experts parameter, in any
layout, and decides on the layout by the tensors that it got. It takes them one at a time: a matrix is read from the file
only when it is to be quantized.

It raises errors at once instead of noting them for Transformers' report, so that no half-loaded model is returned.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers.core_model_loading import MergeModulelist, WeightConverter

from moe_fused.hub import get_kernel

from .entries import (
    BY_EXPERT,
    PUBLISHED,
    Entry,
    by_matrix,
    by_projection,
    layout_of,
    load_dense,
    load_dense_rows,
    load_matrix,
    read_packed,
    read_published,
    share_of_matrices,
)
from .finite import broken_scales, is_finite
from .names import Names, Target, TensorRole
from .quant_state import quantize_matrix
from .share import Share, current, is_divided, local

if TYPE_CHECKING:
    from qwen3_moe_fused import Format4bit, Packed4bitWeights


class Quantization(NamedTuple):
    """How the experts of a model are to be loaded.

    Attributes:
        pre_quantized: whether the checkpoint says that it is quantized. If so, 4-bit experts are read as they are, and dense
            ones stay dense. Otherwise dense experts are quantized.
        quant_type, blocksize, double_quant: the format for experts that are quantized here, and of those that were published
            in a format without a description of its own.
        compute_dtype: the dtype of products with the weights.
        storage_dtype: the dtype of the parameters that hold the bytes of 4-bit weights.
    """

    pre_quantized: bool
    quant_type: str
    blocksize: int
    double_quant: bool | None
    compute_dtype: torch.dtype
    storage_dtype: torch.dtype = torch.uint8

    def format_of(self, target: Target, dtype: torch.dtype) -> Format4bit:
        """Returns the format of a stack that is packed so.

        Args:
            dtype: the dtype of the dequantized weights.
        """
        form: Format4bit = get_kernel().Format4bit(
            target.shape, self.quant_type, self.blocksize, self.double_quant, target.projections, dtype
        )
        return form


def attach(
    module: nn.Module,
    name: str,
    weights: Packed4bitWeights,
    dtype: torch.dtype,
    storage_dtype: torch.dtype = torch.uint8,
) -> dict[str, nn.Parameter]:
    """Makes ``weights`` the parameter ``name`` of an experts module.

    Args:
        dtype: the dtype of the weights before they were quantized, which checkpoints record beside the compute dtype.
        storage_dtype: the dtype of the parameters, which hold bytes.

    Returns:
        The parameters of the module that hold the weights, by their names in it.
    """
    made: dict[str, nn.Parameter] = get_kernel().modules.attach(weights, module, name, storage_dtype)
    setattr(module, f"{name}_source_dtype", dtype)
    return made


def activation_scales_name(name: str) -> str:
    """Returns the attribute of an experts module for the scales of activations that a checkpoint has beside ``name``."""
    return f"{name}_activation_scales"


def was_transposed(module: nn.Module) -> bool:
    """Whether the dense weights of an experts module are (E, in, out), while its packed ones are (E, out, in)."""
    return "dense_is_transposed" in vars(module)


def turn(module: Any) -> None:
    """Says on an experts module that its weights, which get packed, are (E, out, in) from now on."""
    module.is_transposed, module.dense_is_transposed = False, True


def restore_orientation(module: Any) -> None:
    """Undoes ``turn``, if it was called."""
    if was_transposed(module):
        module.is_transposed = True
        del module.dense_is_transposed


def _not_needed(key: str) -> NoReturn:
    raise AssertionError(f"{key} is read, although it belongs to another process or is read by rows")


class _Pattern(str):
    """A source pattern that also says what a tensor is.

    Transformers hands the pattern from ``rename_source_key`` to ``add_tensor``.
    """

    __slots__ = ("role",)
    role: TensorRole


class ExpertsConverter(WeightConverter):
    """Converts all tensors of ``names.targets``; see the module's docstring.

    Attributes:
        names: finds the tensors that it claims.
        quantization: how the experts are to be loaded.
        share: the process whose experts alone are loaded; None if all are.
        shares: the same for each target that a plan of Transformers has divided. All copies share this dictionary.
        loaded: the names of the targets that were converted. All copies share this set.
    """

    def __init__(self, names: Names, quantization: Quantization, shares: dict[str, Share] | None = None) -> None:
        # The pattern must differ from all other converters' patterns. There must be an operation, which `convert` replaces.
        super().__init__(["moe_fused"], ["moe_fused"], [MergeModulelist()])
        self.names = names
        self.quantization = quantization
        self.share = current()
        self.shares = {} if shares is None else shares
        self.loaded: set[str] = set()
        self.entries: list[Entry] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertsConverter:
        # Transformers copies the converter for every tensor of a checkpoint.
        fresh = copy(self)
        fresh.entries = []
        return fresh

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        role = self.names.locate(source_key)
        if role is None:
            return source_key, None
        pattern = _Pattern(self.source_patterns[0])
        pattern.role = role
        return role.target, pattern

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        assert isinstance(source_pattern, _Pattern)
        # Without threads, Transformers passes a function that reads the tensor.
        load = future.result if isinstance(future, Future) else future
        if self._is_not_needed(target_key, source_key, source_pattern.role):
            # What a thread has read already is let go with the future.
            load = partial(_not_needed, source_key)
            if isinstance(future, Future):
                future.cancel()
        self.entries.append(Entry(source_key, source_pattern.role, load))

    def _is_not_needed(self, target_name: str, key: str, role: TensorRole) -> bool:
        """Whether a tensor is of another process' experts, or only rows of it are read, by ``Share.rows``."""
        share = self._share_of(target_name)
        if share is None:
            return False
        if role.layout in BY_EXPERT:
            experts = self.names.targets[target_name].shape[0]
            return role.expert < experts and not share.holds(role.expert, experts)
        by_rows = ("fused", "published") if self.quantization.pre_quantized else ("fused", "published", "stacked")
        reads_rows = role.layout in by_rows
        return reads_rows and role.part != "format" and key in share.files

    def _share_of(self, target_name: str) -> Share | None:
        return self.shares.get(target_name, self.share)

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Tensor]:
        """Makes the parameter ``layer_name`` and its companions, and attaches them to the module.

        Raises:
            ValueError: a tensor is missing, superfluous or does not fit. The message names it.
        """
        entries, self.entries = self.entries, []
        target = self.names.targets[layer_name]
        path, _, name = layer_name.rpartition(".")
        module = model.get_submodule(path)
        placeholder, share = getattr(module, name), self._share_of(layer_name)
        self.loaded.add(layer_name)
        layout = layout_of(layer_name, entries)
        if any(entry.role.part for entry in entries):
            if not self.quantization.pre_quantized:
                key = next(entry.key for entry in entries if entry.role.part)
                raise ValueError(
                    f"{key} belongs to 4-bit weights, but the checkpoint's config has no quantization_config"
                )
            if layout in PUBLISHED:
                form = self.quantization.format_of(target, model.dtype)
                dtype = model.dtype
                weights, scales = read_published(self.names, target, layout, entries, share, form)
                setattr(module, activation_scales_name(name), scales)
            else:
                dtype, weights = read_packed(self.names, target, layout, entries, share)
                if (broken := broken_scales(weights)) is not None:
                    raise ValueError(f"{layer_name}_{broken[0]} holds NaN or infinite values")
        elif self.quantization.pre_quantized:
            if share is not None and not is_divided(placeholder):
                raise ValueError(
                    f"{layer_name} is dense in this 4-bit checkpoint, and only 4-bit experts can be divided: quantize the "
                    "dense checkpoint with moe-fused quantize"
                )
            _, stack = self._stack(target, layout, entries, model, share)
            return {layer_name: stack.to(placeholder.dtype)}
        else:
            dtype, weights = self._quantize(target, layout, entries, model, share)
        weights = weights.to(dtype=self.quantization.compute_dtype)
        made = attach(module, name, weights, dtype, self.quantization.storage_dtype)
        if target.transposed:
            turn(module)
        # Transformers makes DTensors of these where the parameter is one.
        return {f"{path}.{parameter}": local(value) for parameter, value in made.items()}

    def _dense(self, target: Target, layout: str, entries: list[Entry], model: Any) -> Tensor:
        """Returns the dense stack, joined as Transformers does."""
        if layout == "fused":
            stack = load_dense(entries[0])
        elif layout == "stacked":
            stack = torch.cat([load_dense(entry) for entry in by_projection(self.names, target, entries)], dim=1)
        else:
            if layout == "per expert":
                by_matrix(self.names, target, entries)  # raises if a matrix is missing
            converter = deepcopy(self.names.converters[entries[0].role.converter])
            for entry in entries:
                load: Any = partial(load_dense, entry)
                converter.add_tensor(target.name, entry.key, entry.role.pattern, load)
            stack = converter.convert(target.name, model=model, config=model.config)[target.name]
        if tuple(stack.shape) != target.dense_shape:
            raise ValueError(f"{entries[0].key} must make up shape {target.dense_shape}, got {tuple(stack.shape)}")
        return stack

    def _stack(
        self, target: Target, layout: str, entries: list[Entry], model: Any, share: Share | None
    ) -> tuple[Target, Tensor]:
        """Returns the dense stack of this process' experts, and a target of its shape."""
        if share is None:
            return target, self._dense(target, layout, entries, model)
        if layout == "per expert":
            part, entries = share_of_matrices(self.names, share, target, entries)
            return part, self._dense(part, layout, entries, model)
        first, count = share.of(target.shape[0])
        part = replace(target, shape=(count, *target.shape[1:]))
        if layout in ("fused", "stacked"):
            entries = [entry._replace(load=partial(load_dense_rows, share, entry, first, count)) for entry in entries]
            return part, self._dense(part, layout, entries, model)
        return part, self._dense(target, layout, entries, model)[first : first + count]

    def _quantize(
        self, target: Target, layout: str, entries: list[Entry], model: Any, share: Share | None
    ) -> tuple[torch.dtype, Packed4bitWeights]:
        if layout == "per expert":
            if share is not None:
                target, entries = share_of_matrices(self.names, share, target, entries)
            sources = [parts[""] for parts in by_matrix(self.names, target, entries)]
            matrices = (load_matrix(entry, target) for entry in sources)
        else:
            target, stack = self._stack(target, layout, entries, model, share)
            sources = [Entry(target.name, entries[0].role, lambda: stack)]
            experts = stack.mT if target.transposed else stack
            matrices = (matrix for expert in experts for matrix in expert.chunk(target.projections))
        first = next(matrices)
        sums: list[Tensor] = []

        def checked(matrix: Tensor) -> Tensor:
            sums.append(matrix.sum())  # looked at below, because no format quantizes NaN with an error
            return matrix

        weights = self._pack(map(checked, chain([first], matrices)), self.quantization.format_of(target, first.dtype))
        if not torch.isfinite(torch.stack(sums)).all():
            for entry in sources:
                if not is_finite(entry.load()):
                    raise ValueError(f"{entry.key} holds NaN or infinite values, which cannot be quantized")
        if broken_scales(weights) is not None:
            kind = self.quantization.quant_type
            raise ValueError(
                f"{target.name} holds values that become NaN or infinite in {kind}, because they are too large"
            )
        return first.dtype, weights

    def _pack(self, matrices: Iterator[Tensor], form: Format4bit) -> Packed4bitWeights:
        """Quantizes the matrices of a stack, the projections of expert 0 first."""
        kernel = get_kernel()
        weights: Packed4bitWeights
        if form.weight_format.published(form):
            experts = iter(lambda: tuple(islice(matrices, form.projections)), ())
            parts = (part for expert in experts for part in form.weight_format.quantize_expert(expert, form))
            weights = kernel.Packed4bitWeights.of_parts(parts, form)
        else:
            wanted = self.quantization
            pieces = (
                quantize_matrix(matrix, wanted.quant_type, wanted.blocksize, bool(wanted.double_quant))
                for matrix in matrices
            )
            weights = kernel.interchange.stack_of_pieces(pieces, form)
        return weights
