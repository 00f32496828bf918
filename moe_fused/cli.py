"""The command ``moe-fused``. Imports nothing heavy, so that a wrong option is answered at once."""

from __future__ import annotations

import typer

from moe_fused.commands.bench import bench
from moe_fused.commands.convert_adapter import adapter
from moe_fused.commands.convert_model import model
from moe_fused.commands.convert_optimizer import optimizer
from moe_fused.commands.doctor import doctor
from moe_fused.commands.generate import generate
from moe_fused.commands.merge import merge
from moe_fused.commands.quantize import quantize
from moe_fused.commands.tune import tune
from moe_fused.finetune.command import finetune

app = typer.Typer(add_completion=False, rich_markup_mode=None)
convert = typer.Typer(rich_markup_mode=None, help="Convert files between layouts.")
app.add_typer(convert, name="convert")
for conversion in (adapter, model, optimizer):
    convert.command()(conversion)
for command in (finetune, generate, quantize, merge, doctor, tune, bench):
    app.command()(command)


@app.callback()
def main() -> None:
    """Tools around fused mixture-of-experts models."""
