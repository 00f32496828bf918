"""Draws the figures of the README and of ``docs/how-it-works.md`` into ``docs/figures``: ``python scripts/figures.py``.

No size in a figure is typed by hand. The sizes of the experts' tensors follow from their shapes, the memory of a
fine-tuning step comes from ``moe_fused.memory``, and measured numbers come from the rows in ``benchmarks/results``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
FIGURES = REPOSITORY / "docs" / "figures"
# The rows of the README's figure.
FINETUNING = REPOSITORY / "benchmarks" / "results" / "finetune-30b_h200.json"
CAP_GIB = 24

# One layer of Qwen3-30B-A3B, in bf16.
HIDDEN, INTERMEDIATE, TOP_K, TOKENS, ITEM = 2048, 768, 8, 4096, 2
ROWS = TOKENS * TOP_K
# The width in which the loss is drawn, in layers.
LOSS = 3

KEPT, PASSING, AGAIN, STAGE = "#4878a8", "#b8c4cf", "#d9975b", "#f4f1ea"
# Okabe and Ito's palette, as in benchmarks/plot.py; ours comes first.
BARS = ("#D55E00", "#E69F00", "#0072B2", "#CC79A7")


@dataclass(frozen=True)
class Life:
    """One tensor of the experts' forward and backward, and when it exists.

    Attributes:
        name: the tensor's name and shape.
        nbytes: the tensor's size.
        begin, end: the first and the last entry of ``STAGES`` during which the tensor exists.
        colour: whether the tensor is kept for backward, computed again, or neither.
    """

    name: str
    nbytes: int
    begin: int
    end: int
    colour: str


STAGES = ("up", "down", "combine", "", "up\nagain", "down\nbackward", "dx:\nGEMM", "dx:\ncombine")


def _lives(recompute: bool) -> Iterator[Life]:
    wide, inner, outer = (ROWS * size * ITEM for size in (2 * INTERMEDIATE, INTERMEDIATE, HIDDEN))
    tokens = TOKENS * HIDDEN * ITEM
    yield Life("x  (T, H)", tokens, 0, 7, KEPT)
    if recompute:
        yield Life("gate_up, then its gradient", wide, 4, 7, AGAIN)
    else:
        yield Life("gate_up  (S, 2·I)", wide, 0, 7, KEPT)
    yield Life("h  (S, I)", inner, 0, 1, PASSING)
    yield Life("z  (S, H)", outer, 1, 2, PASSING)
    yield Life("y  (T, H)", tokens, 2, 2, PASSING)
    yield Life("weighted h  (S, I)", inner, 5, 5, PASSING)
    if not recompute:
        yield Life("grad_gate_up  (S, 2·I)", wide, 5, 7, PASSING)
    yield Life("rows of dx  (S, H)", outer, 6, 7, PASSING)
    yield Life("dx  (T, H)", tokens, 7, 7, PASSING)


def draw_lives(path: Path) -> None:
    """Draws when each tensor of a layer's experts exists, with and without ``recompute``."""
    from moe_fused.memory import MIB

    figure, panels = _figure(10, 6.2, rows=2)
    for axes, recompute in zip(panels, (False, True), strict=True):
        lives = list(_lives(recompute))
        for place, life in enumerate(lives):
            axes.barh(place, life.end - life.begin + 1, left=life.begin, height=0.72, color=life.colour)
            where = {"x": life.begin + 0.08, "y": place, "va": "center", "fontsize": 8}
            axes.text(s=f"{life.nbytes / MIB:.0f} MiB", color="white" if life.colour == KEPT else "black", **where)
        axes.set_yticks(range(len(lives)), [life.name for life in lives], fontsize=8)
        labels = [stage if recompute or "again" not in stage else "" for stage in STAGES]
        axes.set_xticks([at + 0.5 for at in range(len(STAGES))], labels, fontsize=8)
        axes.axvspan(3, 4, color=STAGE, zorder=0)
        axes.text(3.5, len(lives) / 2 - 0.5, "other\nlayers", ha="center", va="center", fontsize=8)
        axes.set(
            xlim=(0, len(STAGES)),
            title=f"{'recompute=True' if recompute else 'default: gate_up is kept'} (T = {TOKENS}, S = {ROWS}, bf16)",
        )
        axes.title.set_fontsize(9)
        axes.invert_yaxis()
        axes.tick_params(length=0)
    _legend(figure, {"kept from forward to backward": KEPT, "for a moment": PASSING, "made again, in one place": AGAIN})
    _save(figure, path)


def draw_step(path: Path) -> None:
    """Draws the memory that a step's first batch needs beyond the weights, as ``moe_fused.memory`` predicts it."""
    from moe_fused.memory import GIB, Workload, loss_bytes, predict, sizes_of, skeleton
    from scripts.docs import qwen3_30b_a3b

    sizes = sizes_of(skeleton(qwen3_30b_a3b()))
    prediction = predict(sizes, Workload())
    parts = prediction.parts
    loss = loss_bytes(sizes, Workload()) / GIB  # not among the parts: the peak is in a layer
    gradients = parts["adapters"]
    one = {name: parts[name] / GIB for name in ("layer", "expert rows", "expert workspace")}
    layers = sizes.layers
    kept = parts["activations"] / GIB / layers
    times: list[float] = []
    series: dict[str, list[float]] = {"gradients": [], "activations": [], "loss": [], **{name: [] for name in one}}

    def moment(time: float, done: float, inputs: float, inside: bool, at_loss: bool = False) -> None:
        times.append(time)
        series["gradients"].append(done * gradients / GIB)
        series["activations"].append(inputs * kept)
        series["loss"].append(loss if at_loss else 0.0)
        for name, size in one.items():
            series[name].append(size if inside else 0.0)

    for layer in range(layers + 1):
        moment(layer, 0, layer, False)
    moment(layers, 0, layers, False, at_loss=True)
    moment(layers + LOSS, 0, layers, False, at_loss=True)
    for layer in range(layers):
        begin = layers + LOSS + layer
        for at, inside in ((0.0, False), (0.15, True), (0.85, True), (1.0, False)):
            moment(begin + at, (layer + at) / layers, layers - layer - (at == 1.0), inside)
    figure, (axes,) = _figure(10, 3.6)
    colours = ("#7a9e7e", KEPT, "#8a7ca8", AGAIN, "#c77f7f", PASSING)
    axes.stackplot(times, *series.values(), labels=list(series), colors=colours, linewidth=0)
    ends = {
        "forward, layer by layer": layers / 2,
        "loss": layers + LOSS / 2,
        "backward, layer by layer": layers * 1.5 + LOSS,
    }
    axes.set_xticks(list(ends.values()), list(ends))
    axes.tick_params(axis="x", length=0)
    moving = max(map(sum, zip(*series.values(), strict=True)))
    resident = prediction.total / GIB - moving
    stays = "what stays (weights, adapters, optimizer, libraries)"
    sums = f"{resident:.2f} GiB + {moving:.2f} at the peak here = {prediction.total / GIB:.2f}"
    axes.set(xlim=(0, 2 * layers + LOSS), ylabel="GiB beyond what stays")
    axes.set_title(f"without CUDA graphs, first batch of a step; {stays}: {sums}", fontsize=9)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    _save(figure, path)


def draw_finetuning(path: Path) -> None:
    """Draws tokens per second and peak memory of fine-tuning Qwen3-30B-A3B by sequence length, from the committed rows."""
    from benchmarks.rows import FINETUNING_LABELS, read_rows

    rows = read_rows(FINETUNING)
    names = [name for name in FINETUNING_LABELS if any(row.implementation == name for row in rows)]
    lengths = sorted({row.tokens for row in rows})
    figure, (speed, memory) = _figure(12, 4, columns=2)
    width = 0.84 / len(names)
    colours = {FINETUNING_LABELS[name]: colour for name, colour in zip(names, BARS, strict=False)}
    for place, name in enumerate(names):
        for row in rows:
            if row.implementation != name or row.ms is None or row.peak_mib is None:
                continue
            at = lengths.index(row.tokens) + (place - (len(names) - 1) / 2) * width
            per_second, gib = row.tokens / row.ms * 1e3, row.peak_mib / 1024
            for axes, value, text in ((speed, per_second, f"{per_second / 1e3:.1f}k"), (memory, gib, f"{gib:.1f}")):
                axes.bar(at, value, width=width * 0.94, color=colours[FINETUNING_LABELS[name]])
                white = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # in front of the line at 24 GiB
                axes.text(at, value * 1.01, text, ha="center", va="bottom", fontsize=6.5, bbox=white)
    for axes, title in ((speed, "tokens per second (more is better)"), (memory, "peak memory, GiB (less is better)")):
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(lengths)), list(map(str, lengths)), fontsize=8)
        axes.set_xlabel("tokens in a sequence", fontsize=9)
        axes.tick_params(axis="x", length=0)
        axes.tick_params(axis="y", labelsize=8)
    memory.axhline(CAP_GIB, color="black", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    memory.text(-0.5, CAP_GIB + 1, f"{CAP_GIB} GiB", fontsize=8, va="bottom")
    newest = max(rows, key=lambda row: row.date)
    figure.suptitle(f"Fine-tuning Qwen3-30B-A3B, one sequence a step, {newest.gpu}", fontsize=10)
    _legend(figure, colours)
    _save(figure, path)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure, list(panels.flat)


def _legend(figure: Any, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)


def _save(figure: Any, path: Path) -> None:
    import matplotlib as mpl

    # Text stays text, and there are neither dates nor random names, so that the same figure gives the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_all(directory: Path, suffix: str = "svg") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    draw_lives(directory / f"experts-memory.{suffix}")
    draw_step(directory / f"step-memory.{suffix}")
    draw_finetuning(directory / f"finetune-30b.{suffix}")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    draw_all(FIGURES)
