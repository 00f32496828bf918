"""Finds the files of a model or an adapter where Transformers and PEFT do: in a directory, or in the cache of the Hub.

Only JSON and the headers of safetensors and ``torch.save`` files are read here, so that an error names a damaged file before
anything large is loaded.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from .places import ADAPTER_CONFIG
from .safetensors_file import DTYPES
from .tensor_files import INDEX, WEIGHTS, check_inside, read_header, read_index, read_shards

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# In the order in which Transformers looks for them.
MODEL_FILES = (WEIGHTS, INDEX, PICKLED, PICKLED_INDEX)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Header(Protocol):
    """What the header of a file says about a tensor. ``tensor_files.Stored`` and ``Pickled`` are such headers."""

    @property
    def path(self) -> Path: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def load(self, key: str) -> Tensor: ...


@dataclass(frozen=True)
class Pickled:
    """A tensor in a file of ``torch.save``.

    Attributes:
        path: the file.
        dtype: the name that safetensors has for the dtype.
        shape: the shape of the tensor.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]

    def load(self, key: str) -> Tensor:
        """Reads the tensor, whose name in the file is ``key``."""
        value: Tensor = _unpickle(self.path, "cpu")[key]
        return value


def _unpickle(path: Path, device: str) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except (
        RuntimeError,
        ValueError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:  # an OSError means that the file ends within its index
        raise ValueError(f"{path} is not a whole file of torch.save: {str(error).partition(chr(10))[0]}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} must hold tensors by their names, got a {type(content).__name__}")
    return content


def _read_pickled(path: Path) -> dict[str, Pickled]:
    return {
        key: Pickled(path, _NAMES.get(value.dtype, str(value.dtype)), tuple(value.shape))
        for key, value in _unpickle(path, "meta").items()
    }


def read_tensors(path: Path) -> Mapping[str, Header]:
    """Returns the headers of the tensors in a file, or in the files that an index names.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or the index names a file outside of its directory.
    """
    pickled = path.name in (PICKLED, PICKLED_INDEX) or path.suffix == ".bin"
    if not path.name.endswith(".index.json"):
        return _read_pickled(path) if pickled else read_header(path)
    # Transformers loads all tensors of the files, whether or not the index names them.
    read = cast(Any, _read_pickled if pickled else read_header)
    return read_shards(path, read, strict=False)


def find_weights(source: str, revision: str = "main", *, download: bool) -> Path | None:
    """Returns the file of weights that Transformers would load for a model, or the index of several files.

    Args:
        source: a directory, or a name on the Hub.
        download: whether to download files that the cache lacks.

    Returns:
        The path, or None if ``source`` is a name on the Hub, its files are not in the cache, and ``download`` is False.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the index is damaged, or names a file outside of its directory.
    """
    directory = Path(source)
    if directory.is_dir():
        for name in (*_explicit(directory), *MODEL_FILES):
            if (directory / name).is_file():
                return directory / name
        raise FileNotFoundError(f"{source} has no weights: none of {', '.join(MODEL_FILES)}")
    for name in MODEL_FILES:
        path = _fetch(source, [name], revision, download)
        if path is None:
            continue
        if not name.endswith(".index.json"):
            return path
        shards = sorted(set(read_index(path).values()))
        return path if _fetch(source, shards, revision, download) is not None else None
    if download:
        raise FileNotFoundError(f"{source} has no weights: none of {', '.join(MODEL_FILES)}")
    return None


def _explicit(directory: Path) -> Iterator[str]:
    """Yields the file of weights that the config names, if it names one."""
    try:
        name = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return
    if name is not None:
        check_inside(directory, "config.json", "transformers_weights", name)
        yield name


def _fetch(source: str, names: list[str], revision: str, download: bool) -> Path | None:
    """Returns the path of the first of the files ``names`` in the Hub's cache, or None if one of them is not there."""
    if not download:
        found = [try_to_load_from_cache(source, name, revision=revision) for name in names]
        return Path(str(found[0])) if all(isinstance(path, str) for path in found) else None
    from transformers.utils.hub import cached_files

    paths = cached_files(source, names, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(paths[0]) if paths and len(paths) == len(names) else None


def check_json(directory: Path, names: Iterator[str]) -> None:
    """Raises ValueError if one of the files whose names end in .json does not hold JSON."""
    for name in names:
        if name.endswith(".json"):
            try:
                json.loads((directory / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{directory / name} must be JSON: {error}") from None


def find_adapter(source: str) -> tuple[Path, Path]:
    """Returns an adapter's config and its file of weights. Both are downloaded if ``source`` is a name on the Hub.

    Raises:
        FileNotFoundError: one of the two files is missing, or the Hub has no such adapter or cannot be reached.
    """
    directory = Path(source)
    if directory.is_dir():
        config = directory / ADAPTER_CONFIG
        weights = next((directory / name for name in ADAPTER_FILES if (directory / name).is_file()), None)
    else:
        from transformers.utils.hub import cached_files

        try:
            paths = cached_files(source, [ADAPTER_CONFIG])
        except OSError as error:
            raise FileNotFoundError(f"it cannot be read: {str(error).splitlines()[0]}") from error
        assert paths is not None, "it raises an error if a file is missing"
        config = Path(paths[0])
        found = (cached_files(source, [name], _raise_exceptions_for_missing_entries=False) for name in ADAPTER_FILES)
        weights = next((Path(path[0]) for path in found if path), None)
    if not config.is_file():
        raise FileNotFoundError(f"{source} has no {ADAPTER_CONFIG}")
    if weights is None:
        raise FileNotFoundError(f"{source} has no weights: none of {', '.join(ADAPTER_FILES)}")
    return config, weights
