"""Times the experts of a mixture-of-experts layer: ours against those of Transformers, on the same weights and inputs.

    python -m benchmarks.experts            everything, within 6 minutes on an H100 (`make bench`)
    python -m benchmarks.experts --quick    three sizes of one layer, writes nothing

Every implementation is one that Transformers' own ``Qwen3MoeExperts`` dispatches to, called through that module as a
model calls it: ``grouped_mm`` (its default), ``batched_mm``, ``eager``, and the kernel's ``moe_experts``, registered
beside them. ``forward`` runs without gradients; ``forward_backward`` gives the gradients of the tokens, the routing
weights and both weights, freshly allocated; ``forward_cuda_graph`` replays a graph of forwards, which takes the CPU out
of the picture.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from . import harness, plot
from .harness import Call, MismatchError, Timing, current_environment
from .layers import (
    DEFAULT_LAYERS,
    FORWARD_BACKWARD,
    FORWARD_CUDA_GRAPH,
    LAYERS,
    PHASES,
    Ceilings,
    Layer,
    floor_ms,
    flops,
)
from .rows import FLOOR, Row, merge, read_rows, slug, write_rows

BENCHMARK = "experts"
BASELINE = "grouped_mm"
ROOT = Path(__file__).resolve().parent
DTYPE = torch.bfloat16
DEFAULT_TOKENS = (1, 8, 32, 128, 512, 2048, 4096, 16384)
QUICK_TOKENS = (1, 512, 4096)
GRAPH_TOKENS = (1, 8)  # beyond, the GPU takes longer than the launches
POISON_BYTES = 8 * 2**30
# Our implementation's name in Transformers' table: not "moe_fused", which is the integration's to register.
REGISTERED_NAME = "moe_fused_benchmark"


@dataclass(frozen=True)
class Implementation:
    """One contender, and where it is not asked to compete."""

    name: str
    registered_as: str
    most_tokens: int | None = None
    capturable: bool = True

    def competes(self, tokens: int, phase: str) -> bool:
        if phase == FORWARD_CUDA_GRAPH and not self.capturable:
            return False
        return self.most_tokens is None or tokens <= self.most_tokens


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation("moe_fused", REGISTERED_NAME),
        Implementation("grouped_mm", "grouped_mm"),
        # Copies the weights of every routed row: 2.4 GB at 32 tokens of Qwen3-30B-A3B.
        Implementation("batched_mm", "batched_mm", most_tokens=64),
        # A Python loop over experts that waits for the GPU in each.
        Implementation("eager", "eager", most_tokens=512, capturable=False),
    )
}


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


def register_kernel(kernel: ModuleType) -> None:
    """Lets Transformers' experts dispatch to ``kernel.moe_experts``: all implementations take the same way in."""

    def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y: Tensor = kernel.moe_experts(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)
        return y

    ALL_EXPERTS_FUNCTIONS.register(REGISTERED_NAME, experts_forward)


@dataclass(frozen=True)
class Inputs:
    """One input set of a layer, the output's gradient included."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    grad_output: Tensor

    @classmethod
    def random(cls, layer: Layer, tokens: int, generator: torch.Generator) -> Inputs:
        """Normal tokens, routed as a router with random logits does; the weights of a token sum to one."""
        device = generator.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

        weights, index = torch.topk(normal(tokens, layer.experts).softmax(-1), layer.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(DTYPE)
        x = normal(tokens, layer.hidden).to(DTYPE)
        return cls(x.requires_grad_(), index, weights.requires_grad_(), normal(tokens, layer.hidden).to(DTYPE))


def make_experts(
    layer: Layer, implementations: Sequence[Implementation], generator: torch.Generator
) -> dict[str, Qwen3MoeExperts]:
    """Transformers' experts by implementation name, all over the same two random weights."""
    device = generator.device

    def weight(*shape: int) -> nn.Parameter:
        values = torch.randn(*shape, generator=generator, device=device, dtype=DTYPE)
        return nn.Parameter(values.mul_(shape[-1] ** -0.5))  # keeps the outputs near unit size

    gate_up = weight(layer.experts, 2 * layer.intermediate, layer.hidden)
    down = weight(layer.experts, layer.hidden, layer.intermediate)
    experts: dict[str, Qwen3MoeExperts] = {}
    for implementation in implementations:
        config = Qwen3MoeConfig(
            hidden_size=layer.hidden,
            moe_intermediate_size=layer.intermediate,
            num_experts=layer.experts,
            num_experts_per_tok=layer.top_k,
            hidden_act="silu",
        )
        config._experts_implementation = implementation.registered_as
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        module.gate_up_proj, module.down_proj = gate_up, down
        experts[implementation.name] = module
    return experts


def make_call(module: Qwen3MoeExperts, inputs: Sequence[Inputs], phase: str) -> Call:
    """``call(i)``: one pass over input set ``i`` modulo their number; returns the results by name."""

    def forward(i: int) -> dict[str, Tensor]:
        own = inputs[i % len(inputs)]
        with torch.no_grad():
            return {"output": module(own.hidden_states, own.top_k_index, own.top_k_weights)}

    weights = (module.gate_up_proj, module.down_proj)

    def forward_backward(i: int) -> dict[str, Tensor]:
        own = inputs[i % len(inputs)]
        y = module(own.hidden_states, own.top_k_index, own.top_k_weights)
        x, w, up, down = torch.autograd.grad(y, (own.hidden_states, own.top_k_weights, *weights), own.grad_output)
        return {"output": y, "hidden_states.grad": x, "top_k_weights.grad": w, "gate_up.grad": up, "down.grad": down}

    return forward_backward if phase == FORWARD_BACKWARD else forward


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

    def __init__(self, device: torch.device, ceilings: Ceilings, seconds: float) -> None:
        self.device = device
        self.ceilings = ceilings
        self.seconds = seconds
        self.environment = current_environment(device)
        self.generator = torch.Generator(device).manual_seed(0)

    def measure(
        self, point: Point, experts: Mapping[str, Qwen3MoeExperts], names: Sequence[str]
    ) -> tuple[list[Row], dict[str, Outcome]]:
        """Rows of ``names`` and of the floor at ``point``; an implementation with wrong results gets none."""
        inputs = self._inputs(point)
        calls = {name: make_call(experts[name], inputs, point.phase) for name in names}
        outcomes, ready = self._check(calls)
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
        return self._rows(point, inputs, names, outcomes), outcomes

    def _inputs(self, point: Point) -> list[Inputs]:
        layer, tokens = point.layer, point.tokens
        first = Inputs.random(layer, tokens, self.generator)
        touched = first.top_k_index.unique().numel() * layer.expert_parameters + 2 * tokens * layer.hidden
        # Which experts few tokens choose is chance, and with it the bytes to read: an average over many choices.
        least = 16 if tokens <= 512 else 4
        count = harness.input_sets(touched * DTYPE.itemsize, self.device, least=least)
        return [first] + [Inputs.random(layer, tokens, self.generator) for _ in range(count - 1)]

    def _check(self, calls: Mapping[str, Call]) -> tuple[dict[str, Outcome], dict[str, Call]]:
        """Runs each call once, which also compiles it, and once more for its memory; those to be timed come back."""
        outcomes: dict[str, Outcome] = {}
        reference: dict[str, Tensor] = {}
        # The baseline first: the others are compared with it, or with the first that works where it does not.
        for name in sorted(calls, key=lambda name: name != BASELINE):
            outcomes[name] = self._try(name, calls[name], reference)
            harness.release_memory(self.device)
        return outcomes, {name: call for name, call in calls.items() if outcomes[name].problem is None}

    def _try(self, name: str, call: Call, reference: dict[str, Tensor]) -> Outcome:
        """The memory of ``call``, or why it has none to report; its results become an empty ``reference``."""
        try:
            harness.poison(self.device, POISON_BYTES)
            got = call(0)
            harness.compare(name, got, reference or got)  # with itself: all finite
            if not reference:
                reference.update(got)
            del got
            return Outcome(peak_mib=harness.peak_mib(call, self.device))
        except torch.OutOfMemoryError:
            return Outcome(problem="out of memory")
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
        self, point: Point, inputs: Sequence[Inputs], names: Sequence[str], outcomes: Mapping[str, Outcome]
    ) -> list[Row]:
        layer, tokens, phase = point.layer, point.tokens, point.phase
        active = sum(own.top_k_index.unique().numel() for own in inputs) / len(inputs)
        operations = flops(layer, tokens, phase)

        def row(implementation: str, ms: float | None, peak_mib: float | None = None) -> Row:
            return self.environment.row(
                benchmark=BENCHMARK,
                layer=layer.name,
                tokens=tokens,
                implementation=implementation,
                phase=phase,
                weights="bf16",
                ms=ms,
                flops=operations,
                peak_mib=peak_mib,
            )

        rows = [
            row(name, outcome.timing.ms if outcome.timing else None, outcome.peak_mib)
            for name, outcome in ((name, outcomes[name]) for name in names)
            if not outcome.wrong
        ]
        return [*rows, row(FLOOR, floor_ms(layer, tokens, active, phase, self.ceilings, DTYPE.itemsize))]


def results_table(layer: Layer, phase: str, measured: Sequence[tuple[int, list[Row], dict[str, Outcome]]]) -> Table:
    """What was measured of one layer and phase, for the terminal."""
    shape = f"H{layer.hidden} I{layer.intermediate} E{layer.experts} k{layer.top_k}"
    table = Table(title=f"{layer.name} ({shape}, bf16), {phase}", title_justify="left")
    for column in ("tokens", "implementation", "ms", "±", f"× {BASELINE}", "TFLOP/s", "of the floor", "peak MiB"):
        table.add_column(column, justify="left" if column == "implementation" else "right", no_wrap=True)
    for tokens, rows, outcomes in measured:
        ms = {row.implementation: row.ms for row in rows}
        floor, base = ms[FLOOR], ms.get(BASELINE)
        for row in rows:
            own = row.ms
            if row.implementation == FLOOR:
                table.add_row(str(tokens), "[dim]floor", f"[dim]{own:.4g}", "", "", "", "", "")
                continue
            outcome = outcomes[row.implementation]
            if own is None or floor is None or outcome.timing is None:
                table.add_row(str(tokens), row.implementation, outcome.problem or "–", "", "", "", "", "")
                continue
            table.add_row(
                str(tokens),
                row.implementation,
                f"{own:.4g}",
                f"{outcome.timing.spread:.1%}",
                f"{base / own:.2f}" if base else "–",
                f"{row.tflops:.3g}",
                f"{floor / own:.0%}",
                "–" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            )
        table.add_section()
    return table


def pick_device(name: str) -> torch.device:
    """The device to time on.

    Raises:
        typer.Exit: with code 2 and one line on stderr, if there is no such device.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        typer.echo(
            f"The experts benchmark needs a CUDA or ROCm GPU and torch {torch.__version__} sees none; "
            "`--device cpu --layer tiny` smoke-tests the benchmark itself.",
            err=True,
        )
        raise typer.Exit(2)
    return torch.device("cuda", torch.cuda.current_device())


def _choices(option: str, given: Sequence[str] | None, known: Sequence[str], default: Sequence[str]) -> list[str]:
    for value in given or ():
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=f"--{option}")
    return list(dict.fromkeys(given or default))


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """File errors, as one line on stderr and exit code 1."""
    try:
        yield
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def _points(layers: Sequence[str], tokens: Sequence[int], phases: Sequence[str], device: torch.device) -> list[Point]:
    points = []
    for layer in layers:
        for phase in phases:
            graph = phase == FORWARD_CUDA_GRAPH
            if graph and device.type != "cuda":
                continue
            points += [Point(LAYERS[layer], t, phase) for t in tokens if not graph or t in GRAPH_TOKENS]
    return points


def _run(
    bench: Bench,
    points: Sequence[Point],
    names: Sequence[str],
    console: Console,
    save: Callable[[list[Row]], None],
) -> list[str]:
    """Measures ``points``, which stand together by layer and phase, prints and saves; returns what went wrong."""
    problems: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    experts: dict[str, Qwen3MoeExperts] = {}
    measured: list[tuple[int, list[Row], dict[str, Outcome]]] = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(points))
        for i, point in enumerate(points):
            layer, phase = point.layer, point.phase
            progress.update(task, description=f"{layer.name} {phase} {point.tokens} tokens")
            if i == 0 or points[i - 1].layer != layer:
                experts.clear()
                harness.release_memory(bench.device)
                experts.update(make_experts(layer, [IMPLEMENTATIONS[name] for name in names], bench.generator))
            competing = [name for name in names if IMPLEMENTATIONS[name].competes(point.tokens, phase)]
            if competing:
                rows, outcomes = bench.measure(point, experts, competing)
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
                console.print(results_table(layer, phase, measured))
                measured.clear()
    return problems


def main(
    layer: Annotated[list[str] | None, typer.Option(help="A layer shape; may be given again.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="A number of tokens; may be given again.")] = None,
    implementation: Annotated[
        list[str] | None, typer.Option(help="An implementation; may be given again. Writes only to --output.")
    ] = None,
    phase: Annotated[list[str] | None, typer.Option(help="A phase; may be given again.")] = None,
    output: Annotated[Path | None, typer.Option(help="The JSON to write; the plot stands beside it.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few sizes of one layer. Writes only to --output.")] = False,
    seconds: Annotated[float | None, typer.Option(help="Time per implementation and point.", min=0.001)] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
) -> None:
    """Times MoE experts against those of Transformers and writes rows and a plot under benchmarks/results."""
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"{device!r} is none of cuda, cpu", param_hint="--device")
    layers = _choices("layer", layer, tuple(LAYERS), DEFAULT_LAYERS[:1] if quick else DEFAULT_LAYERS)
    names = _choices("implementation", implementation, tuple(IMPLEMENTATIONS), tuple(IMPLEMENTATIONS))
    phases = _choices("phase", phase, PHASES, PHASES)
    sizes = list(dict.fromkeys(tokens or (QUICK_TOKENS if quick else DEFAULT_TOKENS)))
    if min(sizes) < 1:
        raise typer.BadParameter(f"{min(sizes)} is not a positive number of tokens", param_hint="--tokens")
    chosen = pick_device(device)
    if chosen.type == "cpu" and layers != ["tiny"]:
        raise typer.BadParameter("a CPU is only for smoke tests: give --layer tiny", param_hint="--device")

    console = Console()
    if not console.is_terminal:
        console = Console(width=100)  # a log: not the 80 columns that would cut names off
    start = time.perf_counter()
    if "moe_fused" in names:
        register_kernel(load_kernel())
    if chosen.type == "cpu":
        ceilings = harness.measure_ceilings(chosen, copy_bytes=2**20, matmul_size=128, seconds=0.01)
    else:
        ceilings = harness.measure_ceilings(chosen)
    bench = Bench(chosen, ceilings, seconds or (0.1 if quick else 0.4))
    environment = bench.environment
    # A run of some implementations only would leave points in the shared file without their rivals.
    partial = quick or set(names) != set(IMPLEMENTATIONS) or chosen.type == "cpu"
    path = output or (None if partial else ROOT / "results" / f"{BENCHMARK}_{slug(environment.gpu)}.json")
    console.print(
        f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}; ceilings: "
        f"copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, bf16 product {ceilings.flops_per_second / 1e12:.0f} TFLOP/s"
    )

    rows: list[Row] = []
    if path is not None:
        with _one_line_errors():
            rows = read_rows(path) if path.exists() else []

    def save(new: list[Row]) -> None:
        rows[:] = merge(rows, new)
        if path is not None:
            with _one_line_errors():
                write_rows(path, rows)

    gc.freeze()  # a collection takes a quarter of a second otherwise, most of it over what the imports made
    try:
        problems = _run(bench, _points(layers, sizes, phases, chosen), names, console, save)
    finally:
        gc.unfreeze()
    if path is not None and rows:
        picture = path.with_suffix(".png")
        with _one_line_errors():
            plot.save(rows, picture)
        console.print(f"Wrote {path} and {picture}")
    console.print(f"Took {time.perf_counter() - start:.0f} s")
    for problem in problems:
        typer.echo(f"Wrong result, not timed: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
