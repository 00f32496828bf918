"""The loss curve as a picture, and the closing summary on the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .train import History

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend comes first: there may be no display)


def bits_per_byte(loss: float) -> float:
    """From nats per token, where a token is a byte."""
    return loss / math.log(2)


def draw_loss_curve(history: History, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(len(history.train)), history.train, linewidth=0.8, alpha=0.5, label="training batches")
    axes.plot(list(history.held_out), list(history.held_out.values()), marker="o", label="held-out text")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per byte)", title="Qwen3-MoE on the Python reference")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def print_summary(console: Console, results: dict[str, Any], output: Path) -> None:
    before, after = results["held_out_loss"]["before"], results["held_out_loss"]["after"]
    fused, eager = results["step_ms"]["moe_fused"], results["step_ms"]["eager"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, loss in (("before", before), ("after", after)):
        table.add_row(f"held-out loss {label}", f"{loss:.3f} nats ({bits_per_byte(loss):.3f} bits per byte)")
    table.add_row(
        "largest logit difference", f"{results['largest_logit_difference']:.1e} from Transformers' eager experts, float32"
    )
    table.add_row("training step", f"{fused:.1f} ms fused, {eager:.1f} ms eager: {eager / fused:.2f} times as fast")
    table.add_row("reloaded", "by stock Transformers with eager experts: the same logits")
    table.add_row("model", str(output / "model"))
    table.add_row("loss curve", str(output / "loss.png"))
    table.add_row("numbers", str(output / "results.json"))
    console.print(Panel(Text(results["sample"]), title="sample", title_align="left"))
    console.print(table, soft_wrap=True)
