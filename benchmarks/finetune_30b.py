"""Trains Qwen3-30B-A3B as a 4-bit QLoRA in 24 GiB of a GPU: how fast, in how much memory, and where the time goes.

    python -m benchmarks.finetune_30b                    48 layers, five lengths, three implementations
    python -m benchmarks.finetune_30b --layers 4         a short model to try things on, writes nothing
    python -m benchmarks.finetune_30b --model gpt-oss-20b --cap-gib 16 --output gpt-oss-20b.json
    python -m benchmarks.finetune_30b --device cpu --quick

``--model`` takes any of ``benchmarks.models``, whose rows bear its name. ``--weights mxfp4`` and ``nvfp4`` hold the experts
in these formats and leave linear layers in bf16; ``composed`` then dequantizes with our own kernel. Weights are random and
made on the GPU, one stack after the other; nothing is downloaded. The model, its adapters, the optimizer and all kernels but
the experts' are the same for every implementation; options such as ``--compile`` are for ours alone:

- ``moe_fused``: what ``from_pretrained`` and PEFT give while ``moe_fused`` is enabled, the decoder as CUDA graphs.
- ``moe_fused_eager``: the same without CUDA graphs, so that the host launches every kernel, as it does for the others.
- ``composed``: the same experts over the same bytes in plain torch (``experts_lora.composed``), decoder layers run eagerly.
- ``peft``: experts in bf16 under stock Transformers and PEFT, which fits no 24 GiB and runs without the limit. By
  ``--implementation peft`` only.

An implementation that a model cannot have is left out, and a line says why: ``composed`` where plain torch has no such
experts, ``moe_fused_eager`` where ``moe_fused`` runs without CUDA graphs itself. So are lengths beyond a model's positions.

A row's ``ms`` is a step: forward, backward and optimizer on one sequence. ``tflops`` counts what training adapters of frozen
weights needs (a multiply-add is two): 4·N·T for the N parameters that a token is multiplied with, forward and for the
gradient of the input, and 6·L·D·T² of attention in L layers with heads of D features together: two products over the half
of T² that is not masked, and twice that backward. ``model.Model`` counts sliding windows and recurrent layers, too. N is
3.04 B for Qwen3-30B-A3B: the 3.35 B that are called active, without the embedding, which multiplies nothing. Adapters, some
2 % of it, are left out. Further numbers of a row, under ``details``:

- ``tokens_per_second``; ``loss`` of the first step; ``first_step_ms``, of the first two, which compile what is missing
  and record the graphs.
- ``mfu``: ``tflops`` over what a large bf16 product reached in the same run; ``hfu``: the same with the recomputation of
  the decoder layers (another 2·N·T without the head, and attention's forward), which ours ends before the experts' down
  projections unless layers are compiled.
- ``gpu_busy``: the share of a traced step in which a kernel ran, and ``gpu_busy_ms`` how long that was.
- ``experts_ms``, ``attention_ms`` (its projections, norms and rotary embedding included), ``loss_ms`` (with the head),
  ``optimizer_ms`` and ``other_ms``: GPU time of a step, each with forward, recomputation and backward.
- ``weights_mib``, ``training_mib`` (adapters, gradients, optimizer), ``transient_mib``: they add up to ``peak_mib``;
  ``reserved_mib`` is what the allocator held, and what the limit is on; ``predicted_mib`` the peak that ``finetune``
  foresaw.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

import moe_fused
from moe_fused.benchmark import harness
from moe_fused.benchmark.harness import current_environment, release_memory
from moe_fused.benchmark.layers import Ceilings
from moe_fused.devices import use_expandable_segments
from moe_fused.finetune.options import KeepAttention
from moe_fused.quantized import PUBLISHED

from . import full_model, plot, runner
from .experts_4bit import QUANT_TYPE
from .model import Model, composed_refusal
from .models import BY_NAME
from .rows import EAGER, OURS, Row, merge, new_row, read_rows, slug, write_rows
from .step_trace import PARTS
from .training import Measurement, Recipe, Recompute, Training, measure, set_up_loop, trained

NAME = "finetune_30b"
PHASE = "train_step"
DEFAULT_MODEL = "qwen3-30b-a3b"
QWEN3_30B = Model(DEFAULT_MODEL, BY_NAME[DEFAULT_MODEL].config())
TINY = QWEN3_30B.tiny()
TOKENS = (1024, 2048, 4096, 8192, 16384)
QUICK_TOKENS = (16, 64)
# The recipe of the other implementations: options that may be an advantage are for ours alone.
PLAIN = Recipe()
WEIGHTS = (QUANT_TYPE, *PUBLISHED)
CAP_GIB = 24.0
SEED = 0
MEMORY = ("weights", "training", "transient", "reserved", "predicted")
# Losses of the first step, over the same weights and tokens, may differ by this share: what bf16 makes of them.
LOSS_TOLERANCE = 0.005

Implementation = Literal["moe_fused", "moe_fused_eager", "composed", "peft"]
DEFAULT_IMPLEMENTATIONS: tuple[Implementation, ...] = ("moe_fused", "moe_fused_eager", "composed")

TRAINERS = ("finetune", "loop")

SetUp = Callable[[Any, Recipe], Training]
"""What makes a model trainable; the benchmark measures whatever it gives."""


def _set_up(trainer: str) -> SetUp:
    """How ``trainer`` makes a model trainable.

    Raises:
        typer.Exit: with code 2 and one line on stderr, if it needs a package that is missing.
    """
    if trainer == "loop":
        return set_up_loop
    if importlib.util.find_spec("trl") is None:
        typer.echo("--trainer finetune needs trl, which is not installed; `--trainer loop` does not", err=True)
        raise typer.Exit(2)
    from .training_finetune import set_up_finetune

    return set_up_finetune


def model_flops(model: Model, tokens: int) -> int:
    """Floating-point operations of a step on one sequence, as the module's docstring counts them."""
    return 4 * model.multiplied_parameters * tokens + 3 * model.attention_flops(tokens)


def recomputed_flops(model: Model, tokens: int, *, down: bool) -> int:
    """Floating-point operations of recomputing the decoder layers, with the experts' down projections if ``down``."""
    parameters = model.multiplied_parameters - model.head_parameters
    if not down:
        parameters -= model.down_parameters
    return 2 * parameters * tokens + model.attention_flops(tokens)


def limit_memory(device: torch.device, gib: float | None) -> None:
    """Limits what torch's allocator may take of a GPU to ``gib`` GiB; None and 0 lift the limit."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total) if gib else 1.0, device)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures implementations of one model on one device."""

    model: Model
    device: torch.device
    ceilings: Ceilings
    recipe: Recipe
    quant_type: str
    cap_gib: float
    steps: int
    kernels: int
    set_up: SetUp
    console: Console

    def run(self, name: Implementation, lengths: Sequence[int], save: Callable[[Row], None]) -> dict[int, float]:
        """Rows of one implementation, one a length, as they are measured; losses by length."""
        limit_memory(self.device, None if name == "peft" else self.cap_gib)
        start = time.perf_counter()
        try:
            model = full_model.build(
                self.model, self.device, dense_experts=name == "peft", quant_type=self.quant_type, seed=SEED
            )
        except torch.OutOfMemoryError:
            model = None
        if model is None:
            self.console.print(f"{name}: the weights alone do not fit")
            release_memory(self.device)
            for length in lengths:
                save(self._row(name, length, None))
            return {}
        if name == "composed":
            published = self.quant_type in PUBLISHED
            full_model.run_composed(model, (lambda packed: packed) if published else full_model.as_bitsandbytes)
        elif name in (OURS, EAGER):
            full_model.run_fused(recompute=self.recipe.recompute == "selective")
        weights = sum(value.nbytes for value in full_model.storage(model))
        torch.manual_seed(SEED)  # for the adapters
        recipes = {OURS: self.recipe, EAGER: dataclasses.replace(self.recipe, cuda_graphs=False)}
        training = self.set_up(model, recipes.get(name, PLAIN))
        adapters = sum(parameter.numel() for parameter in trained(model))
        self.console.print(
            f"{name}: {self.model.layers} layers built in {time.perf_counter() - start:.0f} s, weights "
            f"{weights / 2**30:.2f} GiB, {adapters / 1e6:.0f} M parameters trained"
        )
        losses: dict[int, float] = {}
        for length in lengths:
            measured: Measurement | None
            try:
                measured = measure(training, length, self.model.vocabulary, weights, steps=self.steps, seed=SEED)
            except torch.OutOfMemoryError:
                measured = None
            release_memory(self.device)
            if measured is not None:
                losses[length] = measured.losses[0]
                if self.kernels:
                    self.console.print(kernels_table(f"{name}, {length} tokens", measured.kernels, self.kernels))
            save(self._row(name, length, measured))
        return losses

    def _row(self, name: Implementation, tokens: int, measured: Measurement | None) -> Row:
        operations = model_flops(self.model, tokens)
        row = new_row(
            current_environment(self.device),
            benchmark=NAME,
            layer=self.model.name,
            tokens=tokens,
            implementation=name,
            phase=PHASE,
            weights="bf16" if name == "peft" else self.quant_type,
            ms=measured.ms if measured else None,
            flops=operations,
            peak_mib=measured.memory.get("peak") if measured else None,
            lora_rank=self.recipe.expert_rank,
        )
        if measured is None:
            return row
        per_second = 1e3 / measured.ms
        peak = self.ceilings.flops_per_second
        details = {
            "tokens_per_second": tokens * per_second,
            "mfu": operations * per_second / peak,
            "loss": measured.losses[0],
            "first_step_ms": measured.first_ms,
            "gpu_busy": measured.busy,
            "gpu_busy_ms": measured.busy_ms,
            **{f"{part}_ms": ms for part, ms in measured.parts.items()},
            **{f"{part}_mib": mib for part, mib in measured.memory.items() if part != "peak"},
        }
        is_ours = name in (OURS, EAGER)
        if not is_ours or self.recipe.recompute == "layers":
            again = recomputed_flops(self.model, tokens, down=not is_ours or self.recipe.compile_layers)
            details["hfu"] = (operations + again) * per_second / peak
        return dataclasses.replace(row, details={key: float(f"{value:.6g}") for key, value in details.items()})


def results_tables(rows: Sequence[Row]) -> list[Table]:
    """What was measured, for the terminal: speed and memory, then where time goes."""
    columns = ("ms", "tok/s", "× composed", "MFU", "HFU", "peak GiB", *MEMORY)
    title = f"{rows[0].layer}, 4-bit QLoRA with rank {rows[0].lora_rank} on experts, a sequence a step"
    speed, split = _table(title, columns), _table("ms of GPU time", (*PARTS, "all kernels", "GPU busy", "first step"))
    composed = {row.tokens: row.ms for row in rows if row.implementation == "composed"}
    for tokens in sorted({row.tokens for row in rows}):
        for row in (row for row in rows if row.tokens == tokens):
            first = (str(tokens), row.implementation)
            speed.add_row(*first, *_speed(row, composed.get(tokens)))
            if row.ms is not None:
                keys = [*(f"{part}_ms" for part in PARTS), "gpu_busy_ms"]
                cells = [
                    *(_shown(row, key) for key in keys),
                    _shown(row, "gpu_busy", ".0%"),
                    _shown(row, "first_step_ms"),
                ]
                split.add_row(*first, *cells)
        speed.add_section()
        split.add_section()
    return [speed, split]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("tokens", "implementation", *columns):
        table.add_column(column, justify="left" if column == "implementation" else "right", no_wrap=True)
    return table


def _shown(row: Row, key: str, form: str = ".0f", divisor: float = 1.0) -> str:
    return format(row.details[key] / divisor, form) if key in row.details else "–"


def _speed(row: Row, composed_ms: float | None) -> list[str]:
    if row.ms is None:
        return ["no memory"]
    return [
        f"{row.ms:.0f}",
        _shown(row, "tokens_per_second"),
        f"{composed_ms / row.ms:.2f}" if composed_ms else "–",
        _shown(row, "mfu", ".1%"),
        _shown(row, "hfu", ".1%"),
        "–" if row.peak_mib is None else f"{row.peak_mib / 1024:.2f}",
        *(_shown(row, f"{part}_mib", ".2f", 1024) for part in MEMORY),
    ]


def kernels_table(title: str, kernels: Mapping[str, tuple[float, int]], most: int) -> Table:
    """The kernels of a step that took longest."""
    table = Table(title=title, title_justify="left")
    for column in ("ms", "runs", "kernel"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, (ms, runs) in list(kernels.items())[:most]:
        table.add_row(f"{ms:.2f}", str(runs), name[:100])
    return table


def disagreements(losses: dict[str, dict[int, float]]) -> list[str]:
    """What is wrong with ``losses``, by implementation and length, if they are not of the same model."""
    problems = []
    names = list(losses)
    for name in names[1:]:
        for length in losses[name].keys() & losses[names[0]].keys():
            got, want = losses[name][length], losses[names[0]][length]
            if not abs(got - want) <= LOSS_TOLERANCE * abs(want):
                problems.append(f"{length} tokens: loss {got:.4f} of {name}, {want:.4f} of {names[0]}")
    return problems


def refusals(model: Model, device: torch.device, recipe: Recipe, trainer: str) -> dict[str, str]:
    """Why a model cannot have some of the implementations, by their names."""
    reasons = {}
    if (reason := composed_refusal(model)) is not None:
        reasons["composed"] = reason
    if recipe.cuda_graphs and trainer == "finetune":
        from .training_finetune import graphs_refusal

        if (reason := graphs_refusal(model.config(), recipe, device)) is not None:
            reasons[EAGER] = f"{OURS} runs without CUDA graphs, too: {reason}"
    return reasons


def main(
    model_name: Annotated[str, typer.Option("--model", help="One of benchmarks.models, by its name.")] = DEFAULT_MODEL,
    weights: Annotated[
        str, typer.Option(help=f"Format of the experts: {', '.join(WEIGHTS)}. Writes only to --output.")
    ] = QUANT_TYPE,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a step; may be given again.", min=2)] = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(help="moe_fused, moe_fused_eager, composed or peft; may be given again. Writes only to --output."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Decoder layers. Writes only to --output.", min=1)] = None,
    cap_gib: Annotated[
        float, typer.Option(help="GiB that the allocator may take; 0 for all there are.", min=0)
    ] = CAP_GIB,
    steps: Annotated[int, typer.Option(help="Steps that are timed.", min=1)] = 3,
    recompute: Annotated[
        str, typer.Option(help="layers, or selective: attention, and of the experts the up projection.")
    ] = "layers",
    compile_layers: Annotated[
        bool, typer.Option("--compile", help="torch.compile for the layers around the experts.")
    ] = False,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs/--eager", help="The decoder's passes as CUDA graphs, on a GPU.")
    ] = True,
    trainer: Annotated[str, typer.Option(help="finetune, that of the command, or loop, a plain one.")] = "finetune",
    paged: Annotated[bool, typer.Option("--paged", help="The paged variant of the optimizer.")] = False,
    keep_attention: Annotated[
        str,
        typer.Option(help="none, device or host, as of moe-fused finetune, for moe_fused. Writes only to --output."),
    ] = "none",
    kernels: Annotated[int, typer.Option(help="How many kernels of each step to list.", min=0)] = 0,
    expandable_segments: Annotated[
        bool, typer.Option(help="An option of torch's allocator, as finetune has it.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="The JSON to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model. Writes only to --output.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
) -> None:
    """Trains a model of random weights, Qwen3-30B-A3B in 24 GiB by default, and writes rows under benchmarks/results."""
    every = get_args(Implementation)
    names: list[Any] = runner.choices("implementation", implementation, every, DEFAULT_IMPLEMENTATIONS)
    (chosen_recompute,) = runner.choices("recompute", [recompute], get_args(Recompute), ())
    (chosen_trainer,) = runner.choices("trainer", [trainer], TRAINERS, ())
    (kept,) = runner.choices("keep-attention", [keep_attention], get_args(KeepAttention), ())
    runner.choices("model", [model_name], tuple(BY_NAME), ())
    runner.choices("weights", [weights], WEIGHTS, ())
    if chosen_trainer == "loop" and BY_NAME[model_name].config().model_type != QWEN3_30B.published.model_type:
        raise typer.BadParameter(f"loop trains Qwen3-MoE alone, {model_name} needs finetune", param_hint="--trainer")
    if chosen_trainer == "finetune" and chosen_recompute != "layers":
        raise typer.BadParameter("--recompute selective needs loop", param_hint="--trainer")
    if kept != "none" and chosen_trainer != "finetune":
        raise typer.BadParameter(f"--keep-attention {kept} needs finetune", param_hint="--trainer")
    if kept == "host" and device == "cpu":
        raise typer.BadParameter("host needs a GPU", param_hint="--keep-attention")
    runner.check_device(device, quick)
    runner.check_output(output)
    if expandable_segments:
        use_expandable_segments()
    chosen = runner.pick_device(device, "--device cpu --quick")
    model = Model(model_name, BY_NAME[model_name].config())
    if quick:
        model = model.tiny()
    if layers is not None:
        model = model.shortened(layers)
    default = Recipe(cuda_graphs=chosen.type == "cuda")
    recipe = dataclasses.replace(
        default,
        recompute=chosen_recompute,
        compile_layers=compile_layers,
        cuda_graphs=cuda_graphs and default.cuda_graphs,
        paged=paged,
        keep_attention=kept,
    )

    start = time.perf_counter()
    console = runner.make_console()
    reasons = refusals(model, chosen, recipe, chosen_trainer)
    if EAGER in reasons:
        recipe = dataclasses.replace(recipe, cuda_graphs=False)
        default = dataclasses.replace(default, cuda_graphs=False)
    if implementation is not None and (refused := [name for name in names if name in reasons]):
        raise typer.BadParameter(f"{refused[0]}: {reasons[refused[0]]}", param_hint="--implementation")
    names = [name for name in names if name not in reasons]
    lengths = sorted(tokens or (QUICK_TOKENS if quick else TOKENS))
    for name, reason in reasons.items():
        console.print(f"{name} is left out: {reason}")
    if too_long := [length for length in lengths if length > model.longest]:
        console.print(f"{model.name} has positions for {model.longest} tokens: not run are {too_long}")
    lengths = [length for length in lengths if length <= model.longest]
    if chosen.type == "cpu":
        ceilings = harness.measure_ceilings(chosen, copy_bytes=2**20, matmul_size=128, seconds=0.01)
    else:
        ceilings = harness.measure_ceilings(chosen)
    environment = current_environment(chosen)
    console.print(
        f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}; "
        f"ceilings: copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, "
        f"bf16 product {ceilings.flops_per_second / 1e12:.0f} TFLOP/s; {recipe}"
    )
    stem = NAME.replace("_", "-") if model_name == DEFAULT_MODEL else f"finetune-{model_name}"
    shared = runner.ROOT / "results" / f"{stem}_{slug(environment.gpu)}.json"
    partial = (
        quick
        or layers is not None
        or implementation is not None
        or recipe != default
        or trainer != TRAINERS[0]
        or weights != QUANT_TYPE
        or cap_gib != CAP_GIB
    )
    path = output or (None if partial else shared)
    rows: list[Row] = []
    with runner.one_line_errors():
        kept = read_rows(path) if path is not None and path.exists() else []

    def save(row: Row) -> None:
        rows.append(row)
        console.print(f"  {row.tokens} tokens: " + (f"{row.ms:.0f} ms" if row.ms else "out of memory"))
        if path is not None:
            with runner.one_line_errors():
                write_rows(path, merge(kept, rows))

    bench = Bench(model, chosen, ceilings, recipe, weights, cap_gib, steps, kernels, _set_up(chosen_trainer), console)
    losses: dict[str, dict[int, float]] = {}
    try:
        for name in names:
            losses[name] = bench.run(name, lengths, save)
            moe_fused.disable()  # composed experts hold on to their model where ours are registered
            release_memory(chosen)
    finally:
        moe_fused.disable()
    for table in results_tables(rows) if rows else ():
        console.print(table)
    if path is not None and rows:
        written = [path]
        if len({row.tokens for row in rows}) >= plot.LEAST_SIZES:
            written.append(path.with_suffix(".png"))
            with runner.one_line_errors():
                plot.save(rows, written[-1], "speedup" if "composed" in losses else "ms")
        console.print(f"Wrote {' and '.join(map(str, written))}")
    console.print(f"Took {time.perf_counter() - start:.0f} s")
    if problems := disagreements({name: by_length for name, by_length in losses.items() if name != "peft"}):
        for problem in problems:
            typer.echo(f"Implementations disagree: {problem}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
