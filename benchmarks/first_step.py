"""Measures how long a fine-tuning run takes until its third step, phase by phase, with cold and with warm caches.

    python -m benchmarks.first_step                        a cold start and two warm ones, of Qwen3-30B-A3B at 4096 tokens
    python -m benchmarks.first_step --layers 4             a short model to try things on
    python -m benchmarks.first_step --device cpu --quick

Each start is a process of its own. The starts share a directory for Triton's cache and one for CUDA's, which are empty at
the first start (``cold``). The second start (``warm``) must compile nothing: the program ends with an error if it does.
Files that libraries read are in the operating system's cache from the first start on. Weights are random and made on the
GPU, so that loading a checkpoint is not in it.

Phases: ``import torch`` and so on; ``make the model``; ``adapt``; ``to the first step``, which is TRL's trainer with the
state of the optimizer; ``step 1``, which runs eagerly; ``step 2``, which records the CUDA graphs; ``step 3``, which replays
them.

What is counted in each phase:

- ``compiled``, ``found``: kernels of Triton that were compiled, and those that were found in its cache, with the seconds of
  both.
- ``loaded``: kernels of Triton that were loaded onto the GPU, with the seconds.
- ``built``: runs of a C compiler by Triton, for its launchers.
- ``recorded``: recordings of CUDA graphs, with the seconds.

Then come the functions in which Python was for longest, of all threads, by samples. A function that calls into a library
has the time that the library takes, such as cuDNN building a plan in ``scaled_dot_product_attention``. Taking samples makes
imports somewhat slower.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

_BEGAN = time.perf_counter()

import typer  # noqa: E402 - what is imported is measured

NAME = "first_step"
STEPS = 3
SAMPLE_SECONDS = 0.02
# Functions in which a thread waits for another one, as far as Python knows.
_WAITING = {"wait", "_wait_for_tstate_lock", "select", "poll", "accept", "get", "_engine_run_backward"}
COUNTS = ("compiled", "found", "loaded", "built", "recorded")


@dataclass
class Phase:
    """A part of a start.

    Attributes:
        name: What is done in it.
        seconds: How long it takes.
        counts: How often each of ``COUNTS`` happened.
        seconds_of: The seconds of each of them, where they are known.
        functions: The seconds in the functions in which Python was for longest.
    """

    name: str
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    seconds_of: dict[str, float] = field(default_factory=dict)
    functions: dict[str, float] = field(default_factory=dict)


class Watch:
    """Notes the phases of this process, and what happens in them."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._counts: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._functions: defaultdict[str, float] = defaultdict(float)
        self._start = _BEGAN
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def phase(self, name: str) -> None:
        """Ends the phase that has run until now, and gives it a name."""
        now = time.perf_counter()
        most = sorted(self._functions.items(), key=lambda item: -item[1])[:12]
        functions = {key: round(seconds, 3) for key, seconds in most if seconds >= 0.05}
        seconds_of = {key: round(seconds, 3) for key, seconds in self._seconds.items()}
        self.phases.append(Phase(name, round(now - self._start, 3), dict(self._counts), seconds_of, functions))
        self._counts.clear()
        self._seconds.clear()
        self._functions.clear()
        self._start = now

    def count(self, what: str, seconds: float = 0.0) -> None:
        self._counts[what] += 1
        self._seconds[what] += seconds

    def timed(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that does the same, and whose runs count."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.count(what, time.perf_counter() - start)

        return run

    def close(self) -> None:
        self._ended.set()
        self._sampler.join()

    def _sample(self) -> None:
        before, own = time.perf_counter(), threading.get_ident()
        while not self._ended.wait(SAMPLE_SECONDS):
            frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != own}
            busy = [frame for frame in frames.values() if frame.f_code.co_name not in _WAITING]
            # While autograd's threads are outside of Python, the thread that waits for them stands for them.
            main = frames.get(threading.main_thread().ident or 0)
            now = time.perf_counter()
            for frame in busy or ([main] if main is not None else []):
                self._functions[_place(frame)] += now - before
            before = now


def _place(frame: Any) -> str:
    """The function of a frame, with its file within the package."""
    path = Path(frame.f_code.co_filename)
    parts = path.parts
    inside = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-3:]
    return f"{'/'.join(inside)}:{frame.f_code.co_name}"


@contextlib.contextmanager
def counting(watch: Watch) -> Iterator[None]:
    """Counts, within the block, what Triton and the graphs do."""
    from moe_fused.finetune.graphs import GraphedDecoder

    replaced: list[tuple[Any, str, Any]] = [
        (GraphedDecoder, "_recorded", watch.timed("recorded", GraphedDecoder._recorded))
    ]
    with contextlib.suppress(ImportError):  # torch for CPUs has no Triton
        import triton
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime import build

        def listen(*, times: Any, cache_hit: bool, **_: Any) -> None:
            watch.count("found" if cache_hit else "compiled", times.total / 1e6)

        replaced += [
            (triton.knobs.compilation, "listener", listen),
            (CompiledKernel, "_init_handles", _once(watch, CompiledKernel._init_handles)),
            (build, "_build", watch.timed("built", build._build)),
        ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _once(watch: Watch, load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Counts the first call for each kernel. Later calls find it loaded."""
    timed = watch.timed("loaded", load)

    def run(kernel: Any) -> None:
        (timed if kernel.module is None else load)(kernel)

    return run


class Laps:
    """Stands where the benchmarks of whole models have their meter, and only notes when steps begin and end."""

    total = STEPS

    def __init__(self, watch: Watch, device: Any) -> None:
        self._watch, self._device, self._steps = watch, device, 0

    def _synchronize(self) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def begin(self, *_: Any) -> None:
        self._synchronize()
        self._watch.phase("to the first step" if self._steps == 0 else f"to step {self._steps + 1}")

    def end(self) -> None:
        self._synchronize()
        self._steps += 1
        self._watch.phase(f"step {self._steps}")


def start(device: str, tokens: int, layers: int | None, quick: bool) -> list[Phase]:
    """Starts a run in this process."""
    watch = Watch()
    watch.phase("start Python")
    import torch

    watch.phase("import torch")
    import transformers  # noqa: F401

    watch.phase("import transformers")
    import peft  # noqa: F401 - with bitsandbytes

    watch.phase("import peft")
    from . import full_model, runner
    from .finetune_30b import QWEN3_30B, SEED
    from .training import Recipe
    from .training_finetune import set_up_finetune

    watch.phase("import finetune")
    chosen = runner.pick_device(device, "--device cpu --quick")
    with counting(watch):
        model = QWEN3_30B.tiny() if quick else QWEN3_30B
        model = model if layers is None else model.shortened(layers)
        base = full_model.build(model, chosen, dense_experts=False, quant_type="nf4", seed=SEED)
        full_model.run_fused(recompute=False)
        if chosen.type == "cuda":
            torch.cuda.synchronize(chosen)
        watch.phase("make the model")
        training = set_up_finetune(base, Recipe(cuda_graphs=chosen.type == "cuda"))
        watch.phase("adapt")
        generator = torch.Generator().manual_seed(SEED)
        sequences = torch.randint(model.vocabulary, (STEPS, tokens), generator=generator).to(chosen)
        meter: Any = Laps(watch, chosen)
        training.train(sequences, meter)
    watch.close()
    return watch.phases


def in_a_process(arguments: list[str], caches: Path) -> list[Phase]:
    """Starts a run in a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    command = [sys.executable, "-m", "benchmarks.first_step", "--as-json", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stderr.strip()[-2000:]}")
    return [Phase(**phase) for phase in json.loads(ended.stdout.splitlines()[-1])]


def tables(starts: dict[str, list[Phase]], functions: int) -> list[Any]:
    """The phases of all starts side by side, then what took longest in the phases of the last start."""
    from rich.table import Table

    table = Table(title="seconds until the third step", title_justify="left")
    table.add_column("phase", no_wrap=True)
    for name in starts:
        table.add_column(name, justify="right")
        table.add_column("of these", no_wrap=False)
    for row in zip(*starts.values(), strict=True):
        if all(phase.name.startswith("to step") and phase.seconds < 0.01 for phase in row):
            continue
        cells = []
        for phase in row:
            counted = [
                f"{phase.counts[what]} {what} {phase.seconds_of[what]:.1f}" for what in COUNTS if what in phase.counts
            ]
            cells += [f"{phase.seconds:.2f}", ", ".join(counted)]
        table.add_row(row[0].name, *cells)
    sums = []
    for phases in starts.values():
        sums += [f"{sum(phase.seconds for phase in phases):.2f}", ""]
    table.add_section()
    table.add_row("all", *sums)
    name, last = list(starts.items())[-1]
    where = Table(title=f"where Python was, {name}", title_justify="left")
    for column in ("phase", "seconds", "function"):
        where.add_column(column, justify="right" if column == "seconds" else "left", no_wrap=True)
    for phase in last:
        for function, seconds in list(phase.functions.items())[:functions]:
            where.add_row(phase.name, f"{seconds:.2f}", function)
    return [table, where]


def compiled_again(starts: dict[str, list[Phase]]) -> list[str]:
    """What every start but the first compiled or built."""
    return [
        f"{name}, {phase.name}: {phase.counts[what]} {what}"
        for name, phases in list(starts.items())[1:]
        for phase in phases
        for what in ("compiled", "built")
        if phase.counts.get(what)
    ]


def main(
    tokens: Annotated[int | None, typer.Option(help="Tokens of a step.", min=2)] = None,
    layers: Annotated[int | None, typer.Option(help="Decoder layers.", min=1)] = None,
    warm: Annotated[int, typer.Option(help="Starts after the cold one.", min=1)] = 2,
    functions: Annotated[int, typer.Option(help="Functions to list in each phase.", min=0)] = 6,
    caches: Annotated[Path | None, typer.Option(help="Directory of the caches, kept. An empty one is cold.")] = None,
    output: Annotated[Path | None, typer.Option(help="The JSON to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--as-json", hidden=True)] = False,
) -> None:
    """Measures the phases of a start with cold and with warm caches."""
    count = tokens or (32 if quick else 4096)
    if as_json:
        print(json.dumps([asdict(phase) for phase in start(device, count, layers, quick)]))
        return
    from . import runner

    runner.check_device(device, quick)
    runner.check_output(output)
    runner.pick_device(device, "--device cpu --quick")
    arguments = ["--device", device, "--tokens", str(count), *(["--quick"] if quick else [])]
    arguments += [] if layers is None else ["--layers", str(layers)]
    starts: dict[str, list[Phase]] = {}
    with tempfile.TemporaryDirectory() as made:
        for number in range(1 + warm):
            name = "cold" if number == 0 else f"warm {number}" if warm > 1 else "warm"
            try:
                starts[name] = in_a_process(arguments, caches or Path(made))
            except RuntimeError as error:
                typer.echo(f"Error: {error}", err=True)
                raise typer.Exit(1) from error
    console = runner.make_console()
    for table in tables(starts, functions):
        console.print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        values = {name: [asdict(phase) for phase in phases] for name, phases in starts.items()}
        output.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if again := compiled_again(starts):
        typer.echo(f"A warm start compiles nothing, but: {'; '.join(again)}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
