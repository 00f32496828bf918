"""``moe-fused quantize``: a 4-bit checkpoint of a dense model, experts included."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DryRun, Dtype, Model, ShardSize, Traceback, check_source, require_4bit


class QuantType(str, Enum):
    NF4 = "nf4"
    FP4 = "fp4"


class Layout(str, Enum):
    """As in ``moe_fused.save_format``, spelled as an option."""

    PER_EXPERT = "per-expert"
    FUSED = "fused"


def quantize(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory to make.")],
    quant_type: Annotated[QuantType, typer.Option(help="The 16 values that weights are rounded to.")] = QuantType.NF4,
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="Hold the scales of blocks in 8 bits.")
    ] = True,
    layout: Annotated[
        Layout,
        typer.Option(
            "--format", help="per-expert: what every tool reads; fused: loads faster, and with moe-fused only."
        ),
    ] = Layout.PER_EXPERT,
    dtype: Annotated[Dtype, typer.Option(help="To compute in, and of what stays dense.")] = Dtype.BFLOAT16,
    device: Annotated[str, typer.Option(help="To quantize on: auto, cpu, cuda ...")] = "auto",
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at OUTPUT.")] = False,
    dry_run: DryRun = False,
    traceback: Traceback = False,
) -> None:
    """Quantize a model to 4 bits as bitsandbytes does, in blocks of 64 weights: linear layers and experts.

    Takes memory for the result and one layer, on the device. The tokenizer and generation config are copied.
    """
    del traceback  # read by console.run, which prints errors
    require_4bit("quantize")
    check_source("MODEL", model, "config.json")

    import torch

    import moe_fused
    from moe_fused.devices import choose_device
    from moe_fused.quantizer import four_bit_config

    from .loading import check_output, is_quantized, load_model, read_config, save_model

    check_output(model, output, overwrite)
    chosen, config = choose_device(device), read_config(model)
    if is_quantized(config):
        raise ValueError(f"MODEL {model} is quantized already; `moe-fused convert model` changes its layout")
    compute: torch.dtype = getattr(torch, dtype.value)
    dense, packed = _sizes(config, compute, double_quant)
    print(f"model   {model}: {dense / 1e9:.3g} GB in {dtype.value}")
    print(f"output  {output}: {packed / 1e9:.3g} GB in {quant_type.value}, experts {layout.value}")
    if dry_run:
        return
    quantization = four_bit_config(compute, quant_type.value, double_quant)
    loaded: Any = load_model(model, compute, chosen, quantization)
    moe_fused.save_format(loaded, "fused" if layout is Layout.FUSED else "per_expert")
    save_model(
        model, output, overwrite, packed, lambda path: loaded.save_pretrained(path, max_shard_size=max_shard_size)
    )
    print(f"quantized to {output}")


def _sizes(config: Any, dtype: Any, double_quant: bool) -> tuple[int, int]:
    """Bytes of the weights, dense and in 4 bits.

    Raises:
        ValueError: no experts of the model can be held in 4 bits.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    from moe_fused.quantizer import BLOCKSIZE, packing_refusal, projections_of

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype)
    experts = [module for module in skeleton.modules() if hasattr(type(module), "_apply_gate")]
    refusals = [packing_refusal(module, BLOCKSIZE) for module in experts]
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
    scale = 1 if double_quant else 4  # bytes of a block's; the scales of the scales are a 64th of that
    return numel * dtype.itemsize, round((numel - quantized) * dtype.itemsize + quantized * (0.5 + scale / BLOCKSIZE))
