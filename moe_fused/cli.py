"""The command ``moe-fused`` with all its subcommands.

Nothing heavy is imported here, so that a wrong option is answered at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from moe_fused import __version__
from moe_fused.commands.bench import bench
from moe_fused.commands.convert_adapter import adapter
from moe_fused.commands.convert_model import model
from moe_fused.commands.convert_optimizer import optimizer
from moe_fused.commands.doctor import doctor
from moe_fused.commands.generate import generate
from moe_fused.commands.merge import merge
from moe_fused.commands.quantize import quantize
from moe_fused.commands.tune import tune
from moe_fused.finetune.command import GroupedCommand, finetune
from moe_fused.finetune.push import push

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
convert = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Convert files between layouts.")
app.add_typer(convert, name="convert")
for conversion in (adapter, model, optimizer):
    convert.command()(conversion)
app.command(cls=GroupedCommand)(finetune)
for command in (generate, quantize, merge, push, doctor, tune, bench):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moe-fused {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune, run and convert mixture-of-experts models, with fused kernels."""
