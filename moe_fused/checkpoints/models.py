"""Saved models from one layout of their experts into another, dense or in 4 bits, a piece at a time.

The source is read by its headers first; what is wrong with it, and what the result will be, is known before anything is
written. The result appears whole or not at all. ``stacks`` says how a layout becomes another.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from moe_fused.staging import staged_directory

from .architecture import CONFIG, ORIGINAL_CLASSES, Architecture, read_config
from .checkpoint import Checkpoint, Layout
from .stacks import DenseStack, PackedStack
from .tensor_files import Output, read_checkpoint, split, write_checkpoint

# Weights of the source in whatever format, which the result has anew.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Plan:
    """What a conversion does.

    Attributes:
        source, target: directories.
        source_layout, layout: of the experts, before and after.
        experts: what they are in, before and after: a dtype, or a format of 4 bits.
        stacks: how many parameters of experts there are.
        tensors, nbytes: number of tensors and their bytes, before and after.
        shards: the names of the tensors in each file of them.
        others: files that are copied.
        notes: what is lost, or left as it is.
        overwrite: whether ``target`` may be replaced.
    """

    source: Path
    target: Path
    source_layout: str
    layout: str
    experts: tuple[str, str]
    stacks: int
    tensors: tuple[int, int]
    nbytes: tuple[int, int]
    shards: Mapping[str, list[str]] = field(repr=False)
    others: tuple[str, ...]
    notes: tuple[str, ...]
    overwrite: bool
    _outputs: Mapping[str, Output] = field(repr=False)
    _config: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        files = len(self.shards)
        lines = [
            f"from {self.source}: {self.source_layout} experts ({self.experts[0]})",
            f"     {self.tensors[0]} tensors, {_size(self.nbytes[0])}",
            f"to   {self.target}: {self.layout} experts ({self.experts[1]})",
            f"     {self.tensors[1]} tensors, {_size(self.nbytes[1])}, in {files} file{'s' * (files > 1)}",
            f"     copied: {', '.join(self.others) or 'nothing else'}",
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def write(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Does what was planned; the target appears once it is complete.

        Args:
            progress: is called with the bytes written so far and those of all tensors.

        Raises:
            FileExistsError: the target exists by now.
            OSError: there is not enough space.
        """
        done, total = 0, self.nbytes[1]

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        check = partial(check_replaceable, overwrite=self.overwrite)
        with staged_directory(self.target, "the target", check, total) as staging:
            for name in self.others:
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.source / name, staging / name)
            text = json.dumps(self._config, indent=2, ensure_ascii=False) + "\n"
            (staging / CONFIG).write_text(text, encoding="utf-8")
            write_checkpoint(staging, self._outputs, self.shards, advance)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**8 else f"{nbytes / 1e6:.2f} MB"


def convert_model(
    source: Path,
    target: Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Writes the model in ``source`` to ``target`` with its experts in another layout, and warns of what is lost.

    Args:
        dry_run: only makes the plan.
        progress: as in ``Plan.write``; the rest as in ``plan_model``.

    Returns:
        The plan.

    Raises:
        ValueError, FileExistsError, FileNotFoundError, OSError: as ``plan_model`` and ``Plan.write``.
    """
    plan = plan_model(
        source,
        target,
        layout,
        dtype=dtype,
        dequantize=dequantize,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    if not dry_run:
        for note in plan.notes:
            warnings.warn(note, stacklevel=2)
        plan.write(progress)
    return plan


def plan_model(
    source: Path,
    target: Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Plan:
    """What it takes to write the model in ``source`` to ``target`` with its experts in another layout.

    Each weight keeps its bits, dense or packed, unless ``dtype`` or ``dequantize`` says otherwise. Writing takes memory
    for the packed experts of a layer, or for a few megabytes if they are dense.

    Args:
        source: a directory with ``config.json`` and safetensors, in one file or with an index.
        target: the directory to make; its parent must exist.
        layout: ``"per-expert"``, a matrix for each expert, what the Hub has; ``"fused"``, stacks as Transformers 5 holds
            them in memory, or, in 4 bits, as ``moe_fused.save_format(model, "fused")`` has them saved; ``"original"``, a
            stack for each projection, as the original qwen3-moe-fused has them.
        dtype: to cast floating-point tensors to, but for those that the model keeps in fp32; None to leave them.
        dequantize: makes dense tensors of all 4-bit ones.
        max_shard_size: of a file, in bytes or as in ``"5GB"``; larger tensors get a file to themselves.
        overwrite: allows for a model at ``target``, which is replaced.

    Raises:
        ValueError: the source is incomplete, in several layouts or in none that is known, or cannot be in ``layout``:
            which tensor, and why.
        FileExistsError: ``target`` exists.
        FileNotFoundError: a file of the source is missing.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    source, target = Path(source), Path(target)
    check_apart(source, target)
    check_replaceable(target, overwrite)
    config, tensors = read_config(source), read_checkpoint(source)
    checkpoint = Checkpoint(Architecture.read(source, config), tensors, "quantization_config" in config)
    if dequantize and not checkpoint.packed:
        raise ValueError(f"{source} has no 4-bit tensors that could be dequantized")
    if dtype is not None and checkpoint.packed and not dequantize:
        raise ValueError(f"dtype={dtype} is for dense models: those in 4 bits, as {source}, must be dequantized, too")
    model = type(checkpoint.architecture.model).__name__
    if layout == "original" and model not in ORIGINAL_CLASSES.values():
        raise ValueError(f"the original project's layout is for Qwen3-MoE, not for a {model}, as is in {source}")
    outputs = checkpoint.outputs(layout, dtype, dequantize)
    unchanged = checkpoint.layout == layout and dtype is None and not dequantize
    results = [
        stack.description if unchanged else stack.description_after(dtype, dequantize) for stack in checkpoint.stacks
    ]
    return Plan(
        source,
        target,
        checkpoint.layout,
        layout,
        (_list(stack.description for stack in checkpoint.stacks), _list(results)),
        len(checkpoint.stacks),
        (len(tensors), len(outputs)),
        (sum(own.nbytes for own in tensors.values()), sum(own.nbytes for own in outputs.values())),
        split(outputs, max_shard_size),
        tuple(other_files(source)),
        (*checkpoint.notes, *(() if unchanged or dequantize else _losses(checkpoint.stacks))),
        overwrite,
        outputs,
        _adjusted(config, layout, dtype, dequantize),
    )


def _list(values: Iterable[str]) -> str:
    return " and ".join(sorted(set(values)))


def check_apart(source: Path, target: Path) -> None:
    """Raises ValueError if one of the directories is the other or holds it."""
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"source and target must be apart, got {source} and {target}")


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless a model may be written to ``target``: nothing is there, or a model to overwrite."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a directory: choose another path")
    if not overwrite:
        raise FileExistsError(f"{target} exists: choose another path, or overwrite it")
    if not (target / CONFIG).is_file():
        raise FileExistsError(f"{target} exists and has no {CONFIG}, so that it is no model: choose another path")


def _losses(stacks: list[DenseStack | PackedStack]) -> Iterator[str]:
    lossy = [stack for stack in stacks if isinstance(stack, PackedStack) and stack.loses_double_quantization]
    if lossy:
        yield (
            f"double quantization is lost in {len(lossy)} of {len(stacks)} stacks, as {lossy[0].target.name}: its groups "
            "run over from one expert to the next, so that absmaxes become fp32; the weights stay the same bit for bit"
        )


def _adjusted(config: dict[str, Any], layout: Layout, dtype: torch.dtype | None, dequantize: bool) -> dict[str, Any]:
    """The config of the result."""
    classes = ORIGINAL_CLASSES if layout != "original" else {new: old for old, new in ORIGINAL_CLASSES.items()}
    result = dict(config)
    if result.get("architectures"):
        result["architectures"] = [classes.get(name, name) for name in result["architectures"]]
    if dequantize:
        result.pop("quantization_config", None)
    if dtype is not None:
        for key in {"dtype", "torch_dtype"} & result.keys() or {"dtype"}:
            result[key] = str(dtype).removeprefix("torch.")
    return result


def other_files(source: Path) -> Iterator[str]:
    """What is copied as it is: a tokenizer, a generation config and so on, but no weights and nothing hidden."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and name.as_posix() != CONFIG and not name.name.endswith(_WEIGHTS):
            yield name.as_posix()
