"""The command ``moe-fused``. Imports nothing heavy, so that a wrong option is answered at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

from moe_fused import convert_model_cli
from moe_fused.checkpoints.adapters import Layout, ScalingChoice
from moe_fused.finetune.command import finetune

if TYPE_CHECKING:
    from moe_fused.checkpoints.adapters.convert import Plan

app = typer.Typer(add_completion=False, rich_markup_mode=None)
convert = typer.Typer(rich_markup_mode=None, help="Convert files between layouts.")
app.add_typer(convert, name="convert")
convert.command()(convert_model_cli.model)
app.command()(finetune)


@app.callback()
def main() -> None:
    """Tools around fused mixture-of-experts models."""


def _print_plan(plan: Plan, source: Path, target: Path, dry_run: bool) -> None:
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


@convert.command()
def adapter(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Directory of an adapter with LoRA on experts, in safetensors.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Directory to make.")],
    to: Annotated[
        Layout,
        typer.Option(help="Layout to write. per-expert: vLLM, SGLang, llama.cpp, PEFT; peft-fused: today's PEFT."),
    ] = Layout.PER_EXPERT,
    from_: Annotated[
        Layout | None, typer.Option("--from", help="Layout of SOURCE, where SOURCE does not tell it.")
    ] = None,
    scaling: Annotated[
        ScalingChoice | None,
        typer.Option(
            help="fold: into lora_B, with one rank and alpha = rank for all; keep: alpha, rsLoRA and ranks stay  "
            "[default: fold for per-expert, else keep]"
        ),
    ] = None,
    widen: Annotated[
        bool, typer.Option("--widen", help="Allow a larger rank where the layout cannot be exact otherwise.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter at TARGET.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Convert an adapter with LoRA on experts to another layout, without changing what it computes."""
    del traceback  # read by console.run, which prints errors
    from moe_fused.checkpoints.adapters.convert import convert_adapter  # takes torch

    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done)

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
