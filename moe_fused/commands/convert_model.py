"""The command ``moe-fused convert model``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from moe_fused.checkpoints.places import CONFIG, check_apart, check_replaceable, read_config
from moe_fused.quantized import check_config, content_of, find_modelopt_config

from .options import DryRun, Dtype, ShardSize, Traceback, check_weights, writing


class ModelLayout(str, Enum):
    """The layouts of ``checkpoints.models``."""

    PER_EXPERT = "per-expert"
    FUSED = "fused"
    ORIGINAL = "original"


def model(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Directory of a model with experts, in safetensors.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Directory to make.")],
    to: Annotated[
        ModelLayout,
        typer.Option(
            help="Layout to write. per-expert: every tool reads it, mxfp4 and nvfp4 as compressed-tensors has them; fused: "
            "as Transformers 5 holds it in memory, nf4 and fp4 in the layout of moe-fused, mxfp4 in the stacks of gpt-oss; "
            "original: the layout of the original qwen3-moe-fused."
        ),
    ],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Cast the weights of a dense or dequantized model.  [default: no cast]")
    ] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Make all 4-bit tensors dense.")] = False,
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at TARGET.")] = False,
    dry_run: DryRun = False,
    traceback: Traceback = False,
) -> None:
    """Convert a model to another layout of its experts, bit for bit, with little memory.

    SOURCE may be dense, or in nf4, fp4, mxfp4 or nvfp4. --dequantize makes a 4-bit model dense, such as the published
    gpt-oss. ModelOpt NVFP4 checkpoints are rewritten as compressed-tensors ones.

    To make a GGUF file, write a dense model with separate experts: --to per-expert, and for a model in 4 bits also
    --dequantize --dtype bfloat16. Then run llama.cpp's convert_hf_to_gguf.py on TARGET.
    """
    del traceback  # read by console.run, which prints errors
    if not source.is_dir():
        raise FileNotFoundError(f"SOURCE {source} is not a directory")
    check_apart(source, target)
    check_replaceable(target, overwrite)
    config = read_config(source)
    check_config("SOURCE", str(source), config)
    quantized = content_of(config) is not None or find_modelopt_config(str(source)) is not None
    check_weights("SOURCE", str(source), ("*.safetensors",))
    if dtype is not None and quantized and not dequantize:
        raise ValueError(
            f"--dtype {dtype.value} is for dense models: those in 4 bits, as {source}, must be dequantized, too"
        )
    if dequantize and not quantized:
        raise ValueError(
            f"{source} has no 4-bit tensors that could be dequantized: its {CONFIG} has no quantization_config"
        )
    with writing("TARGET", target, overwrite, dry_run):
        _convert(source, target, to, dtype, dequantize, max_shard_size, overwrite, dry_run)


def _convert(
    source: Path,
    target: Path,
    to: ModelLayout,
    dtype: Dtype | None,
    dequantize: bool,
    max_shard_size: str,
    overwrite: bool,
    dry_run: bool,
) -> None:
    import torch

    from moe_fused.checkpoints.models import plan_model

    plan = plan_model(
        source,
        target,
        to.value,
        dtype=getattr(torch, dtype.value) if dtype else None,
        dequantize=dequantize,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    print(plan)
    if dry_run:
        return
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=plan.nbytes[1])
        plan.write(lambda done, total: bar.update(task, completed=done, total=total))
