"""Reads and writes the safetensors files of a model a piece at a time.

``safetensors`` itself reads and writes whole tensors in memory. Its reader checks every file before it is read here.
``safetensors_file`` writes the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .finite import Watch, check_of_scales, is_finite
from .names import MATRIX_PARTS, STACK_PARTS
from .safetensors_file import DTYPES, Chunks, TensorSpec, as_bytes, dtype_name, safetensors_writer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_CHUNK = 1 << 20
_PACKED, _BLOCKS = MATRIX_PARTS[0], STACK_PARTS[0]
FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, or a part of one.

    Attributes:
        path: the file.
        dtype: the name that safetensors has for the dtype.
        shape: the shape of the tensor.
        start, nbytes: where its bytes begin in the file, and how many there are.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def part(self, index: int, count: int, shape: tuple[int, ...]) -> Stored:
        """Returns the ``index``-th of ``count`` equal parts."""
        size = self.nbytes // count
        return Stored(self.path, self.dtype, shape, self.start + index * size, size)

    def chunks(self, size: int = _CHUNK) -> Iterator[bytearray]:
        """Yields its bytes, ``size`` at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for done in range(0, self.nbytes, size):
                data = bytearray(min(size, self.nbytes - done))
                if file.readinto(data) != len(data):
                    raise OSError(f"{self.path} has become shorter while it was read")
                yield data

    def load(self, key: str) -> Tensor:
        """Reads the tensor, which is called ``key`` in errors.

        Raises:
            ValueError: its dtype is not one of weights, dense or packed.
        """
        dtype = self.torch_dtype(key)
        if not self.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        (data,) = self.chunks(self.nbytes)
        return torch.frombuffer(data, dtype=dtype).view(self.shape)

    def empty(self, key: str) -> Tensor:
        """Returns a meta tensor of the same dtype and shape. Raises ValueError as ``load`` does."""
        return torch.empty(self.shape, dtype=self.torch_dtype(key), device="meta")

    def torch_dtype(self, key: str) -> torch.dtype:
        # These are the dtypes of weights and of the tensors beside packed weights. Other tensors are copied but never read.
        # What such a tensor must be is said where it is read.
        if self.dtype not in (*FLOATS, "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"):
            raise ValueError(f"{key} must be bfloat16, float16, float32 or uint8, got safetensors' {self.dtype}")
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Output(TensorSpec):
    """A tensor to be written.

    Attributes:
        chunks: returns its bytes, in order.
    """

    chunks: Callable[[], Chunks]

    @classmethod
    def of_tensor(cls, example: Tensor, make: Callable[[], Tensor]) -> Output:
        """Makes an output of the tensor that ``make`` returns. It is like ``example``, which may be on meta."""
        return cls(dtype_name(example.dtype), tuple(example.shape), example.nbytes, lambda: [as_bytes(make())])

    @classmethod
    def of_stored(cls, stored: Stored, dtype: torch.dtype | None = None) -> Output:
        """Makes an output that copies ``stored``, and casts it if it has a floating dtype and ``dtype`` is not None."""
        name = cast_name(stored, dtype)
        nbytes = stored.nbytes if name == stored.dtype else prod(stored.shape) * DTYPES[name].itemsize
        return cls(name, stored.shape, nbytes, lambda: cast_chunks(stored, name))


def cast_name(stored: Stored, dtype: torch.dtype | None) -> str:
    """Returns the name of the dtype that ``stored`` has after casting. Only floating-point tensors are cast."""
    return stored.dtype if dtype is None or stored.dtype not in FLOATS else dtype_name(dtype)


def cast_chunks(stored: Stored, name: str) -> Iterator[bytearray | memoryview]:
    """Yields the bytes of ``stored`` in the dtype that safetensors calls ``name``."""
    for chunk in stored.chunks():
        if name == stored.dtype:
            yield chunk
        else:  # chunks hold whole values, because their size is a multiple of every item size
            yield as_bytes(torch.frombuffer(chunk, dtype=DTYPES[stored.dtype]).to(DTYPES[name]))


def read_header(path: Path) -> dict[str, Stored]:
    """Returns the tensors of a safetensors file.

    Raises:
        ValueError: the file is not in this format, or is cut short.
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


def check_inside(directory: Path, index: str, key: str, name: object) -> None:
    """Raises ValueError unless ``name``, which the file ``index`` gives for ``key``, is a path within ``directory``.

    The file itself may be a link, as in the cache of the Hub, but the directories above it must not lead elsewhere.
    """
    paths = (PurePosixPath(name), PureWindowsPath(name)) if isinstance(name, str) else ()
    inside = bool(paths) and all(not path.is_absolute() and not path.drive and ".." not in path.parts for path in paths)
    root = directory.resolve()
    if inside:
        parent = (directory / str(name)).parent.resolve()
        inside = parent == root or root in parent.parents
    if not inside:
        raise ValueError(
            f"{directory / index} names the file {name!r} for {key}, which must be a path within {directory}, where all "
            "files of a checkpoint are"
        )


def read_index(index: Path) -> dict[str, str]:
    """Reads, from the index of a checkpoint in several files, which file holds each tensor.

    Raises:
        ValueError: the index is not JSON with a ``weight_map``, or names a file outside of its directory.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index} must be JSON with a weight_map: {error}") from None
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} must be JSON with a weight_map of all tensors and their files")
    checked: set[object] = set()
    for key, name in places.items():
        if not isinstance(name, str) or name not in checked:
            check_inside(index.parent, index.name, key, name)
            checked.add(name)
    return places


def read_shards(
    index: Path, read: Callable[[Path], dict[str, Stored]] = read_header, *, strict: bool = True
) -> dict[str, Stored]:
    """Returns the tensors of the files that an index names.

    Args:
        read: returns the tensors of a file.
        strict: whether the index must name all tensors of the files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the index or a file is damaged, or a tensor is not in the file that the index names, or is in two files.
    """
    directory, places = index.parent, read_index(index)
    headers: dict[str, dict[str, Stored]] = {}
    for key, name in places.items():
        if name not in headers:
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / name}, which holds {key}, is missing")
            headers[name] = read(directory / name)
            extra = next((other for other in headers[name] if other not in places), None)
            if strict and extra is not None:
                raise ValueError(f"{extra} is in {name}, but not in {index.name}")
        if key not in headers[name]:
            raise ValueError(f"{key} is not in {name}, where {index.name} has it")
    tensors = {key: headers[name][key] for key, name in places.items()}
    for name, header in headers.items():
        for key, stored in header.items():
            if tensors.setdefault(key, stored) is not stored:
                raise ValueError(f"{key} is in {name}, and in another file of {index.name}")
    return tensors


def read_checkpoint(directory: Path) -> dict[str, Stored]:
    """Returns the tensors of the model in ``directory``, from its single file if there is one, else by its index.

    Transformers prefers the single file, too.

    Raises:
        FileNotFoundError: there is neither a file nor an index, or a file that the index names is missing.
        ValueError: a file is damaged or outside of the directory, or a tensor is not in the file that the index names.
    """
    if (directory / WEIGHTS).is_file():
        return read_header(directory / WEIGHTS)
    if not (directory / INDEX).is_file():
        raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}: only safetensors are read")
    return read_shards(directory / INDEX)


def split(outputs: Mapping[str, Output], max_shard_size: int | str) -> dict[str, list[str]]:
    """Distributes tensors over files, and returns the names of the tensors in each file.

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


def _values(key: str, outputs: Mapping[str, Output]) -> tuple[torch.dtype, Callable[[Tensor], bool]]:
    """Returns the dtype of a tensor's values, and what says whether they are sound.

    The scales of packed experts are fp32 in bytes, unless they are in 8 bits.
    """
    dtype = DTYPES.get(outputs[key].dtype, torch.uint8)
    for main, separator in ((_PACKED, "."), (_BLOCKS, "_")):
        name, _, part = key.rpartition(separator)
        if f"{name}{separator}{main}" in outputs and (check := check_of_scales(part, dtype)) is not None:
            return torch.uint8, check
    fp32 = key.endswith(("_nested_absmax", "_nested_offset")) or (
        key.endswith("_absmax") and f"{key.removesuffix('_absmax')}_nested_absmax" not in outputs
    )
    return torch.float32 if fp32 else dtype, is_finite


def write_checkpoint(
    directory: Path, outputs: Mapping[str, Output], shards: Mapping[str, list[str]], progress: Callable[[int], None]
) -> None:
    """Writes ``outputs`` into the files of ``shards``, one tensor at a time in their order, and the index.

    Args:
        progress: called with the number of bytes written since its last call.

    Raises:
        ValueError: a tensor holds NaN or infinite values. The message names it.
    """

    def seen(key: str, chunks: Chunks) -> Chunks:
        dtype, check = _values(key, outputs)
        for chunk in chunks:
            watch.see(key, chunk, dtype, check)
            yield chunk
            progress(len(chunk))

    with Watch() as watch:
        for name, keys in shards.items():
            with safetensors_writer(directory / name, {key: outputs[key] for key in keys}, {"format": "pt"}) as write:
                for key in keys:  # in this order, because neighbours come from the same experts
                    write(key, seen(key, outputs[key].chunks()))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(output.nbytes for output in outputs.values())},
            "weight_map": {key: name for name, keys in shards.items() for key in keys},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
