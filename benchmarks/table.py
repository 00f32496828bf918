"""Writes benchmark rows into a Markdown file as tables, so that no number in it is ever typed.

    python -m benchmarks.table README.md            renews the tables
    python -m benchmarks.table README.md --check    fails if a table is not what its rows say

A table stands between two comments, of which the first names the rows' file, relative to the Markdown file, and may
narrow the rows down by key; what is between them is replaced:

    <!-- rows: benchmarks/results/experts_h100-80gb-hbm3.json layer=qwen3-30b-a3b -->
    <!-- rows end -->
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from .rows import FLOOR, KEYS, Row, read_rows, replace_file

BASELINE = "grouped_mm"
OURS = "moe_fused"
_BEGIN = re.compile(r"<!-- rows: (?P<file>\S+)(?P<filters>(?: \S+=\S+)*) -->")
_END = "<!-- rows end -->"
_TITLES = {
    "forward": "forward",
    "forward_backward": "forward + backward",
    "forward_cuda_graph": "forward in a CUDA graph",
}

_LEGEND = f"In brackets: speed over {BASELINE}'s; –: out of memory or could not run."


def _ordered(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _ms(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.{2 if value < 10 else 1}f}" if value >= 1 else f"{value:.3f}"


def _cell(row: Row | None, baseline: Row | None) -> str:
    if row is None:
        return ""
    if row.ms is None:
        return "–"
    if baseline is None or baseline.ms is None or row.implementation in (BASELINE, FLOOR):
        return _ms(row.ms)
    text = f"{_ms(row.ms)} ({baseline.ms / row.ms:.2f}×)"
    return f"**{text}**" if row.implementation == OURS else text


def _share(row: Row | None, floor: Row | None) -> str:
    return f"{floor.ms / row.ms:.0%}" if row and row.ms and floor and floor.ms else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _phase_table(rows: Sequence[Row]) -> list[str]:
    """One layer and phase: times by implementation and size, then the memory of ours and the baseline."""
    by_key = {(row.implementation, row.tokens): row for row in rows}
    sizes = sorted({row.tokens for row in rows})
    names = sorted(_ordered(row.implementation for row in rows), key=lambda name: (name == FLOOR, name != OURS))
    lines = [
        _line([f"{_TITLES.get(rows[0].phase, rows[0].phase)}, ms", *(f"T={t}" for t in sizes)]),
        _line(["---", *("---:" for _ in sizes)]),
    ]
    lines += [
        _line([name, *(_cell(by_key.get((name, t)), by_key.get((BASELINE, t))) for t in sizes)]) for name in names
    ]
    if (OURS in names) and (FLOOR in names):
        shares = [_share(by_key.get((OURS, t)), by_key.get((FLOOR, t))) for t in sizes]
        lines.append(_line([f"{OURS}, share of the floor reached", *shares]))
    for name in (OURS, BASELINE):
        peaks = [row.peak_mib if (row := by_key.get((name, t))) else None for t in sizes]
        if any(peak is not None for peak in peaks):
            lines.append(_line([f"{name}, peak MiB", *("" if peak is None else f"{peak:.0f}" for peak in peaks)]))
    return lines


def render(rows: Sequence[Row]) -> str:
    """Markdown tables of ``rows``, one a layer, kind of weights and phase.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one row to make a table of, got none")
    blocks: list[str] = []
    groups = list(dict.fromkeys((row.gpu, row.layer, row.weights, row.lora_rank) for row in rows))
    for gpu, layer, weights, rank in groups:
        own = [row for row in rows if (row.gpu, row.layer, row.weights, row.lora_rank) == (gpu, layer, weights, rank)]
        runs = "; ".join(_ordered(f"torch {row.torch}, Triton {row.triton}, {row.date}" for row in own))
        lora = f", LoRA rank {rank}" if rank else ""
        blocks.append(f"**{layer}**, {weights}{lora} on {gpu} ({runs}). {_LEGEND}")
        phases = _ordered(row.phase for row in own)
        blocks += ["\n".join(_phase_table([row for row in own if row.phase == phase])) for phase in phases]
    return "\n\n".join(blocks)


def _selected(rows: Sequence[Row], filters: str) -> list[Row]:
    chosen = list(rows)
    for item in filters.split():
        key, _, value = item.partition("=")
        if key not in KEYS:
            raise ValueError(f"a table's filter must be one of {', '.join(KEYS)}, got {key!r}")
        chosen = [row for row in chosen if str(getattr(row, key)) == value]
    if not chosen:
        raise ValueError(f"no row fits the filters {filters.strip()!r}")
    return chosen


def renewed(text: str, directory: Path) -> str:
    """``text`` with every table between markers made anew from the rows it names, relative to ``directory``.

    Raises:
        ValueError: no markers, a begin without an end, or rows that cannot be read.
        OSError: a file of rows that cannot be opened.
    """
    parts: list[str] = []
    position = 0
    while match := _BEGIN.search(text, position):
        end = text.find(_END, match.end())
        next_begin = _BEGIN.search(text, match.end())
        if end < 0 or (next_begin and next_begin.start() < end):
            raise ValueError(f"{match.group(0)!r} has no {_END!r} after it")
        rows = _selected(read_rows(directory / match["file"]), match["filters"])
        parts += [text[position : match.end()], "\n\n", render(rows), "\n\n"]
        position = end
    if position == 0:
        raise ValueError("there is no '<!-- rows: FILE -->' in it to put a table after")
    return "".join(parts) + text[position:]


def main(
    document: Annotated[Path, typer.Argument(help="The Markdown file with the markers.")] = Path("README.md"),
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if the tables are out of date.")] = False,
) -> None:
    """Renews the benchmark tables of a Markdown file from their rows."""
    try:
        text = document.read_text(encoding="utf-8")
        new = renewed(text, document.parent)
        if new == text:
            typer.echo(f"{document} is up to date")
            return
        if check:
            typer.echo(f"Error: the tables of {document} are not those of their rows: run it without --check", err=True)
            raise typer.Exit(1)
        replace_file(document, new.encode())
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {document}: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"Renewed the tables of {document}")


if __name__ == "__main__":
    typer.run(main)
