"""Converts stacks of 4-bit weights from and to the tensors of checkpoints, bit for bit.

Single matrices that bitsandbytes makes are ``Piece``: those of nf4 and fp4, whose scales are blocks' absmaxes
(``formats.absmax``). mxfp4 and nvfp4 are kept as they are published, in tensors with names: those of gpt-oss, ``blocks`` and
``scales``, or those of compressed-tensors, ``weight_packed``, ``weight_scale`` and ``weight_global_scale``. The format says
which there are (``WeightFormat.published``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from . import checks
from .formats.absmax import GROUP, AbsmaxFormat, nested_values
from .formats.base import Format4bit, PublishedTensor, as_floats
from .packed import Packed4bitWeights, is_wanted


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

    def tensors(self, name: str, weights: int, format: Format4bit) -> dict[str, Tensor]:
        """The tensors by attribute name, flat, ``packed`` as bytes, once they fit a matrix of so many weights.

        Args:
            name: what an error calls the piece.
            weights: of the matrix.
            format: of the stack that the matrix becomes a part of.

        Raises:
            TypeError, ValueError: a tensor that is missing, superfluous, or of another dtype or size.
        """
        blocks = weights // format.blocksize
        absmax_dtype = torch.uint8 if format.double_quant else torch.float32
        wanted: dict[str, tuple[torch.dtype, int]] = {
            "packed": (torch.uint8, weights // 2),
            "absmax": (absmax_dtype, blocks),
        }
        if format.double_quant:
            wanted["nested_absmax"] = (torch.float32, math.ceil(blocks / GROUP))
            wanted["nested_offset"] = (torch.float32, 1)
        flat: dict[str, Tensor] = {}
        for part in (attribute.name for attribute in fields(self)):
            value, label = getattr(self, part), f"{name}.{part}"
            if not is_wanted(label, value, part in wanted, format):
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


def _check_format(format: Format4bit) -> None:
    """Raises ValueError unless the matrices of ``format`` are those of bitsandbytes."""
    if not isinstance(format.weight_format, AbsmaxFormat):
        raise ValueError(
            f"bitsandbytes has no pieces of {format.quant_type}: use stack_of_published, stack_of_published_matrices and "
            "published_of"
        )


def _checked(name: str, piece: object) -> Piece:
    if not isinstance(piece, Piece):
        raise TypeError(f"{name} must be a Piece, got {type(piece).__name__}")
    return piece


def stack_of_pieces(
    pieces: Iterable[Piece], format: Format4bit, device: torch.device | str | int | None = None
) -> Packed4bitWeights:
    """A stack of matrices that were quantized one by one, bit for bit.

    Args:
        pieces: E·projections of them, the projections of expert 0 first. They are taken one at a time, so an iterator that
            loads or makes them needs memory for one.
        format: what they make up.
        device: of the stack; None for that of the first piece.

    Raises:
        TypeError, ValueError: too many or too few, or one that does not fit the format: which, and why. Or a format that
            bitsandbytes does not have.
    """
    _check_format(format)
    num_experts, out_features, in_features = format.shape
    weights = out_features // format.projections * in_features
    places = [(expert, projection) for expert in range(num_experts) for projection in range(format.projections)]

    def parts() -> Iterator[dict[str, Tensor]]:
        remaining = iter(pieces)
        for index, (expert, projection) in enumerate(places):
            piece = next(remaining, None)
            if piece is None:
                raise ValueError(f"pieces must be {len(places)}, of each expert and projection, got {index}")
            name = f"piece of expert {expert}, projection {projection}"
            yield _checked(name, piece).tensors(name, weights, format)
        if next(remaining, None) is not None:
            raise ValueError(f"pieces must be {len(places)}, of each expert and projection, got more")

    return Packed4bitWeights.of_parts(parts(), format, device)


def matrix_of_piece(piece: Piece, format: Format4bit) -> Packed4bitWeights:
    """A stack of one matrix, in the memory of a piece whose tensors are contiguous.

    Args:
        piece: the matrix.
        format: of the stack, with one expert and one projection.

    Raises:
        TypeError, ValueError: the piece does not fit the format: why. Or a format of more than one matrix, or one that
            bitsandbytes does not have.
    """
    _check_format(format)
    num_experts, out_features, in_features = format.shape
    if num_experts * format.projections != 1:
        raise ValueError(f"format must be of one matrix, got {num_experts} experts of {format.projections} projections")
    tensors = _checked("piece", piece).tensors("piece", out_features * in_features, format)
    return Packed4bitWeights(format, **{part: value.view(torch.uint8)[None] for part, value in tensors.items()})


def stack_of_fused_pieces(
    pieces: Sequence[Piece], format: Format4bit, device: torch.device | str | int | None = None
) -> Packed4bitWeights:
    """A stack of matrices that were quantized over all experts at once, as if each expert had been quantized alone.

    Nothing is lost: ``dequantize`` gives the same bits. Groups of 256 absmaxes that run over from one expert to the next
    cannot be kept, though; the absmaxes are then stored in fp32, and the result's format has ``double_quant=False``.

    Args:
        pieces: for each projection the one that quantizing its (E, out/projections, in) stack gave.
        format: of the stack, with ``double_quant`` as the pieces have it.
        device: of the stack; None for that of the first piece.

    Raises:
        TypeError, ValueError: too many or too few, or one that does not fit the format: which, and why. Or a format that
            bitsandbytes does not have.
    """
    _check_format(format)
    if len(pieces) != format.projections:
        raise ValueError(f"pieces must be {format.projections}, one for each projection, got {len(pieces)}")
    num_experts, out_features, in_features = format.shape
    weights = num_experts * out_features // format.projections * in_features
    stacks = []
    for projection, piece in enumerate(pieces):
        name = f"piece of projection {projection}"
        stacks.append(_checked(name, piece).tensors(name, weights, format))
    if format.double_quant and format.blocks % GROUP:
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

    return stack_of_pieces(split(), format, device)


def piece_of(weights: Packed4bitWeights, expert: int, projection: int = 0) -> Piece:
    """One matrix of a stack as bitsandbytes holds it: ``packed`` (n/2, 1), the others flat, the offset a scalar.

    The tensors are views of the stack's memory, as far as alignment lets them be.

    Raises:
        ValueError: no such expert or projection, or a format that bitsandbytes does not have.
    """
    format = weights.format
    _check_format(format)
    for name, value, size in (("expert", expert, format.shape[0]), ("projection", projection, format.projections)):
        if not 0 <= value < size:
            raise ValueError(f"{name} must be from 0 to {size - 1}, got {value}")
    parts = {part: value[expert].view(format.projections, -1)[projection] for part, value in weights.tensors().items()}
    if not format.double_quant:
        return Piece(parts["packed"][:, None], as_floats(parts["absmax"]))
    nested_absmax, nested_offset = as_floats(parts["nested_absmax"]), as_floats(parts["nested_offset"])
    return Piece(parts["packed"][:, None], parts["absmax"], nested_absmax, nested_offset.view(()))


def stack_of_published(tensors: Mapping[str, Tensor], format: Format4bit) -> Packed4bitWeights:
    """A stack of tensors with all experts, as gpt-oss publishes its own; it shares their memory where they are contiguous.

    Args:
        tensors: by the name that the format gives them. Those of mxfp4 are ``blocks`` (E, out, in/32, 16) and ``scales``
            (E, out, in/32), both uint8, or ``weight_packed`` (E, out, in/2) and ``weight_scale`` (E, out, in/32), both
            uint8. Those of nvfp4 are ``weight_packed`` (E, out, in/2) uint8, ``weight_scale`` (E, out, in/16) float8_e4m3fn
            and ``weight_global_scale`` (E, projections) fp32.
        format: of the stack. The out features are in the order of the tensors, in which gate and up may alternate.

    Raises:
        TypeError: another dtype, or not a tensor.
        ValueError: the format has no such tensors, or a tensor has another shape.
    """
    published = _published(tensors, format, "tensors")
    storage: dict[str, Tensor] = {}
    for part, (name, wanted) in zip(format.storage(), published.items(), strict=True):
        value = _checked_tensor(name, tensors[name], wanted.dtype, _of_stack(wanted, format))
        storage[part] = value.detach().contiguous().flatten(1).view(torch.uint8)
    return Packed4bitWeights(format, **storage)


def stack_of_published_matrices(
    matrices: Iterable[Mapping[str, Tensor]], format: Format4bit, device: torch.device | str | int | None = None
) -> Packed4bitWeights:
    """A stack of tensors with one matrix each, as compressed-tensors publishes experts.

    Args:
        matrices: E·projections of them, the projections of expert 0 first, taken one at a time. The tensors are those of
            ``stack_of_published`` without the first dimension, and ``weight_global_scale`` is (1,).
        format: what they make up.
        device: of the stack; None for that of the first matrix.

    Raises:
        TypeError, ValueError: as ``stack_of_published``, and too many or too few.
    """
    count = format.shape[0] * format.projections

    def parts() -> Iterator[dict[str, Tensor]]:
        remaining = iter(matrices)
        for index in range(count):
            tensors = next(remaining, None)
            if tensors is None:
                raise ValueError(f"matrices must be {count}, of each expert and projection, got {index}")
            where = f"of expert {index // format.projections}, projection {index % format.projections}"
            part = {}
            for stored, (name, wanted) in zip(
                format.storage(), _published(tensors, format, f"tensors {where}").items(), strict=True
            ):
                value = _checked_tensor(f"{name} {where}", tensors[name], wanted.dtype, wanted.shape)
                part[stored] = value.detach().contiguous()
            yield part
        if next(remaining, None) is not None:
            raise ValueError(f"matrices must be {count}, of each expert and projection, got more")

    return Packed4bitWeights.of_parts(parts(), format, device)


def published_of(weights: Packed4bitWeights, name: str | None = None) -> dict[str, Tensor]:
    """The tensors of a stack as they are published, with all experts.

    They share the stack's memory as far as alignment lets them. Expert e is ``tensor[e]``. Of its projections each has an
    equal part of the first dimension that is then left.

    Args:
        weights: the stack.
        name: one of the tensors that are wanted, where a format is published with several sets of names. None stands for the
            set that ``stack_of_published`` names first.

    Raises:
        ValueError: the format is not published so.
    """
    layouts = _layouts(weights.format)
    published = layouts[0] if name is None else next((layout for layout in layouts if name in layout), None)
    if published is None:
        raise ValueError(f"{weights.format.quant_type} is not published with a tensor called {name}")
    tensors = {}
    for (name, wanted), value in zip(published.items(), weights.tensors().values(), strict=True):
        typed = as_floats(value) if wanted.dtype == torch.float32 else value.view(wanted.dtype)
        tensors[name] = typed.view(_of_stack(wanted, weights.format))
    return tensors


def _layouts(format: Format4bit) -> tuple[dict[str, PublishedTensor], ...]:
    published = format.weight_format.published(format)
    if not published:
        raise ValueError(
            f"{format.quant_type} is not published as named tensors: its matrices are made of a Piece each"
        )
    return published


def _published(tensors: Mapping[str, Tensor], format: Format4bit, what: str) -> dict[str, PublishedTensor]:
    """The layout that has the names of ``tensors``."""
    layouts = _layouts(format)
    for layout in layouts:
        if set(layout) == set(tensors):
            return layout
    names = ", or ".join(" and ".join(layout) for layout in layouts)
    raise ValueError(f"{what} must be {names} for {format.quant_type}, got {' and '.join(tensors) or 'none'}")


def _of_stack(wanted: PublishedTensor, format: Format4bit) -> tuple[int, ...]:
    first, *others = wanted.shape
    return (format.shape[0], format.projections * first, *others)


def _checked_tensor(name: str, value: object, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    tensor = checks.tensor(name, value, shape)
    checks.dtype(name, tensor, (dtype,))
    return tensor
