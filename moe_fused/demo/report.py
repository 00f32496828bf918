"""Draws the loss curves, and prints the summary at the end."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from .output import ADAPTER, DENSE, DEQUANTIZED, EXPORTED, PACKED, RESULTS


def bits_per_byte(loss: float) -> float:
    """Converts a loss in nats per token to bits per byte; a token is a byte."""
    return loss / math.log(2)


def _draw(axes: Axes, title: str, train: Mapping[int, float], held_out: Mapping[int, float]) -> None:
    axes.plot(list(train), list(train.values()), linewidth=0.8, alpha=0.5, label="training batches")
    axes.plot(list(held_out), list(held_out.values()), marker="o", linestyle=":", label="held-out text")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per byte)", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def draw_loss_curves(results: dict[str, Any], path: Path) -> None:
    """Draws the losses of training and, if there was one, of fine-tuning. ``results`` is the content of results.json."""
    history, tuned = results["history"], results.get("finetune")
    figure = Figure(figsize=(12 if tuned else 7, 4), layout="constrained")  # pyplot would look for a display
    axes = figure.subplots(1, 2 if tuned else 1, squeeze=False)[0]
    _draw(axes[0], "Qwen3-MoE on the Python reference", dict(enumerate(history["train"])), history["held_out"])
    if tuned:
        _draw(axes[1], "4-bit fine-tuning on Python's source code", tuned["history"], _evaluated(tuned))
    figure.savefig(path, dpi=120)


def _evaluated(tuned: dict[str, Any]) -> dict[int, float]:
    """Returns the held-out loss by step: before the fine-tuning, and of each evaluation of ``moe-fused finetune``."""
    return {0: tuned["held_out_loss"]["before"], **tuned["evaluations"]}


_BARS = "▁▂▃▄▅▆▇█"


def curve(losses: Mapping[int, float]) -> str:
    """Draws losses by step as a line of bars, the highest of them eight times as high as the lowest, with their ends."""
    values = list(losses.values())
    low, high = min(values), max(values)
    heights = (round((value - low) / (high - low or 1) * (len(_BARS) - 1)) for value in values)
    bars = "".join(_BARS[height] for height in heights)
    return f"{bars}  {values[0]:.3f} to {values[-1]:.3f} nats, after steps {', '.join(map(str, losses))}"


def _describe_loss(loss: float) -> str:
    return f"{loss:.3f} nats, {bits_per_byte(loss):.3f} bits per byte"


def _equal(difference: float) -> str:
    return "" if difference else " (bitwise equal)"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.2f} MiB"


def _saved(results: dict[str, Any], output: Path, name: str) -> str:
    """Describes a directory of the output, with its size."""
    return f"{output / name}, {_mib(results['bytes'][name])}"


def _trained(results: dict[str, Any], output: Path) -> dict[str, str]:
    loss, step_ms = results["held_out_loss"], results["step_ms"]
    fused, eager = step_ms["moe_fused"], step_ms["eager"]
    difference = results["largest_logit_difference"]
    plain = "; on a CPU both are plain torch" if results["device"] == "cpu" else ""
    return {
        **{f"held-out loss {when}": _describe_loss(x) for when, x in loss.items()},
        "largest logit difference": f"{difference:.1e}{_equal(difference)} from Transformers' eager experts, float32",
        "training step": f"{fused:.1f} ms, {eager:.1f} ms with eager experts: {eager / fused:.2f} times as fast{plain}",
        "saved": f"{_saved(results, output, DENSE)} (stock Transformers: same logits)",
    }


def _quantized(results: dict[str, Any], output: Path) -> dict[str, str]:
    numbers = results["four_bit"]
    loss, difference, experts = numbers["held_out_loss"], numbers["largest_logit_difference"], numbers["experts"]
    memory, dense = (
        f"{experts[key] / experts['parameters']:.3f} bytes per parameter, {_mib(experts[key])}"
        for key in ("bytes", "dense_bytes")
    )
    return {
        "held-out loss": f"{_describe_loss(loss)}; dense: {_describe_loss(results['held_out_loss']['after'])}",
        "experts": f"{memory}; dense: {dense}",
        "largest logit difference": f"{difference:.1e}{_equal(difference)} from eager experts, weights dequantized, float32",
        "saved": f"{_saved(results, output, PACKED)} (reloaded: same bits)",
    }


def _tuned(results: dict[str, Any], output: Path) -> dict[str, str]:
    numbers = results["finetune"]
    return {
        **{f"held-out loss {when}": _describe_loss(x) for when, x in numbers["held_out_loss"].items()},
        "evaluations": curve(_evaluated(numbers)),
        "trained": f"{numbers['trained_parameters']:,} parameters, {results['size']['finetuning_steps']} steps",
        "adapter": _saved(results, output, ADAPTER),
        "exported per expert": f"{_saved(results, output, EXPORTED)} (and back: same bits)",
    }


def _reloaded(results: dict[str, Any], output: Path) -> dict[str, str]:
    differences = results["stock"]["largest_logit_difference"]
    return {
        "base": _saved(results, output, DEQUANTIZED),
        **{
            f"logits, {layout} adapter": f"{x:.1e}{_equal(x)} at most from moe_fused over 4 bits, float32"
            for layout, x in differences.items()
        },
    }


def _next(output: Path) -> list[str]:
    """Returns commands that a user can run next."""
    python = shlex.quote(sys.executable)
    program = Path(sys.executable).with_name("moe-fused")  # another installation may come first in PATH
    command = shlex.quote(str(program)) if program.exists() else f"{python} -m moe_fused"
    packed, adapter = (shlex.quote(str(output / name)) for name in (PACKED, ADAPTER))
    merged, script = (
        shlex.quote(str(output.with_name(f"{output.name}-merged"))),
        shlex.quote(str(output / "stock.py")),
    )
    return [
        f"{command} generate {packed} --adapter {adapter} --temperature 1 --max-new-tokens 200 --prompt '    def '",
        f"{command} merge {packed} {adapter} {merged}",
        f"{python} {script}",
        f"{command} finetune --model Qwen/Qwen3-30B-A3B --dataset YOUR.jsonl --output my-adapter",
    ]


def print_summary(console: Console, results: dict[str, Any], output: Path) -> None:
    """Prints the summary of a run. ``results`` is the content of results.json."""
    parts = [("trained on the Python reference", _trained, results["training_seconds"])]
    if "finetune" in results:
        parts += [
            ("quantized to 4 bits", _quantized, results["four_bit"]["seconds"]),
            ("fine-tuned on Python's source code", _tuned, results["finetune"]["seconds"]),
            ("reloaded by stock Transformers and PEFT", _reloaded, results["stock"]["seconds"]),
        ]
    samples = {"sample": results, "sample in 4 bits": results.get("four_bit"), "fine-tuned": results.get("finetune")}
    for title, numbers in samples.items():
        if numbers is not None:
            console.print(Panel(Text(numbers["sample"]), title=title, title_align="left"))
    for number, (title, rows, seconds) in enumerate(parts, 1):
        console.print(f"[bold]{number}. {title}[/], {seconds:.0f} s")
        for label, value in rows(results, output).items():
            _print(console, f"   {label:<28}{value}")
    console.print(f"[bold]{results['seconds']:.0f} s in all[/]")
    _print(console, f"   {'loss curves':<28}{output / 'loss.png'}")
    _print(console, f"   {'numbers':<28}{output / RESULTS}")
    if "finetune" in results:
        console.print("[bold]next[/]")
        for command in _next(output):
            _print(console, f"   {command}")


def _print(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False)
