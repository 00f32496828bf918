"""``moe-fused convert model``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .options import DryRun, Dtype, ShardSize, Traceback


class ModelLayout(str, Enum):
    """As in ``checkpoints.models``."""

    PER_EXPERT = "per-expert"
    FUSED = "fused"
    ORIGINAL = "original"


def model(
    source: Annotated[Path, typer.Argument(help="Directory of a model with experts, in safetensors.")],
    target: Annotated[Path, typer.Argument(help="Directory to make.")],
    to: Annotated[
        ModelLayout,
        typer.Option(
            help="Layout to write. per-expert: what every tool reads; fused: Transformers 5 in memory, in 4 bits ours; "
            "original: the original qwen3-moe-fused."
        ),
    ],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Cast the weights of a dense or dequantized model.  [default: as they are]")
    ] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Make dense tensors of all 4-bit ones.")] = False,
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model at TARGET.")] = False,
    dry_run: DryRun = False,
    traceback: Traceback = False,
) -> None:
    """Convert a model to another layout of its experts, bit for bit, in little memory.

    For GGUF, which llama.cpp makes of dense models with separate experts: --to per-expert, and of one in 4 bits
    --dequantize --dtype bfloat16; then its convert_hf_to_gguf.py on TARGET.
    """
    del traceback  # read by whoever prints errors
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
