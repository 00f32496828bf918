"""Trains the same adapters over the same small model three ways and draws the curves of their loss in one plot.

    python -m benchmarks.loss_parity                         500 steps each, within 2 minutes on an H100
    python -m benchmarks.loss_parity --quick --device cpu    smoke-tests the benchmark itself, writes only to --output

A byte-level Qwen3-MoE learns Python's language reference first, in bf16, so that its weights mean something, and is saved.
LoRA, as ``moe-fused finetune`` has it by default (attention and experts, bf16, 8-bit AdamW, clipped gradients, warm-up and
cosine), then adapts it to the docstrings of the standard library:

- ``moe_fused``: the model loaded in 4 bits (NF4, double quantization), experts and adapters in the kernel.
- ``transformers_bf16``: without us. Weights in bf16, Transformers' ``grouped_mm``, stock PEFT, which adds adapters to the
  experts' weights on every pass and rounds the sum to bf16.
- ``dequantized``: the model of ``moe_fused``, whose experts bitsandbytes dequantizes once, multiplied in plain torch.

All start with the same adapters and see the same batches in the same order. ``losses`` of a row are those of each step, in
nats per byte, before its update; ``held_out`` is the mean over text that nobody trains on, by the number of steps before.

``moe_fused`` and ``dequantized`` compute the same function of the same weights in bf16, so only rounding tells them apart:
they must not differ by more than ``FIRST_TOLERANCE`` at the first step and ``TOLERANCE`` along the way, or the benchmark
fails. ``transformers_bf16`` has other weights: what quantizing them costs is reported, and no failure.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import json
import math
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, get_scheduler

import moe_fused
from moe_fused.benchmark.harness import Environment, current_environment, release_memory
from moe_fused.demo.data import Corpus, byte_tokenizer, hold_out, reference_text, windows
from moe_fused.demo.model import Size, new_model
from moe_fused.demo.train import train
from moe_fused.finetune.adapters import adapt
from moe_fused.finetune.model import load_config, load_model
from moe_fused.finetune.options import Options
from moe_fused.finetune.resolve import ModelSetup, set_up
from moe_fused.integrations.quantizer.packed_experts import packed_modules

from . import full_model, plot, runner
from .experts_4bit import QUANT_TYPE
from .loading import quiet
from .rows import OURS, slug, write_rows
from .training import Recipe, new_optimizer, trained

NAME = "loss_parity"
QWEN3 = "qwen3-moe"
NEEDED = ("accelerate", "bitsandbytes", "peft")
BF16, DEQUANTIZED = "transformers_bf16", "dequantized"
# By implementation, how its weights are stored.
WEIGHTS = {OURS: QUANT_TYPE, BF16: "bf16", DEQUANTIZED: QUANT_TYPE}
SEED = 0

# The learning rate of the adapters; it is large, as is usual for small models.
LEARNING_RATE = 1e-3
# Four passes over the reference; steps and learning rate are those of this first training.
FULL = Size(
    512, 256, 4, 32, 4, batch_size=16, sequence_length=256, steps=300, learning_rate=2e-3,
    finetuning_steps=500, finetuning_rate=LEARNING_RATE,
)  # fmt: skip
QUICK = Size(
    128, 64, 2, 4, 2, batch_size=2, sequence_length=32, steps=8, learning_rate=5e-3,
    finetuning_steps=6, finetuning_rate=LEARNING_RATE,
)  # fmt: skip
EVALUATIONS = 10
# Windows of held-out text, at most.
HELD_OUT, QUICK_HELD_OUT = 96, 4

CHARACTERS, QUICK_CHARACTERS = 600_000, 40_000
LEAST_CHARACTERS = 80

# A point of a smoothed curve is the mean of so many steps. Batches are the same for all, so their noise is not in a
# difference; what rounding does, by a router that chooses another expert above all, is of either sign and averages out.
WINDOW = 25
# Nats per byte. On a CPU, two layers and batches of 128 bytes, rounding alone made 0.0005 of difference at the first step
# and 0.0003 in the mean of 80 steps, experts' adapters that did nothing 0.017, and those that did half 0.0065. Larger
# batches round less, and more steps let rounding and errors alike grow: 0.005 is well above the one and below the other.
FIRST_TOLERANCE = 0.005
TOLERANCE = 0.005


@dataclass(frozen=True)
class LossRow:
    """One training; losses in nats per byte, ``held_out`` by the number of steps before it."""

    benchmark: str
    gpu: str
    date: str
    torch: str
    triton: str
    transformers: str
    peft: str
    layers: int
    experts: int
    hidden: int
    implementation: str
    weights: str
    seconds: float
    held_out: dict[int, float]
    losses: tuple[float, ...]
    model: str = QWEN3


def docstrings(characters: int) -> tuple[str, str]:
    """Docstrings of the standard library's modules, to train on and held out; each counts once.

    Paragraphs that another docstring or the reference quotes, which depends on the Python version, are not held out.

    Args:
        characters: after how many to stop.
    """
    texts: dict[str, str] = {}
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                key = " ".join(text.split())
                if len(text) >= LEAST_CHARACTERS and key not in texts:
                    texts[key] = text + "\n\n"
                    size += len(text)
        if size >= characters:
            break
    text, held_out = hold_out(list(texts.values()))
    seen = text + "".join(reference_text())
    unseen = [part for part in held_out.split("\n\n") if len(part) <= 2 * LEAST_CHARACTERS or part not in seen]
    return text, "\n\n".join(unseen)


def corpus_of(texts: tuple[str, str], size: Size, most: int, device: torch.device) -> Corpus:
    """Text to train on and held out, as bytes; of the latter so many windows at most."""
    tokenizer, (text, held_out) = byte_tokenizer(), texts
    tokens = torch.tensor(tokenizer(text).input_ids, device=device)
    return Corpus(tokens, windows(held_out, tokenizer, size.sequence_length, device)[:most])


def save_base(directory: Path, size: Size, corpus: Corpus, make: Callable[..., Any] = new_model) -> float:
    """Trains the model to adapt and saves it in bf16; returns its loss on held-out text of what it learned.

    Args:
        make: makes the new model, as ``new_model`` does.
    """
    moe_fused.enable()
    torch.manual_seed(SEED)
    model: Any = make(size, byte_tokenizer(), corpus.train.device)
    history = train(model, corpus, size, SEED, lambda *_: None)
    model.to(torch.bfloat16).save_pretrained(directory)
    return history.held_out[size.steps]


def setup_of(directory: Path, device: torch.device, quantization: Any = "auto") -> ModelSetup:
    """What ``finetune`` decides about a run over the saved model, with one of its values for ``--quantization``."""
    options = Options(
        model=str(directory),
        device=device.type,
        dtype="bfloat16",
        learning_rate=LEARNING_RATE,
        seed=SEED,
        quantization=quantization,
    )
    return set_up(options, load_config(options), device)


def load(name: str, directory: Path, setup: ModelSetup) -> Any:
    """The model in ``directory`` as an implementation has it, without adapters.

    Raises:
        RuntimeError: experts that were to be in 4 bits are not.
    """
    moe_fused.disable()  # whatever ran before
    if name == BF16:
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )
        return model.to(setup.device)
    model = load_model(setup)
    if len(list(packed_modules(model))) != model.config.num_hidden_layers:
        raise RuntimeError(f"{name} must have experts in {QUANT_TYPE} in all {model.config.num_hidden_layers} layers")
    if name == DEQUANTIZED:
        full_model.run_composed(model, full_model.dequantized)
    else:
        full_model.run_fused()
    return model


@dataclass
class Task:
    """What is the same for all implementations.

    Attributes:
        load: makes the model of an implementation, by its name, of the saved one.
        adapters: what they start from, by name; those of the first to ask, None before.
    """

    directory: Path
    corpus: Corpus
    size: Size
    steps: int
    device: torch.device
    load: Callable[[str, Path, ModelSetup], Any] = load
    adapters: dict[str, Tensor] | None = None

    def run(self, name: str) -> tuple[list[float], dict[int, float]]:
        """Trains new adapters: the loss of every step, and those on held-out text by the number of steps before.

        Raises:
            RuntimeError: the adapters are not those of the other implementations.
            FloatingPointError: a loss is not finite.
        """
        setup = setup_of(self.directory, self.device)
        options = setup.options
        model = adapt(self.load(name, self.directory, setup), setup)
        parameters = trained(model)
        for parameter in parameters:
            parameter.data = parameter.data.to(setup.adapter_dtype)
        self._initialize({key: value for key, value in model.named_parameters() if value.requires_grad})
        optimizer = new_optimizer(parameters, Recipe(learning_rate=LEARNING_RATE, paged=True))
        warmup = math.ceil(options.warmup * self.steps)
        schedule = get_scheduler(options.scheduler, optimizer, warmup, self.steps)
        generator = torch.Generator().manual_seed(SEED)
        every = max(1, self.steps // EVALUATIONS)
        model.train()
        losses: list[Tensor] = []
        held_out = {0: self._held_out(model)}
        for step in range(1, self.steps + 1):
            batch = self.corpus.batch(self.size.batch_size, generator)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if step % every == 0 or step == self.steps:
                held_out[step] = self._held_out(model)
        values = torch.stack(losses).tolist()
        if not all(map(math.isfinite, itertools.chain(values, held_out.values()))):
            raise FloatingPointError(f"losses of {name} must be finite, got {values[-1]} at the end")
        return values, held_out

    @torch.no_grad()
    def _initialize(self, parameters: dict[str, Tensor]) -> None:
        if self.adapters is None:
            self.adapters = {name: value.detach().clone() for name, value in parameters.items()}
        shapes, others = (
            {name: tuple(value.shape) for name, value in by_name.items()} for by_name in (parameters, self.adapters)
        )
        if shapes != others:
            raise RuntimeError(f"adapters must be the same for all, got {shapes} and {others}")
        for name, value in parameters.items():
            value.copy_(self.adapters[name])

    @torch.no_grad()
    def _held_out(self, model: Any) -> float:
        """As the training is: without the autocast of ``held_out_loss``, which these bf16 models do not train under."""
        held_out = self.corpus.held_out
        total = torch.zeros((), device=held_out.device)
        for batch in held_out.split(self.size.batch_size):
            total += model(input_ids=batch, labels=batch, use_cache=False).loss * len(batch)
        return total.item() / len(held_out)


def measure(
    task: Task, environment: Environment, console: Console, weights_of: Mapping[str, str] = WEIGHTS, model: str = QWEN3
) -> Iterator[LossRow]:
    """A row for each implementation, one after the other.

    Args:
        weights_of: how each stores its weights.
        model: what the rows call the model.
    """
    versions = {package: importlib.metadata.version(package) for package in ("transformers", "peft")}
    for name, weights in weights_of.items():
        start = time.perf_counter()
        losses, held_out = task.run(name)
        seconds = time.perf_counter() - start
        # Experts in plain torch hold on to their model where ours are registered.
        moe_fused.disable()
        release_memory(task.device)
        console.print(f"{name}: {task.steps} steps in {seconds:.0f} s, held-out loss {held_out[task.steps]:.4f}")
        yield LossRow(
            benchmark=NAME,
            **asdict(environment),
            **versions,
            layers=task.size.num_layers,
            experts=task.size.num_experts,
            hidden=task.size.hidden_size,
            implementation=name,
            weights=weights,
            seconds=round(seconds, 1),
            held_out={step: round(loss, 5) for step, loss in held_out.items()},
            losses=tuple(round(loss, 5) for loss in losses),
            model=model,
        )


def run(
    quick: bool,
    base_steps: int | None,
    steps: int | None,
    device: torch.device,
    environment: Environment,
    console: Console,
) -> list[LossRow]:
    """Trains what is adapted, then the adapters of each implementation; steps as the size has them where None is given."""
    size = QUICK if quick else FULL
    size = replace(size, steps=base_steps or size.steps, finetuning_steps=steps or size.finetuning_steps)
    characters, most = (QUICK_CHARACTERS, QUICK_HELD_OUT) if quick else (CHARACTERS, HELD_OUT)
    with tempfile.TemporaryDirectory(prefix="loss-parity-") as name:
        directory, start = Path(name), time.perf_counter()
        loss = save_base(directory, size, corpus_of(reference_text(), size, most, device))
        console.print(f"base: {size.steps} steps in {time.perf_counter() - start:.0f} s, held-out loss {loss:.4f}")
        corpus = corpus_of(docstrings(characters), size, most, device)
        task = Task(directory, corpus, size, size.finetuning_steps, device)
        return list(measure(task, environment, console))


def read(path: Path) -> list[LossRow]:
    """The rows of a file, as ``main`` writes them."""
    rows = [LossRow(**value) for value in json.loads(path.read_text(encoding="utf-8"))]
    return [replace(row, held_out={int(step): loss for step, loss in row.held_out.items()}) for row in rows]


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and up to ``WINDOW - 1`` before it."""
    slices = (losses[max(0, end - WINDOW) : end] for end in range(1, len(losses) + 1))
    return [sum(window) / len(window) for window in slices]


def differences(row: LossRow, other: LossRow) -> list[float]:
    """The differences of two smoothed curves, step by step."""
    return [a - b for a, b in zip(smoothed(row.losses), smoothed(other.losses), strict=True)]


def distance(row: LossRow, other: LossRow) -> float:
    """The mean absolute difference of the smoothed curves."""
    values = differences(row, other)
    return sum(map(abs, values)) / len(values)


def disagreements(rows: Sequence[LossRow]) -> list[str]:
    """What more than rounding must have done to ours, compared with the same weights in plain torch."""
    by_name = {row.implementation: row for row in rows}
    ours, same = by_name[OURS], by_name[DEQUANTIZED]
    problems = []
    first = abs(ours.losses[0] - same.losses[0])
    if not first <= FIRST_TOLERANCE:
        problems.append(f"first losses of {OURS} and {DEQUANTIZED} differ by {first:.4f}, more than {FIRST_TOLERANCE}")
    apart = distance(ours, same)
    if not apart <= TOLERANCE:
        problems.append(f"losses of {OURS} and {DEQUANTIZED} differ by {apart:.4f}, more than {TOLERANCE}")
    return problems


def quantization_cost(rows: Sequence[LossRow]) -> str:
    """What 4 bits cost on held-out text, before training and after it, in a line."""
    by_name = {row.implementation: row for row in rows}
    ours, dense = by_name[OURS].held_out, by_name[BF16].held_out
    before, after = ours[0] - dense[0], ours[max(ours)] - dense[max(dense)]
    line = f"4 bits against bf16, held-out loss: {before:+.4f} before training, {after:+.4f} after it"
    if after > max(before, 0.0) + TOLERANCE:
        line += f"; more than {TOLERANCE} above what quantizing cost, look for the reason"
    return line


def results_table(rows: Sequence[LossRow]) -> Table:
    """``rows``, which are of one run, for the terminal."""
    first = rows[0]
    by_name = {row.implementation: row for row in rows}
    table = Table(
        title=f"{first.layers} layers, {first.experts} experts, hidden {first.hidden}; {len(first.losses)} steps, "
        "nats per byte",
        title_justify="left",
    )
    columns = ("weights", "first loss", "last losses", "held out before", "after", "to bf16", "to dequantized", "s")
    for column in ("implementation", *columns):
        table.add_column(column, justify="left" if column == "implementation" else "right", no_wrap=True)
    for row in rows:
        apart = ("–" if row is by_name[name] else f"{distance(row, by_name[name]):.4f}" for name in (BF16, DEQUANTIZED))
        held_out = (f"{row.held_out[step]:.4f}" for step in (0, max(row.held_out)))
        losses = (f"{row.losses[0]:.4f}", f"{smoothed(row.losses)[-1]:.4f}")
        table.add_row(row.implementation, row.weights, *losses, *held_out, *apart, f"{row.seconds:.0f}")
    return table


def figure(rows: Sequence[LossRow]) -> Figure:
    """The curves, raw and smoothed, with the held-out losses; below them how far they are from bf16."""
    by_name = {row.implementation: row for row in rows}
    # From wide to thin, the last in dashes: where curves are the same, all are seen.
    styles: dict[str, dict[str, Any]] = {
        OURS: {"color": plot.OUR_COLOUR, "linewidth": 3.6},
        BF16: {"color": plot.COLOURS[0], "linewidth": 1.8},
        DEQUANTIZED: {"color": "black", "linewidth": 1.2, "linestyle": (0, (4, 3))},
    }
    drawing = Figure(figsize=(9.0, 7.0), dpi=150, layout="constrained")
    curves, gaps = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, style in styles.items():
        row = by_name[name]
        steps = range(1, len(row.losses) + 1)
        curves.plot(steps, row.losses, color=style["color"], linewidth=0.5, alpha=0.25)
        curves.plot(steps, smoothed(row.losses), label=f"{name} ({row.weights})", **style)
        curves.plot(*zip(*row.held_out.items(), strict=True), "o", color=style["color"], markersize=4, alpha=0.7)
        if name != BF16:
            gaps.plot(steps, differences(row, by_name[BF16]), **style | {"linewidth": style["linewidth"] / 2})
    curves.plot([], [], color="grey", linewidth=0.5, label="each step")
    curves.plot([], [], "o", color="grey", markersize=4, label="held out")
    curves.set_ylabel(f"loss, nats per byte; means of {WINDOW} steps", fontsize=9)
    curves.legend(frameon=False, fontsize=8)
    gaps.axhline(0, **styles[BF16])
    gaps.set_ylabel(f"difference to {BF16}", fontsize=9)
    gaps.set_xlabel("step", fontsize=9)
    for axes in (curves, gaps):
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    drawing.suptitle(
        f"LoRA on attention and experts of a Qwen3-MoE of {first.layers} layers and {first.experts} experts\n"
        f"{first.gpu}, torch {first.torch}, Transformers {first.transformers}, PEFT {first.peft}, {first.date}",
        fontsize=9,
    )
    return drawing


def report(
    name: str,
    device: torch.device,
    output: Path | None,
    partial: bool,
    make: Callable[[Environment, Console], list[LossRow]],
    shown: Callable[[Sequence[LossRow]], Sequence[Any]],
    draw: Callable[[Sequence[LossRow]], Figure],
    problems_of: Callable[[Sequence[LossRow]], Sequence[str]],
) -> None:
    """Makes rows, shows them, and writes them with their plot.

    Args:
        name: what the files in benchmarks/results are called.
        output: the JSON to write.
        partial: whether nothing is written without ``output``.
        make, shown, draw: make the rows, what the terminal shows of them, and their plot.
        problems_of: what is wrong with the rows, which is a failure.

    Raises:
        typer.Exit: with code 1 and lines on stderr, if something fails.
    """
    start = time.perf_counter()
    environment = current_environment(device)
    shared = runner.ROOT / "results" / f"{name.replace('_', '-')}_{slug(environment.gpu)}.json"
    path = output or (None if partial else shared)
    console = runner.make_console()
    console.print(f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}")
    quiet()
    try:
        rows = make(environment, console)
        for each in shown(rows):
            console.print(each)
        if path is not None:
            write_rows(path, rows)
            plot.write(draw(rows), path.with_suffix(".png"))
            console.print(f"Wrote {path} and {path.with_suffix('.png')}")
    except (OSError, RuntimeError, ValueError, ArithmeticError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    finally:
        moe_fused.disable()
    console.print(f"Took {time.perf_counter() - start:.0f} s")
    if problems := problems_of(rows):
        for problem in problems:
            typer.echo(problem, err=True)
        raise typer.Exit(1)


def main(
    steps: Annotated[int | None, typer.Option(help="Of each training. Writes only to --output.", min=1)] = None,
    base_steps: Annotated[
        int | None, typer.Option(help="Of the training of what is adapted. Writes only to --output.", min=1)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The JSON to write; a PNG is written beside it.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model. Writes only to --output.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu. Of a CPU, writes only to --output.")] = "cuda",
) -> None:
    """Trains adapters in 4 bits, in bf16 and over dequantized weights, and writes losses under benchmarks/results."""
    runner.check_device(device)
    runner.check_output(output)
    chosen = runner.pick_device(device, "--device cpu --quick")
    if missing := [module for module in NEEDED if importlib.util.find_spec(module) is None]:
        typer.echo(f"Training in 4 bits needs {', '.join(missing)}, not installed here", err=True)
        raise typer.Exit(2)
    partial = quick or device == "cpu" or steps is not None or base_steps is not None
    report(
        NAME,
        chosen,
        output,
        partial,
        lambda environment, console: run(quick, base_steps, steps, chosen, environment, console),
        lambda rows: (results_table(rows), quantization_cost(rows)),
        figure,
        lambda rows: [f"Implementations disagree: {problem}" for problem in disagreements(rows)],
    )


if __name__ == "__main__":
    typer.run(main)
