"""Loads a model for a command, and raises an error if a tensor is missing, has a wrong shape or is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM

from moe_fused.quantized import content_of, quantization_of
from moe_fused.sizes import linear_modules, skeleton

from .architecture import Architecture
from .checkpoint import STATE
from .complete import check_complete, check_problems, problems_of
from .files import Pickled, find_weights, read_tensors
from .finite import check_finite, weights_of
from .places import read_object
from .share import Share

# Checkpoints that this process has found complete, with the names, times and sizes of their files.
_complete: set[tuple[object, ...]] = set()


def check_checkpoint(
    source: str, name: str, config: Any, *, revision: str = "main", packs: bool = False, download: bool = False
) -> None:
    """Compares the headers of a model's files with what its config needs. ``load_pretrained`` does this, too.

    Args:
        source: a directory, or a name on the Hub.
        name: what ``source`` is called in errors.
        config: the configuration of the model.
        packs: whether the model will be quantized to 4 bits while it is loaded.
        download: whether to download files that the Hub's cache lacks. If not, nothing is checked in this case.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged or outside of the directory, or a tensor is missing, has
            another shape or does not belong to the model.
    """
    try:
        path = find_weights(source, revision, download=download)
        if path is None:
            return
        key = (path, packs, *_state_of(path.parent))
        if key in _complete:
            return
        tensors = read_tensors(path)
        if path.name.endswith(".index.json") and not isinstance(read_object(path).get("metadata"), dict):
            raise ValueError(
                f'{path} has no metadata, without which Transformers does not read an index: {{"total_size": BYTES}}'
            )
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    quantization = quantization_of(config)
    if content_of(config) is None or quantization is not None:
        check_complete(skeleton(config), tensors, name, quantization=quantization, packs=packs)
    _complete.add(key)


class DenseWeights(NamedTuple):
    """What is dense in a checkpoint whose config says that it is in 4 bits.

    Attributes:
        experts: the names of the experts' parameters.
        linears: the names of linear layers, without the head. In published formats all of them are dense anyway, and none
            is named.
    """

    experts: frozenset[str] = frozenset()
    linears: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        return self.experts | self.linears


def dense_weights(source: str, config: Any, *, revision: str = "main") -> DenseWeights:
    """Finds what is dense in a checkpoint whose config says that it is in 4 bits.

    Only headers of files on this machine are read. Without them, or if the checkpoint is dense, the result is empty.

    Args:
        source: a directory, or a name on the Hub.
        config: the configuration of the model.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.
    """
    quantization = quantization_of(config)
    path = find_weights(source, revision, download=False) if quantization is not None else None
    if quantization is None or path is None:
        return DenseWeights()
    architecture = Architecture.of(skeleton(config), in_rows=quantization.is_published)
    names = architecture.names
    packed: set[str] = set()
    for key in read_tensors(path):
        role = names.locate(architecture.in_model(key))
        if role is not None and role.part:
            packed.update(names.spellings(role.target))
        elif STATE in key:
            packed.add(architecture.in_model(key.partition(STATE)[0]).removesuffix(".weight"))
    linears = set() if quantization.is_published else linear_modules(architecture.model).keys() - packed
    return DenseWeights(frozenset(names.targets.keys() - packed), frozenset(linears))


def _state_of(directory: Path) -> Iterator[tuple[str, int, int]]:
    for path in sorted(directory.iterdir()):
        if path.is_file():
            stat = path.stat()
            yield path.name, stat.st_mtime_ns, stat.st_size


def share_of(
    source: str, name: str, rank: int, processes: int, *, device: Any, dtype: Any, revision: str = "main"
) -> Share:
    """Returns what one of several processes loads of a checkpoint, for ``share.taking``.

    Args:
        source: a directory, or a name on the Hub.
        name: what ``source`` is called in errors.
        rank, processes: the number of the process, counted from 0, and the number of processes.
        device, dtype: where the model is loaded, and the dtype of dense experts before they are quantized.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or is none of safetensors.
    """
    path = find_weights(source, revision, download=True)
    assert path is not None  # because it was downloaded
    tensors = read_tensors(path)
    if any(isinstance(header, Pickled) for header in tensors.values()):
        raise ValueError(
            f"{name} has weights of torch.save, of which no part can be read: save them as safetensors first"
        )
    return Share(rank, processes, device, dtype, {key: header.path for key, header in tensors.items()})


def load_pretrained(
    source: str, name: str, config: Any, *, revision: str = "main", quantization: Any = None, **options: Any
) -> Any:
    """Loads a ``PreTrainedModel`` and checks that it is complete and has finite weights.

    Args:
        source: a directory, or a name on the Hub.
        name: what ``source`` is called in errors.
        config: the configuration of the model.
        quantization: the ``quantization_config`` for ``from_pretrained``, or None.
        options: further options of ``from_pretrained``.

    Raises:
        FileNotFoundError, ValueError: as for ``check_checkpoint``, or some weights are NaN or infinite.
    """
    check_checkpoint(source, name, config, revision=revision, packs=quantization is not None, download=True)
    if quantization is not None:
        options["quantization_config"] = quantization
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, revision=revision, output_loading_info=True, **options)
    model, info = loaded
    check_problems(name, model, problems_of(model, info))
    check_finite(weights_of(model), name)
    return model
