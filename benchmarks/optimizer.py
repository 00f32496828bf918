"""Measures a step of 8-bit AdamW over the adapters of a model, with bitsandbytes' kernel and with that of ``finetune``.

    python -m benchmarks.optimizer                         the adapters of Qwen3-30B-A3B, in half a minute
    python -m benchmarks.optimizer --device cpu --quick    smoke-tests the benchmark itself, writes nothing

Parameters and gradients are random, as many and as large as those that ``moe-fused finetune`` trains by default; the model
itself is only looked at on meta. Each contender has an unpaged optimizer (``adamw_8bit``) and a paged one
(``paged_adamw_8bit``):

- ``bitsandbytes``: its own optimizer, which waits for the GPU after each parameter.
- ``queued``: the same calls without the waits, as ``finetune`` makes them by default.
- ``moe_fused``: one launch for all parameters (``moe_fused/finetune/adamw.py``), as ``finetune`` makes it with
  ``MOE_FUSED_ADAMW=1``. On a CPU it is the same as ``queued``.

First all make the same steps. After these, parameters and states of ``queued`` must be those of ``bitsandbytes`` bit for
bit, and those of ``moe_fused`` but for roundings. What is measured then:

- ``ms``: a step from an idle GPU to its end, in batches that take turns.
- ``stream_ms``: the time of the stream for a step that is queued while the GPU is busy, as in training, where the backward
  pass runs meanwhile. It has the prefetches of paged states. It has the host's time only where the host waits for the GPU.
  None on a CPU.
- ``kernel_ms`` and ``launches``: the sum of all kernels and copies of a step, and their number, from a trace; on a CPU, of
  operators.
- ``host_ms``: what the host takes to queue a step.
- ``gb_per_second``: the bytes that a step must read and write, by ``stream_ms``, on a CPU by ``ms``.
- ``state_mib``: what torch has allocated for the state. ``paged_mib`` is what the GPU's used memory grew by besides.
- ``step_mib``: the most that torch allocates during a step besides.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from moe_fused.benchmark import harness
from moe_fused.benchmark.harness import MIB, Environment, MismatchError, current_environment
from moe_fused.devices import use_expandable_segments
from moe_fused.finetune import variables
from moe_fused.finetune.host import queued
from moe_fused.finetune.plan import plan_run, workload_of
from moe_fused.finetune.resolve import set_up
from moe_fused.memory import SMALLEST_8BIT, STATE_BLOCK, adapter_numels, sizes_of

from . import runner, step_trace
from .model import Model
from .models import BY_NAME
from .rows import OURS, slug, write_rows
from .training_finetune import random_options

NAME = "optimizer"
DEFAULT_MODEL = "qwen3-30b-a3b"
STOCK, QUEUED = "bitsandbytes", "queued"
IMPLEMENTATIONS = (STOCK, QUEUED, OURS)
OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit")
DTYPE = torch.bfloat16
CHECKED_STEPS, REPEATS = 3, 5
# How far the states of ``moe_fused`` may be from those of bitsandbytes: the share of codes that differ, by how many codes,
# and the relative difference of the maxima of blocks.
MOST_DIFFERING, MOST_APART, MAXIMA_APART = 0.01, 2, 0.02
# Where a code of the second moment is 0 for one and 1 for the other, their steps differ by any factor. So many parameters
# of a tensor may differ by more than roundings.
MOST_FAR = 1e-4
# How long the GPU is kept busy while a step is queued; a step of the slowest contender takes the host a third of it.
BUSY_CYCLES = 10**8
SETTINGS: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.01, "optim_bits": 8}


@dataclass(frozen=True)
class OptimizerRow:
    """A step of one contender, as the docstring of this file explains it."""

    benchmark: str
    gpu: str
    date: str
    torch: str
    triton: str
    model: str
    tensors: int
    parameters: int
    optimizer: str
    implementation: str
    ms: float
    stream_ms: float | None
    kernel_ms: float
    launches: int
    host_ms: float
    gb_per_second: float
    state_mib: float | None
    paged_mib: float | None
    step_mib: float | None


def adapters_of(model: Model, device: torch.device) -> list[int]:
    """The number of elements of each tensor that ``finetune`` trains by default."""
    plan = plan_run(set_up(random_options(device, "", None, 1), model.config(), device), plain_text=True)
    return list(adapter_numels(sizes_of(model.skeleton), workload_of(plan.run)))


def bytes_of(numels: Sequence[int]) -> int:
    """The bytes that a step must read or write: parameters and states both, gradients and codes once."""
    total = 0
    for numel in numels:
        state = 2 * numel * 4 if numel < SMALLEST_8BIT else 2 * (numel + 4 * -(-numel // STATE_BLOCK))
        total += 3 * numel * DTYPE.itemsize + 2 * state
    return total


class Contender:
    """An optimizer of its own over parameters of its own; all contenders begin with the same and share the gradients."""

    def __init__(
        self, implementation: str, optimizer: str, start: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        device = start[0].device
        self.implementation, self.optimizer = implementation, optimizer
        self.parameters = [nn.Parameter(value.clone()) for value in start]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        before, used = harness.allocated_mib(device), _used_mib(device)
        stock: Any = importlib.import_module("bitsandbytes.optim").AdamW
        kind = stock if implementation == STOCK else queued(stock)
        self._inner: Any = kind(self.parameters, is_paged=optimizer.startswith("paged"), **SETTINGS)
        if implementation == OURS:
            os.environ[variables.ADAMW] = "1"
            self._inner.allocate()
        self._inner.step()
        self.state_mib = harness.allocated_mib(device) - before
        harness.release_memory(device)
        self.paged_mib = _used_mib(device) - used - self.state_mib

    def step(self, _: int = 0) -> None:
        self._inner.step()

    def state(self) -> dict[str, Any]:
        """The states of all parameters, by their numbers."""
        state: dict[str, Any] = self._inner.state_dict()["state"]
        return state


def _used_mib(device: torch.device) -> float:
    """The memory of the GPU that is used, whoever uses it."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / MIB


def check(contenders: Mapping[str, Contender], device: torch.device) -> None:
    """Lets all make the same steps.

    Raises:
        MismatchError: a contender's parameters or states are not those of bitsandbytes.
    """
    for contender in contenders.values():
        for _ in range(CHECKED_STEPS):
            contender.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    stock = contenders[STOCK]
    for name, contender in contenders.items():
        is_near = name == OURS
        for number, (mine, theirs) in enumerate(zip(contender.parameters, stock.parameters, strict=True)):
            if not (_are_close(mine, theirs) if is_near else torch.equal(mine, theirs)):
                apart = float((mine.float() - theirs.float()).abs().max())
                raise MismatchError(f"parameter {number} of {name} is not that of {STOCK}, by up to {apart:.3g}")
        if not (_are_near if is_near else _are_equal)(contender.state(), stock.state()):
            raise MismatchError(f"the state of {name} is not that of {STOCK}")


def _are_close(mine: Tensor, theirs: Tensor) -> bool:
    """Whether almost all parameters are finite and equal but for roundings."""
    apart = (mine.float() - theirs.float()).abs()
    # A rounding of each step, and a hundredth of each step for parameters that are almost 0.
    is_near = apart <= 4 * torch.finfo(DTYPE).eps * theirs.abs() + 0.04 * SETTINGS["lr"]
    return float((~is_near).float().mean()) <= MOST_FAR and bool(mine.isfinite().all())


def _are_equal(left: Any, right: Any) -> bool:
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(_are_equal(left[name], right[name]) for name in left)
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return bool(left == right)


def _are_near(left: Mapping[Any, Any], right: Mapping[Any, Any]) -> bool:
    """Whether states of many parameters have the same entries, and are equal but for roundings."""
    entries, others = list(_entries(left)), list(_entries(right))
    if [name for name, _ in entries] != [name for name, _ in others]:
        return False
    differing, total = 0, 0
    for (_, mine), (_, other) in zip(entries, others, strict=True):
        if isinstance(mine, Tensor) and mine.dtype is torch.uint8:
            apart = (mine.to(torch.int16) - other.to(mine.device, torch.int16)).abs()
            differing, total = differing + int((apart > 0).sum()), total + apart.numel()
            is_near = int(apart.max()) <= MOST_APART
        else:
            is_near = torch.allclose(torch.as_tensor(mine), torch.as_tensor(other), rtol=MAXIMA_APART)
        if not is_near:
            return False
    return differing <= MOST_DIFFERING * total


def _entries(state: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Yields the entries of states within states."""
    for name, value in state.items():
        yield from _entries(value) if isinstance(value, Mapping) else [(name, value)]


def stream_ms(step: Callable[[], None], device: torch.device) -> float | None:
    """The time of the stream for a step that the host queues while the GPU is busy. None on a CPU."""
    if device.type != "cuda":
        return None
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def host_ms(step: Callable[[], None], device: torch.device) -> float:
    """The time that the host takes to queue a step."""
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def traced(step: Callable[[], None], device: torch.device) -> tuple[float, int]:
    """The milliseconds of all kernels of a step, and their number."""
    with step_trace.tracing(device, ranges=False) as events:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    kernels = step_trace.time_by_kernel(events).values()
    return sum(ms for ms, _ in kernels), sum(runs for _, runs in kernels)


def measure(
    model: str, numels: Sequence[int], optimizer: str, names: Sequence[str], device: torch.device, seconds: float
) -> list[OptimizerRow]:
    """The rows of one optimizer.

    Raises:
        MismatchError: a contender does not give the bits of bitsandbytes.
    """
    generator = torch.Generator(device).manual_seed(0)
    start, gradients = (
        [torch.randn(numel, device=device, dtype=DTYPE, generator=generator) for numel in numels] for _ in range(2)
    )
    contenders = {name: Contender(name, optimizer, start, gradients) for name in names}
    del start
    check(contenders, device)
    calls = {name: contender.step for name, contender in contenders.items()}
    timings = harness.time_interleaved(calls, harness.clock_for(device), seconds=seconds)
    environment = current_environment(device)
    return [_row(contenders[name], model, numels, environment, device, timings[name]) for name in names]


def _row(
    contender: Contender,
    model: str,
    numels: Sequence[int],
    environment: Environment,
    device: torch.device,
    timing: harness.Timing | None,
) -> OptimizerRow:
    if timing is None:
        raise torch.OutOfMemoryError(f"{contender.implementation} ran out of memory")
    queued_ms, (kernel_ms, launches) = stream_ms(contender.step, device), traced(contender.step, device)
    on_gpu = device.type == "cuda"
    return OptimizerRow(
        benchmark=NAME,
        **asdict(environment),
        model=model,
        tensors=len(numels),
        parameters=sum(numels),
        optimizer=contender.optimizer,
        implementation=contender.implementation,
        ms=round(timing.ms, 4),
        stream_ms=None if queued_ms is None else round(queued_ms, 4),
        kernel_ms=round(kernel_ms, 4),
        launches=launches,
        host_ms=round(host_ms(contender.step, device), 4),
        gb_per_second=round(bytes_of(numels) / 1e6 / (queued_ms or timing.ms), 4),
        state_mib=round(contender.state_mib, 2) if on_gpu else None,
        paged_mib=round(contender.paged_mib, 2) if on_gpu else None,
        step_mib=None if (peak := harness.peak_mib(contender.step, device)) is None else round(peak, 2),
    )


def results_table(rows: Sequence[OptimizerRow]) -> Table:
    """``rows``, which are of one run, for the terminal."""
    title = f"{rows[0].model}: {rows[0].tensors} tensors, {rows[0].parameters / 1e6:.0f} M parameters"
    table = Table(title=title, title_justify="left")
    for column in ("optimizer", "implementation"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "stream ms", "kernel ms", "launches", "host ms", "GB/s", "state", "paged", "step MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        times = (row.ms, row.stream_ms, row.kernel_ms, row.launches, row.host_ms, row.gb_per_second)
        sizes = (row.state_mib, row.paged_mib, row.step_mib)
        numbers = ["–" if value is None else f"{value:.4g}" for value in times]
        table.add_row(row.optimizer, row.implementation, *numbers, *("–" if s is None else f"{s:.0f}" for s in sizes))
    return table


def main(
    model_name: Annotated[str, typer.Option("--model", help="One of benchmarks.models, by its name.")] = DEFAULT_MODEL,
    optimizer: Annotated[list[str] | None, typer.Option(help="An optimizer; may be given again.")] = None,
    seconds: Annotated[float, typer.Option(help="Time per implementation and optimizer.", min=0.001)] = 1.0,
    output: Annotated[Path | None, typer.Option(help="The JSON to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model. Writes only to --output.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
) -> None:
    """Measures a step of the optimizer and writes rows under benchmarks/results, in place of those of the same GPU."""
    runner.choices("model", [model_name], tuple(BY_NAME), ())
    kinds = runner.choices("optimizer", optimizer, OPTIMIZERS, OPTIMIZERS)
    runner.check_device(device, quick)
    runner.check_output(output)
    chosen = runner.pick_device(device, "--device cpu --quick")
    if importlib.util.find_spec("bitsandbytes") is None:
        typer.echo("This benchmark needs bitsandbytes, which is not installed here", err=True)
        raise typer.Exit(2)
    use_expandable_segments()
    environment = current_environment(chosen)
    shared = runner.ROOT / "results" / f"{NAME}_{slug(environment.gpu)}.json"
    partial = quick or optimizer or model_name != DEFAULT_MODEL
    path = output or (None if partial else shared)
    console = runner.make_console()
    console.print(f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}")
    model = Model(model_name, BY_NAME[model_name].config())
    model = model.tiny() if quick else model
    numels = adapters_of(model, chosen)
    rows: list[OptimizerRow] = []
    try:
        for kind in kinds:
            rows += measure(model.name, numels, kind, IMPLEMENTATIONS, chosen, seconds)
            harness.release_memory(chosen)
        console.print(results_table(rows))
        if path is not None:
            write_rows(path, rows)
            console.print(f"Wrote {path}")
    except (MismatchError, OSError, RuntimeError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
