"""The options of the demo. Nothing heavy is imported here, so that a wrong option or path is answered at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_fused.commands.options import check_device, require
from moe_fused.signals import interrupted_afterwards

from .output import staged_output

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory to write; an earlier output of the demo is replaced.")] = Path(
        "demo-output"
    ),
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps to train, and most steps to fine-tune.  [default: by device]"),
    ] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, xpu ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed, which determines the result on a CPU.")] = 0,
    load_in_4bit: Annotated[
        bool,
        typer.Option(
            "--load-in-4bit/--no-load-in-4bit",
            help="Continue in 4 bits: quantize the model, fine-tune it on other text, and reload the adapter without "
            "moe-fused.",
        ),
    ] = True,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Train a small Qwen3-MoE with fused experts on Python's reference text, and fine-tune it in 4 bits on Python's code.

    Each part is compared with what Transformers and PEFT compute without moe-fused.
    """
    del traceback  # read by console.run, which prints errors
    check_device(device)
    if load_in_4bit:
        packages = ("accelerate", "bitsandbytes", "datasets", "peft", "trl", "yaml")
        require("the demo, unless with --no-load-in-4bit,", *packages, extra="train")
    with staged_output(output) as staging:
        with interrupted_afterwards():
            from . import report, run  # import torch and transformers

        console, results = run.run(staging, steps, device, seed, load_in_4bit)
    report.print_summary(console, results, output)
