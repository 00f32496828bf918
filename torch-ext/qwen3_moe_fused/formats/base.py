"""What all 4-bit weight formats share: the interface of a format, their names, and how a stack is packed in one.

A format is one class, a subclass of ``WeightFormat`` in a file of its own, and one call of ``register``. Everything else
takes the format by its name in a ``Format4bit``: kernels get its device functions in a ``kernels.records.FormatCode``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..views import View
from . import ptx
from .tables import Table

# Kernels that dequantize on the way read a row of packed weights in tiles of multiples of this many weights, so they take
# stacks whose stored rows are whole units. Other stacks go through the workspace.
ROW_UNIT = 64
# What dequantized weights may be.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class DeviceFunctions(NamedTuple):
    """Triton functions of a format, with the arguments that ``kernels.records.FormatCode`` describes.

    Attributes:
        block_scale: from blocks to their fp32 scales.
        prepare: what the scales of a row share; None if there is nothing.
        pair, in_order: from loaded elements to weights; None for 16 values times a scale.
    """

    block_scale: Any
    prepare: Any = None
    pair: Any = None
    in_order: Any = None


class PublishedTensor(NamedTuple):
    """A tensor of one matrix in a checkpoint.

    Attributes:
        dtype: as published.
        shape: of one projection of one expert. A stack has those of an expert's projections one after the other along
            the first dimension, and a dimension of the experts before it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightFormat:
    """A 4-bit format: two weights a byte, and a scale for every block of neighbours.

    The weights of an expert lie flat, row-major. A weight is ``codes[nibble] · scale`` in fp32, rounded once.

    Attributes:
        name: of the format, in a ``Format4bit`` and in the schema of operators.
        codes: the values of the 16 nibbles.
        high_nibble_first: the first weight of a byte is in its high nibble.
        blocksizes: how many weights may share a scale, the default first.
        double_quants: whether scales may themselves be quantized, the default first.
        blocks_in_rows: a block is a part of one row, so rows must be whole blocks; else blocks may run over their ends.
    """

    name: str
    codes: tuple[float, ...]
    high_nibble_first: bool = True
    blocksizes: tuple[int, ...]
    double_quants: tuple[bool, ...] = (False,)
    blocks_in_rows: bool = False

    def code(self, device: torch.device) -> Tensor:
        """(16,) fp32 values of the nibbles on ``device``."""
        return code_of(self, device)

    def scale_storage(self, stack: Format4bit) -> dict[str, tuple[int, int]]:
        """Shapes of the uint8 tensors beside ``packed``, by name; E first. Wider values are stored as their bytes."""
        raise NotImplementedError

    def scales(self, stack: Format4bit, storage: Mapping[str, Tensor]) -> Tensor:
        """(E, blocks of all projections) fp32 scales of the stored tensors: what kernels must compute."""
        raise NotImplementedError

    def is_broken(self, stack: Format4bit, name: str, values: Tensor) -> Tensor | None:
        """Which scales of a stored tensor make weights NaN or infinite, whatever the weights are, or are no scales at all.

        Args:
            stack: how the weights are packed.
            name: the stored tensor, one of ``scale_storage``.
            values: its bytes or a part of them, uint8 of any shape, whole scales along the last dimension.

        Returns:
            Booleans, one for each scale; None if any bytes are right.
        """
        raise NotImplementedError

    def broken(self, stack: Format4bit, storage: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which scales of the stored tensors make weights NaN or infinite, or are no scales at all.

        Returns:
            (E, scales of an expert) booleans by the name of the stored tensor, without tensors in which any bytes are right.
        """
        found = {name: self.is_broken(stack, name, storage[name]) for name in self.scale_storage(stack)}
        return {name: broken for name, broken in found.items() if broken is not None}

    def quantize(self, matrix: Tensor, stack: Format4bit) -> dict[str, Tensor]:
        """One projection of one expert as its part of each stored tensor, ``packed`` included; flat, of any dtype.

        Args:
            matrix: (out, in), bfloat16, float16 or float32, of any strides.
            stack: what it is to be a part of.
        """
        raise NotImplementedError

    def quantize_expert(self, matrices: Iterable[Tensor], stack: Format4bit) -> Iterator[dict[str, Tensor]]:
        """The projections of one expert, each as ``quantize`` returns it. A format may give them scales in common.

        Args:
            matrices: (out/projections, in) each, as many as ``stack`` has projections.
            stack: what they are to be a part of.
        """
        return (self.quantize(matrix, stack) for matrix in matrices)

    def published(self, stack: Format4bit) -> tuple[dict[str, PublishedTensor], ...]:
        """How checkpoints that others publish hold one projection of one expert, if they hold the bytes of the storage.

        Returns:
            A dict for each way of publishing, the format's own first: for each stored tensor in turn the name of the
            published one, with its dtype and shape. Nothing if there is none, or if checkpoints hold other bytes.
        """
        return ()

    def tensors(self, stack: Format4bit, *scales: Tensor) -> NamedTuple:
        """The scales as a record of tensors for ``device_functions``; a pointer that is not read is that of another.

        Each launch makes this record, so it should take little time.

        Args:
            scales: the stored tensors beside ``packed``, in the order of ``scale_storage``.
        """
        raise NotImplementedError

    def layout(self, stack: Format4bit) -> NamedTuple:
        """The record of constants that ``device_functions`` find as ``FORMAT.LAYOUT``."""
        raise NotImplementedError

    def word_ptx(self, dtype: torch.dtype) -> ptx.WordPtx:
        """PTX from scales and words of eight nibbles to weights in ``dtype``, bfloat16 or float16, for NVIDIA GPUs."""
        return ptx.by_table(self.codes, self.high_nibble_first, dtype)

    def device_functions(self) -> DeviceFunctions:
        """The format's Triton functions; imported here, as torch without a GPU may come without Triton."""
        raise NotImplementedError


@Table
def code_of(weight_format: WeightFormat, device: torch.device) -> Tensor:
    """(16,) fp32."""
    return torch.tensor(weight_format.codes, dtype=torch.float32, device=device)


def as_floats(values: Tensor) -> Tensor:
    """uint8 (E, 4·n) as fp32 (E, n), the same memory; a copy of bytes that do not begin where an fp32 may."""
    if values.storage_offset() % 4:
        values = values.clone()
    return values.view(torch.float32)


def float_pointer(values: Tensor) -> Tensor | View:
    """``as_floats`` as the argument of a kernel, without torch's view."""
    return as_floats(values) if values.storage_offset() % 4 else View(values, 0, torch.float32)


_formats: dict[str, WeightFormat] = {}


def register(weight_format: WeightFormat) -> None:
    """Makes ``weight_format`` known by its name.

    Raises:
        ValueError: its name is taken, or is not one word, which the schema of operators needs.
    """
    name = weight_format.name
    if not name or name.split() != [name]:
        raise ValueError(f"the name of a format must be one word, got {name!r}")
    if name in _formats:
        raise ValueError(f"there is a format of the name {name} already")
    _formats[name] = weight_format


def unregister(name: str) -> None:
    """Forgets the format of that name."""
    del _formats[name]


def names() -> list[str]:
    """The names of all formats, in the order in which they were registered."""
    return list(_formats)


def named(name: str) -> WeightFormat:
    """The format of that name.

    Raises:
        ValueError: there is none; says which there are.
    """
    weight_format = _formats.get(name)
    if weight_format is None:
        raise ValueError(f"quant_type must be one of {', '.join(_formats)}, got {name!r}")
    return weight_format


@dataclass(frozen=True)
class Format4bit:
    """How a stack is packed.

    Attributes:
        shape: (E, out, in) of the weights; out·in a multiple of the blocksize, in each projection. For mxfp4 and nvfp4 the
            in features alone are a multiple of it.
        quant_type: name of the format: "nf4", "fp4", "mxfp4" or "nvfp4".
        blocksize: weights that share a scale; 0 for the format's default.
        double_quant: scales are quantized as well; None for the format's default.
        projections: equal parts of the out features, each quantized on its own.
        dtype: of dequantized weights, which is also what products compute in.

    Raises:
        ValueError: values that do not fit each other.
    """

    shape: tuple[int, int, int]
    quant_type: str = "nf4"
    blocksize: int = 0
    double_quant: bool | None = None
    projections: int = 1
    dtype: torch.dtype = torch.bfloat16
    # All of it as a string, which is how operators take it.
    spec: str = field(init=False, repr=False, compare=False)
    weight_format: WeightFormat = field(init=False, repr=False, compare=False)
    _storage: dict[str, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape: tuple[int, ...] = tuple(self.shape)  # of a torch.Size, or a list of JSON
        object.__setattr__(self, "shape", shape)
        weight_format = named(self.quant_type)
        object.__setattr__(self, "weight_format", weight_format)
        if self.blocksize == 0:
            object.__setattr__(self, "blocksize", weight_format.blocksizes[0])
        if self.double_quant is None:
            object.__setattr__(self, "double_quant", weight_format.double_quants[0])
        self._check(shape, weight_format)
        dtype = str(self.dtype).removeprefix("torch.")
        scales = "double" if self.double_quant else "plain"
        parts = (self.quant_type, self.blocksize, scales, self.projections, dtype, *shape)
        object.__setattr__(self, "spec", " ".join(map(str, parts)))
        _, out_features, in_features = self.shape
        storage = {"packed": (self.shape[0], out_features * in_features // 2), **weight_format.scale_storage(self)}
        object.__setattr__(self, "_storage", storage)

    def __hash__(self) -> int:  # every launch asks; a string keeps its hash
        return hash(self.spec)

    def _check(self, shape: tuple[int, ...], weight_format: WeightFormat) -> None:
        if self.blocksize not in weight_format.blocksizes:
            sizes = ", ".join(map(str, sorted(weight_format.blocksizes)))
            raise ValueError(f"blocksize must be one of {sizes}, got {self.blocksize}")
        if self.double_quant not in weight_format.double_quants:
            raise ValueError(f"double_quant must be {weight_format.double_quants[0]} for {self.quant_type}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be bfloat16, float16 or float32, got {self.dtype}")
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape must be (E, out, in), all positive, got {shape}")
        _, out_features, in_features = shape
        if self.projections < 1 or out_features % self.projections:
            raise ValueError(f"projections must divide the {out_features} out features, got {self.projections}")
        if out_features // self.projections * in_features % self.blocksize:
            raise ValueError(
                f"an expert's {out_features // self.projections} x {in_features} weights must be a multiple of the "
                f"blocksize {self.blocksize}"
            )
        if weight_format.blocks_in_rows and in_features % self.blocksize:
            raise ValueError(
                f"the in features must be a multiple of the blocksize {self.blocksize} for {self.quant_type}, "
                f"got {in_features}"
            )

    @property
    def blocks(self) -> int:
        """Blocks of an expert's projection."""
        _, out_features, in_features = self.shape
        return out_features // self.projections * in_features // self.blocksize

    def storage(self) -> dict[str, tuple[int, int]]:
        """Shapes of the uint8 tensors by the name of their attribute in ``Packed4bitWeights``, ``packed`` first."""
        return self._storage


@functools.cache
def parse(spec: str) -> Format4bit:
    """The format whose ``spec`` this is."""
    quant_type, blocksize, double_quant, projections, dtype, *shape = spec.split(" ")
    num_experts, out_features, in_features = map(int, shape)
    return Format4bit(
        (num_experts, out_features, in_features),
        quant_type,
        int(blocksize),
        double_quant == "double",
        int(projections),
        getattr(torch, dtype),
    )
