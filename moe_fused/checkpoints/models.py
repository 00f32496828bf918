"""Converts saved models from one layout of their experts into another, dense or in 4 bits, a piece at a time.

Only the headers of the source are read at first, so that errors, and the size of the result, are known before anything is
written. The result appears whole or not at all. ``stacks`` converts the layouts.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from moe_fused.quantized import (
    MODELOPT_CONFIG,
    CheckpointQuantization,
    check_quantization,
    quantization_of,
    with_content,
)
from moe_fused.staging import check_writable, staged_directory

from . import modelopt
from .architecture import ORIGINAL_CLASSES, Architecture
from .checkpoint import Checkpoint, Layout
from .complete import check_complete
from .files import check_json
from .places import CONFIG, check_apart, check_replaceable, read_config
from .quant_state import dtype_of
from .tensor_files import Output, read_checkpoint, split, write_checkpoint

# Files of weights in any format. They are not copied, because the result has weights of its own.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class ModelConversionPlan:
    """What the conversion of a model will do.

    Attributes:
        source, target: the directories.
        source_layout, layout: the layout of the experts before and after.
        experts: the dtype or 4-bit format of the experts before and after.
        stacks: the number of experts' parameters.
        tensors, nbytes: the number of tensors and their size in bytes, before and after.
        shards: for each file of the result, the names of its tensors.
        others: the files that are copied.
        notes: what is lost or left as it is.
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
        """Writes the target, which appears once it is complete.

        Args:
            progress: called with the number of bytes written so far, and the number in total.

        Raises:
            FileExistsError: the target has been made by something else meanwhile.
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
) -> ModelConversionPlan:
    """Converts the model in ``source`` to another layout of its experts in ``target``, and warns of what is lost.

    Args:
        dry_run: whether to make the plan only.
        progress: as for ``ModelConversionPlan.write``. The other arguments are those of ``plan_model``.

    Returns:
        The plan.

    Raises:
        ValueError, FileExistsError, FileNotFoundError, OSError: as for ``plan_model`` and ``ModelConversionPlan.write``.
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
) -> ModelConversionPlan:
    """Plans the conversion of the model in ``source`` to another layout of its experts in ``target``.

    Each weight keeps its bits, dense or packed, unless ``dtype`` or ``dequantize`` says otherwise. Writing needs memory for
    the packed experts of one layer, or a few megabytes if the experts are dense, in mxfp4 or in nvfp4.

    Args:
        source: a directory with ``config.json`` and safetensors, in one file or with an index.
        target: the directory to make; its parent must exist.
        layout: ``"per-expert"`` writes a matrix for each expert, as the Hub has it. ``"fused"`` writes stacks as
            Transformers 5 holds them in memory, and 4-bit stacks as ``moe_fused.save_format(model, "fused")`` does.
            ``"original"`` writes a stack for each projection, as the original qwen3-moe-fused does. Experts in mxfp4 are
            written as compressed-tensors has them, or as stacks as gpt-oss has them. Linear layers that compressed-tensors
            quantized become dense beside such stacks.
        dtype: the dtype to cast floating-point tensors to, except for those that the model keeps in fp32. None casts none.
        dequantize: whether to make all 4-bit tensors dense. Those of nf4 and fp4 get the dtype that they had before they
            were quantized, and those of mxfp4 and nvfp4 the dtype of the model, unless ``dtype`` is given.
        max_shard_size: the largest size of a file, in bytes or as in ``"5GB"``. A larger tensor gets a file of its own.
        overwrite: whether a model at ``target`` may be replaced.

    Raises:
        ValueError: the source is incomplete, in several layouts or in an unknown one, or ``layout`` cannot hold it. The
            message names the tensor and says why.
        FileExistsError: ``target`` exists.
        FileNotFoundError: a file of the source is missing.
        NotImplementedError: the source is quantized to something else than nf4, fp4, mxfp4 or nvfp4.
        OSError: ``target`` cannot be made, or there is not enough space for it.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    source, target = Path(source), Path(target)
    check_apart(source, target)
    check_replaceable(target, overwrite)
    config = read_config(source)
    notes: tuple[str, ...] = ()
    quantization: CheckpointQuantization | None
    if modelopt.is_nvfp4(source, config):
        tensors = read_checkpoint(source)
        try:
            config, tensors, quantization, notes = modelopt.as_compressed(config, tensors)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    else:
        check_quantization("SOURCE", str(source), config)
        tensors, quantization = read_checkpoint(source), quantization_of(config)
    architecture = Architecture.read(source, config, quantization)
    published = quantization is not None and quantization.is_published
    dense_dtype = _dtype_of(source, config) if published else torch.bfloat16
    checkpoint = Checkpoint(architecture, tensors, quantization, dense_dtype)
    check_complete(architecture.model, tensors, str(source), quantization=quantization, packs=True)
    check_json(source, other_files(source))
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
    nbytes = sum(output.nbytes for output in outputs.values())
    check_writable(target, "the target", nbytes)
    return ModelConversionPlan(
        source,
        target,
        checkpoint.layout,
        layout,
        (_list(stack.description for stack in checkpoint.stacks), _list(results)),
        len(checkpoint.stacks),
        (len(tensors), len(outputs)),
        (sum(tensor.nbytes for tensor in tensors.values()), nbytes),
        split(outputs, max_shard_size),
        tuple(other_files(source)),
        (*notes, *checkpoint.notes, *checkpoint.losses(layout, dequantize)),
        overwrite,
        outputs,
        _adjusted(config, checkpoint, layout, dtype, dequantize),
    )


def _list(values: Iterable[str]) -> str:
    return " and ".join(sorted(set(values)))


def _dtype_of(source: Path, config: dict[str, Any]) -> torch.dtype:
    """Returns the dtype of a model by the content of its ``config.json``, bfloat16 if that names none."""
    for part in (config, config.get("text_config") or {}):
        if name := part.get("dtype") or part.get("torch_dtype"):
            return dtype_of(str(source / CONFIG), name)
    return torch.bfloat16


def _adjusted(
    config: dict[str, Any], checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype | None, dequantize: bool
) -> dict[str, Any]:
    """Returns the config of the result."""
    classes = ORIGINAL_CLASSES if layout != "original" else {new: old for old, new in ORIGINAL_CLASSES.items()}
    result = dict(config)
    if result.get("architectures"):
        result["architectures"] = [classes.get(name, name) for name in result["architectures"]]
    if dequantize:
        result = with_content(result, None)
    elif checkpoint.changes_method(layout):
        result = with_content(result, checkpoint.content_of(layout))
    if dtype is not None:
        for key in {"dtype", "torch_dtype"} & result.keys() or {"dtype"}:
            result[key] = str(dtype).removeprefix("torch.")
    return result


def other_files(source: Path) -> Iterator[str]:
    """Yields the files that are copied as they are, such as a tokenizer: no weights and no hidden files.

    What ModelOpt says of its weights is no longer true of the copy.
    """
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if (
            path.is_file()
            and not hidden
            and name.as_posix() not in (CONFIG, MODELOPT_CONFIG)
            and not name.name.endswith(_WEIGHTS)
        ):
            yield name.as_posix()
