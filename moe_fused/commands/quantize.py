"""The command ``moe-fused quantize``, which makes a 4-bit checkpoint of a dense model, experts included."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
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
    writing,
)


class QuantType(str, Enum):
    NF4 = "nf4"
    FP4 = "fp4"


class Layout(str, Enum):
    """The layouts of ``moe_fused.save_format``, spelled as an option."""

    PER_EXPERT = "per-expert"
    FUSED = "fused"


def quantize(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory to make.")],
    quant_type: Annotated[QuantType, typer.Option(help="4-bit format of the weights.")] = QuantType.NF4,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Store the scales of the blocks in 8 bits.")
    ] = True,
    layout: Annotated[
        Layout,
        typer.Option("--format", help="per-expert: every tool reads it; fused: loads faster, but only with moe-fused."),
    ] = Layout.PER_EXPERT,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype to compute in, and dtype of the weights that stay dense.")
    ] = Dtype.BFLOAT16,
    device: Annotated[str, typer.Option(help="Device to quantize on: auto, cpu, cuda ...")] = "auto",
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at OUTPUT.")] = False,
    dry_run: DryRun = False,
    traceback: Traceback = False,
) -> None:
    """Quantize the linear layers and experts of a model to 4 bits as bitsandbytes does, in blocks of 64 weights.

    The device needs memory for the result and one layer. The tokenizer and the generation config are copied.
    """
    del traceback  # read by console.run, which prints errors
    require_4bit("quantize")
    config = read_source("MODEL", model, "config.json")
    check_output(model, output, overwrite)
    if config is not None and config.get("quantization_config"):
        raise ValueError(f"MODEL {model} is quantized already; `moe-fused convert model` changes its layout")
    check_device(device)
    if not dry_run:
        check_weights("MODEL", model)
    with writing("OUTPUT", output, overwrite, dry_run):
        _quantize(model, output, quant_type, double_quant, layout, dtype, device, max_shard_size, overwrite, dry_run)


def _quantize(
    model: str,
    output: Path,
    quant_type: QuantType,
    double_quant: bool,
    layout: Layout,
    dtype: Dtype,
    device: str,
    max_shard_size: str,
    overwrite: bool,
    dry_run: bool,
) -> None:
    import torch

    import moe_fused
    from moe_fused.devices import choose_device
    from moe_fused.integrations.quantizer.packed_experts import four_bit_config

    from .loading import (
        check_model,
        check_target,
        generation_note,
        is_quantized,
        load_model,
        read_config,
        save_model,
    )

    chosen, config = choose_device(device), read_config(model)
    if is_quantized(config):
        raise ValueError(f"MODEL {model} is quantized already; `moe-fused convert model` changes its layout")
    compute: torch.dtype = getattr(torch, dtype.value)
    dense, packed = _sizes(config, compute, double_quant)
    print(f"model   {model}: {dense / 1e9:.3g} GB in {dtype.value}")
    print(f"output  {output}: {packed / 1e9:.3g} GB in {quant_type.value}, experts {layout.value}")
    check_target(model, output, packed, max_shard_size)
    check_model(model, config, packs=True)
    if note := generation_note(model):
        print(f"note: {note}")
    if dry_run:
        return
    quantization = four_bit_config(compute, quant_type.value, double_quant)
    loaded: Any = load_model(model, compute, chosen, quantization)
    moe_fused.save_format(loaded, "fused" if layout is Layout.FUSED else "per_expert")
    save_model(loaded, model, output, overwrite, packed, max_shard_size)
    print(f"quantized to {output}")


def _sizes(config: Any, dtype: Any, double_quant: bool) -> tuple[int, int]:
    """Returns the size of the weights in bytes, dense and in 4 bits.

    Raises:
        ValueError: none of the model's experts can be held in 4 bits.
    """
    from torch import nn

    from moe_fused.integrations.quantizer.packed_experts import BLOCKSIZE, packing_refusal
    from moe_fused.integrations.transformers.experts_module import projections_of
    from moe_fused.memory import skeleton as make

    skeleton = make(config)
    experts = [module for module in skeleton.modules() if hasattr(type(module), "_apply_gate")]
    refusals = [packing_refusal(module) for module in experts]
    if None not in refusals:
        reason = ", ".join(sorted({reason for reason in refusals if reason})) or "it has none"
        raise ValueError(f"the experts of {type(skeleton).__name__} cannot be held in 4 bits: {reason}")
    head = skeleton.get_output_embeddings()
    quantized = sum(
        getattr(module, name).numel()
        for module, refusal in zip(experts, refusals, strict=True)
        if refusal is None
        for name in projections_of(module)
    )
    quantized += sum(
        module.weight.numel() for module in skeleton.modules() if isinstance(module, nn.Linear) and module is not head
    )
    numel = sum(parameter.numel() for parameter in skeleton.parameters())
    scale = 1 if double_quant else 4  # bytes for the scale of a block; the scales of these scales take a 64th of that
    return numel * dtype.itemsize, round((numel - quantized) * dtype.itemsize + quantized * (0.5 + scale / BLOCKSIZE))
