"""``Packed4bitWeights``: stacks of expert matrices in the 4-bit format of bitsandbytes (QLoRA, arXiv:2305.14314).

The weights of an expert lie flat, row-major, two to a byte, the first in the high nibble. Every ``blocksize`` of them share
an absmax, and a weight is ``code[nibble] · absmax``, multiplied in fp32 and rounded once. With double quantization an absmax
is itself a byte: ``code2[byte] · absmax2 + offset``, each step rounded to fp32, one absmax2 for 256 of them.

A stack may hold several *projections* along the out features, as the gate and up of Transformers' fused experts.
Second-level scales and offsets are kept for every expert and projection, so that checkpoints with one 4-bit matrix for each
load without loss.

All storage is uint8 with leading dimension E, fp32 values as their bytes: what shards by expert, survives
``module.to(dtype)`` and mixed precision, and no optimizer touches.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

# Absmaxes that share a second-level scale; bitsandbytes knows no other number.
NESTED_BLOCKSIZE = 256
BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The values of bitsandbytes' get_4bit_type, as it makes fp32 of them.
CODES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(
        sign * value / 12.0 for sign in (1.0, -1.0) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}  # fmt: skip


@functools.cache
def code(quant_type: str, device: torch.device) -> Tensor:
    """(16,) fp32 values of the nibbles."""
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


@functools.cache
def nested_code(device: torch.device) -> Tensor:
    """(256,) fp32 values of an absmax byte: the signed dynamic map of 8-bit optimizers (arXiv:2110.02861).

    Seven decades, each with twice as many values as the one below, at the middles of its equal parts; with 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        positive = (10.0 ** (decade - 6) * middles).tolist()  # rounded to fp32
        values += positive + [-value for value in positive]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Format4bit:
    """How a stack is packed.

    Attributes:
        shape: (E, out, in) of the weights; out·in a multiple of the blocksize, in each projection.
        quant_type: "nf4" or "fp4".
        blocksize: weights that share an absmax.
        double_quant: absmaxes are bytes with a second-level scale.
        projections: equal parts of the out features, each quantized on its own.
        dtype: of dequantized weights, which is also what products compute in.

    Raises:
        ValueError: values that do not fit each other.
    """

    shape: tuple[int, int, int]
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    projections: int = 1
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.quant_type not in CODES:
            raise ValueError(f"quant_type must be one of {', '.join(CODES)}, got {self.quant_type!r}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be bfloat16, float16 or float32, got {self.dtype}")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape must be (E, out, in), all positive, got {self.shape}")
        _, out_features, in_features = self.shape
        if self.projections < 1 or out_features % self.projections:
            raise ValueError(f"projections must divide the {out_features} out features, got {self.projections}")
        if out_features // self.projections * in_features % self.blocksize:
            raise ValueError(
                f"an expert's {out_features // self.projections} x {in_features} weights must be a multiple of the "
                f"blocksize {self.blocksize}"
            )

    @property
    def blocks(self) -> int:
        """Blocks of an expert's projection."""
        _, out_features, in_features = self.shape
        return out_features // self.projections * in_features // self.blocksize

    @property
    def groups(self) -> int:
        """Second-level blocks of an expert's projection."""
        return math.ceil(self.blocks / NESTED_BLOCKSIZE)

    def storage(self) -> dict[str, tuple[int, int]]:
        """Shapes of the uint8 tensors by the name of their attribute in ``Packed4bitWeights``."""
        num_experts, out_features, in_features = self.shape
        shapes = {"packed": (num_experts, out_features * in_features // 2)}
        if not self.double_quant:
            return shapes | {"absmax": (num_experts, 4 * self.projections * self.blocks)}
        return shapes | {
            "absmax": (num_experts, self.projections * self.blocks),
            "nested_absmax": (num_experts, 4 * self.projections * self.groups),
            "nested_offset": (num_experts, 4 * self.projections),
        }


def as_bytes(values: Tensor) -> Tensor:
    """fp32 (E, n) as uint8 (E, 4·n), the same memory."""
    return values.contiguous().view(torch.uint8)


def as_floats(values: Tensor) -> Tensor:
    """uint8 (E, 4·n) as fp32 (E, n), the same memory."""
    return values.view(torch.float32)


@dataclass(frozen=True, eq=False)
class Packed4bitWeights:
    """A stack of expert matrices in 4 bits; takes the place of a dense (E, out, in) tensor in every function.

    A value like a tensor: ``to`` moves it, ``copy.deepcopy`` and ``pickle`` work, ``attach`` makes a module own it.

    Attributes:
        format: how it is packed.
        packed: (E, out·in/2) uint8.
        absmax: (E, blocks) uint8 with double quantization, else (E, 4·blocks) uint8, the bytes of fp32; blocks of all
            projections.
        nested_absmax: (E, 4·groups) uint8, the bytes of fp32, groups of all projections; None without double quantization.
        nested_offset: (E, 4·projections) uint8, the bytes of fp32; None without double quantization.

    Raises:
        TypeError, ValueError: a tensor that is missing, or not uint8, or of another shape than the format's.
    """

    format: Format4bit
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = self.format.storage()
        for name in ("packed", "absmax", "nested_absmax", "nested_offset"):
            value, want = getattr(self, name), shapes.get(name)
            if want is None and value is None:
                continue
            if not isinstance(value, Tensor) or want is None:
                wanted = "must be None without" if want is None else "must be a tensor with"
                raise TypeError(f"{name} {wanted} double_quant={self.format.double_quant}, got {type(value).__name__}")
            if value.dtype != torch.uint8:
                raise TypeError(f"{name} must be uint8, got {str(value.dtype).removeprefix('torch.')}")
            if value.shape != want:
                raise ValueError(f"{name} must have shape {want}, got {tuple(value.shape)}")
            if value.device != self.packed.device:
                raise ValueError(f"{name} must be on {self.packed.device} like packed, got {value.device}")

    @property
    def shape(self) -> torch.Size:
        """(E, out, in) of the weights."""
        return torch.Size(self.format.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, once dequantized."""
        return self.format.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The storage by attribute name."""
        return {name: getattr(self, name) for name in self.format.storage()}

    def to(self, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> Packed4bitWeights:
        """On ``device``, dequantizing to ``dtype``; the bits stay as they are."""
        moved = {name: value if device is None else value.to(device) for name, value in self.tensors().items()}
        return Packed4bitWeights(self.format if dtype is None else replace(self.format, dtype=dtype), **moved)

    def block_absmax(self) -> Tensor:
        """(E, blocks) fp32: the absmax of every block, blocks of all projections."""
        if self.nested_absmax is None or self.nested_offset is None:
            return as_floats(self.absmax)
        own = self.format
        parts = (own.shape[0], own.projections)
        scales = as_floats(self.nested_absmax).view(*parts, own.groups)
        scales = scales.repeat_interleave(NESTED_BLOCKSIZE, dim=-1)[..., : own.blocks]
        values = nested_code(self.device)[self.absmax.view(*parts, own.blocks).long()]
        return (values * scales + as_floats(self.nested_offset).view(*parts, 1)).flatten(1)

    def attach(self, module: nn.Module, name: str) -> None:
        """Makes ``module`` own the storage: frozen parameters ``name``, ``name_absmax``, … and ``name_format``."""
        for part, value in self.tensors().items():
            parameter = nn.Parameter(value, requires_grad=False)
            module.register_parameter(name if part == "packed" else f"{name}_{part}", parameter)
        setattr(module, f"{name}_format", self.format)

    @staticmethod
    def of_module(module: Any, name: str) -> Tensor | Packed4bitWeights:
        """What ``attach`` gave ``module``, or the dense parameter of that name."""
        own = getattr(module, f"{name}_format", None)
        if own is None:
            dense: Tensor = getattr(module, name)
            return dense
        parts = {part: getattr(module, name if part == "packed" else f"{name}_{part}") for part in own.storage()}
        return Packed4bitWeights(own, **parts)
