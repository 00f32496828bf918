"""The command ``moe-fused merge``, which adds an adapter to the weights of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_fused.checkpoints.places import ADAPTER_CONFIG

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
    device: Annotated[str, typer.Option(help="Device to merge on: auto, cpu, cuda ...")] = "cpu",
    max_shard_size: ShardSize = "5GB",
    allow_other_base: AllowOtherBase = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at OUTPUT.")] = False,
    dry_run: DryRun = False,
    traceback: Traceback = False,
) -> None:
    """Merge an adapter into its model. The result is a dense model that needs neither PEFT nor moe-fused.

    A model in 4 bits is dequantized first. This loses nothing, because the adapter was trained on the dequantized values.
    """
    del traceback  # read by console.run, which prints errors
    require_peft("merge")
    config = read_source("MODEL", model, "config.json")
    read_source("ADAPTER", adapter, ADAPTER_CONFIG)
    check_weights("ADAPTER", adapter, ("adapter_model.safetensors", "adapter_model.bin"))
    check_output(model, output, overwrite)
    check_device(device)
    if config is not None and config.get("quantization_config"):
        require_4bit(f"MODEL {model}, which is in 4 bits,")
    if not dry_run:
        check_weights("MODEL", model)
    with writing("OUTPUT", output, overwrite, dry_run):
        _merge(model, adapter, output, dtype, device, max_shard_size, allow_other_base, overwrite, dry_run)


def _merge(
    model: str,
    adapter: str,
    output: Path,
    dtype: Dtype | None,
    device: str,
    max_shard_size: str,
    allow_other_base: bool,
    overwrite: bool,
    dry_run: bool,
) -> None:
    import torch

    from moe_fused.checkpoints.adapters.fits import read_adapter
    from moe_fused.checkpoints.finite import check_finite
    from moe_fused.devices import choose_device

    from .loading import (
        check_fits,
        check_model,
        check_target,
        generation_note,
        is_quantized,
        load_adapter,
        load_model,
        read_config,
        save_model,
    )

    chosen, config = choose_device(device), read_config(model)
    quantized = is_quantized(config)
    if quantized:
        require_4bit(f"MODEL {model}, which is in 4 bits,")
    stored = config.dtype or torch.float32
    result: torch.dtype = getattr(torch, dtype.value) if dtype else stored
    about, _ = read_adapter(adapter, f"ADAPTER {adapter}")
    nbytes = _size(config) * result.itemsize
    print(f"model    {model}{', in 4 bits: will be dequantized' if quantized else ''}")
    print(
        f"adapter  {adapter}: {about['peft_type']}, made for {about.get('base_model_name_or_path') or 'an unnamed model'}"
    )
    print(f"output   {output}: dense, {str(result).removeprefix('torch.')}, {nbytes / 1e9:.3g} GB")
    check_target(model, output, nbytes, max_shard_size)
    check_model(model, config)
    check_fits(model, config, adapter, allow_other_base)
    if note := generation_note(model):
        print(f"note: {note}")
    if dry_run:
        return
    loaded: Any = load_model(model, stored if quantized else result, chosen)
    if quantized:
        loaded.dequantize(result)
        loaded = loaded.to(result)
    adapted = load_adapter(loaded, adapter)
    overflows = _may_overflow(adapted, result)
    merged = adapted.merge_and_unload()
    if overflows:  # the model and the adapter are known to be finite
        check_finite(merged.named_parameters(), f"MODEL {model} merged with ADAPTER {adapter}")
    nbytes = sum(parameter.nbytes for parameter in merged.parameters())
    save_model(merged, model, output, overwrite, nbytes, max_shard_size)
    print(f"merged {nbytes / 1e9:.3g} GB")


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
