"""``moe-fused merge``: a model with an adapter's weights in its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DryRun, Dtype, Model, ShardSize, Traceback, check_source, require_4bit, require_peft


def merge(
    model: Model,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Directory of an adapter, or its name on the Hub.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory to make.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the merged weights.  [default: as the model says]")] = None,
    device: Annotated[str, typer.Option(help="To merge on: auto, cpu, cuda ...")] = "cpu",
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at OUTPUT.")] = False,
    dry_run: DryRun = False,
    traceback: Traceback = False,
) -> None:
    """Merge an adapter into its model, which becomes a dense one that needs neither PEFT nor moe-fused.

    A model in 4 bits is dequantized first: the adapter was trained on what that gives, so nothing is lost.
    """
    del traceback  # read by console.run, which prints errors
    require_peft("merge")
    check_source("MODEL", model, "config.json")
    check_source("ADAPTER", adapter, "adapter_config.json")

    import torch
    from peft import PeftConfig

    from moe_fused.devices import choose_device

    from .loading import check_output, is_quantized, load_adapter, load_model, read_config, save_model

    check_output(model, output, overwrite)
    chosen, config = choose_device(device), read_config(model)
    quantized = is_quantized(config)
    if quantized:
        require_4bit(f"MODEL {model}, which is in 4 bits,")
    own = config.dtype or torch.float32
    result: torch.dtype = getattr(torch, dtype.value) if dtype else own
    about = PeftConfig.from_pretrained(adapter)
    print(f"model    {model}{', in 4 bits: will be dequantized' if quantized else ''}")
    print(
        f"adapter  {adapter}: {about.peft_type.value}, made for {about.base_model_name_or_path or 'an unnamed model'}"
    )
    print(f"output   {output}: dense, {str(result).removeprefix('torch.')}")
    if dry_run:
        return
    loaded: Any = load_model(model, own if quantized else result, chosen)
    if quantized:
        loaded.dequantize(result)
        loaded = loaded.to(result)
    # `safe_merge` raises rather than writing a weight that is not finite.
    merged = load_adapter(loaded, adapter).merge_and_unload(safe_merge=True)
    nbytes = sum(parameter.nbytes for parameter in merged.parameters())
    save_model(
        model, output, overwrite, nbytes, lambda path: merged.save_pretrained(path, max_shard_size=max_shard_size)
    )
    print(f"merged {nbytes / 1e9:.3g} GB")
