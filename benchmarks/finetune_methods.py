"""Compares the passes of ``moe-fused finetune`` with its plain step: evaluations, the steps beside them, and preferences.

    python -m benchmarks.finetune_methods                    48 layers of Qwen3-30B-A3B, 4096 tokens, in 24 GiB
    python -m benchmarks.finetune_methods --layers 4         a short model to try things on, writes nothing
    python -m benchmarks.finetune_methods --device cpu --quick

Weights are random and in 4 bits. All contenders have the trainer of the command, the same adapters and as many tokens in a
step, in sequences without padding:

- ``sft``: a step of supervised training without an evaluation, on one sequence.
- ``sft_beside_evaluation``: a step of a run that evaluates every few steps. The evaluations themselves are not part of it.
- ``evaluation``: those evaluations, by sequence. It is a forward pass without gradients, with its loss.
- ``dpo``: a step of ``--method dpo``, on two sequences of half as many tokens, which the model computes with its adapters
  and, as the reference, without them.

``sft`` and ``sft_beside_evaluation`` take turns, each the first in every second turn. A time is the median of the
steps, each from an idle GPU to its end. Peaks are what the allocator held, because CUDA graphs take their memory for
good. Further numbers of a row, under ``details``:

- ``tokens_per_second``.
- ``over_sft``, of ``sft_beside_evaluation``: its time over that of ``sft``.
- ``over_sft_and_evaluation``, of ``dpo``: its time over that of ``sft`` and ``evaluation`` together.
- ``predicted_mib``: the peak that the plan foresaw.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

import moe_fused
from moe_fused.benchmark.harness import MIB, current_environment, release_memory
from moe_fused.devices import use_expandable_segments
from moe_fused.finetune.adapters import adapt
from moe_fused.finetune.data import fit
from moe_fused.finetune.options import Options
from moe_fused.finetune.plan import plan_run
from moe_fused.finetune.resolve import ResolvedRun, set_up
from moe_fused.finetune.trainer import make_trainer

from . import full_model, runner
from .experts_4bit import QUANT_TYPE
from .finetune_30b import CAP_GIB, DEFAULT_MODEL, PHASE, SEED, limit_memory, model_flops
from .model import Model
from .models import BY_NAME
from .rows import Row, merge, new_row, read_rows, slug, write_rows
from .training_finetune import random_options, tokenizer

NAME = "finetune_methods"
SFT, BESIDE, EVALUATION, DPO = "sft", "sft_beside_evaluation", "evaluation", "dpo"
# The first steps of a run compile kernels and record graphs, and are not timed.
READY = 3
EVAL_STEPS, EVAL_ROWS = 4, 6


class Timer(TrainerCallback):
    """Times the steps and the evaluations of a trainer, in milliseconds."""

    def __init__(self, trainer: Any, device: torch.device) -> None:
        self.steps: list[float] = []
        self.evaluations: list[float] = []
        self._device, self._evaluate, self._start = device, trainer.evaluate, 0.0
        trainer.evaluate = self._timed_evaluation

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(1e3 * (self._now() - self._start))

    def _timed_evaluation(self, *args: Any, **kwargs: Any) -> Any:
        start = self._now()
        metrics = self._evaluate(*args, **kwargs)
        self.evaluations.append(1e3 * (self._now() - start))
        return metrics

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Timed:
    """What a run took: milliseconds of its steps and evaluations, and MiB, measured and predicted."""

    steps: list[float]
    evaluations: list[float]
    peak: float | None
    predicted: float


def resolved(model: Any, output: str, length: int, steps: int, **options: Any) -> tuple[ResolvedRun, float]:
    """The record of a run of the command over random tokens, and the MiB that its plan predicts."""
    given = random_options(model.device, output, length, steps, **options)
    plan = plan_run(set_up(given, model.config, model.device), plain_text=True)
    return plan.run, plan.prediction.allocated / MIB


def random_rows(rows: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random tokens, (rows, length), the same each time."""
    generator = torch.Generator().manual_seed(SEED)
    tokens: list[list[int]] = torch.randint(vocabulary, (rows, length), generator=generator).tolist()
    return tokens


def train(model: Any, run: ResolvedRun, predicted: float, dataset: Dataset, evaluation: Dataset | None = None) -> Timed:
    """Trains for the steps of a run."""
    device = run.device
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer: Any = make_trainer(model, tokenizer(), dataset, run, evaluation=evaluation)
    trainer.args.save_strategy = SaveStrategy.NO
    timer = Timer(trainer, device)
    trainer.add_callback(timer)
    trainer.train_from(None)
    peak = torch.cuda.max_memory_reserved(device) / MIB if device.type == "cuda" else None
    for parameter in trainer.model.parameters():
        parameter.grad = None
    return Timed(timer.steps[READY:], timer.evaluations[1:], peak, predicted)


def supervised(model: Any, adapted: Any, length: int, steps: int, *, evaluates: bool) -> Timed:
    """Trains on whole sequences, with or without evaluations of others."""
    with tempfile.TemporaryDirectory() as output:
        more = {"eval_dataset": "random", "eval_steps": EVAL_STEPS} if evaluates else {}
        run, predicted = resolved(model, output, length, steps + READY, **more)
        tokens = random_rows(steps + READY + EVAL_ROWS, length, run.vocabulary)
        train_rows, held = (
            fit(Dataset.from_dict({"input_ids": rows, "labels": rows}), run.batching)
            for rows in (tokens[EVAL_ROWS:], tokens[:EVAL_ROWS])
        )
        return train(adapted, run, predicted, train_rows, held if evaluates else None)


def preferences(model: Any, length: int, steps: int) -> Timed:
    """Trains on pairs of answers of ``length`` tokens each, of which a quarter is the prompt."""
    with tempfile.TemporaryDirectory() as output:
        run, predicted = resolved(model, output, length, steps + READY, method="dpo")
        prompts, chosen, rejected = (
            random_rows(steps + READY, tokens, run.vocabulary)
            for tokens in (length // 4, length - length // 4, length - length // 4)
        )
        rejected = [answer[::-1] for answer in rejected]
        rows = Dataset.from_dict({"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected})
        return train(model, run, predicted, rows)


def measure(model: Any, length: int, steps: int, turns: int) -> dict[str, tuple[float, Timed]]:
    """Milliseconds of each contender, with the run that they are from."""
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as output:
        adapted = adapt(model, resolved(model, output, length, steps)[0])
    plain: list[Timed] = []
    beside: list[Timed] = []
    for turn in range(turns):
        # Each is the first as often as the other, because a GPU that gets warmer gets slower.
        order = [(plain, False), (beside, True)]
        for timed, evaluates in order if turn % 2 == 0 else order[::-1]:
            timed.append(supervised(model, adapted, length, steps, evaluates=evaluates))
    sft, evaluated = (statistics.median(ms for timed in each for ms in timed.steps) for each in (plain, beside))
    evaluation = statistics.median(ms for timed in beside for ms in timed.evaluations) / EVAL_ROWS
    bare = adapted.unload()
    pairs = preferences(bare, length // 2, steps)
    return {
        SFT: (sft, plain[-1]),
        BESIDE: (evaluated, beside[-1]),
        EVALUATION: (evaluation, beside[-1]),
        DPO: (statistics.median(pairs.steps), pairs),
    }


def rows_of(
    found: dict[str, tuple[float, Timed]], model: Model, device: torch.device, length: int, rank: int
) -> list[Row]:
    """The rows of one length."""
    ms = {name: time for name, (time, _) in found.items()}
    ratios = {
        BESIDE: {"over_sft": ms[BESIDE] / ms[SFT]},
        DPO: {"over_sft_and_evaluation": ms[DPO] / (ms[SFT] + ms[EVALUATION])},
    }
    operations = {
        SFT: model_flops(model, length),
        BESIDE: model_flops(model, length),
        EVALUATION: 2 * model.multiplied_parameters * length + model.attention_flops(length),
        DPO: 2 * model_flops(model, length // 2)
        + 2 * (2 * model.multiplied_parameters * (length // 2) + model.attention_flops(length // 2)),
    }
    rows = []
    for name, (time_ms, timed) in found.items():
        row = new_row(
            current_environment(device),
            benchmark=NAME,
            layer=model.name,
            tokens=length,
            implementation=name,
            phase=PHASE,
            weights=QUANT_TYPE,
            ms=time_ms,
            flops=operations[name],
            peak_mib=timed.peak,
            lora_rank=rank,
        )
        details = {
            "tokens_per_second": 1e3 * length / time_ms,
            "predicted_mib": timed.predicted,
            **ratios.get(name, {}),
        }
        rows.append(dataclasses.replace(row, details={key: float(f"{value:.6g}") for key, value in details.items()}))
    return rows


def main(
    model_name: Annotated[str, typer.Option("--model", help="One of benchmarks.models, by its name.")] = DEFAULT_MODEL,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a step; may be given again.", min=8)] = None,
    layers: Annotated[int | None, typer.Option(help="Decoder layers. Writes only to --output.", min=1)] = None,
    cap_gib: Annotated[
        float, typer.Option(help="GiB that the allocator may take; 0 for all there are.", min=0)
    ] = CAP_GIB,
    steps: Annotated[int, typer.Option(help="Steps that are timed in each turn.", min=1)] = 8,
    turns: Annotated[int, typer.Option(help="Turns of training without and with evaluations.", min=1)] = 4,
    output: Annotated[Path | None, typer.Option(help="The JSON to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model. Writes only to --output.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
) -> None:
    """Measures evaluations and preferences against a plain step, and writes rows under benchmarks/results."""
    runner.choices("model", [model_name], tuple(BY_NAME), ())
    runner.check_device(device, quick)
    runner.check_output(output)
    use_expandable_segments()
    disable_progress_bars()
    chosen = runner.pick_device(device, "--device cpu --quick")
    model = Model(model_name, BY_NAME[model_name].config())
    model = model.tiny() if quick else model
    model = model if layers is None else model.shortened(layers)
    console = runner.make_console()
    environment = current_environment(chosen)
    console.print(f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}")
    shared = runner.ROOT / "results" / f"{NAME.replace('_', '-')}_{slug(environment.gpu)}.json"
    path = output or (None if quick or layers is not None or model_name != DEFAULT_MODEL else shared)
    limit_memory(chosen, cap_gib)
    rows: list[Row] = []
    try:
        for length in tokens or ([32] if quick else [4096]):
            built = full_model.build(model, chosen, dense_experts=False, seed=SEED)
            full_model.run_fused(recompute=False)
            rows += rows_of(measure(built, length, steps, turns), model, chosen, length, Options.expert_rank)
            del built
            moe_fused.disable()
            release_memory(chosen)
            for row in rows[-4:]:
                peak = "" if row.peak_mib is None else f", {row.peak_mib / 1024:.2f} GiB"
                numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.details.items())
                console.print(f"{row.tokens} tokens, {row.implementation}: {row.ms:.1f} ms{peak}; {numbers}")
            if path is not None:
                with runner.one_line_errors():
                    write_rows(path, merge(read_rows(path) if path.exists() else [], rows))
    finally:
        moe_fused.disable()
    if path is not None:
        console.print(f"Wrote {path}")


if __name__ == "__main__":
    typer.run(main)
