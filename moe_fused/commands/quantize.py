"""The command ``moe-fused quantize``, which makes a 4-bit checkpoint of a dense model, experts included."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_fused.quantized import PUBLISHED

from .options import (
    DryRun,
    Dtype,
    Model,
    ShardSize,
    Traceback,
    check_device,
    check_output,
    check_weights,
    from_4bit,
    read_source,
    require_4bit,
    writing,
)


class QuantType(str, Enum):
    NF4 = "nf4"
    FP4 = "fp4"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"

    @property
    def is_published(self) -> bool:
        return self.value in PUBLISHED


class Format(str, Enum):
    """What ``--format`` takes: a format, or a layout, for which older versions had this option."""

    NF4 = "nf4"
    FP4 = "fp4"
    MXFP4 = "mxfp4"
    NVFP4 = "nvfp4"
    PER_EXPERT = "per-expert"
    FUSED = "fused"


class Layout(str, Enum):
    """The layouts of ``moe_fused.save_format``, spelled as an option."""

    PER_EXPERT = "per-expert"
    FUSED = "fused"


def quantize(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory to make.")],
    formats: Annotated[
        list[Format] | None,
        typer.Option(
            "--format",
            "--quant-type",
            metavar="[nf4|fp4|mxfp4|nvfp4]",  # without the layouts of older versions
            help="4-bit format. nf4 and fp4, as bitsandbytes has them, quantize linear layers and experts. mxfp4 and "
            "nvfp4 quantize only experts, and are written as compressed-tensors files, or for gpt-oss as mxfp4 stacks.  "
            "[default: nf4]",
        ),
    ] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option(
            "--double-quant/--no-double-quant",
            help="Store the scales of nf4 and fp4 in 8 bits.  [default: double-quant]",
        ),
    ] = None,
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="Layout of nf4 and fp4. per-expert: every tool reads it; fused: loads faster, but only with moe-fused.  "
            "[default: per-expert]"
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype to compute in, and dtype of the weights that stay dense.")
    ] = Dtype.BFLOAT16,
    device: Annotated[str, typer.Option(help="Device to quantize on: auto, cpu, cuda ...")] = "auto",
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at OUTPUT.")] = False,
    dry_run: DryRun = False,
    traceback: Traceback = False,
) -> None:
    """Quantize the experts of a model to 4 bits, and with nf4 and fp4 its linear layers, too.

    The device needs memory for the result and one layer. The tokenizer and the generation config are copied.
    """
    del traceback  # read by console.run, which prints errors
    quant_type, layout = _chosen(formats or (), layout)
    if quant_type.is_published:
        for option, given in (("--double-quant", double_quant), ("--layout", layout)):
            if given is not None:
                stacks = "; stacks are made by `moe-fused convert model OUTPUT NEW --to fused`"
                more = (
                    stacks if layout is Layout.FUSED and option == "--layout" and quant_type is QuantType.MXFP4 else ""
                )
                raise ValueError(f"{option} has no effect on {quant_type.value}: leave it out{more}")
    else:
        require_4bit("quantize")
    config = read_source("MODEL", model, "config.json")
    check_output(model, output, overwrite)
    if config is not None and config.get("quantization_config"):
        raise ValueError(_is_quantized(model))
    check_device(device)
    if not dry_run:
        check_weights("MODEL", model)
    with writing("OUTPUT", output, overwrite, dry_run):
        _quantize(
            model,
            output,
            quant_type,
            double_quant is not False,
            layout or Layout.PER_EXPERT,
            dtype,
            device,
            max_shard_size,
            overwrite,
            dry_run,
        )


def _is_quantized(model: str) -> str:
    return f"MODEL {model} is quantized already; `moe-fused convert model` changes its layout; {from_4bit(model)}"


def _chosen(formats: Sequence[Format], layout: Layout | None) -> tuple[QuantType, Layout | None]:
    """Returns the format and the layout that the options ask for.

    Raises:
        ValueError: they ask for several.
    """
    kinds = {member.value for member in QuantType}
    quant_types = dict.fromkeys(QuantType(each.value) for each in formats if each.value in kinds)
    layouts = dict.fromkeys([Layout(each.value) for each in formats if each.value not in kinds])
    if layout is not None:
        layouts[layout] = None
    for option, values in (("--format", quant_types), ("--layout", layouts)):
        if len(values) > 1:
            raise ValueError(f"{option} must be given once, got {' and '.join(each.value for each in values)}")
    return next(iter(quant_types), QuantType.NF4), next(iter(layouts), None)


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
    from moe_fused.integrations.quantizer.configs import config_for, has_stacks_alone
    from moe_fused.memory import skeleton as make

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
        raise ValueError(_is_quantized(model))
    compute: torch.dtype = getattr(torch, dtype.value)
    skeleton = make(config)
    _check_experts(skeleton, quant_type)
    dense, packed = _sizes(skeleton, compute, quant_type, double_quant)
    if has_stacks_alone(skeleton):
        layout = Layout.FUSED  # there are no names for another one
    kind = f"experts {layout.value}"
    if quant_type.is_published:
        kind = (
            "experts as mxfp4 stacks (gpt-oss)" if has_stacks_alone(skeleton) else "experts as compressed-tensors files"
        )
    print(f"model   {model}: {dense / 1e9:.3g} GB in {dtype.value}")
    print(f"output  {output}: {packed / 1e9:.3g} GB in {quant_type.value}, {kind}")
    check_target(model, output, packed, max_shard_size)
    check_model(model, config, packs=True)
    if note := generation_note(model):
        print(f"note: {note}")
    if dry_run:
        return
    quantization = config_for(quant_type.value, skeleton, compute, double_quant=double_quant)
    loaded: Any = load_model(model, compute, chosen, quantization)
    if not quant_type.is_published:
        moe_fused.save_format(loaded, "fused" if layout is Layout.FUSED else "per_expert")
    save_model(loaded, model, output, overwrite, packed, max_shard_size)
    print(f"quantized to {output}")


def _check_experts(skeleton: Any, quant_type: QuantType) -> None:
    """Raises ValueError if none of a model's experts can be held in a format, or not all in one that needs all of them."""
    from moe_fused.integrations.quantizer.configs import has_stacks_alone
    from moe_fused.integrations.quantizer.packed_experts import packing_refusal
    from moe_fused.integrations.transformers.experts_module import is_experts

    experts = [module for module in skeleton.modules() if is_experts(module)]
    refusals = [packing_refusal(module, quant_type.value) for module in experts]
    dense = {reason for reason in refusals if reason is not None}
    if None not in refusals or (dense and quant_type.is_published):
        what = "4 bits" if not quant_type.is_published else quant_type.value
        reason = ", ".join(sorted(dense)) or "it has none"
        raise ValueError(f"the experts of {type(skeleton).__name__} cannot be held in {what}: {reason}")
    if quant_type is QuantType.NVFP4 and has_stacks_alone(skeleton):
        raise ValueError(
            f"a {type(skeleton).__name__} cannot be saved in nvfp4: its checkpoints have no matrix for each expert; use "
            "--format mxfp4"
        )


def _sizes(skeleton: Any, dtype: Any, quant_type: QuantType, double_quant: bool) -> tuple[int, int]:
    """Returns the size of the weights in bytes, dense and in 4 bits."""
    from torch import nn

    from moe_fused.hub import get_kernel
    from moe_fused.integrations.quantizer.packed_experts import BLOCKSIZE, blocksize_of, packing_refusal, target_of
    from moe_fused.integrations.transformers.experts_module import is_experts, projections_of

    quantized = nbytes = 0
    head = skeleton.get_output_embeddings()
    for path, module in skeleton.named_modules():
        if is_experts(module) and packing_refusal(module, quant_type.value) is None:
            for name in projections_of(module):
                target = target_of(path, module, name, quant_type.value)
                form = get_kernel().Format4bit(
                    target.shape,
                    quant_type.value,
                    blocksize_of(quant_type.value),
                    None if quant_type.is_published else double_quant,
                    target.projections,
                )
                quantized += getattr(module, name).numel()
                nbytes += sum(rows * columns for rows, columns in form.storage().values())
        elif isinstance(module, nn.Linear) and module is not head and not quant_type.is_published:
            quantized += module.weight.numel()
            # A scale for each block, of 4 bytes, or of 1 if they have scales of their own.
            nbytes += round(module.weight.numel() * (0.5 + (1 if double_quant else 4) / BLOCKSIZE))
    numel = sum(parameter.numel() for parameter in skeleton.parameters())
    return numel * dtype.itemsize, (numel - quantized) * dtype.itemsize + nbytes
