"""Safetensors files of a model, read and written a piece at a time.

``safetensors`` reads and writes tensors that are all in memory. Its own reader checks every file before ours reads it;
``safetensors_file`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .safetensors_file import DTYPES, Chunks, TensorSpec, as_bytes, dtype_name, safetensors_writer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_CHUNK = 1 << 20
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, or a part of one.

    Attributes:
        path: of the file.
        dtype: as safetensors calls it.
        shape: of the tensor.
        start, nbytes: its place in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def part(self, index: int, count: int, shape: tuple[int, ...]) -> Stored:
        """The ``index``-th of ``count`` equal parts."""
        size = self.nbytes // count
        return Stored(self.path, self.dtype, shape, self.start + index * size, size)

    def chunks(self, size: int = _CHUNK) -> Iterator[bytearray]:
        """Its bytes, ``size`` at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for done in range(0, self.nbytes, size):
                data = bytearray(min(size, self.nbytes - done))
                if file.readinto(data) != len(data):
                    raise OSError(f"{self.path} has become shorter while it was read")
                yield data

    def load(self, key: str) -> Tensor:
        """The tensor, which ``key`` names in errors.

        Raises:
            ValueError: it is of a dtype that weights, packed or not, are not in.
        """
        dtype = self.torch_dtype(key)
        if not self.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        (data,) = self.chunks(self.nbytes)
        return torch.frombuffer(data, dtype=dtype).view(self.shape)

    def empty(self, key: str) -> Tensor:
        """A meta tensor of the same dtype and shape; raises as ``load``."""
        return torch.empty(self.shape, dtype=self.torch_dtype(key), device="meta")

    def torch_dtype(self, key: str) -> torch.dtype:
        # What weights are in, and what stands beside packed ones. Tensors of other dtypes are copied, never read.
        if self.dtype not in (*FLOATS, "U8"):
            raise ValueError(f"{key} must be bfloat16, float16, float32 or uint8, got safetensors' {self.dtype}")
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Output(TensorSpec):
    """A tensor to be written.

    Attributes:
        chunks: gives its bytes, in order.
    """

    chunks: Callable[[], Chunks]

    @classmethod
    def of_tensor(cls, example: Tensor, make: Callable[[], Tensor]) -> Output:
        """What ``make`` gives, a tensor like ``example``, which may be on meta."""
        return cls(dtype_name(example.dtype), tuple(example.shape), example.nbytes, lambda: [as_bytes(make())])

    @classmethod
    def of_stored(cls, stored: Stored, dtype: torch.dtype | None = None) -> Output:
        """A copy of ``stored``, cast if that is of a floating dtype and ``dtype`` is not None."""
        name = cast_name(stored, dtype)
        nbytes = stored.nbytes if name == stored.dtype else prod(stored.shape) * DTYPES[name].itemsize
        return cls(name, stored.shape, nbytes, lambda: cast_chunks(stored, name))


def cast_name(stored: Stored, dtype: torch.dtype | None) -> str:
    """The dtype of ``stored`` once it is cast to ``dtype``, if it is to be, and can be."""
    return stored.dtype if dtype is None or stored.dtype not in FLOATS else dtype_name(dtype)


def cast_chunks(stored: Stored, name: str) -> Iterator[bytearray | memoryview]:
    """The bytes of ``stored`` in the dtype that safetensors calls ``name``."""
    for chunk in stored.chunks():
        if name == stored.dtype:
            yield chunk
        else:  # chunks are of whole values, for their size is a multiple of any
            yield as_bytes(torch.frombuffer(chunk, dtype=DTYPES[stored.dtype]).to(DTYPES[name]))


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of a file.

    Raises:
        ValueError: it is not one of safetensors, or is cut short.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        key: Stored(path, value["dtype"], tuple(value["shape"]), 8 + length + first, last - first)
        for key, value in header.items()
        for first, last in [value["data_offsets"]]
    }


def read_checkpoint(directory: Path) -> dict[str, Stored]:
    """The tensors of the model in ``directory``: those of its index, or of its one file.

    Raises:
        FileNotFoundError: there is neither, or not all files of the index.
        ValueError: a file that is damaged; a tensor that is not in the file that the index names.
    """
    index = directory / INDEX
    if not index.is_file():
        if not (directory / WEIGHTS).is_file():
            raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}: only safetensors are read")
        return _header(directory / WEIGHTS)
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{index} must be JSON with a weight_map") from None
    tensors: dict[str, Stored] = {}
    headers: dict[str, dict[str, Stored]] = {}
    for key, name in places.items():
        if name not in headers:
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name}, which holds {key}, is missing")
            headers[name] = _header(directory / name)
            if extra := next((other for other in headers[name] if other not in places), None):
                raise ValueError(f"{extra} is in {name}, but not in {INDEX}")
        if key not in headers[name]:
            raise ValueError(f"{key} is not in {name}, where {INDEX} has it")
        tensors[key] = headers[name][key]
    return tensors


def split(outputs: Mapping[str, Output], max_shard_size: int | str) -> dict[str, list[str]]:
    """The names of the tensors by the file that they go into.

    Raises:
        ValueError: ``max_shard_size`` is not a size.
    """
    shards: dict[str, list[str]] = split_state_dict_into_shards_factory(
        dict(outputs),
        get_storage_size=lambda output: output.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    ).filename_to_tensors
    return shards


def write_checkpoint(
    directory: Path, outputs: Mapping[str, Output], shards: Mapping[str, list[str]], progress: Callable[[int], None]
) -> None:
    """Writes ``outputs`` into the files of ``shards``, one tensor at a time, in their order, and the index.

    Args:
        progress: is told the number of bytes that were written since it was last called.
    """

    def counted(chunks: Chunks) -> Chunks:
        for chunk in chunks:
            yield chunk
            progress(len(chunk))

    for name, keys in shards.items():
        with safetensors_writer(directory / name, {key: outputs[key] for key in keys}, {"format": "pt"}) as write:
            for key in keys:  # neighbours come from the same experts
                write(key, counted(outputs[key].chunks()))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(output.nbytes for output in outputs.values())},
            "weight_map": {key: name for name, keys in shards.items() for key in keys},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
