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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from . import checks
from .autograd import intercepted

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


T = TypeVar("T")


class Table(Generic[T]):
    """A function whose results are kept, but for those it computes while a tracer looks on, which may have no values."""

    def __init__(self, make: Callable[..., T]) -> None:
        functools.update_wrapper(self, make)
        self.make = make
        self.kept: dict[tuple[Any, ...], T] = {}
        self.cache_clear = self.kept.clear

    def __call__(self, *key: Any) -> T:
        value = self.kept.get(key)  # first, for every launch asks
        if value is None:
            value = self.make(*key)
            if not intercepted():
                self.kept[key] = value
        return value


@Table
def code(quant_type: str, device: torch.device) -> Tensor:
    """(16,) fp32 values of the nibbles."""
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


@Table
def nested_code(device: torch.device) -> Tensor:
    """(256,) fp32 values of an absmax byte: the signed dynamic map of 8-bit optimizers (arXiv:2110.02861).

    Seven decades, each with twice as many values as the one below, at the middles of its equal parts; with 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32, device="cpu")
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
    # All of it as a string, which is how operators take it.
    spec: str = field(init=False, repr=False, compare=False)
    _storage: dict[str, tuple[int, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shape: tuple[int, ...] = tuple(self.shape)  # of a torch.Size, or a list of JSON
        object.__setattr__(self, "shape", shape)
        if self.quant_type not in CODES:
            raise ValueError(f"quant_type must be one of {', '.join(CODES)}, got {self.quant_type!r}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {', '.join(map(str, BLOCKSIZES))}, got {self.blocksize}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be bfloat16, float16 or float32, got {self.dtype}")
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape must be (E, out, in), all positive, got {shape}")
        _, out_features, in_features = self.shape
        if self.projections < 1 or out_features % self.projections:
            raise ValueError(f"projections must divide the {out_features} out features, got {self.projections}")
        if out_features // self.projections * in_features % self.blocksize:
            raise ValueError(
                f"an expert's {out_features // self.projections} x {in_features} weights must be a multiple of the "
                f"blocksize {self.blocksize}"
            )
        dtype = str(self.dtype).removeprefix("torch.")
        scales = "double" if self.double_quant else "plain"
        parts = (self.quant_type, self.blocksize, scales, self.projections, dtype, *shape)
        object.__setattr__(self, "spec", " ".join(map(str, parts)))
        object.__setattr__(self, "_storage", self._shapes())

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
        return self._storage

    def _shapes(self) -> dict[str, tuple[int, int]]:
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
    """uint8 (E, 4·n) as fp32 (E, n), the same memory; a copy of bytes that do not begin where an fp32 may."""
    if values.storage_offset() % 4:
        values = values.clone()
    return values.view(torch.float32)


def nested_values(absmax: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """(…, n) fp32 absmaxes from their bytes (…, n), second-level absmaxes (…, ⌈n/256⌉) and offsets (…, 1)."""
    scales = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE, dim=-1)[..., : absmax.shape[-1]]
    values = nested_code(absmax.device).index_select(0, absmax.reshape(-1).int()).view(absmax.shape)
    return values.mul_(scales).add_(nested_offset)  # two roundings


@dataclass(frozen=True, eq=False)
class Piece:
    """One matrix as bitsandbytes holds it: an expert's projection, or a stack that was quantized as one.

    Attributes:
        packed: (n/2, 1) or of any other shape, uint8 or a dtype that its bytes are viewed as (bnb_4bit_quant_storage).
        absmax: (blocks,) uint8 with double quantization, else fp32.
        nested_absmax: (groups,) fp32, the absmax of ``QuantState.state2``; None without double quantization.
        nested_offset: one fp32, ``QuantState.offset``; None without double quantization.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    def tensors(self, name: str, weights: int, blocksize: int, double_quant: bool) -> dict[str, Tensor]:
        """The tensors by attribute name, flat, ``packed`` as bytes, once they fit a matrix of so many weights.

        Raises:
            TypeError, ValueError: a tensor that is missing, superfluous, or of another dtype or size; ``name`` is what
                the message calls the piece.
        """
        blocks = weights // blocksize
        absmax_dtype = torch.uint8 if double_quant else torch.float32
        wanted: dict[str, tuple[torch.dtype, int]] = {
            "packed": (torch.uint8, weights // 2),
            "absmax": (absmax_dtype, blocks),
        }
        if double_quant:
            wanted["nested_absmax"] = (torch.float32, math.ceil(blocks / NESTED_BLOCKSIZE))
            wanted["nested_offset"] = (torch.float32, 1)
        flat: dict[str, Tensor] = {}
        for part in (own.name for own in fields(self)):
            value, label = getattr(self, part), f"{name}.{part}"
            if not _wanted(label, value, part in wanted, double_quant):
                continue
            dtype, size = wanted[part]
            value = value.detach().reshape(-1)
            if part == "packed" and value.is_floating_point():
                value = value.view(torch.uint8)
            checks.dtype(label, value, (dtype,))
            if value.numel() != size:
                what = "bytes" if part == "packed" else "values"
                raise ValueError(f"{label} must have {size} {what} for {weights} weights, got {value.numel()}")
            flat[part] = value
        return flat


def _wanted(name: str, value: object, wanted: bool, double_quant: bool) -> bool:
    """Whether there is a tensor, as there must be if it is ``wanted`` and must not be if not.

    Raises:
        TypeError: where that is not so.
    """
    if isinstance(value, Tensor) == wanted and (wanted or value is None):
        return wanted
    must = "a tensor" if wanted else "None"
    raise TypeError(f"{name} must be {must} with double_quant={double_quant}, got {type(value).__name__}")


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
        TypeError, ValueError: a tensor that is missing, or not uint8, or of another shape than the format's, or not
            contiguous.
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
            if not _wanted(name, value, want is not None, self.format.double_quant):
                continue
            if value.dtype != torch.uint8:
                raise TypeError(f"{name} must be uint8, got {str(value.dtype).removeprefix('torch.')}")
            if value.shape != want:
                raise ValueError(f"{name} must have shape {want}, got {tuple(value.shape)}")
            if not value.is_contiguous():  # which kernels take for granted
                raise ValueError(f"{name} must be contiguous, got strides {value.stride()}")
            if value.device != self.packed.device:
                raise ValueError(f"{name} must be on {self.packed.device} like packed, got {value.device}")

    @classmethod
    def checked(cls, format: Format4bit, *storage: Tensor) -> Packed4bitWeights:
        """Of tensors that were taken from such weights before, in the order of the format's storage: not checked again."""
        own: Packed4bitWeights = object.__new__(cls)
        vars(own).update(zip(format.storage(), storage, strict=True), format=format)
        return own

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

    @property
    def requires_grad(self) -> bool:
        return False

    def requires_grad_(self, requires_grad: bool = True) -> Packed4bitWeights:
        """These weights, which are frozen.

        Raises:
            TypeError: a gradient is asked for.
        """
        if requires_grad:
            raise TypeError("packed 4-bit weights are frozen: train an adapter, or dequantize() them")
        return self

    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.format.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The storage by attribute name."""
        return {name: getattr(self, name) for name in self.format.storage()}

    def to(
        self, device: torch.device | torch.dtype | str | int | None = None, dtype: torch.dtype | None = None
    ) -> Packed4bitWeights:
        """On ``device``, dequantizing to ``dtype``, which may come alone as for a tensor; the bits stay as they are."""
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise TypeError(f"device must be a device, got {device}")
            device, dtype = None, device
        moved = {name: value if device is None else value.to(device) for name, value in self.tensors().items()}
        return Packed4bitWeights(self.format if dtype is None else replace(self.format, dtype=dtype), **moved)

    def narrow(self, first: int, count: int) -> Packed4bitWeights:
        """Experts ``first`` to ``first + count``, the same memory."""
        parts = {name: value.narrow(0, first, count) for name, value in self.tensors().items()}
        return Packed4bitWeights(replace(self.format, shape=(count, *self.format.shape[1:])), **parts)

    def block_absmax(self) -> Tensor:
        """(E, blocks) fp32: the absmax of every block, blocks of all projections."""
        if self.nested_absmax is None or self.nested_offset is None:
            return as_floats(self.absmax)
        own = self.format
        parts = (own.shape[0], own.projections)
        scales = as_floats(self.nested_absmax).view(*parts, own.groups)
        offsets = as_floats(self.nested_offset).view(*parts, 1)
        return nested_values(self.absmax.view(*parts, own.blocks), scales, offsets).flatten(1)

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        projections: int = 1,
        dtype: torch.dtype | None = None,
    ) -> Packed4bitWeights:
        """Each expert's projections as ``bitsandbytes.functional.quantize_4bit`` quantizes them, bit for bit.

        On the weights' device, whose bits these are: bitsandbytes differs between CPU and GPU (see ``quantize``). Takes
        memory for the result and a few times one expert's projection in fp32.

        Args:
            weight: (E, out, in) bfloat16, float16 or float32, of any strides.
            quant_type, blocksize, double_quant, projections: as in ``Format4bit``.
            dtype: of dequantized weights; None for the dtype of ``weight``.

        Raises:
            TypeError: ``weight`` is not a tensor of these dtypes.
            ValueError: values that do not fit each other.
        """
        from .quantize import quantize_matrix  # which takes the formats of this module

        checks.tensor("weight", weight, ("E", "out", "in"))
        checks.dtype("weight", weight, DTYPES)
        shape = (weight.shape[0], weight.shape[1], weight.shape[2])
        own = Format4bit(shape, quant_type, blocksize, double_quant, projections, dtype or weight.dtype)
        matrices = (matrix for expert in weight.detach() for matrix in expert.unflatten(0, (projections, -1)))
        return cls.from_pieces((quantize_matrix(m, quant_type, blocksize, double_quant) for m in matrices), own)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(E, out, in) weights, bit for bit as ``bitsandbytes.functional.dequantize_4bit`` gives them in ``dtype``.

        Args:
            dtype: of the result, rounded once from fp32; None for the format's.

        Raises:
            TypeError: ``dtype`` is not a float, or not one that the device supports.
        """
        from .backend import backend_for  # whose stages take packed weights

        out = torch.empty(self.shape, dtype=self.dtype if dtype is None else dtype, device=self.device)
        checks.dtype("dtype", out, checks.FLOAT_DTYPES)
        backend_for(self.packed, out.dtype).dequantize(self, 0, self.shape[0], out)
        return out

    @classmethod
    def from_pieces(
        cls, pieces: Iterable[Piece], format: Format4bit, device: torch.device | str | int | None = None
    ) -> Packed4bitWeights:
        """A stack of matrices that were quantized one by one, bit for bit.

        Args:
            pieces: E·projections of them, the projections of expert 0 first; taken one at a time, so that an iterator
                that loads or makes them needs memory for one.
            format: what they make up.
            device: of the stack; None for that of the first piece.

        Raises:
            TypeError, ValueError: too many or too few, or one that does not fit the format: which, and why.
        """
        num_experts, out_features, in_features = format.shape
        places = [(expert, projection) for expert in range(num_experts) for projection in range(format.projections)]
        weights = out_features // format.projections * in_features
        remaining = iter(pieces)
        storage: dict[str, Tensor] = {}
        for index, (expert, projection) in enumerate(places):
            piece = next(remaining, None)
            if piece is None:
                raise ValueError(f"pieces must be {len(places)}, of each expert and projection, got {index}")
            name = f"piece of expert {expert}, projection {projection}"
            if not isinstance(piece, Piece):
                raise TypeError(f"{name} must be a Piece, got {type(piece).__name__}")
            parts = piece.tensors(name, weights, format.blocksize, format.double_quant)
            if not storage:
                device = piece.packed.device if device is None else device
                storage = {
                    part: torch.empty(shape, dtype=torch.uint8, device=device)
                    for part, shape in format.storage().items()
                }
            for part, value in parts.items():
                storage[part].view(len(places), -1)[index].copy_(value.view(torch.uint8))
        if next(remaining, None) is not None:
            raise ValueError(f"pieces must be {len(places)}, of each expert and projection, got more")
        return cls(format, **storage)

    @classmethod
    def from_fused(
        cls, pieces: Sequence[Piece], format: Format4bit, device: torch.device | str | int | None = None
    ) -> Packed4bitWeights:
        """A stack of matrices that were quantized over all experts at once, as if each expert had been quantized alone.

        Nothing is lost: ``dequantize`` gives the same bits. Groups of 256 absmaxes that run over from one expert to the
        next cannot be kept, though; the absmaxes are then stored in fp32 and the result's format has
        ``double_quant=False``.

        Args:
            pieces: for each projection the one that quantizing its (E, out/projections, in) stack gave.
            format: of the stack, with ``double_quant`` as the pieces have it.
            device: of the stack; None for that of the first piece.

        Raises:
            TypeError, ValueError: too many or too few, or one that does not fit the format: which, and why.
        """
        if len(pieces) != format.projections:
            raise ValueError(f"pieces must be {format.projections}, one for each projection, got {len(pieces)}")
        num_experts, out_features, in_features = format.shape
        weights = num_experts * out_features // format.projections * in_features
        stacks = []
        for projection, piece in enumerate(pieces):
            name = f"piece of projection {projection}"
            if not isinstance(piece, Piece):
                raise TypeError(f"{name} must be a Piece, got {type(piece).__name__}")
            stacks.append(piece.tensors(name, weights, format.blocksize, format.double_quant))
        if format.double_quant and format.blocks % NESTED_BLOCKSIZE:
            format = replace(format, double_quant=False)
            stacks = [
                {"packed": s["packed"], "absmax": nested_values(s["absmax"], s["nested_absmax"], s["nested_offset"])}
                for s in stacks
            ]

        def split() -> Iterator[Piece]:
            for expert in range(num_experts):
                for stack in stacks:
                    yield Piece(
                        **{
                            part: value if part == "nested_offset" else value.view(num_experts, -1)[expert]
                            for part, value in stack.items()
                        }
                    )

        return cls.from_pieces(split(), format, device)

    def piece(self, expert: int, projection: int = 0) -> Piece:
        """One matrix as bitsandbytes holds it: ``packed`` (n/2, 1), the others flat, the offset a scalar.

        Views of this stack's memory, as far as alignment lets them be.

        Raises:
            ValueError: no such expert or projection.
        """
        for name, value, size in (
            ("expert", expert, self.format.shape[0]),
            ("projection", projection, self.format.projections),
        ):
            if not 0 <= value < size:
                raise ValueError(f"{name} must be from 0 to {size - 1}, got {value}")
        parts = {
            part: value[expert].view(self.format.projections, -1)[projection] for part, value in self.tensors().items()
        }
        if self.nested_absmax is None:
            return Piece(parts["packed"][:, None], as_floats(parts["absmax"]))
        nested_absmax, nested_offset = as_floats(parts["nested_absmax"]), as_floats(parts["nested_offset"])
        return Piece(parts["packed"][:, None], parts["absmax"], nested_absmax, nested_offset.view(()))

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
