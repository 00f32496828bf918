"""The command ``moe-fused tune``, which measures configurations and thresholds on this GPU and writes a table of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_fused.benchmark.layers import LAYERS, Layer
from moe_fused.locks import locked_file
from moe_fused.quantized import quantization_of

from .options import Traceback, check_finite_options, check_report, read_source

if TYPE_CHECKING:
    from moe_fused.tuner.workload import Workload

_DEFAULT = LAYERS["qwen3-30b-a3b"]


def tune(
    hidden: Annotated[int | None, typer.Option(min=16, help="Hidden size.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=16, help="Intermediate size of an expert.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Number of experts.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Number of experts for each token.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Take the sizes from a model: a directory, or a name on the Hub.")
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(
            help="Kernels to tune, such as up,gemm.  [default: all that the layer uses; none with --thresholds]"
        ),
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            help="Thresholds to measure: some of buckets,dequantize_rows,gemv_slots,few_slots.  "
            "[default: all; none with --kernels]"
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            help="Directory of the table, or the table itself, which must be named after the GPU, such as sm_90.json."
        ),
    ] = Path("moe-fused-configs"),
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Seconds to spend on a kernel at one height of tiles, and on a threshold.")
    ] = 30,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Change an existing table. Entries that are not measured stay.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write, with the GPU, the versions and what was found, to attach to an issue. "
            "It must not exist.  [default: reports/ beside the table, where the last report is replaced]"
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Measure launch configurations on this GPU, by default for a layer of Qwen3-30B-A3B, and write the faster ones.

    Four heights of tiles, for few to many tokens, are tuned for each kernel. Then the thresholds between ways
    to compute are measured: from how many rows on taller tiles are faster, up to how many rows 4-bit weights are
    dequantized inside the products, and up to how many tokens the paths for few rows are faster.

    Each improvement is written as soon as it is found, so Ctrl-C loses nothing. Set MOE_FUSED_CONFIGS=DIRECTORY to use the
    table.
    """
    del traceback  # read by console.run, which prints errors
    check_finite_options(seconds=seconds)
    if output.exists() and not output.is_dir():
        if not overwrite:
            raise FileExistsError(f"--output {output} exists: choose another path, or give --overwrite")
        if not output.suffix:
            raise FileExistsError(
                f"--output {output} exists and is neither a directory nor a table: choose another path"
            )
    check_report(report)
    layer = _layer(hidden, intermediate, experts, top_k, model)

    import moe_fused
    from moe_fused.tuner.table import TableFile, table_path

    workload = open_workload(moe_fused.get_kernel(), layer)
    tuning, target = workload.tuning, workload.target
    chosen = _chosen(workload, kernels, thresholds)
    path = table_path(output, tuning.table_name(target.arch))
    if path.exists() and not overwrite:
        raise FileExistsError(f"--output {path} exists: choose another path, or give --overwrite")
    # Two processes at once would each overwrite what the other has found.
    with locked_file(path.with_name(f".{path.name}.lock"), f"--output {path}", parents=True):
        _tune(workload, layer, chosen, seconds, TableFile(path, tuning), report or path.parent / "reports" / path.name)


@dataclass(frozen=True)
class _Chosen:
    """What is measured: kernel families, and sections of thresholds."""

    kernels: list[str]
    sections: list[str]


class _Found:
    """What was found: a table for the kernel, and rows for a report, of which the last of a kind counts.

    Args:
        table: The ``TableFile``.
    """

    def __init__(self, table: Any) -> None:
        self._table = table
        self._rows: dict[tuple[str, ...], dict[str, Any]] = {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of a report."""
        return list(self._rows.values())

    def add(self, kernel: str, itemsize: int, block_m: int, config: Any, gain: float) -> None:
        """Writes a configuration into the table, and keeps how many times as fast as the one in use it is."""
        self._table.add(kernel, itemsize, block_m, config)
        self._rows[kernel, str(block_m)] = {
            "kernel": kernel, "block_m": block_m, "config": asdict(config), "speedup": round(gain, 4)
        }  # fmt: skip

    def add_threshold(self, threshold: Any, thresholds: Any, size: int, gain: float) -> None:
        """Writes a threshold into the table, and keeps how much faster calls between it and the one in use become."""
        self._table.add_threshold(threshold.place, thresholds)
        # A slash would not pass the check of reports, which have no paths.
        name = " ".join(threshold.place)
        self._rows[("threshold", name)] = {
            "threshold": name, "size": size, "before": threshold.start, "speedup": round(gain, 4)
        }  # fmt: skip


def _tune(workload: Workload, layer: Layer, chosen: _Chosen, seconds: float, table: Any, report: Path) -> None:
    """Measures what was chosen, and says what came of it."""
    from moe_fused.tuner.thresholds import places

    results = _Found(table)
    heights = [(kernel, height) for kernel in chosen.kernels for height in workload.heights(kernel)]
    thresholds = places(workload, tuple(chosen.sections))
    steps = len(heights) + len(thresholds)
    console = Console(stderr=True)
    console.print(
        f"{workload.target.arch}: H{layer.hidden} I{layer.intermediate} E{layer.experts} k{layer.top_k} ({layer.name}), "
        f"{', '.join(chosen.kernels + chosen.sections)}; at most {seconds * steps / 60:.0f} minutes"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        # Thresholds are measured with the configurations that were found, and with each other.
        with contextlib.ExitStack() as found, Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=steps)
            for kernel, block_m in heights:
                progress.update(task, description=f"{kernel}, {_bucket(workload, kernel, block_m)}")
                _tune_one(workload, kernel, block_m, seconds, results, found, progress.console.print)
                progress.advance(task)
            for place in thresholds:
                progress.update(task, description="/".join(place))
                _move_one(workload, place, seconds, results, found, progress.console.print)
                progress.advance(task)
    finally:
        # This is reported even if the user stops the tuning early.
        _summarize(table)
        _write_report(report, workload, layer, results)


def _write_report(path: Path, workload: Workload, layer: Layer, results: _Found) -> None:
    """Writes what was found, and that nothing was: that the configurations in use are right is worth knowing, too."""
    from moe_fused.reports import new_report, write_report

    write_report(path, new_report("tune", workload.device, layer, results.rows))
    print(f"{path} has the GPU, the versions and what was found; it names neither this machine nor you")


def _summarize(table: Any) -> None:
    if not table.entries and not table.thresholds:
        print(f"nothing faster than what is in use was found; {table.path} was left as it is")
        return
    found = [f"{table.entries} faster configurations"] if table.entries else []
    found += [f"{table.thresholds} better thresholds"] if table.thresholds else []
    print(f"{' and '.join(found)} in {table.path}: export MOE_FUSED_CONFIGS={table.path.parent.resolve()}")


def _bucket(workload: Workload, kernel: str, block_m: int) -> str:
    """What a bucket of ``kernel`` is."""
    if kernel not in workload.tuning.KERNELS_FEW:
        return f"tiles of {block_m} rows"
    return f"up to {block_m} {'rows' if kernel == 'few_linear_4bit' else 'slots'}"


def _tune_one(
    workload: Workload,
    kernel: str,
    block_m: int,
    seconds: float,
    results: _Found,
    found: contextlib.ExitStack,
    report: Callable[[str], object],
) -> None:
    """Writes each configuration of ``kernel`` that beats the one in use; the last stays in force until ``found`` ends."""
    from moe_fused.tuner.search import climb, neighbours

    tuning, target, itemsize = workload.tuning, workload.target, 2
    start = tuning.launch_config(kernel, block_m, target, itemsize)
    end = time.monotonic() + seconds
    for config, gain in climb(
        start,
        lambda config: neighbours(tuning, kernel, block_m, config, target, itemsize),
        workload.measure(kernel, block_m),
        lambda: time.monotonic() >= end,
    ):
        results.add(kernel, itemsize, block_m, config, gain)
        found.enter_context(tuning.trying(kernel, block_m, itemsize, config))
        report(f"{kernel}, {_bucket(workload, kernel, block_m)}: {gain:.2f} times as fast")


def _move_one(
    workload: Workload,
    place: tuple[str, ...],
    seconds: float,
    results: _Found,
    found: contextlib.ExitStack,
    report: Callable[[str], object],
) -> None:
    """Writes each better place of a threshold; the last stays in force until ``found`` ends."""
    from moe_fused.tuner.search import crossover
    from moe_fused.tuner.thresholds import threshold_at

    tuning = workload.tuning
    threshold = threshold_at(workload, place)
    end = time.monotonic() + seconds
    for size, gain in crossover(
        threshold.start, threshold.least, threshold.most, threshold.speedup, lambda: time.monotonic() >= end
    ):
        thresholds = threshold.laid_over(tuning.thresholds_of(workload.target), size)
        results.add_threshold(threshold, thresholds, size, gain)
        found.enter_context(tuning.trying_thresholds(thresholds))
        report(
            f"{threshold.name}: {size} {threshold.unit}, not {threshold.start}; "
            f"calls between are up to {gain:.2f} times as fast"
        )


def open_workload(kernel: Any, layer: Layer) -> Workload:
    """Makes the workload of ``layer`` on this machine's GPU.

    Raises:
        RuntimeError: there is no GPU that could be tuned.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            f"tune needs the CUDA or ROCm GPU that is to be tuned for, and torch {torch.__version__} sees none here"
        )
    from moe_fused.devices import choose_device
    from moe_fused.tuner.workload import Workload

    device = choose_device("auto")
    if device.type != "cuda":
        name = torch.cuda.get_device_name()
        raise RuntimeError(f"tune needs compute capability 8.0 (Ampere) or newer, which {name} does not have")
    return Workload(kernel, layer, device)


def _layer(
    hidden: int | None, intermediate: int | None, experts: int | None, top_k: int | None, model: str | None
) -> Layer:
    """Returns the layer that the options describe."""
    sizes = {"--hidden": hidden, "--intermediate": intermediate, "--experts": experts, "--top-k": top_k}
    given = [name for name, value in sizes.items() if value is not None]
    if model is not None:
        if given:
            raise ValueError(f"--model has sizes of its own: leave {', '.join(given)} out, or --model")
        read_source("--model", model, "config.json")
        from moe_fused.benchmark.shapes import layer_of

        from .loading import read_config

        config = read_config(model, "--model")
        found = quantization_of(config)
        if found is not None and found.quant_type != "nf4":
            print(
                f"note: 4-bit weights are measured in nf4, not in {found.quant_type} as --model has them, because a table "
                "serves all formats"
            )
        return layer_of(model, config)
    if not given:
        return _DEFAULT
    if hidden is None or intermediate is None or experts is None or top_k is None:
        missing = ", ".join(name for name, value in sizes.items() if value is None)
        verb = "do" if len(given) > 1 else "does"
        raise ValueError(f"{', '.join(given)} {verb} not make a layer alone: give {missing} too, or --model")
    if top_k > experts:
        raise ValueError(f"--top-k must be at most --experts, got {top_k} of {experts}")
    return Layer("as given", hidden, intermediate, experts, top_k)


def _chosen(workload: Workload, kernels: str | None, thresholds: str | None) -> _Chosen:
    """What ``--kernels`` and ``--thresholds`` name: all without them, and with one of them only what it names."""
    from moe_fused.tuner.thresholds import SECTIONS

    known = workload.kernels()
    chosen = _names("--kernels", "those that this layer uses", kernels, known, thresholds is None)
    sections = _names("--thresholds", "those that there are", thresholds, list(SECTIONS), kernels is None)
    return _Chosen(chosen, sections)


def _names(option: str, which: str, given: str | None, known: list[str], otherwise: bool) -> list[str]:
    if given is None:
        return known if otherwise else []
    chosen = [name.strip() for name in given.split(",")]
    for name in chosen:
        if name not in known:
            raise ValueError(f"{option} must be of {which}, {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(chosen))
