"""Converts experts and linear layers of a checkpoint in mxfp4 or nvfp4, which are kept as they are published.

A matrix has the same bytes in every published layout: that of compressed-tensors, with tensors for each matrix, and that of
gpt-oss, with tensors for the stack of all experts. So ranges of bytes are copied from one layout into another. Only
dequantizing reads tensors, one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_fused.hub import get_kernel

from .entries import (
    PublishedTensors,
    by_published_matrix,
    check_published,
    check_published_matrix,
    check_scales,
    layout_of,
    published_as,
)
from .names import (
    ACTIVATION_SCALE,
    MATRIX_PARTS,
    STACK_PARTS,
    Names,
    Target,
    part_of_matrix,
    published_matrices,
)
from .safetensors_file import as_bytes, dtype_name
from .stacks import Found, dense_outputs, matrix_names, named
from .tensor_files import Output, Stored

if TYPE_CHECKING:
    from qwen3_moe_fused import Format4bit

# The tensors of a matrix, in the order of the format's storage. Their bytes are the same in every layout.
Parts = tuple[Stored, ...]
Keys = tuple[str, ...]


@dataclass(frozen=True)
class PublishedCheckpointStack:
    """An experts parameter in a checkpoint that is in a published 4-bit format.

    Attributes:
        target, layout, names: as in ``PackedCheckpointStack``.
        format: how the weights are packed. Its dtype is that of the dequantized weights, unless another is asked for.
        matrices: the tensors of each matrix, the projections of expert 0 first.
        keys: their names in the checkpoint, in the same order.
        activation_scales: how many matrices have a scale of activations beside them.
    """

    target: Target
    layout: str
    names: Names
    format: Format4bit
    matrices: tuple[Parts, ...]
    keys: tuple[Keys, ...]
    activation_scales: int

    @property
    def description(self) -> str:
        return f"{self.format.quant_type} in blocks of {self.format.blocksize}"

    def description_after(self, dtype: torch.dtype | None, dequantize: bool) -> str:
        """Describes the stack after its conversion."""
        return named(dtype or self.format.dtype) if dequantize else self.description

    def dequantized(self, layout: str, dtype: torch.dtype | None) -> dict[str, Output]:
        """Returns the dense tensors of the stack in ``layout``, by their names in the model.

        Args:
            dtype: the dtype of these tensors. None is that of the model.

        Raises:
            ValueError: the model has no names for that layout.
        """
        wanted = dtype or self.format.dtype
        one = replace(self.format, shape=(1, *self.target.matrix_shape), projections=1)

        def chunks(expert: int, part: int) -> list[memoryview]:
            index = expert * self.target.projections + part
            dense = dequantize(self.keys[index], self.matrices[index], one, wanted)
            return [as_bytes(dense.mT if self.target.transposed else dense)]

        return dense_outputs(self.target, self.names, layout, dtype_name(wanted), chunks)

    def outputs(self, layout: str) -> dict[str, Output]:
        """Returns the tensors of the stack in ``layout``, by their names in the model.

        Raises:
            ValueError: the model has no names for that layout, or nobody publishes the format in it.
        """
        quant_type = self.format.quant_type
        if layout == "per-expert":
            return {
                name.removesuffix("weight") + part: _output(dtype, shape, [stored])
                for (_, _, name), parts in zip(matrix_names(self.names, self.target), self.matrices, strict=True)
                for (part, (dtype, shape)), stored in zip(_of_matrix(self.format).items(), parts, strict=True)
            }
        wanted = published_as(self.format, STACK_PARTS[0]) if layout == "fused" else None
        if wanted is None:
            advice = "--to per-expert or --to fused" if quant_type == "mxfp4" else "--to per-expert"
            raise ValueError(
                f"{self.target.name} is in {quant_type}, which nobody publishes in the layout {layout!r}: give {advice}, or "
                "--dequantize for a dense model"
            )
        experts, projections = self.target.shape[0], self.target.projections
        return {
            f"{self.target.name}_{part}": _output(
                dtype, (experts, projections * rows, *others), [parts[index] for parts in self.matrices]
            )
            for index, (part, (dtype, (rows, *others))) in enumerate(wanted.items())
        }


def _output(dtype: torch.dtype, shape: tuple[int, ...], parts: Sequence[Stored]) -> Output:
    """Makes a tensor to be written of the bytes of ``parts``."""
    nbytes = prod(shape) * dtype.itemsize
    return Output(dtype_name(dtype), shape, nbytes, lambda: chain.from_iterable(stored.chunks() for stored in parts))


def _of_matrix(form: Format4bit) -> PublishedTensors:
    """Returns the tensors of a matrix as compressed-tensors publishes all of these formats."""
    tensors = published_as(form, MATRIX_PARTS[0])
    assert tensors is not None
    return tensors


def dequantize(keys: Keys, parts: Parts, form: Format4bit, dtype: torch.dtype) -> Tensor:
    """Reads and dequantizes one matrix.

    Args:
        keys: the names of the tensors in the checkpoint.
        parts: the tensors.
        form: that of a stack of this matrix alone.

    Raises:
        ValueError: a scale makes weights NaN or infinite. The message names the tensor.
    """
    tensors = {
        part: replace(stored, dtype=dtype_name(wanted), shape=shape).load(part)
        for (part, (wanted, shape)), stored in zip(_of_matrix(form).items(), parts, strict=True)
    }
    stack = get_kernel().interchange.stack_of_published_matrices([tensors], form)
    check_scales(stack, keys, lambda key, *_: key)
    dense: Tensor = stack.dequantize(dtype)[0]
    return dense


def find_published_stack(
    names: Names, target: Target, tensors: Iterable[Found], quant_type: str, dtype: torch.dtype
) -> PublishedCheckpointStack:
    """Joins ``tensors`` to the stack that they make up.

    Args:
        quant_type: the kernel's name of the format, which the checkpoint's config names.
        dtype: the dtype of the model.

    Raises:
        ValueError: a tensor is missing, superfluous or does not fit. The message names it.
    """
    found = tuple(tensors)
    entries = [one.entry(real=False) for one in found]
    layout = layout_of(target.name, entries)
    form = get_kernel().Format4bit(target.shape, quant_type, projections=target.projections, dtype=dtype)
    check_published(names, target, layout, entries, form)
    stored = {one.key: one.stored for one in found}
    scales = sum(entry.role.part == ACTIVATION_SCALE for entry in entries)
    if layout == "published":
        wanted = published_as(form, STACK_PARTS[0])
        assert wanted is not None
        stacks = {one.role.part: one.stored for one in found}
        count = target.shape[0] * target.projections
        matrices = [
            tuple(stacks[part].part(index, count, shape) for part, (_, shape) in wanted.items())
            for index in range(count)
        ]
        whole = {one.role.part: one.key for one in found}
        keys = [tuple(whole[part] for part in wanted)] * count
    else:
        table = by_published_matrix(names, target, entries)
        keys = [tuple(parts[part].key for part in _of_matrix(form)) for parts in table]
        matrices = [tuple(stored[key] for key in of_matrix) for of_matrix in keys]
    return PublishedCheckpointStack(target, layout, names, form, tuple(matrices), tuple(keys), scales)


@dataclass(frozen=True)
class PublishedMatrix:
    """The weight of a linear layer as compressed-tensors has it.

    Attributes:
        form: that of a stack of this matrix alone.
        keys: the names of its tensors in the checkpoint.
        parts: its tensors.
        has_activation_scale: whether there is a scale of activations beside them.
    """

    form: Format4bit
    keys: Keys
    parts: Parts
    has_activation_scale: bool

    def dequantized(self, dtype: torch.dtype) -> Output:
        """Returns the dense weight (out, in) of ``dtype``."""
        example = torch.empty(self.form.shape[1:], dtype=dtype, device="meta")
        return Output.of_tensor(example, partial(dequantize, self.keys, self.parts, self.form, dtype))


def find_matrices(tensors: Mapping[str, Stored], quant_type: str) -> dict[str, PublishedMatrix]:
    """Joins the tensors of the matrices of compressed-tensors, by the names of their modules.

    Args:
        tensors: those of a checkpoint that do not belong to experts, of any kind.
        quant_type: the kernel's name of the format.

    Raises:
        ValueError: a tensor is missing or does not fit. The message names it.
    """
    return {
        module: _find_matrix(module, [Found(key, part_of_matrix(key), tensors[key]) for key in keys], quant_type)
        for module, keys in published_matrices(tensors).items()
    }


def _find_matrix(module: str, found: list[Found], quant_type: str) -> PublishedMatrix:
    stored = {one.role.part: one.stored for one in found}
    packed = stored.get(MATRIX_PARTS[0])
    if packed is None or len(packed.shape) != 2:
        raise ValueError(f"{module}.{MATRIX_PARTS[0]} must be a matrix, got {packed.shape if packed else 'none'}")
    shape = (1, packed.shape[0], 2 * packed.shape[1])
    try:
        form = get_kernel().Format4bit(shape, quant_type)
    except ValueError as error:
        raise ValueError(f"{found[0].key} must be of {quant_type} weights: {error}") from None
    check_published_matrix(module, [one.entry(real=False) for one in found], form)
    wanted = tuple(_of_matrix(form))
    keys = tuple(f"{module}.{part}" for part in wanted)
    return PublishedMatrix(form, keys, tuple(stored[part] for part in wanted), ACTIVATION_SCALE in stored)
