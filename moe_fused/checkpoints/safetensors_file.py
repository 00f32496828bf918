"""Writing a safetensors file a piece at a time.

``safetensors.torch.save_file`` wants all tensors in memory at once, which for a shard is gigabytes. The format does not:
eight bytes with the length of a JSON header, the header with every tensor's dtype, shape and place, the tensors' bytes
without gaps. Whoever knows the header beforehand can write it first, and the bytes as they come.
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

# As in the format's own list of types; what else torch has does not occur in adapters and checkpoints.
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
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls ``dtype``.

    Raises:
        TypeError: the format has no name for it.
    """
    if dtype not in _NAMES:
        raise TypeError(f"dtype must be one that safetensors can hold, got {dtype}")
    return _NAMES[dtype]


def as_bytes(value: Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    # numpy has no bfloat16.
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class TensorSpec:
    """What the header says of a tensor.

    Attributes:
        dtype: as safetensors calls it, which may be one of ``DTYPES`` or not.
        shape: of the tensor.
        nbytes: of the tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> TensorSpec:
        """Of ``tensor``, which may be on meta and which ``name`` names in errors.

        Raises:
            TypeError: the format has no name for its dtype.
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
        path: of the file, which must not exist.
        specs: of all tensors to come, by name.
        metadata: the header's own strings.

    Yields:
        A function that writes the tensor of a name, given its bytes in order.

    Raises:
        FileExistsError: ``path`` exists.
        ValueError: a tensor is not as large as announced, was not announced, was written before, or is missing at the end.
    """
    places: dict[str, int] = {}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    # Wide types first: readers view the bytes in place, so each tensor must begin at a multiple of its item size.
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
