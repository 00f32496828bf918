"""Trains the same adapters over the same small model in each 4-bit format, and draws the curves of their loss in one plot.

    python -m benchmarks.format_parity                       two models, four formats, 300 steps each
    python -m benchmarks.format_parity --quick --device cpu  smoke-tests the benchmark itself, writes only to --output

As in ``loss_parity``: a byte-level model learns Python's language reference in bf16 and is saved; LoRA on attention and
experts then adapts it to the docstrings of the standard library. There are two models, one of Qwen3-MoE and one of gpt-oss,
whose experts have biases, a clamped gate, and gate and up features that alternate. All over the same batches, from the same
adapters:

- ``transformers_bf16``: without us. Weights in bf16, Transformers' ``grouped_mm``, stock PEFT.
- ``moe_fused_nf4``: experts and linear layers in nf4 with double quantization, in the kernel.
- ``moe_fused_mxfp4``, ``moe_fused_nvfp4``: experts in these formats, linear layers in bf16, in the kernel.

The formats round the weights differently, so their losses differ. ``held_out`` says what that costs before and after the
training. A curve that ends farther from bf16 than it began, by more than ``loss_parity.TOLERANCE``, is a failure: training
must not make worse what quantizing did.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

import moe_fused
from moe_fused.benchmark.harness import Environment
from moe_fused.demo.data import reference_text
from moe_fused.demo.model import Size, new_model
from moe_fused.finetune.model import load_model
from moe_fused.finetune.resolve import ModelSetup

from . import loss_parity, plot, runner
from .loss_parity import BF16, QWEN3, TOLERANCE, LossRow, Task, smoothed
from .rows import OURS

NAME = "format_parity"
GPT_OSS = "gpt-oss"
# By implementation, how its experts are stored.
WEIGHTS = {BF16: "bf16", **{f"{OURS}_{quant_type}": quant_type for quant_type in ("nf4", "mxfp4", "nvfp4")}}
STEPS, QUICK_STEPS = 300, 6


def new_gpt_oss(size: Size, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> Any:
    """A randomly initialised float32 model as gpt-oss, of the same sizes as ``new_model`` makes."""
    heads = size.hidden_size // 32
    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": 32,
        "num_local_experts": size.num_experts,
        "num_experts_per_tok": size.top_k,
        "intermediate_size": size.intermediate_size,
        "sliding_window": 64,
        "max_position_embeddings": 1024,
        "experts_implementation": "moe_fused",
        "attn_implementation": "eager",
    }
    return GptOssForCausalLM(GptOssConfig(**options)).to(device)  # type: ignore[arg-type]


MODELS = {QWEN3: new_model, GPT_OSS: new_gpt_oss}


def load(name: str, directory: Path, setup: ModelSetup) -> Any:
    """The model in ``directory`` as an implementation has it, without adapters."""
    if name == BF16:
        return loss_parity.load(BF16, directory, setup)
    moe_fused.disable()  # whatever ran before
    # ``finetune`` refuses nvfp4 for gpt-oss, because no checkpoint of gpt-oss can be saved in it. The kernels take it.
    quant_type: Any = WEIGHTS[name]
    decided = loss_parity.setup_of(directory, setup.device, "mxfp4" if quant_type == "nvfp4" else quant_type)
    return load_model(replace(decided, quantize_to=quant_type, quant_type=quant_type))


def run(
    models: Sequence[str], quick: bool, steps: int, device: torch.device, environment: Environment, console: Console
) -> list[LossRow]:
    """Trains each model, and the adapters of each implementation over it."""
    size = replace(loss_parity.QUICK if quick else loss_parity.FULL, finetuning_steps=steps)
    characters = loss_parity.QUICK_CHARACTERS if quick else loss_parity.CHARACTERS
    most = loss_parity.QUICK_HELD_OUT if quick else loss_parity.HELD_OUT
    rows = []
    for model in models:
        with tempfile.TemporaryDirectory(prefix="format-parity-") as name:
            directory, start = Path(name), time.perf_counter()
            corpus = loss_parity.corpus_of(reference_text(), size, most, device)
            loss = loss_parity.save_base(directory, size, corpus, MODELS[model])
            console.print(
                f"{model}: {size.steps} steps in {time.perf_counter() - start:.0f} s, held-out loss {loss:.4f}"
            )
            corpus = loss_parity.corpus_of(loss_parity.docstrings(characters), size, most, device)
            task = Task(directory, corpus, size, steps, device, load)
            made = loss_parity.measure(task, environment, console, WEIGHTS, model)
            rows += [replace(row, benchmark=NAME) for row in made]
    return rows


def costs(row: LossRow, dense: LossRow) -> tuple[float, float]:
    """How far the held-out loss of a row is above that of bf16, before training and after it."""
    return row.held_out[0] - dense.held_out[0], row.held_out[max(row.held_out)] - dense.held_out[max(dense.held_out)]


def by_model(rows: Sequence[LossRow]) -> dict[str, dict[str, LossRow]]:
    """The rows by model and implementation."""
    found: dict[str, dict[str, LossRow]] = {}
    for row in rows:
        found.setdefault(row.model, {})[row.implementation] = row
    return found


def disagreements(rows: Sequence[LossRow]) -> list[str]:
    """Formats over which training lost more than quantizing did."""
    problems = []
    for model, found in by_model(rows).items():
        for name, row in found.items():
            before, after = costs(row, found[BF16])
            if after > max(before, 0.0) + TOLERANCE:
                problems.append(f"{name} of {model} is {after:.4f} above {BF16} after training, {before:.4f} before it")
    return problems


def results_table(rows: Sequence[LossRow]) -> Table:
    """``rows``, which are of one run, for the terminal."""
    table = Table(title=f"{len(rows[0].losses)} steps, nats per byte", title_justify="left")
    for column in ("model", "weights", "first loss", "last losses", "held out before", "after", "s"):
        table.add_column(column, justify="left" if column in ("model", "weights") else "right", no_wrap=True)
    for row in rows:
        held_out = (f"{row.held_out[step]:.4f}" for step in (0, max(row.held_out)))
        losses = (f"{row.losses[0]:.4f}", f"{smoothed(row.losses)[-1]:.4f}")
        table.add_row(row.model, row.weights, *losses, *held_out, f"{row.seconds:.0f}")
    return table


def figure(rows: Sequence[LossRow]) -> Figure:
    """The smoothed curves and the held-out losses of each model; below them how far they are from bf16."""
    found = by_model(rows)
    drawing = Figure(figsize=(5.0 * len(found), 7.0), dpi=150, layout="constrained")
    grid = drawing.subplots(2, len(found), sharex=True, squeeze=False, height_ratios=(3, 2))
    for column, (model, implementations) in enumerate(found.items()):
        curves, gaps = grid[0][column], grid[1][column]
        for colour, (name, row) in zip((plot.OUR_COLOUR, *plot.COLOURS), implementations.items(), strict=False):
            steps = range(1, len(row.losses) + 1)
            curves.plot(steps, smoothed(row.losses), color=colour, linewidth=1.5, label=f"{name} ({row.weights})")
            curves.plot(*zip(*row.held_out.items(), strict=True), "o", color=colour, markersize=4, alpha=0.7)
            if name != BF16:
                gaps.plot(steps, loss_parity.differences(row, implementations[BF16]), color=colour, linewidth=1.2)
        curves.set_title(model, fontsize=9)
        curves.legend(frameon=False, fontsize=7)
        gaps.axhline(0, color="grey", linewidth=1)
        gaps.set_xlabel("step", fontsize=9)
        for axes in (curves, gaps):
            axes.grid(True, color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel(f"loss, nats per byte; means of {loss_parity.WINDOW} steps, points: held out", fontsize=8)
    grid[1][0].set_ylabel(f"difference to {BF16}", fontsize=8)
    first = rows[0]
    drawing.suptitle(
        f"LoRA on attention and experts; {first.layers} layers of {first.experts} experts\n"
        f"{first.gpu}, torch {first.torch}, Transformers {first.transformers}, PEFT {first.peft}, {first.date}",
        fontsize=9,
    )
    return drawing


def main(
    model: Annotated[
        list[str] | None, typer.Option(help=f"{' or '.join(MODELS)}; may be given again. Writes only to --output.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of each training. Writes only to --output.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="The JSON to write; a PNG is written beside it.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models. Writes only to --output.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu. Of a CPU, writes only to --output.")] = "cuda",
) -> None:
    """Trains adapters over experts in nf4, mxfp4, nvfp4 and bf16, and writes losses under benchmarks/results."""
    models = runner.choices("model", model, tuple(MODELS), tuple(MODELS))
    runner.check_device(device)
    runner.check_output(output)
    chosen = runner.pick_device(device, "--device cpu --quick")
    count = steps or (QUICK_STEPS if quick else STEPS)
    loss_parity.report(
        NAME,
        chosen,
        output,
        quick or device == "cpu" or steps is not None or model is not None,
        lambda environment, console: run(models, quick, count, chosen, environment, console),
        lambda rows: (results_table(rows),),
        figure,
        lambda rows: [f"Training made it worse: {problem}" for problem in disagreements(rows)],
    )


if __name__ == "__main__":
    typer.run(main)
