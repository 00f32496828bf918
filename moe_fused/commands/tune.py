"""``moe-fused tune``: launch configurations measured on this GPU, in a table that the kernel reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_fused.benchmark.layers import LAYERS, Layer

from .options import Traceback

if TYPE_CHECKING:
    from moe_fused.tuner.workload import Workload

_DEFAULT = LAYERS["qwen3-30b-a3b"]


def tune(
    hidden: Annotated[int | None, typer.Option(min=16, help="Hidden size.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=16, help="Intermediate size of an expert.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Number of experts.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts of a token.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Take the sizes from a model: a directory, or a name on the Hub.")
    ] = None,
    kernels: Annotated[
        str | None, typer.Option(help="Kernels to tune, as up,gemm.  [default: all that the layer uses]")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Directory of the table, or the table itself, named for the GPU as sm_90.json.")
    ] = Path("moe-fused-configs"),
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for a kernel at a height of tiles.")] = 30,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Change a table that is there; entries that are not measured stay.")
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Measure launch configurations on this GPU, by default for a layer of Qwen3-30B-A3B, and write those that are faster.

    Each better configuration is written as it is found: Ctrl-C loses nothing. MOE_FUSED_CONFIGS=DIRECTORY puts the table to
    use. Four heights of tiles, for few to many tokens, are tuned for each kernel.
    """
    del traceback  # read by console.run, which prints errors
    layer = _layer(hidden, intermediate, experts, top_k, model)

    import moe_fused
    from moe_fused.tuner.table import TableFile, table_path

    workload = open_workload(moe_fused.get_kernel(), layer)
    tuning, target = workload.tuning, workload.target
    chosen = _chosen(kernels, workload.kernels())
    path = table_path(output, tuning.table_name(target.arch))
    if path.exists() and not overwrite:
        raise FileExistsError(f"--output {path} exists: choose another path, or give --overwrite")
    table = TableFile(path, tuning)
    console = Console(stderr=True)
    console.print(
        f"{target.arch}: H{layer.hidden} I{layer.intermediate} E{layer.experts} k{layer.top_k} ({layer.name}), "
        f"{', '.join(chosen)}; at most {seconds * len(chosen) * len(tuning.BUCKETS) / 60:.0f} minutes"
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(chosen) * len(tuning.BUCKETS))
            for kernel in chosen:
                for block_m in tuning.BUCKETS:
                    progress.update(task, description=f"{kernel}, tiles of {block_m} rows")
                    _tune_one(workload, kernel, block_m, seconds, table, progress.console.print)
                    progress.advance(task)
    finally:
        # Whether or not it came to the end.
        if table.entries:
            print(f"{table.entries} faster configurations in {path}: export MOE_FUSED_CONFIGS={path.parent.resolve()}")
        else:
            print(f"nothing faster than what is in use was found; {path} was left as it is")


def _tune_one(
    workload: Workload, kernel: str, block_m: int, seconds: float, table: Any, report: Callable[[str], object]
) -> None:
    """Writes each configuration of ``kernel`` that beats the one in use."""
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
        table.add(kernel, itemsize, block_m, config)
        report(f"{kernel}, tiles of {block_m} rows: {gain:.2f} times as fast")


def open_workload(kernel: Any, layer: Layer) -> Workload:
    """The layer on this machine's GPU.

    Raises:
        RuntimeError: there is none that could be tuned.
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
        raise RuntimeError(f"tune needs compute capability 8.0 (Ampere) or newer, which {name} has not")
    return Workload(kernel, layer, device)


def _layer(
    hidden: int | None, intermediate: int | None, experts: int | None, top_k: int | None, model: str | None
) -> Layer:
    """The layer that the options describe."""
    sizes = {"--hidden": hidden, "--intermediate": intermediate, "--experts": experts, "--top-k": top_k}
    given = [name for name, value in sizes.items() if value is not None]
    if model is not None:
        if given:
            raise ValueError(f"--model has sizes of its own: leave {', '.join(given)} out, or --model")
        from moe_fused.benchmark.shapes import layer_of

        from .loading import read_config

        return layer_of(model, read_config(model))
    if not given:
        return _DEFAULT
    if hidden is None or intermediate is None or experts is None or top_k is None:
        missing = [name for name, value in sizes.items() if value is None]
        raise ValueError(f"{', '.join(given)} alone do not make a layer: give {', '.join(missing)} too, or --model")
    if top_k > experts:
        raise ValueError(f"--top-k must be at most --experts, got {top_k} of {experts}")
    return Layer("as given", hidden, intermediate, experts, top_k)


def _chosen(names: str | None, known: list[str]) -> list[str]:
    if names is None:
        return known
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise ValueError(f"--kernels must be of those that this layer uses, {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(chosen))
