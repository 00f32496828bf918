"""Writes benchmark rows into a Markdown file as tables, so that nobody types a number by hand.

    python -m benchmarks.table README.md            renews the tables
    python -m benchmarks.table README.md --check    fails if a table is not what its rows say

A table stands between two comments. The first comment names the file of rows, relative to the Markdown file, and may
select rows by key. The script replaces everything between the two comments:

    <!-- rows: benchmarks/results/experts_h100-80gb-hbm3.json layer=qwen3-30b-a3b -->
    <!-- rows end -->

The plot that lies beside the file of rows follows the table. A file that does not exist yet gives "Not measured yet."
With ``view=summary`` the rows of the fine-tuning benchmark become one small table, without the plot: wall time beside
GPU time, and peak memory, with the implementations named in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer

from moe_fused.staging import replace_file

from .rows import EAGER, FINETUNING_LABELS, KEYS, OURS, ROOFLINE, Row, baselines_of, read_rows, weights_of

_BEGIN = re.compile(r"<!-- rows: (?P<file>\S+)(?P<filters>(?: \S+=\S+)*) -->")
_END = "<!-- rows end -->"
_VIEW = "view"
_SUMMARY = "summary"
_TITLES = {
    "forward": "forward",
    "forward_backward": "forward + backward",
    "forward_cuda_graph": "forward in a CUDA graph",
    "recompute": "forward + backward with recomputation",
    "train_step": "a training step",
}
# Details that the tables show for our implementations and for the baseline: title, keys, form.
_DETAILS = (
    ("tokens/s", ("tokens_per_second",), "{:,.0f}"),
    ("GPU busy", ("gpu_busy",), "{:.0%}"),
    (
        "GPU time by part, ms: experts + attention + loss + optimizer + rest",
        ("experts_ms", "attention_ms", "loss_ms", "optimizer_ms", "other_ms"),
        "{:.0f}",
    ),
)
# Details that the tables show for our main implementation alone.
_OUR_DETAILS = (
    ("model FLOP utilization", ("mfu",), "{:.0%}"),
    (
        "memory by part, MiB: weights + adapters and optimizer + the rest",
        ("weights_mib", "training_mib", "transient_mib"),
        "{:.0f}",
    ),
    ("predicted peak MiB", ("predicted_mib",), "{:.0f}"),
)


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
    if baseline is None or baseline.ms is None or row.implementation in (baseline.implementation, ROOFLINE):
        return _ms(row.ms)
    text = f"{_ms(row.ms)} ({_ratio(row, baseline)})"
    return f"**{text}**" if row.implementation == OURS else text


def _ratio(row: Row | None, baseline: Row | None) -> str:
    return f"{baseline.ms / row.ms:.2f}×" if row and row.ms and baseline and baseline.ms else ""


def _share(row: Row | None, roofline: Row | None) -> str:
    return f"{roofline.ms / row.ms:.0%}" if row and row.ms and roofline and roofline.ms else ""


def _peak(row: Row | None, baseline: Row | None) -> str:
    if row is None or row.peak_mib is None:
        return ""
    if (
        row is baseline or baseline is None or not baseline.peak_mib or baseline.peak_mib < 1
    ):  # a share of next to nothing
        return f"{row.peak_mib:.0f}"
    return f"{row.peak_mib:.0f} ({row.peak_mib / baseline.peak_mib:.0%})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


_GPU_MS = "gpu_busy_ms"


def _gpu_ratio(row: Row | None, baseline: Row | None) -> str:
    """How many times the baseline's GPU time is the row's, empty where either lacks it."""
    if row is None or baseline is None or _GPU_MS not in row.details or _GPU_MS not in baseline.details:
        return ""
    return f"{baseline.details[_GPU_MS] / row.details[_GPU_MS]:.2f}×"


def _gpu_cell(row: Row | None, baseline: Row | None) -> str:
    """The time of a step in which the GPU ran a kernel, with the speed over the baseline's."""
    text = _details(row, (_GPU_MS,), "{:.0f}")
    ratio = "" if row is baseline else _gpu_ratio(row, baseline)
    return f"{text} ({ratio})" if text and ratio else text


def _details(row: Row | None, keys: Sequence[str], form: str) -> str:
    if row is None or any(key not in row.details for key in keys):
        return ""
    return " + ".join(form.format(row.details[key]) for key in keys)


def _place(name: str) -> tuple[bool, bool, bool]:
    """Sorts ours first, ours without CUDA graphs second and the floor last."""
    return name == ROOFLINE, name != OURS, name != EAGER


def _phase_table(rows: Sequence[Row]) -> list[str]:
    """The table of one layer and phase: times by implementation and size, then ratios, memory and further details."""
    baseline, *others = baselines_of(rows)
    by_key = {(row.implementation, row.tokens): row for row in rows}
    sizes = sorted({row.tokens for row in rows})
    names = sorted(_ordered(row.implementation for row in rows), key=_place)
    lines = [
        _line([f"{_TITLES.get(rows[0].phase, rows[0].phase)}, ms", *(f"T={t}" for t in sizes)]),
        _line(["---", *("---:" for _ in sizes)]),
    ]
    lines += [
        _line([name, *(_cell(by_key.get((name, t)), by_key.get((baseline, t))) for t in sizes)]) for name in names
    ]
    for other in others:
        if OURS in names and other in names:
            ratios = [_ratio(by_key.get((OURS, t)), by_key.get((other, t))) for t in sizes]
            lines.append(_line([f"{OURS}, speed over {other}'s", *ratios]))
    if OURS in names and ROOFLINE in names:
        shares = [_share(by_key.get((OURS, t)), by_key.get((ROOFLINE, t))) for t in sizes]
        lines.append(_line([f"{OURS}, share of the roofline reached", *shares]))
    for name in names:
        cells = [_gpu_cell(by_key.get((name, t)), by_key.get((baseline, t))) for t in sizes]
        if any(cells):
            lines.append(_line([f"{name}, GPU time, ms", *cells]))
    for name in (OURS, EAGER, baseline, *others):
        peaks = [_peak(by_key.get((name, t)), by_key.get((baseline, t))) for t in sizes]
        if any(peaks):
            lines.append(_line([f"{name}, peak MiB", *peaks]))
    for name, details in ((OURS, _DETAILS + _OUR_DETAILS), (EAGER, _DETAILS), (baseline, _DETAILS)):
        for title, keys, form in details:
            cells = [_details(by_key.get((name, t)), keys, form) for t in sizes]
            if any(cells):
                lines.append(_line([f"{name}, {title}", *cells]))
    return lines


def render(rows: Sequence[Row]) -> str:
    """Markdown tables of ``rows``, one a layer and phase.

    Raises:
        ValueError: no rows, or rows of several benchmarks.
    """
    if not rows:
        raise ValueError("rows must hold at least one row to make a table of, got none")
    blocks: list[str] = []
    baseline = baselines_of(rows)[0]
    legend = (
        f"Numbers in brackets are speed and peak relative to {baseline}. A dash means that the implementation ran out of "
        "memory or could not run."
    )
    for gpu, layer, rank in dict.fromkeys((row.gpu, row.layer, row.lora_rank) for row in rows):
        group = [row for row in rows if (row.gpu, row.layer, row.lora_rank) == (gpu, layer, rank)]
        lora = f", LoRA rank {rank}" if rank else ""
        blocks.append(f"**{layer}**, {weights_of(group)}{lora} on {gpu} ({_runs(group)}). {legend}")
        phases = _ordered(row.phase for row in group)
        blocks += ["\n".join(_phase_table([row for row in group if row.phase == phase])) for phase in phases]
    return "\n\n".join(blocks)


def _runs(rows: Sequence[Row]) -> str:
    """The versions and dates of the runs that measured ``rows``."""
    return "; ".join(_ordered(f"torch {row.torch}, Triton {row.triton}, {row.date}" for row in rows))


def summary(rows: Sequence[Row]) -> str:
    """The rows of the fine-tuning benchmark as one small table that names the implementations in words.

    Raises:
        ValueError: rows that have no label in words, or rows of several GPUs, layers or ranks.
    """
    if len({(row.gpu, row.layer, row.lora_rank, row.phase) for row in rows}) != 1:
        raise ValueError("a summary must be of one GPU, layer, rank and phase")
    names = sorted(_ordered(row.implementation for row in rows), key=_place)
    if unknown := set(names) - FINETUNING_LABELS.keys():
        raise ValueError(f"a summary must be of {', '.join(FINETUNING_LABELS)}, got {', '.join(sorted(unknown))}")
    (baseline,) = baselines_of(rows)
    by_key = {(row.implementation, row.tokens): row for row in rows}
    sizes = sorted({row.tokens for row in rows})

    def line(title: str, cell: Callable[[Row | None], str], name: str) -> str:
        return _line([title, *(cell(by_key.get((name, tokens))) for tokens in sizes)])

    def ratio(row: Row | None) -> str:
        base = None if row is None else by_key.get((baseline, row.tokens))
        wall, gpu = _ratio(row, base), _gpu_ratio(row, base)
        return f"**{wall}** ({gpu})" if wall and gpu else wall

    lines = [
        _line(["tokens in a step", *map(str, sizes)]),
        _line(["---", *("---:" for _ in sizes)]),
        *(line(f"{FINETUNING_LABELS[name]}, ms of a step (of GPU time)", _wall_and_gpu, name) for name in names),
        *(
            line(f"{FINETUNING_LABELS[name]}, speed over “{FINETUNING_LABELS[baseline]}” (by GPU time)", ratio, name)
            for name in names
            if name in (OURS, EAGER)
        ),
        *(line(f"{FINETUNING_LABELS[name]}, peak GiB", _gib, name) for name in names),
    ]
    return f"Measured on {rows[0].gpu} ({_runs(rows)}):\n\n" + "\n".join(lines)


def _wall_and_gpu(row: Row | None) -> str:
    if row is None:
        return ""
    if row.ms is None:
        return "–"
    gpu = _details(row, (_GPU_MS,), "{:.0f}")
    return _ms(row.ms) + (f" ({gpu})" if gpu else "")


def _gib(row: Row | None) -> str:
    return "" if row is None or row.peak_mib is None else f"{row.peak_mib / 1024:.1f}"


def _selected(rows: Sequence[Row], filters: str) -> list[Row]:
    chosen = list(rows)
    for item in filters.split():
        key, _, value = item.partition("=")
        if item == f"{_VIEW}={_SUMMARY}":
            continue
        if key not in KEYS:
            raise ValueError(f"a table's filter must be one of {', '.join(KEYS)}, got {key!r}")
        chosen = [row for row in chosen if str(getattr(row, key)) == value]
    if not chosen:
        raise ValueError(f"no row fits the filters {filters.strip()!r}")
    return chosen


def _block(file: str, filters: str, directory: Path) -> str:
    """The text between two markers: the tables of the rows in ``file``, and the plot beside it if there is one."""
    path = directory / file
    if not path.exists():
        return "Not measured yet."
    rows = _selected(read_rows(path), filters)
    if f"{_VIEW}={_SUMMARY}" in filters.split():
        return summary(rows)
    blocks = [render(rows)]
    if path.with_suffix(".png").exists():
        picture = PurePosixPath(file).with_suffix(".png")
        blocks.append(f"![Speed-up over {baselines_of(rows)[0]} by number of tokens]({picture})")
    return "\n\n".join(blocks)


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
        block = _block(match["file"], match["filters"], directory)
        parts += [text[position : match.end()], "\n\n", block, "\n\n"]
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
