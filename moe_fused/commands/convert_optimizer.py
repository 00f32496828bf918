"""``moe-fused convert optimizer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DryRun, Traceback, progress_of_steps


def optimizer(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Checkpoint of Trainer or accelerate: optimizer.pt and the adapter or model it is of.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET", help="Directory to resume from, with the adapter or model; gets optimizer.pt."
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="Of the parameters in the run to be resumed. Models: per-expert, fused (Transformers 5) or original; "
            "adapters: as for convert adapter, where TARGET does not tell it.",
        ),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="LAYOUT", help="Of the parameters in SOURCE, where it does not tell it."),
    ] = None,
    parameters: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Names of SOURCE's parameters in the optimizer's order, a line each, or JSON; where the model does not "
            "tell them.",
        ),
    ] = None,
    target_parameters: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same of the run to be resumed.")
    ] = None,
    align_steps: Annotated[
        bool,
        typer.Option(
            "--align-steps", help="Allow experts to become one that were updated in different numbers of steps."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET's optimizer.pt.")] = False,
    dry_run: DryRun = False,
    traceback: Traceback = False,
) -> None:
    """Convert the state of AdamW, of torch or in 8 bits of bitsandbytes, so that a run resumes in another layout.

    First convert the adapter, with --scaling keep, or the model; then this brings the optimizer's state along.
    """
    del traceback  # read by console.run, which prints errors
    from moe_fused.checkpoints.optimizers.convert import plan_optimizer

    with progress_of_steps() as progress:
        plan = plan_optimizer(
            source,
            target,
            to=to,
            given=from_,
            parameters=parameters,
            target_parameters=target_parameters,
            align_steps=align_steps,
            overwrite=overwrite,
            progress=progress,
        )
        if not dry_run:
            plan.write(progress)
    print(f"{'would convert' if dry_run else 'converted'}\n{plan}")
