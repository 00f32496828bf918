"""Writing a safetensors file one tensor at a time.

``safetensors.torch.save_file`` wants all tensors in memory at once. The format does not: eight bytes with the length of a
JSON header, the header with every tensor's type, shape and place, the tensors' bytes without gaps.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

# As in the format's own list of types; what else torch has does not occur in adapters and checkpoints.
_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class TensorSpec(NamedTuple):
    """What the header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@contextlib.contextmanager
def safetensors_writer(
    path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, torch.Tensor], None]]:
    """Makes a safetensors file whose tensors are announced first and then written one by one, in any order.

    Args:
        path: of the file, which must not exist.
        specs: of all tensors to come, by name.
        metadata: the header's own strings.

    Yields:
        A function that writes the tensor of a name.

    Raises:
        FileExistsError: ``path`` exists.
        TypeError: the format has no name for the dtype of a tensor.
        ValueError: a tensor is not as announced, was written before, or is missing at the end.
    """
    places: dict[str, int] = {}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    # Wide types first: readers view the bytes in place, so each tensor must begin at a multiple of its item size.
    for name, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if spec.dtype not in _NAMES:
            raise TypeError(f"{name} is {spec.dtype}, which safetensors cannot hold")
        places[name] = end
        end += spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [places[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    left = set(specs)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + end)

        def write(name: str, tensor: torch.Tensor) -> None:
            if name not in left or TensorSpec.of(tensor) != specs[name]:
                raise ValueError(f"{name} is {TensorSpec.of(tensor)}, announced was {specs.get(name)}, once")
            left.remove(name)
            file.seek(start + places[name])
            # numpy has no bfloat16, so the bytes are written.
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

        yield write
    if left:
        raise ValueError(f"{min(left)} was announced and not written")
