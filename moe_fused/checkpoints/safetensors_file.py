"""Writes a safetensors file one tensor at a time.

``safetensors.torch.save_file`` needs all tensors in memory at once, which for a shard is gigabytes. The file format does not
need this. A file begins with eight bytes that hold the length of a JSON header. The header holds the dtype, shape and
position of every tensor, and the tensors' bytes follow without gaps. So if the header is known beforehand, it can be
written first, and the bytes as they come.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

Chunks: TypeAlias = "Iterable[bytearray | memoryview]"

# The names in the format's list of types. Other dtypes of torch do not occur in adapters and checkpoints.
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the name that safetensors has for ``dtype``.

    Raises:
        TypeError: safetensors has no name for it.
    """
    if dtype not in _NAMES:
        raise TypeError(f"dtype must be one that safetensors can hold, got {dtype}")
    return _NAMES[dtype]


def as_bytes(value: Tensor) -> memoryview:
    """Returns the bytes of a tensor in row-major order."""
    # Viewed as uint8, because numpy has no bfloat16.
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class TensorSpec:
    """What the header of a file says about a tensor.

    Attributes:
        dtype: the name that safetensors has for the dtype. It need not be one of ``DTYPES``.
        shape: the shape of the tensor.
        nbytes: the size of the tensor in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        """Describes ``tensor``, which may be on meta.

        Args:
            name: what the tensor is called in errors.

        Raises:
            TypeError: safetensors has no name for its dtype.
        """
        if tensor.dtype not in _NAMES:
            raise TypeError(f"{name} is {tensor.dtype}, which safetensors cannot hold")
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)

    @property
    def itemsize(self) -> int:
        count = prod(self.shape)
        return self.nbytes // count if count else 0


@contextlib.contextmanager
def safetensors_writer(
    path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, Chunks], None]]:
    """Makes a safetensors file whose tensors are announced first and then written one by one, in any order.

    Args:
        path: the file, which must not exist.
        specs: the descriptions of all tensors, by name.
        metadata: strings to store in the header.

    Yields:
        A function that writes the tensor of a name, given its bytes in order.

    Raises:
        FileExistsError: ``path`` exists.
        ValueError: a tensor is not as large as announced, was not announced, was written before, or is missing at the end.
    """
    places: dict[str, int] = {}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    # Wide dtypes come first, because readers view the bytes in place: a tensor must begin at a multiple of its item size.
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].itemsize):
        places[name], end = end, end + spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [places[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    left = set(specs)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + end)

        def write(name: str, chunks: Chunks) -> None:
            if name not in left:
                raise ValueError(f"{name} must be announced, and written once")
            left.remove(name)
            file.seek(start + places[name])
            written = 0
            for chunk in chunks:
                file.write(chunk)
                written += len(chunk)
            if written != specs[name].nbytes:
                raise ValueError(f"{name} must have the {specs[name].nbytes} bytes announced, got {written}")

        yield write
    if left:
        raise ValueError(f"{min(left)} was announced and not written")
