"""The command ``moe-fused merge``, which adds an adapter to the weights of its model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_fused.checkpoints.places import ADAPTER_CONFIG
from moe_fused.quantized import COMPRESSED_TENSORS, CheckpointQuantization, quantization_of

from .options import (
    AllowOtherBase,
    DryRun,
    Dtype,
    Model,
    ShardSize,
    Traceback,
    check_device,
    check_output,
    check_weights,
    progress_of_steps,
    read_source,
    require_4bit,
    require_peft,
    writing,
)

# If no factor exceeds this, their product is far within the range of bf16 and fp32, whatever rank and scaling are.
_LARGE = 1e12


def merge(
    model: Model,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Directory of an adapter, or its name on the Hub.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory to make.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the merged weights.  [default: the dtype in the model's config]")
    ] = None,
    keep_format: Annotated[
        bool,
        typer.Option(
            "--keep-format",
            help="Merge a model in 4 bits back into its format. This loses precision, because merged weights are rounded to "
            "4 bits again; a table says how much.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="Device to merge on: auto, cpu, cuda ...")] = "cpu",
    max_shard_size: ShardSize = "5GB",
    allow_other_base: AllowOtherBase = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at OUTPUT.")] = False,
    dry_run: DryRun = False,
    traceback: Traceback = False,
) -> None:
    """Merge an adapter into its model. The result is a dense model that needs neither PEFT nor moe-fused.

    A model in 4 bits is dequantized first, to the values that the adapter was trained on, rounded to the dtype of the
    result. --dtype float32 keeps them exactly.
    With --keep-format the merged weights are quantized again instead, as the model was, which loses precision.
    """
    del traceback  # read by console.run, which prints errors
    require_peft("merge")
    config = read_source("MODEL", model, "config.json")
    read_source("ADAPTER", adapter, ADAPTER_CONFIG)
    check_weights("ADAPTER", adapter, ("adapter_model.safetensors", "adapter_model.bin"))
    check_output(model, output, overwrite)
    check_device(device)
    if keep_format and dtype is not None:
        raise ValueError("--dtype is for dense results, and --keep-format makes one in 4 bits: leave one of them out")
    if config is not None:
        _check_format(model, quantization_of(config), keep_format)
    if not dry_run:
        check_weights("MODEL", model)
    with writing("OUTPUT", output, overwrite, dry_run):
        _merge(model, adapter, output, dtype, keep_format, device, max_shard_size, allow_other_base, overwrite, dry_run)


def _check_format(model: str, quantization: CheckpointQuantization | None, keep_format: bool) -> None:
    """Checks how a model is quantized.

    Raises:
        ValueError: it is dense, and its format of 4 bits is to be kept.
        RuntimeError: it is in a format of bitsandbytes, which is not installed.
    """
    if quantization is None:
        if keep_format:
            raise ValueError(f"--keep-format is for models in 4 bits, and MODEL {model} is dense: leave it out")
    elif not quantization.is_published:
        require_4bit(f"MODEL {model}, which is in 4 bits,")


def _merge(
    model: str,
    adapter: str,
    output: Path,
    dtype: Dtype | None,
    keep_format: bool,
    device: str,
    max_shard_size: str,
    allow_other_base: bool,
    overwrite: bool,
    dry_run: bool,
) -> None:
    import torch

    import moe_fused
    from moe_fused.checkpoints.adapters.fits import read_adapter
    from moe_fused.devices import choose_device

    from .loading import (
        check_fits,
        check_model,
        check_target,
        generation_note,
        load_adapter,
        load_model,
        read_config,
        save_model,
    )

    chosen, config = choose_device(device), read_config(model)
    quantization = quantization_of(config)
    _check_format(model, quantization, keep_format)
    published = quantization is not None and quantization.is_published
    stored = config.dtype or (torch.bfloat16 if published else torch.float32)
    result: torch.dtype = getattr(torch, dtype.value) if dtype else stored
    about, _ = read_adapter(adapter, f"ADAPTER {adapter}")
    if keep_format and about["peft_type"] != "LORA":
        raise ValueError(f"--keep-format merges LoRA, and ADAPTER {adapter} is {about['peft_type']}: leave it out")
    check_model(model, config)
    kept = None
    nbytes = _size(config) * result.itemsize
    kind = f"dense, {str(result).removeprefix('torch.')}"
    begin = f"model    {model}{'' if quantization is None else ', in 4 bits'}"
    if keep_format and quantization is not None:
        kept = _Stored.read(model, config, quantization, result, download=False)
        nbytes = 0 if kept is None else kept.nbytes
        if kept is None or kept.is_4bit:
            kind = f"in {quantization.quant_type}, quantized again"
    elif quantization is not None:
        begin += ": will be dequantized"
    print(begin)
    print(
        f"adapter  {adapter}: {about['peft_type']}, made for {about.get('base_model_name_or_path') or 'an unnamed model'}"
    )
    print(f"output   {output}: {kind}{f', {nbytes / 1e9:.3g} GB' if nbytes else ''}")
    check_target(model, output, nbytes, max_shard_size)
    check_fits(model, config, adapter, allow_other_base)
    for note in (*(kept.notes if kept is not None else ()), generation_note(model)):
        if note is not None:
            print(f"note: {note}")
    if dry_run:
        return
    loaded: Any = load_model(model, stored if quantization is not None else result, chosen)
    if keep_format and quantization is not None:
        kept = kept or _Stored.read(model, config, quantization, result, download=True)
        merged = _merge_in_format(load_adapter(loaded, adapter), f"MODEL {model} merged with ADAPTER {adapter}")
        assert kept is not None  # because it was downloaded
        if kept.is_fused:
            moe_fused.save_format(merged, "fused")
        nbytes = kept.nbytes
    else:
        if quantization is not None:
            loaded.dequantize(result)
            loaded = loaded.to(result)
        merged = _merge_dense(load_adapter(loaded, adapter), result, f"MODEL {model} merged with ADAPTER {adapter}")
        nbytes = sum(parameter.nbytes for parameter in merged.parameters())
    save_model(merged, model, output, overwrite, nbytes, max_shard_size)
    print(f"merged {nbytes / 1e9:.3g} GB")


def _merge_dense(adapted: Any, dtype: Any, what: str) -> Any:
    """Merges an adapter into a dense model, which errors call ``what``."""
    from moe_fused.checkpoints.finite import check_finite

    overflows = _may_overflow(adapted, dtype)
    merged = adapted.merge_and_unload()
    if overflows:  # the model and the adapter are known to be finite
        check_finite(merged.named_parameters(), what)
    return merged


@dataclass(frozen=True)
class _Stored:
    """What a model in 4 bits becomes if it keeps its format.

    Attributes:
        nbytes: the size of the result.
        is_fused: whether the experts are in the fused layout of nf4 and fp4.
        is_4bit: whether any weight is in 4 bits.
        notes: what is not kept.
    """

    nbytes: int
    is_fused: bool
    is_4bit: bool
    notes: tuple[str, ...]

    @classmethod
    def read(
        cls, model: str, config: Any, quantization: CheckpointQuantization, dtype: Any, *, download: bool
    ) -> _Stored | None:
        """Reads the headers of a model, or returns None if they are on the Hub and not to be downloaded.

        Args:
            dtype: of the weights that are dense.
        """
        import torch

        from moe_fused.checkpoints.architecture import Architecture
        from moe_fused.checkpoints.files import find_weights, read_tensors
        from moe_fused.checkpoints.names import MATRIX_PARTS
        from moe_fused.checkpoints.safetensors_file import DTYPES
        from moe_fused.memory import skeleton

        path = find_weights(model, download=download)
        if path is None:
            return None
        architecture = Architecture.of(skeleton(config), in_rows=quantization.is_published)
        nbytes, linears, layouts = 0, [], set()
        for key, header in read_tensors(path).items():
            role = architecture.names.locate(architecture.in_model(key))
            if role is not None and role.part:
                layouts.add(role.layout)
            module, _, part = key.rpartition(".")
            if role is None and quantization.method == COMPRESSED_TENSORS and part in MATRIX_PARTS:
                if part == MATRIX_PARTS[0]:  # two weights to a byte
                    linears.append(module)
                    nbytes += 2 * math.prod(header.shape) * dtype.itemsize
            else:
                nbytes += math.prod(header.shape) * DTYPES.get(header.dtype, torch.uint8).itemsize
        notes = []
        if linears:
            notes.append(
                f"{len(linears)} linear layers, as {linears[0]}, become {str(dtype).removeprefix('torch.')}, because those "
                "of compressed-tensors are dequantized when they are loaded"
            )
        if "stacked" in layouts:
            notes.append("the experts are written per-expert, because the original project's layout is only read")
        is_4bit = bool(layouts) or not quantization.is_published
        return cls(nbytes, "fused" in layouts, is_4bit, tuple(notes))


def _merge_in_format(adapted: Any, what: str) -> Any:
    """Merges an adapter into a model in 4 bits, which errors call ``what``, and prints what quantizing again loses."""
    from moe_fused.checkpoints.finite import check_finite
    from moe_fused.integrations.peft.merging import merge_in_format

    with progress_of_steps() as progress:
        try:
            merged, results, dense = merge_in_format(adapted, partial(progress, "merging"))
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
    check_finite(merged.named_parameters(), what)  # those that are dense
    if results:
        print("what quantizing again loses: the Frobenius norm of the error, as a share of that of the merged weights")
        print("\n".join(error_table({result.name: result.error for result in results})))
    if dense:
        print(f"{dense} adapted linear layers stay dense and are not in this table")
    return merged


def error_table(errors: Mapping[str, float]) -> Iterator[str]:
    """Yields the lines of a table of errors: a row for each layer of the model, a column for each weight of a layer.

    Args:
        errors: the errors as shares, by names such as ``model.layers.0.self_attn.q_proj``.
    """
    rows: dict[str, dict[str, float]] = {}
    for name, error in errors.items():
        match = re.fullmatch(r"(.+?\.\d+)\.(.+)", name)
        layer, weight = match.groups() if match else ("", name)
        rows.setdefault(layer, {})[weight] = error
    weights = list(dict.fromkeys(weight for row in rows.values() for weight in row))
    titles = _short(weights)
    first = max(map(len, ("layer", *rows)))
    yield "  ".join(["layer".ljust(first), *titles])
    for layer, row in rows.items():
        cells = [f"{100 * row[weight]:.2f} %" if weight in row else "" for weight in weights]
        yield "  ".join([layer.ljust(first), *map(str.rjust, cells, map(len, titles))]).rstrip()
    yield f"mean of all {len(errors)}: {100 * sum(errors.values()) / len(errors):.2f} %"


def _short(names: Sequence[str]) -> list[str]:
    """Returns the last parts of names, as many as tell them apart."""

    def last(name: str, count: int) -> str:
        return ".".join(name.split(".")[-count:])

    result = []
    for name in names:
        counts = range(1, name.count(".") + 2)
        alone = (n for n in counts if all(other == name or last(other, n) != last(name, n) for other in names))
        result.append(last(name, next(alone, max(counts))).rjust(len("00.00 %")))
    return result


def _size(config: Any) -> int:
    """Returns the number of weights of the dense model."""
    from moe_fused.memory import skeleton

    return sum(parameter.numel() for parameter in skeleton(config).parameters())


def _may_overflow(adapted: Any, dtype: Any) -> bool:
    """Whether merging an adapter into finite weights may give values that are not finite in ``dtype``."""
    import torch

    from moe_fused.checkpoints.adapters.fits import adapter_weights

    config = adapted.active_peft_config
    if dtype is torch.float16 or config.peft_type.value != "LORA" or config.use_dora:
        return True
    largest = max((float(weight.detach().abs().max()) for _, weight in adapter_weights(adapted)), default=0.0)
    return largest > _LARGE
