"""The command ``moe-fused convert optimizer``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_fused.checkpoints.places import check_optimizer

from .options import DryRun, Traceback, progress_of_steps


def optimizer(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Checkpoint of Trainer or accelerate, with optimizer.pt and the adapter or model that it belongs to.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="TARGET", help="Directory to resume from, with the adapter or model. optimizer.pt is written there."
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="LAYOUT",
            help="Layout of the parameters in the run to be resumed. For models: per-expert, fused (Transformers 5) or "
            "original. For adapters, give it only if TARGET does not show its layout; the names are those of convert "
            "adapter.",
        ),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="LAYOUT", help="Layout of the parameters in SOURCE, if it does not show which one it is."
        ),
    ] = None,
    parameters: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Names of SOURCE's parameters in the optimizer's order, one on each line or as JSON. Needed if the model "
            "does not show their order.",
        ),
    ] = None,
    target_parameters: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same for the run to be resumed.")
    ] = None,
    align_steps: Annotated[
        bool,
        typer.Option(
            "--align-steps",
            help="Allow experts that were updated in different numbers of steps to become one parameter.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace TARGET's optimizer.pt.")] = False,
    dry_run: DryRun = False,
    traceback: Traceback = False,
) -> None:
    """Convert the state of AdamW, from torch or in 8 bits from bitsandbytes, so that a run resumes in another layout.

    Convert the adapter (with --scaling keep) or the model first. This command then converts the optimizer's state.
    """
    del traceback  # read by console.run, which prints errors
    check_optimizer(source, target, to, from_, overwrite)
    for path in (parameters, target_parameters):
        if path is not None:
            path.open("rb").close()

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
