"""Compares a fine-tuning step over documents side by side with one over a whole sequence of as many tokens.

    python -m benchmarks.finetune_packed                   48 layers, three lengths, each kernel that can be had
    python -m benchmarks.finetune_packed --layers 4        a short model to try things on, writes nothing
    python -m benchmarks.finetune_packed --kernel cudnn    one kernel for documents; may be given again
    python -m benchmarks.finetune_packed --device cpu --quick

The model, its adapters, the tokens and everything else are those of the benchmark ``finetune_30b``, of Qwen3-30B-A3B with
CUDA graphs in 24 GiB. ``whole`` is a step over one sequence that is one document, and ``packed_torch``, ``packed_cudnn`` and
so on are steps over sequences with the mix of documents that ``documents`` has, by the kernel that ``--attn`` names.
``whole_joined`` is ``whole`` with ``MOE_FUSED_QKV=1``, and the others are without it. All are measured in turns, each time
from the same adapters, so that the clocks of the GPU are the same. The median over the turns counts.

``details``: the time over that of ``whole`` (``over_whole``), which is to be at most 1.05, the part of attention in a step
with its projections (``attention_ms``), and the other parts that ``finetune_30b`` explains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import moe_fused
from moe_fused.benchmark.harness import current_environment, release_memory
from moe_fused.devices import use_expandable_segments
from moe_fused.finetune import varlen

from . import full_model, runner
from .experts_4bit import QUANT_TYPE
from .finetune_30b import CAP_GIB, PHASE, QWEN3_30B, SEED, limit_memory, model_flops
from .rows import Row, merge, new_row, read_rows, slug, write_rows
from .training import Measurement, Recipe, measure, trained

NAME = "finetune_packed"
TOKENS, QUICK_TOKENS = (4096, 8192, 16384), (64,)
WHOLE, JOINED = "whole", "whole_joined"
MOST_OVER_WHOLE = 1.05


def recipes_of(kernels: Sequence[str], *, graphs: bool) -> dict[str, Recipe]:
    """The recipe of each contender, by its name."""
    whole = Recipe(cuda_graphs=graphs, joined=False)
    packed = {f"packed_{name}": dataclasses.replace(whole, documents=True, attn=name) for name in kernels}
    return {WHOLE: whole, JOINED: dataclasses.replace(whole, joined=True), **packed}


def kernels_here(device: torch.device) -> list[str]:
    """The kernels for documents that can be had without naming one of the Hub. A CPU has a mask instead."""
    if device.type == "cpu":
        return ["sdpa"]
    return [varlen.TORCH, *([varlen.CUDNN] if varlen.cudnn_refusal(device) is None else [])]


def measure_all(
    training: Any, recipes: dict[str, Recipe], length: int, vocabulary: int, weights: int, *, steps: int, turns: int
) -> dict[str, list[Measurement]]:
    """Measures the contenders in turns, each with a trainer and graphs of its own, and from the same adapters."""
    begin = [(parameter, parameter.detach().cpu().clone()) for parameter in trained(training.model)]
    found: dict[str, list[Measurement]] = {name: [] for name in recipes}
    for turn in range(turns):
        for name in list(recipes)[:: 1 if turn % 2 == 0 else -1]:
            training.recipe = recipes[name]
            with torch.no_grad():
                for parameter, value in begin:
                    parameter.copy_(value)
            with contextlib.suppress(torch.OutOfMemoryError):
                found[name].append(measure(training, length, vocabulary, weights, steps=steps, seed=SEED))
            release_memory(training.model.device)
    return found


def rows_of(found: dict[str, list[Measurement]], length: int, model: Any, device: torch.device) -> list[Row]:
    """The rows of one length."""
    times = {name: statistics.median(each.ms for each in every) for name, every in found.items() if every}
    rows = []
    for name, every in found.items():
        ms = times.get(name)
        peaks = [each.memory["peak"] for each in every if "peak" in each.memory]
        row = new_row(
            current_environment(device), benchmark=NAME, layer=model.name, tokens=length, implementation=name, phase=PHASE,
            weights=QUANT_TYPE, ms=ms, flops=model_flops(model, length), peak_mib=max(peaks) if peaks else None,
            lora_rank=Recipe().expert_rank,
        )  # fmt: skip
        details: dict[str, float] = {}
        if ms is not None:
            details["tokens_per_second"] = 1e3 * length / ms
            details["loss"], details["first_step_ms"] = every[0].losses[0], every[0].first_ms
            if WHOLE in times:
                details["over_whole"] = ms / times[WHOLE]
            for part in every[0].parts:
                details[f"{part}_ms"] = statistics.median(each.parts[part] for each in every)
        rows.append(
            dataclasses.replace(
                row,
                tflops=row.tflops if name == WHOLE else None,  # documents have fewer pairs of tokens
                details={key: float(f"{value:.6g}") for key, value in details.items()},
            )
        )
    return rows


def results_table(rows: Sequence[Row]) -> Table:
    """What was measured, for the terminal."""
    table = Table(title=f"{rows[0].layer}: a step over one sequence", title_justify="left")
    for column in ("tokens", "contender", "ms", "over whole", "attention ms", "other parts ms", "peak GiB", "first ms"):
        table.add_column(column, justify="left" if column == "contender" else "right", no_wrap=True)
    for row in rows:
        parts = {name.removesuffix("_ms"): ms for name, ms in row.details.items() if name.endswith("_ms")}
        first, mixer = parts.pop("first_step", None), parts.pop("attention", None)
        table.add_row(
            str(row.tokens),
            row.implementation,
            "no memory" if row.ms is None else f"{row.ms:.1f}",
            f"{row.details['over_whole']:.3f}" if "over_whole" in row.details else "–",
            "–" if mixer is None else f"{mixer:.1f}",
            f"{sum(parts.values()):.1f}" if parts else "–",
            "–" if row.peak_mib is None else f"{row.peak_mib / 1024:.2f}",
            "–" if first is None else f"{first:.0f}",
        )
    return table


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a step; may be given again.", min=8)] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="A value of finetune --attn; may be given again. Writes only to --output.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Decoder layers. Writes only to --output.", min=1)] = None,
    cap_gib: Annotated[
        float, typer.Option(help="GiB that the allocator may take; 0 for all there are.", min=0)
    ] = CAP_GIB,
    steps: Annotated[int, typer.Option(help="Steps that are timed in each turn.", min=1)] = 3,
    turns: Annotated[int, typer.Option(help="How often each contender has its turn.", min=1)] = 2,
    output: Annotated[Path | None, typer.Option(help="The JSON to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model. Writes only to --output.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
) -> None:
    """Measures steps over whole sequences and over documents, and writes rows under benchmarks/results."""
    from .training_finetune import check, set_up_finetune

    runner.check_device(device, quick)
    runner.check_output(output)
    use_expandable_segments()
    chosen = runner.pick_device(device, "--device cpu --quick")
    model = QWEN3_30B.tiny() if quick else QWEN3_30B
    if layers is not None:
        model = model.shortened(layers)
    environment = current_environment(chosen)
    shared = runner.ROOT / "results" / f"{NAME.replace('_', '-')}_{slug(environment.gpu)}.json"
    path = output or (None if quick or layers or kernel or cap_gib != CAP_GIB else shared)
    console = runner.make_console()
    console.print(f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}")
    rows: list[Row] = []
    lengths = sorted(tokens or (QUICK_TOKENS if quick else TOKENS))
    recipes = recipes_of(kernel or kernels_here(chosen), graphs=chosen.type == "cuda")
    with runner.one_line_errors():
        for recipe in recipes.values():
            check(model.config(), recipe, chosen, lengths[0])
        kept = read_rows(path) if path is not None and path.exists() else []
    try:
        limit_memory(chosen, cap_gib)
        base = full_model.build(model, chosen, dense_experts=False, quant_type=QUANT_TYPE, seed=SEED)
        full_model.run_fused(recompute=False)
        weights = sum(value.nbytes for value in full_model.storage(base))
        torch.manual_seed(SEED)
        training = set_up_finetune(base, recipes[WHOLE])
        for length in lengths:
            found = measure_all(training, recipes, length, model.vocabulary, weights, steps=steps, turns=turns)
            rows += rows_of(found, length, model, chosen)
            if path is not None:
                with runner.one_line_errors():
                    write_rows(path, merge(kept, rows))
    except ValueError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    finally:
        moe_fused.disable()
    console.print(results_table(rows))
    if path is not None:
        console.print(f"Wrote {path}")
    for row in rows:
        if (over := row.details.get("over_whole", 1.0)) > MOST_OVER_WHOLE:
            console.print(f"{row.tokens} tokens: {row.implementation} takes {over:.3f} times as long as {WHOLE}")


if __name__ == "__main__":
    typer.run(main)
