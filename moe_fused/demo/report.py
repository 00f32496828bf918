"""The loss curve as a picture, and the closing summary on the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from .four_bit import PACKED
from .output import RESULTS
from .train import History


def bits_per_byte(loss: float) -> float:
    """From nats per token, where a token is a byte."""
    return loss / math.log(2)


def draw_loss_curve(history: History, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")  # without pyplot, which would look for a display
    axes = figure.subplots()
    axes.plot(range(len(history.train)), history.train, linewidth=0.8, alpha=0.5, label="training batches")
    axes.plot(list(history.held_out), list(history.held_out.values()), marker="o", label="held-out text")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per byte)", title="Qwen3-MoE on the Python reference")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _describe_loss(loss: float) -> str:
    return f"{loss:.3f} nats, {bits_per_byte(loss):.3f} bits per byte"


def _equal(difference: float) -> str:
    return "" if difference else " (bitwise equal)"


def _four_bit_rows(results: dict[str, Any], output: Path) -> dict[str, str]:
    numbers = results["four_bit"]
    loss, difference, experts = numbers["held_out_loss"], numbers["largest_logit_difference"], numbers["experts"]
    memory, dense = (
        f"{experts[key] / experts['parameters']:.3f} bytes per parameter, {experts[key] / 2**20:.2f} MiB"
        for key in ("bytes", "dense_bytes")
    )
    return {
        "held-out loss in 4 bits": f"{_describe_loss(loss)}; dense: {_describe_loss(results['held_out_loss']['after'])}",
        "experts in 4 bits": f"{memory}; dense: {dense}",
        "4-bit logit difference": f"{difference:.1e}{_equal(difference)} from eager experts, weights dequantized, float32",
        "saved 4-bit model": f"{output / PACKED} (reloaded: same bits)",
    }


def print_summary(console: Console, results: dict[str, Any], output: Path) -> None:
    """Prints what came of a run; ``results`` as in results.json."""
    loss, step_ms = results["held_out_loss"], results["step_ms"]
    fused, eager = step_ms["moe_fused"], step_ms["eager"]
    difference = results["largest_logit_difference"]
    plain = "; on a CPU both are plain torch" if results["device"] == "cpu" else ""
    rows = {
        **{f"held-out loss {when}": _describe_loss(x) for when, x in loss.items()},
        "largest logit difference": f"{difference:.1e}{_equal(difference)} from Transformers' eager experts, float32",
        "training step": f"{fused:.1f} ms, {eager:.1f} ms with eager experts: {eager / fused:.2f} times as fast{plain}",
        "saved model": f"{output / 'model'} (reloaded by stock Transformers: same logits)",
        **(_four_bit_rows(results, output) if "four_bit" in results else {}),
        "loss curve": str(output / "loss.png"),
        "numbers": str(output / RESULTS),
    }
    samples = {"sample": results} | ({"sample in 4 bits": results["four_bit"]} if "four_bit" in results else {})
    for title, numbers in samples.items():
        console.print(Panel(Text(numbers["sample"]), title=title, title_align="left"))
    for label, value in rows.items():
        console.print(f"{label:<26}{value}", soft_wrap=True, markup=False)
