"""``Packed4bitWeights``: a stack of expert matrices in 4 bits, which takes the place of a dense tensor.

The weights of an expert lie flat, row-major, two to a byte. Every ``blocksize`` of them share a scale, whose storage belongs
to the format (``formats``). A stack may hold several *projections* along the out features, as the gate and up of
Transformers' fused experts. Scales are kept for every expert and projection, so that checkpoints with one 4-bit matrix for
each load without loss.

All storage is uint8 with leading dimension E, with wider values as their bytes. Such storage shards by expert, survives
``module.to(dtype)`` and mixed precision, and is touched by no optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import checks
from .formats.base import DTYPES, Format4bit
from .stages import backend_for
from .stages.stacks import PackedStack


class Packed4bitWeights:
    """A stack of expert matrices in 4 bits; takes the place of a dense (E, out, in) tensor in every function.

    A value like a tensor, which does not change: ``to`` moves it, ``copy.deepcopy`` and ``pickle`` work.

    Args:
        format: how the stack is packed.
        storage: the format's tensors in the order of ``format.storage()``, or by name. ``packed`` (E, out·in/2) uint8 holds
            the weights, the others hold the scales. For nf4 and fp4 these are ``absmax`` (E, blocks) uint8 with double
            quantization, else (E, 4·blocks) uint8, the bytes of fp32, for the blocks of all projections; and with double
            quantization ``nested_absmax`` (E, 4·groups) and ``nested_offset`` (E, 4·projections), the bytes of fp32.
            For mxfp4 and nvfp4 there is ``block_scale`` (E, blocks) uint8, the bytes of E8M0 or E4M3, and for nvfp4 also
            ``global_scale`` (E, 4·projections), the bytes of fp32. Each is an attribute of the stack; those of nf4 and fp4
            that the format does not have are None.

    Raises:
        TypeError, ValueError: a tensor that is missing or superfluous, or not uint8, or of another shape than the format's,
            or not contiguous.
    """

    format: Format4bit
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(self, format: Format4bit, *storage: Tensor | None, **named: Tensor | None) -> None:
        shapes = format.storage()
        given: dict[str, Any] = {**dict(zip(shapes, storage, strict=False)), **named}
        for name in (*shapes, *(name for name in given if name not in shapes)):
            value: Any = given.get(name)
            shape = shapes.get(name)
            if not is_wanted(name, value, shape is not None, format):
                continue
            if value.dtype != torch.uint8:
                raise TypeError(f"{name} must be uint8, got {str(value.dtype).removeprefix('torch.')}")
            if value.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
            if not value.is_contiguous():  # which kernels take for granted
                raise ValueError(f"{name} must be contiguous, got strides {value.stride()}")
            if value.device != given["packed"].device:
                raise ValueError(f"{name} must be on {given['packed'].device} like packed, got {value.device}")
        object.__setattr__(self, "format", format)
        for name in ("packed", "absmax", "nested_absmax", "nested_offset", *shapes):
            object.__setattr__(self, name, given.get(name))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} does not change: make another one with replaced()")

    def __repr__(self) -> str:
        return f"Packed4bitWeights({self.format}, device={str(self.device)!r})"

    def replaced(self, **tensors: Tensor | None) -> Packed4bitWeights:
        """A stack with some of its tensors replaced."""
        return Packed4bitWeights(self.format, **{**self.tensors(), **tensors})

    @property
    def shape(self) -> torch.Size:
        """(E, out, in) of the weights."""
        return torch.Size(self.format.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights once they are dequantized."""
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
        """The storage by attribute name, ``packed`` first."""
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

    def scales(self) -> Tensor:
        """(E, blocks) fp32: the scale of every block, blocks of all projections."""
        return self.format.weight_format.scales(self.format, self.tensors())

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        *,
        quant_type: str = "nf4",
        blocksize: int = 0,
        double_quant: bool | None = None,
        projections: int = 1,
        dtype: torch.dtype | None = None,
    ) -> Packed4bitWeights:
        """Each expert's projections in 4 bits: nf4 and fp4 bit for bit as ``bitsandbytes.functional.quantize_4bit``.

        The bits are those of bitsandbytes on the weights' device, as it differs between CPU and GPU (``formats.absmax``).
        mxfp4 and nvfp4 are rounded as compressed-tensors 0.20 rounds them, except that fp16 is taken for fp32, that -0 stays
        -0, and that a block of mxfp4 with Inf or NaN becomes NaN. What was dequantized then gets the same 4 bits again,
        unless a block's scale in nvfp4 was below 2^-6, the smallest normal number of E4M3, or projections of an expert had
        different global scales. All projections of an expert get the same one, which vLLM needs.

        This takes memory for the result and a few times one expert's projection in fp32.

        Args:
            weight: (E, out, in) bfloat16, float16 or float32, of any strides.
            quant_type, blocksize, double_quant, projections: as in ``Format4bit``.
            dtype: of dequantized weights; None for the dtype of ``weight``.

        Raises:
            TypeError: ``weight`` is not a tensor of these dtypes.
            ValueError: values that do not fit each other.
        """
        checks.tensor("weight", weight, ("E", "out", "in"))
        checks.dtype("weight", weight, DTYPES)
        shape = (weight.shape[0], weight.shape[1], weight.shape[2])
        format = Format4bit(shape, quant_type, blocksize, double_quant, projections, dtype or weight.dtype)
        experts = (expert.unflatten(0, (projections, -1)) for expert in weight.detach())
        quantize = format.weight_format.quantize_expert
        return cls.of_parts((part for expert in experts for part in quantize(expert, format)), format)

    @classmethod
    def of_parts(
        cls,
        parts: Iterable[Mapping[str, Tensor]],
        format: Format4bit,
        device: torch.device | str | int | None = None,
    ) -> Packed4bitWeights:
        """A stack of the tensors of its matrices.

        Args:
            parts: the tensors of each matrix by their names in the format's storage, flat; the projections of expert 0
                first. They are taken one at a time.
            device: of the stack; None for that of the first matrix.
        """
        storage: dict[str, Tensor] = {}
        matrices = format.shape[0] * format.projections
        for index, tensors in enumerate(parts):
            if not storage:
                device = tensors["packed"].device if device is None else device
                storage = {
                    name: torch.empty(shape, dtype=torch.uint8, device=device)
                    for name, shape in format.storage().items()
                }
            for name, value in tensors.items():
                storage[name].view(matrices, -1)[index].copy_(value.reshape(-1).view(torch.uint8))
        return cls(format, **storage)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """(E, out, in) weights: nf4 and fp4 bit for bit as ``bitsandbytes.functional.dequantize_4bit`` in ``dtype``.

        mxfp4 equals Transformers' ``convert_moe_packed_tensors`` bit for bit, but for a scale of 255, which the
        specification makes NaN. nvfp4 equals compressed-tensors.

        fp4 has a second zero, which is -0 on GPUs of CUDA and ROCm and 0 elsewhere. bitsandbytes has it so, too, except on
        CPUs without AVX-512, where its kernel makes -0 of it.

        Args:
            dtype: of the result, rounded once from fp32; None for the format's.

        Raises:
            TypeError: ``dtype`` is not a float, or not one that the device supports.
        """
        out = torch.empty(self.shape, dtype=self.dtype if dtype is None else dtype, device=self.device)
        checks.dtype("dtype", out, checks.FLOAT_DTYPES)
        stack = PackedStack(self.format, tuple(self.tensors().values()))
        backend_for(self.packed, out.dtype).dequantize(stack, 0, self.shape[0], out)
        return out


def is_wanted(name: str, value: object, wanted: bool, format: Format4bit) -> bool:
    """Whether there is a tensor, as there must be if it is ``wanted`` and must not be if not.

    Raises:
        TypeError: where that is not so.
    """
    if isinstance(value, Tensor) == wanted and (wanted or value is None):
        return wanted
    must = "a tensor" if wanted else "None"
    one_kind = len(format.weight_format.double_quants) == 1
    where = f"for {format.quant_type}" if one_kind else f"with double_quant={format.double_quant}"
    raise TypeError(f"{name} must be {must} {where}, got {type(value).__name__}")
