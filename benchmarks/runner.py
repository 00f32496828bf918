"""What every benchmark of experts does around its implementations: inputs, checks, rows, the terminal, the command line.

A ``Benchmark`` says who competes where and makes the contenders of a layer; ``command`` turns it into a command. Rows and
the plot go to ``benchmarks/results``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from moe_fused.benchmark import harness
from moe_fused.benchmark.harness import Call, MismatchError, Timing, UnavailableError, current_environment
from moe_fused.benchmark.inputs import DTYPE, Inputs
from moe_fused.benchmark.layers import FORWARD, FORWARD_CUDA_GRAPH, LAYERS, Ceilings, Layer, flops, roofline_ms
from moe_fused.integrations.quantizer import bitsandbytes_cpu

from . import plot
from .rows import BASELINES, ROOFLINE, Row, merge, new_row, read_rows, slug, write_rows

ROOT = Path(__file__).resolve().parent
GRAPH_TOKENS = (1, 8)  # beyond, the GPU takes longer than the launches
POISON_BYTES = 8 * 2**30
T = TypeVar("T")


@dataclass(frozen=True)
class Implementation:
    """One contender, and where it is not asked to compete.

    Attributes:
        forward_only: it computes no gradients.
        unavailable: says why it cannot compete on a device, or None; such a contender is left out of a run.
    """

    name: str
    weights: str = "bf16"
    most_tokens: int | None = None
    capturable: bool = True
    forward_only: bool = False
    unavailable: Callable[[torch.device], str | None] = lambda _: None

    def competes(self, tokens: int, phase: str) -> bool:
        if phase == FORWARD_CUDA_GRAPH and not self.capturable:
            return False
        if self.forward_only and phase not in (FORWARD, FORWARD_CUDA_GRAPH):
            return False
        return self.most_tokens is None or tokens <= self.most_tokens


Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps hidden_states (T, H), top_k_index (T, K) and top_k_weights (T, K) to (T, H)."""

MakeCall = Callable[[Sequence["Inputs"], str], Call]
"""``make_call(inputs, phase)``: what is timed in a phase; a call returns its results by name."""


@dataclass(frozen=True)
class Contenders:
    """The implementations of one layer, all over the same weights.

    Attributes:
        weight_bytes: the size of a weight, for the roofline.
        remark: a line for the terminal.
        expected: for implementations that compute something else than the baseline does, what they must agree with.
    """

    make_call: Mapping[str, MakeCall]
    weight_bytes: float
    remark: str = ""
    expected: Mapping[str, MakeCall] = field(default_factory=dict)


Prepare = Callable[[Layer, torch.Generator], Contenders]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of experts.

    Attributes:
        name: the ``benchmark`` of its rows, a key of ``rows.BASELINES``.
        about: what ``--help`` says.
        implementations: in the order in which tables list them.
        setup: given the names that compete, loads what they need, once; what it returns makes the contenders of a layer.
        layers, tokens, phases, lora_ranks: what is measured unless asked otherwise; there are no other phases and ranks.
        weights: how the weights are stored for which the roofline is computed.
        seconds: time per implementation and point.
        tolerance: of results, relative to their norms.
    """

    name: str
    about: str
    implementations: tuple[Implementation, ...]
    setup: Callable[[Sequence[str]], Prepare]
    layers: tuple[str, ...]
    tokens: tuple[int, ...]
    quick_tokens: tuple[int, ...]
    phases: tuple[str, ...]
    lora_ranks: tuple[int, ...] = (0,)
    weights: str = "bf16"
    seconds: float = 0.4
    tolerance: float = harness.TOLERANCE

    @property
    def baselines(self) -> tuple[str, ...]:
        """Whose times the others' are compared with; the first's results are what the others' must be."""
        return BASELINES[self.name]

    def named(self, name: str) -> Implementation:
        return next(implementation for implementation in self.implementations if implementation.name == name)


def load_kernel() -> ModuleType:
    """The kernel, as users load it: from ``moe_fused`` where that is installed, else through ``kernels``."""
    if importlib.util.find_spec("moe_fused") is not None:
        import moe_fused

        return moe_fused.get_kernel()
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    from kernels import get_kernel

    general = tomllib.loads((ROOT.parent / "build.toml").read_text(encoding="utf-8"))["general"]
    repo_id = general["hub"]["repo-id"]
    # A revision, not a version: only so does `kernels` leave the Hub alone where LOCAL_KERNELS names a build.
    return get_kernel(repo_id, revision=f"v{general['version']}", trust_remote_code=[repo_id])


def forward_call(forward: Forward, inputs: Sequence[Inputs]) -> Call:
    """``call(i)``: ``forward`` of input set ``i`` modulo their number, without gradients."""

    def call(i: int) -> dict[str, Tensor]:
        input_set = inputs[i % len(inputs)]
        with torch.no_grad():
            return {"output": forward(input_set.hidden_states, input_set.top_k_index, input_set.top_k_weights)}

    return call


@dataclass(frozen=True)
class Point:
    """What one set of comparable rows measures."""

    layer: Layer
    tokens: int
    phase: str


@dataclass(frozen=True)
class Outcome:
    """What became of an implementation at a point: a time, or the reason why there is none."""

    timing: Timing | None = None
    peak_mib: float | None = None
    problem: str | None = None
    wrong: bool = False


class Bench:
    """Measures points on one device."""

    def __init__(self, benchmark: Benchmark, device: torch.device, ceilings: Ceilings, seconds: float) -> None:
        self.benchmark = benchmark
        self.device = device
        self.ceilings = ceilings
        self.seconds = seconds
        self.environment = current_environment(device)
        self.generator = torch.Generator(device).manual_seed(0)
        self._kept: dict[str, float] = {}  # MiB that an implementation holds between calls

    def measure(
        self, point: Point, contenders: Contenders, names: Sequence[str]
    ) -> tuple[list[Row], dict[str, Outcome]]:
        """Rows of ``names`` and of the roofline at ``point``; an implementation with wrong results gets none."""
        inputs = self._inputs(point, contenders.weight_bytes)
        calls = {name: contenders.make_call[name](inputs, point.phase) for name in names}
        expected = {name: make(inputs, point.phase) for name, make in contenders.expected.items()}
        outcomes, ready = self._check(calls, expected)
        replayed = 1
        if point.phase == FORWARD_CUDA_GRAPH:
            replayed = len(inputs)
            ready = self._capture(ready, replayed, outcomes)
        timings = harness.time_interleaved(ready, harness.clock_for(self.device), seconds=self.seconds)
        for name, timing in timings.items():
            if timing is None:
                outcomes[name] = Outcome(problem="out of memory")
            else:
                outcomes[name] = Outcome(timing.divided(replayed), outcomes[name].peak_mib)
        return self._rows(point, inputs, contenders.weight_bytes, names, outcomes), outcomes

    def _inputs(self, point: Point, weight_bytes: float) -> list[Inputs]:
        layer, tokens = point.layer, point.tokens
        first = Inputs.random(layer, tokens, self.generator)
        weights = first.top_k_index.unique().numel() * layer.expert_parameters * weight_bytes
        touched = weights + 2 * tokens * layer.hidden * DTYPE.itemsize
        # Which experts few tokens choose is chance, and with it the bytes to read: an average over many choices.
        least = 16 if tokens <= 512 else 4
        count = harness.input_sets(touched, self.device, least=least)
        return [first] + [Inputs.random(layer, tokens, self.generator) for _ in range(count - 1)]

    def _check(
        self, calls: Mapping[str, Call], expected: Mapping[str, Call]
    ) -> tuple[dict[str, Outcome], dict[str, Call]]:
        """Runs each call once, which also compiles it, and once more for its memory; those to be timed come back."""
        outcomes: dict[str, Outcome] = {}
        reference: dict[str, Tensor] = {}
        # The baseline first: the others are compared with it, or with the first that works where it does not.
        for name in sorted(calls, key=lambda name: name != self.benchmark.baselines[0]):
            outcomes[name] = self._try(name, calls[name], reference, expected.get(name))
            harness.release_memory(self.device)
        return outcomes, {name: call for name, call in calls.items() if outcomes[name].problem is None}

    def _try(self, name: str, call: Call, reference: dict[str, Tensor], expected: Call | None) -> Outcome:
        """The memory of ``call``, or why it has none to report.

        Its results must be those of ``expected``, else those in ``reference``, which they fill if it is empty.
        """
        try:
            if expected is not None:
                reference, _ = harness.run_and_weigh(expected, self.device)
            harness.poison(self.device, POISON_BYTES)
            got, grown = harness.run_and_weigh(call, self.device)
            self._kept[name] = self._kept.get(name, 0.0) + grown
            # With itself: all finite.
            harness.compare(name, got, reference or got, tolerance=self.benchmark.tolerance)
            if not reference:
                reference.update(got)
            del got
            peak = harness.peak_mib(call, self.device)
            return Outcome(peak_mib=None if peak is None else peak + self._kept[name])
        except torch.OutOfMemoryError:
            return Outcome(problem="out of memory")
        except UnavailableError as error:
            return Outcome(problem=str(error))
        except MismatchError as error:
            return Outcome(problem=str(error), wrong=True)

    def _capture(self, calls: Mapping[str, Call], count: int, outcomes: dict[str, Outcome]) -> dict[str, Call]:
        """The calls as graphs of ``count`` calls each; a graph must give what the call itself gives."""
        ready: dict[str, Call] = {}
        for name, call in calls.items():
            replay, outcomes[name] = self._try_capture(name, call, count)
            if replay is not None:
                ready[name] = replay
        return ready

    def _try_capture(self, name: str, call: Call, count: int) -> tuple[Call | None, Outcome]:
        try:
            replay, got = harness.graph_of(call, count)
            for value in got.values():
                value.fill_(float("nan"))
            replay(0)
            harness.compare(f"{name} in a CUDA graph", got, call(0))
        except MismatchError as error:
            return None, Outcome(problem=str(error), wrong=True)
        except RuntimeError as error:
            return None, Outcome(problem=f"cannot be captured: {str(error).splitlines()[0]}")
        return replay, Outcome()  # its memory belongs to the graph's pool

    def _rows(
        self,
        point: Point,
        inputs: Sequence[Inputs],
        weight_bytes: float,
        names: Sequence[str],
        outcomes: Mapping[str, Outcome],
    ) -> list[Row]:
        layer, tokens, phase = point.layer, point.tokens, point.phase
        active = sum(input_set.top_k_index.unique().numel() for input_set in inputs) / len(inputs)
        operations = flops(layer, tokens, phase)

        def row(implementation: str, weights: str, ms: float | None, peak_mib: float | None = None) -> Row:
            return new_row(
                self.environment,
                benchmark=self.benchmark.name,
                layer=layer.name,
                tokens=tokens,
                implementation=implementation,
                phase=phase,
                weights=weights,
                ms=ms,
                flops=operations,
                peak_mib=peak_mib,
                lora_rank=layer.lora_rank,
            )

        rows = [
            row(
                name,
                self.benchmark.named(name).weights,
                outcome.timing.ms if outcome.timing else None,
                outcome.peak_mib,
            )
            for name, outcome in ((name, outcomes[name]) for name in names)
            if not outcome.wrong
        ]
        roofline = roofline_ms(layer, tokens, active, phase, self.ceilings, DTYPE.itemsize, weight_bytes)
        return [*rows, row(ROOFLINE, self.benchmark.weights, roofline)]


def results_table(
    benchmark: Benchmark, layer: Layer, phase: str, measured: Sequence[tuple[int, list[Row], dict[str, Outcome]]]
) -> Table:
    """What was measured of one layer and phase, for the terminal."""
    shape = f"H{layer.hidden} I{layer.intermediate} E{layer.experts} k{layer.top_k}"
    lora = f", LoRA rank {layer.lora_rank}" if layer.lora_rank else ""
    table = Table(title=f"{layer.name} ({shape}, {benchmark.weights}{lora}), {phase}", title_justify="left")
    ratios = [f"× {name}" for name in benchmark.baselines]
    for column in ("tokens", "implementation", "ms", "±", *ratios, "TFLOP/s", "of the roofline", "peak MiB"):
        table.add_column(column, justify="left" if column == "implementation" else "right", no_wrap=True)
    for tokens, rows, outcomes in measured:
        ms = {row.implementation: row.ms for row in rows}
        roofline = ms[ROOFLINE]
        for row in rows:
            if row.implementation == ROOFLINE:
                table.add_row(str(tokens), "[dim]roofline", f"[dim]{row.ms:.4g}")
                continue
            outcome = outcomes[row.implementation]
            if row.ms is None or roofline is None or outcome.timing is None:
                table.add_row(str(tokens), row.implementation, outcome.problem or "–")
                continue
            bases = [ms.get(name) for name in benchmark.baselines]
            table.add_row(
                str(tokens),
                row.implementation,
                f"{row.ms:.4g}",
                f"{outcome.timing.spread:.1%}",
                *(f"{base / row.ms:.2f}" if base else "–" for base in bases),
                f"{row.tflops:.3g}",
                f"{roofline / row.ms:.0%}",
                "–" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            )
        table.add_section()
    return table


def pick_device(name: str, smoke: str = "--device cpu --layer tiny") -> torch.device:
    """The device to time on.

    Args:
        smoke: the options that test the benchmark where there is no GPU.

    Raises:
        typer.Exit: with code 2 and one line on stderr, if there is no such device.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        typer.echo(
            f"Benchmarks need a CUDA or ROCm GPU and torch {torch.__version__} sees none; "
            f"`{smoke}` smoke-tests a benchmark itself.",
            err=True,
        )
        raise typer.Exit(2)
    return torch.device("cuda", torch.cuda.current_device())


def check_device(name: str, quick: bool = True) -> None:
    """Checks the option ``--device`` before anything touches the GPU.

    Args:
        quick: whether the model is so small that a CPU may run it.

    Raises:
        typer.BadParameter: no benchmark runs there.
    """
    if name not in ("cuda", "cpu"):
        raise typer.BadParameter(f"{name!r} is none of cuda, cpu", param_hint="--device")
    if name == "cpu" and not quick:
        raise typer.BadParameter("a CPU is only for smoke tests: give --quick", param_hint="--device")


def check_output(path: Path | None) -> None:
    """Checks the option ``--output`` before anything is measured.

    Raises:
        typer.BadParameter: nothing can be written there.
    """
    if path is None:
        return
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory, and must be a file", param_hint="--output")
    parent = next(each for each in path.absolute().parents if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "may not be written" if parent.is_dir() else "is no directory"
        raise typer.BadParameter(f"{path} cannot be written, because {parent} {reason}", param_hint="--output")


def check_gpus(device: str, number: int, option: str) -> None:
    """Checks that there are as many GPUs as ``option`` asks for; a CPU counts as any number.

    Raises:
        typer.BadParameter: there are fewer.
    """
    if device == "cuda" and number > torch.cuda.device_count():
        raise typer.BadParameter(f"this machine has {torch.cuda.device_count()} GPUs, got {number}", param_hint=option)


def in_processes(module: str, contender: str, job: Any, number: int) -> Any:
    """Runs a job of ``module`` in new processes, which torchrun starts, and returns what the first one has found.

    Args:
        module: a benchmark whose hidden option ``--job`` takes the job as JSON and writes JSON to ``--output``.
        contender: what the job is called if it fails.
        job: a dataclass.
        number: how many processes.

    Raises:
        RuntimeError: they failed; the error has the end of what they said.
    """
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number),
            "-m", f"benchmarks.{module}", "--job", json.dumps(dataclasses.asdict(job)), "--output", str(result),
        ]  # fmt: skip
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number)), **os.environ}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode or not result.is_file():
            raise RuntimeError(f"{contender} failed: {ended.stderr[-3000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def choices(option: str, given: Sequence[T] | None, known: Sequence[T], default: Sequence[T]) -> list[T]:
    for value in given or ():
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(map(str, known))}", param_hint=f"--{option}")
    return list(dict.fromkeys(given or default))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """File errors, as one line on stderr and exit code 1."""
    try:
        yield
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def _points(layers: Sequence[Layer], tokens: Sequence[int], phases: Sequence[str], device: torch.device) -> list[Point]:
    points = []
    for layer in layers:
        for phase in phases:
            graph = phase == FORWARD_CUDA_GRAPH
            if graph and device.type != "cuda":
                continue
            points += [Point(layer, t, phase) for t in tokens if not graph or t in GRAPH_TOKENS]
    return points


def _run(
    bench: Bench,
    points: Sequence[Point],
    names: Sequence[str],
    prepare: Prepare,
    console: Console,
    save: Callable[[list[Row]], None],
) -> list[str]:
    """Measures ``points``, which stand together by layer and phase, prints and saves; returns what went wrong."""
    problems: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    contenders: Contenders | None = None
    measured: list[tuple[int, list[Row], dict[str, Outcome]]] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(points))
        for i, point in enumerate(points):
            layer, phase = point.layer, point.phase
            progress.update(task, description=f"{layer.name} {phase} {point.tokens} tokens")
            if contenders is None or points[i - 1].layer != layer:
                contenders = None  # the last layer's weights go before the next one's come
                harness.release_memory(bench.device)
                contenders = prepare(layer, bench.generator)
                if contenders.remark:
                    console.print(f"{layer.name}: {contenders.remark}")
            competing = [name for name in names if bench.benchmark.named(name).competes(point.tokens, phase)]
            if competing:
                rows, outcomes = bench.measure(point, contenders, competing)
                problems += [
                    f"{layer.name} {phase} {point.tokens} tokens: {outcome.problem}"
                    for outcome in outcomes.values()
                    if outcome.wrong
                ]
                save(rows)
                measured.append((point.tokens, rows, outcomes))
            progress.advance(task)
            last = i + 1 == len(points) or (points[i + 1].layer, points[i + 1].phase) != (layer, phase)
            if last and measured:
                console.print(results_table(bench.benchmark, layer, phase, measured))
                measured.clear()
    return problems


def unavailable(benchmark: Benchmark, names: Sequence[str], device: torch.device) -> dict[str, str]:
    """Those of ``names`` that cannot compete on ``device``, with the reasons."""
    reasons = {name: benchmark.named(name).unavailable(device) for name in names}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def make_console() -> Console:
    console = Console()
    # A log has no width: 80 columns would cut names off.
    return console if console.is_terminal else Console(width=180)


def command(benchmark: Benchmark) -> Callable[..., None]:
    """The benchmark's command, for typer."""

    def main(
        layer: Annotated[list[str] | None, typer.Option(help="A layer shape; may be given again.")] = None,
        tokens: Annotated[list[int] | None, typer.Option(help="A number of tokens; may be given again.")] = None,
        implementation: Annotated[
            list[str] | None, typer.Option(help="An implementation; may be given again. Writes only to --output.")
        ] = None,
        phase: Annotated[list[str] | None, typer.Option(help="A phase; may be given again.")] = None,
        lora_rank: Annotated[list[int] | None, typer.Option(help="A rank of LoRA; may be given again.")] = None,
        output: Annotated[Path | None, typer.Option(help="The JSON to write; the plot stands beside it.")] = None,
        quick: Annotated[
            bool, typer.Option("--quick", help="A few sizes of one layer. Writes only to --output.")
        ] = False,
        seconds: Annotated[float | None, typer.Option(help="Time per implementation and point.", min=0.001)] = None,
        device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
    ) -> None:
        check_device(device)
        check_output(output)
        every = [competitor.name for competitor in benchmark.implementations]
        layers = choices("layer", layer, tuple(LAYERS), benchmark.layers[:1] if quick else benchmark.layers)
        names = choices("implementation", implementation, every, every)
        phases = choices("phase", phase, benchmark.phases, benchmark.phases)
        ranks = choices("lora-rank", lora_rank, benchmark.lora_ranks, benchmark.lora_ranks)
        adapted = [dataclasses.replace(LAYERS[name], lora_rank=rank) for name in layers for rank in ranks]
        sizes = list(dict.fromkeys(tokens or (benchmark.quick_tokens if quick else benchmark.tokens)))
        if min(sizes) < 1:
            raise typer.BadParameter(f"{min(sizes)} is not a positive number of tokens", param_hint="--tokens")
        chosen = pick_device(device)
        if chosen.type == "cpu" and layers != ["tiny"]:
            raise typer.BadParameter("a CPU is only for smoke tests: give --layer tiny", param_hint="--device")

        bitsandbytes_cpu.register()  # for smoke tests: its own kernel for CPUs is wrong at small sizes
        console = make_console()
        some = set(names) != set(every)
        absent = unavailable(benchmark, names, chosen)
        if implementation and absent:
            name, reason = next(iter(absent.items()))
            typer.echo(f"{name} cannot compete: {reason}; `--implementation` chooses others", err=True)
            raise typer.Exit(2)
        names = [name for name in names if name not in absent]
        start = time.perf_counter()
        prepare = benchmark.setup(names)
        for name, reason in absent.items():
            console.print(f"{name} does not compete: {reason}")
        if chosen.type == "cpu":
            ceilings = harness.measure_ceilings(chosen, copy_bytes=2**20, matmul_size=128, seconds=0.01)
        else:
            ceilings = harness.measure_ceilings(chosen)
        bench = Bench(benchmark, chosen, ceilings, seconds or (0.1 if quick else benchmark.seconds))
        environment = bench.environment
        # A run of some implementations only would leave points in the shared file without their rivals.
        partial = quick or some or chosen.type == "cpu"
        shared = ROOT / "results" / f"{benchmark.name.replace('_', '-')}_{slug(environment.gpu)}.json"
        path = output or (None if partial else shared)
        console.print(
            f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}; "
            f"ceilings: copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, "
            f"bf16 product {ceilings.flops_per_second / 1e12:.0f} TFLOP/s"
        )

        rows: list[Row] = []
        if path is not None:
            with one_line_errors():
                rows = read_rows(path) if path.exists() else []

        def save(new: list[Row]) -> None:
            rows[:] = merge(rows, new)
            if path is not None:
                with one_line_errors():
                    write_rows(path, rows)

        gc.freeze()  # a collection takes a quarter of a second otherwise, most of it over what the imports made
        try:
            problems = _run(bench, _points(adapted, sizes, phases, chosen), names, prepare, console, save)
        finally:
            gc.unfreeze()
        if path is not None and rows:
            picture = path.with_suffix(".png")
            with one_line_errors():
                plot.save(rows, picture)
            console.print(f"Wrote {path} and {picture}")
        console.print(f"Took {time.perf_counter() - start:.0f} s")
        for problem in problems:
            typer.echo(f"Wrong result, not timed: {problem}", err=True)
        if problems:
            raise typer.Exit(1)

    main.__doc__ = benchmark.about
    return main
