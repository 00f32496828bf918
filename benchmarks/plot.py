"""Draws benchmark rows: a panel per layer and LoRA rank (columns) and phase (rows), tokens across.

``python -m benchmarks.plot benchmarks/results/FILE.json`` writes ``FILE.png`` beside it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from moe_fused.staging import replace_file

from .rows import OURS, ROOFLINE, Row, baselines_of, read_rows, weights_of

METRICS = ("speedup", "ms")
# A phase of fewer sizes (CUDA graphs stand at the smallest only) has a place in the tables, not in a curve.
LEAST_SIZES = 3
# Where the speed-up axis ends: an implementation that is nowhere faster is named in the legend instead.
LEAST_SPEEDUP = 0.25

# Okabe and Ito's palette, which the colour-blind can tell apart; markers tell them apart in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")
_MARKERS = ("s", "^", "D", "v", "P", "X")
OUR_COLOUR = "#D55E00"
_ROOFLINE_COLOUR = "#777777"


def _ordered(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, object]]:
    """Line style by implementation, the same in every panel; ours in front of the rest."""
    styles: dict[str, dict[str, object]] = {}
    names = _ordered(row.implementation for row in rows)
    peers = [name for name in names if name not in (OURS, ROOFLINE)]
    if OURS in names:
        styles[OURS] = {"color": OUR_COLOUR, "marker": "o", "linewidth": 2.2, "markersize": 5, "zorder": 4}
    for i, name in enumerate(peers):
        colour, marker = COLOURS[i % len(COLOURS)], _MARKERS[i % len(_MARKERS)]
        styles[name] = {"color": colour, "marker": marker, "linewidth": 1.4, "markersize": 4, "zorder": 3}
    if ROOFLINE in names:
        styles[ROOFLINE] = {"color": _ROOFLINE_COLOUR, "linestyle": (0, (4, 2)), "linewidth": 1.2, "zorder": 2}
    return styles


def _compact(value: float, _: object = None) -> str:
    return f"{value:g}" if value < 1000 else f"{value / 1000:.4g}k"


def _count(tokens: float, _: object = None) -> str:
    """16384 as 16k, in the binary thousands that token counts come in."""
    whole = int(tokens)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)


def _speedups(rows: Sequence[Row], implementation: str) -> list[tuple[int, float]]:
    """(tokens, baseline's time over the implementation's) where both have a time."""
    baseline = baselines_of(rows)[0]
    times = {row.point: row.ms for row in rows if row.implementation == baseline}
    pairs = []
    for row in rows:
        base = times.get(row.point)
        if row.implementation == implementation and row.ms and base:
            pairs.append((row.tokens, base / row.ms))
    return sorted(pairs)


def _label(name: str, rows: Sequence[Row], metric: str) -> str:
    if name == ROOFLINE:
        return "roofline (bytes, FLOPs)"
    speedups = [speedup for _, speedup in _speedups(rows, name)]
    if metric == "speedup" and all(speedup < LEAST_SPEEDUP for speedup in speedups):
        return f"{name} (below {LEAST_SPEEDUP:g}×)" if speedups else f"{name} (not comparable)"
    return name


def _draw(axes: Axes, rows: Sequence[Row], styles: dict[str, dict[str, object]], metric: str) -> None:
    sizes = sorted({row.tokens for row in rows})
    for name, style in styles.items():
        if metric == "speedup":
            points = _speedups(rows, name)
        else:
            points = sorted((row.tokens, row.ms) for row in rows if row.implementation == name and row.ms)
        if points:
            axes.plot(*zip(*points, strict=True), **style)  # type: ignore[arg-type]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2 if metric == "speedup" else 10)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(FuncFormatter(_count))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    if metric == "speedup":
        axes.yaxis.set_major_locator(FixedLocator([2.0**power for power in range(-2, 10)]))
        axes.set_ylim(bottom=LEAST_SPEEDUP)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(_compact))
    axes.tick_params(axis="x", labelsize=8, labelrotation=45)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def figure(rows: Sequence[Row], metric: str = "speedup") -> Figure:
    """The rows as a figure; ``metric`` is ``speedup`` (over the baseline at the same point) or ``ms``.

    Raises:
        ValueError: an unknown metric, rows of several benchmarks or GPUs, or no phase with three sizes or more.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    gpus = _ordered(row.gpu for row in rows)
    if len(gpus) > 1:
        raise ValueError(f"rows must be of one GPU, got {', '.join(gpus)}")
    phases = [
        phase
        for phase in _ordered(row.phase for row in rows)
        if len({row.tokens for row in rows if row.phase == phase}) >= LEAST_SIZES
    ]
    if not phases:
        raise ValueError(f"rows must have a phase with at least {LEAST_SIZES} token counts to draw, got none")
    rows = [row for row in rows if row.phase in phases]
    layers = list(dict.fromkeys((row.layer, row.lora_rank) for row in rows))
    baseline = baselines_of(rows)[0]
    styles = _styles(rows)

    # A layer and rank a column; a single one has its phases side by side, or it would be too narrow for the legend.
    flat = len(layers) == 1
    height, width = (1, len(phases)) if flat else (len(phases), len(layers))
    drawing = Figure(figsize=(max(9.0, 1.2 + 3.2 * width), 1.3 + 2.6 * height), dpi=150, layout="constrained")
    grid = drawing.subplots(height, width, squeeze=False, sharex=not flat and "col", sharey=not flat and "row")
    for i, phase in enumerate(phases):
        for j, (layer, rank) in enumerate(layers):
            axes = grid[j][i] if flat else grid[i][j]
            panel_rows = [row for row in rows if (row.phase, row.layer, row.lora_rank) == (phase, layer, rank)]
            if panel_rows:  # none in a run that was cut short
                _draw(axes, panel_rows, styles, metric)
            lora = f", LoRA rank {rank}" if rank else ""
            axes.set_title(f"{layer}{lora}, {phase.replace('_', ' + ', 1)}", fontsize=9)
            if flat or i + 1 == len(phases):
                axes.set_xlabel("tokens", fontsize=9)
            if (i if flat else j) == 0:
                axes.set_ylabel(f"times {baseline}'s speed" if metric == "speedup" else "ms", fontsize=9)
    handles = [
        Line2D([], [], label=_label(name, rows, metric), **style)  # type: ignore[arg-type]
        for name, style in styles.items()
    ]
    drawing.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    newest = max(rows, key=lambda row: row.date)
    drawing.suptitle(
        f"{newest.gpu}, {weights_of(rows)}, torch {newest.torch}, Triton {newest.triton}, {newest.date}", fontsize=9
    )
    return drawing


def save(rows: Sequence[Row], path: Path, metric: str = "speedup") -> bool:
    """Writes the figure as a PNG, in one step; False, and no file, if the rows have no phase to draw a curve of.

    Raises:
        ValueError: as ``figure``, but for too few sizes.
        OSError: the file cannot be written.
    """
    sizes: dict[str, set[int]] = {}
    for row in rows:
        sizes.setdefault(row.phase, set()).add(row.tokens)
    if all(len(tokens) < LEAST_SIZES for tokens in sizes.values()):
        return False
    write(figure(rows, metric), path)
    return True


def write(drawing: Figure, path: Path) -> None:
    """Writes ``drawing`` as a PNG, in one step."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png")
    replace_file(path, buffer.getvalue())


def main(
    results: Annotated[Path, typer.Argument(help="A JSON file of rows.")],
    output: Annotated[Path | None, typer.Option(help="The PNG to write; default: beside the rows.")] = None,
    metric: Annotated[str, typer.Option(help="speedup (over the baseline) or ms.")] = "speedup",
) -> None:
    """Draws the rows of a results file."""
    path = output or results.with_suffix(".png")
    try:
        drawn = save(read_rows(results), path, metric)
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    if not drawn:
        typer.echo(f"Error: {results} has no phase with {LEAST_SIZES} token counts or more to draw", err=True)
        raise typer.Exit(1)
    typer.echo(f"Wrote {path}")


if __name__ == "__main__":
    typer.run(main)
