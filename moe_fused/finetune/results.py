"""The files that a run leaves: the adapter, its card and the plot of the loss."""

from __future__ import annotations

import secrets
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_fused.signals import signals_ignored

from .endings import writing
from .output import ADAPTER_CONFIG, LOG
from .progress import read_log

if TYPE_CHECKING:
    from .resolve import ResolvedRun

CARD, PLOT = "README.md", "loss.png"
# From so many records on, the plot of the loss has a mean, over this share of them.
_RECORDS_OF_A_MEAN, _SHARE_OF_A_MEAN = 50, 10


def draw_loss(records: Sequence[dict[str, Any]], path: Path, per_token: bool = True) -> None:
    """Draws the loss by steps, with its mean if there are enough, and the loss of evaluations, as a picture.

    Args:
        records: The records of the log.
        path: Where the picture is written.
        per_token: Whether losses are nats per token.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")  # without pyplot, which would look for a display
    axes = figure.subplots()
    trained = [record for record in records if "loss" in record]
    steps, losses = [record["step"] for record in trained], [record["loss"] for record in trained]
    width = window(len(losses))
    axes.plot(steps, losses, linewidth=0.8, alpha=0.5 if width else 1, label="training")
    if width:
        axes.plot(steps, smoothed(losses, width), label=f"training, mean of {width} records")
    if evaluated := [record for record in records if "eval_loss" in record]:
        points = [record["step"] for record in evaluated], [record["eval_loss"] for record in evaluated]
        axes.plot(*points, marker="o", label="evaluation")
    axes.set(xlabel="step", ylabel="loss (nats per token)" if per_token else "loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def window(records: int) -> int:
    """Returns over how many records the plot takes a mean: a tenth of them, an odd number. 0 means that it has no mean."""
    return records // _SHARE_OF_A_MEAN | 1 if records >= _RECORDS_OF_A_MEAN else 0


def smoothed(losses: Sequence[float], width: int) -> list[float]:
    """Returns the mean of each loss and its neighbours on both sides, ``width`` in all, fewer towards both ends.

    It has as many of them before as behind, so that a loss that falls has a mean that neither lags nor leads.
    """
    means = []
    for i in range(len(losses)):
        side = min(width // 2, i, len(losses) - 1 - i)
        means.append(statistics.fmean(losses[i - side : i + side + 1]))
    return means


def write_results(model: Any, tokenizer: Any, run: ResolvedRun, text: str) -> None:
    """Writes the adapter and the files beside it to the output directory.

    All files are first written elsewhere and then moved. ``adapter_config.json``, which PEFT looks for first, is moved
    last: whenever the process ends, an adapter that can be loaded is whole.

    Args:
        model: PEFT's model, with the trained adapters.
        tokenizer: The tokenizer of the run.
        run: The record of the run.
        text: The text of the model card.

    Raises:
        CannotWrite: Writing failed, as on a full disk. An adapter that was there before is whole or gone.
    """
    staging = run.output / f".adapter-{secrets.token_hex(4)}.partial"
    try:
        with writing("the adapter"):
            _write_files(model, tokenizer, run, text, staging)
            with signals_ignored():
                _publish(staging, run.output)
    finally:
        with signals_ignored():
            shutil.rmtree(staging, ignore_errors=True)


def _write_files(model: Any, tokenizer: Any, run: ResolvedRun, text: str, directory: Path) -> None:
    model.save_pretrained(str(directory))
    if run.options.export != "none":
        _export(directory, directory / run.options.export)
    tokenizer.save_pretrained(str(directory))
    draw_loss(read_log(run.output / LOG), directory / PLOT, per_token=not run.options.has_preferences)
    (directory / CARD).write_text(text, encoding="utf-8")


def _publish(staging: Path, output: Path) -> None:
    (output / ADAPTER_CONFIG).unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == ADAPTER_CONFIG):
        if path.is_dir():
            shutil.rmtree(output / path.name, ignore_errors=True)
        path.replace(output / path.name)


def _export(source: Path, target: Path) -> None:
    """Writes an adapter in the layout that ``target`` is named after, as ``moe-fused convert adapter`` does."""
    from moe_fused.checkpoints.adapters import Layout
    from moe_fused.checkpoints.adapters.convert import convert_adapter

    convert_adapter(source, target, to=Layout(target.name), given=Layout.PEFT_FUSED, widen=True)
