"""The command ``moe-fused convert adapter``."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_fused.checkpoints.adapters import Layout, ScalingChoice
from moe_fused.checkpoints.places import (
    ADAPTER_CONFIG,
    check_adapter_replaceable,
    check_adapter_source,
    read_object,
)
from moe_fused.signals import interrupted_afterwards
from moe_fused.staging import claimed

from .options import DryRun, Traceback, progress_of_steps

if TYPE_CHECKING:
    from moe_fused.checkpoints.adapters.convert import AdapterConversionPlan


def _print_plan(plan: AdapterConversionPlan, source: Path, target: Path, dry_run: bool) -> None:
    print(
        f"{'would convert' if dry_run else 'converted'} {source} ({plan.source.value}) to {target} ({plan.target.value})"
    )
    ranks = ", ".join(f"{name}_proj {rank}" for name, rank in plan.ranks.items())
    print(f"{plan.layers} layers of {plan.experts} experts, rank: {ranks}; alpha {plan.config['lora_alpha']}")
    print(
        f"{len(plan.tensors)} tensors, {plan.nbytes / 2**20:.1f} MiB; copied: {', '.join(plan.files) or 'nothing else'}"
    )
    for note in plan.notes:
        print(note)


def adapter(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Directory of an adapter with LoRA on experts, in safetensors.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Directory to make.")],
    to: Annotated[
        Layout,
        typer.Option(
            help="Layout to write. per-expert: for vLLM, SGLang, llama.cpp and PEFT; peft-fused: for today's PEFT."
        ),
    ] = Layout.PER_EXPERT,
    from_: Annotated[
        Layout | None, typer.Option("--from", help="Layout of SOURCE, if its files do not show which one it is.")
    ] = None,
    scaling: Annotated[
        ScalingChoice | None,
        typer.Option(
            help="fold: multiply the scaling into lora_B, with one rank and alpha = rank for all; keep: leave alpha, rsLoRA "
            "and ranks as they are  "
            "[default: fold for per-expert, else keep]"
        ),
    ] = None,
    widen: Annotated[
        bool,
        typer.Option("--widen", help="Allow a larger rank where the layout cannot hold the adapter exactly otherwise."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter at TARGET.")] = False,
    dry_run: DryRun = False,
    traceback: Traceback = False,
) -> None:
    """Convert an adapter with LoRA on experts to another layout, without changing what it computes."""
    del traceback  # read by console.run, which prints errors
    check_adapter_source(source, "SOURCE")
    read_object(source / ADAPTER_CONFIG)
    check = partial(check_adapter_replaceable, source, overwrite=overwrite)
    check(target)
    with contextlib.ExitStack() as stack:
        if not dry_run:
            stack.enter_context(claimed(target, "TARGET", check))
        with interrupted_afterwards():
            from moe_fused.checkpoints.adapters.convert import convert_adapter  # imports torch
            from moe_fused.checkpoints.adapters.fits import check_against_base
        check_against_base(source, from_)
        progress = stack.enter_context(progress_of_steps())
        plan = convert_adapter(
            source,
            target,
            to=to,
            given=from_,
            scaling=scaling,
            widen=widen,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    _print_plan(plan, source, target, dry_run)
