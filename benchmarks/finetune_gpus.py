"""Compares fine-tuning on several GPUs with one: each with the whole model, or with a part of it (``--shard``).

    python -m benchmarks.finetune_gpus --gpus 2             48 layers of Qwen3-30B-A3B, 4096 tokens to a batch
    python -m benchmarks.finetune_gpus --gpus 2 --model qwen3-235b-a22b --layers 8 --contender sharded --output rows.json
    python -m benchmarks.finetune_gpus --device cpu --quick --gpus 2

Weights are random and in 4 bits. All contenders have the trainer of the command and the same batches to a GPU. Each runs in
processes of its own, which torchrun starts, one contender after the other:

- ``one_gpu``: a step on one GPU.
- ``replicated``: a step on all GPUs, each of which holds the whole model.
- ``sharded``: a step on all GPUs, which divide the experts, their adapters and the optimizer's state among them.
- ``sharded_eager``: the same without CUDA graphs.

A row's ``tokens`` are those of a batch, and its ``ms`` are a step, with the batches that are accumulated: the median over
the steps, each timed from an idle GPU until the GPU is idle again. Peaks are what the allocator of the first GPU held.
Further numbers of a row, under ``details``:

- ``gpus``, ``accumulation``, and ``tokens_per_second`` of all GPUs together.
- ``weights_mib``: what the model takes on the first GPU while nothing is gathered, without adapters.
- ``used_mib``: what the GPU has in use at the end, which includes CUDA's context and what NCCL takes.
- ``predicted_mib``: the peak that the plan foresaw.
- ``over_one_gpu``: tokens per second over those of ``one_gpu``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, disable_progress_bars
from transformers.trainer_utils import SaveStrategy

import moe_fused
from moe_fused.benchmark.harness import MIB, current_environment
from moe_fused.checkpoints.share import local
from moe_fused.devices import use_expandable_segments
from moe_fused.finetune.adapters import adapt
from moe_fused.finetune.data import fit
from moe_fused.finetune.options import Options
from moe_fused.finetune.parallel import Peers
from moe_fused.finetune.plan import MemoryPlan, plan_run
from moe_fused.finetune.precheck import Process
from moe_fused.finetune.resolve import set_up
from moe_fused.finetune.sharding import Sharding
from moe_fused.finetune.trainer import make_trainer

from . import full_model, runner
from .experts_4bit import QUANT_TYPE
from .finetune_30b import DEFAULT_MODEL, PHASE, SEED, model_flops
from .finetune_methods import READY, Timer, random_rows
from .model import Model
from .models import BY_NAME
from .rows import Row, merge, new_row, read_rows, slug, write_rows
from .training_finetune import random_options, tokenizer

NAME = "finetune_gpus"
ONE, REPLICATED, SHARDED, EAGER = "one_gpu", "replicated", "sharded", "sharded_eager"
CONTENDERS = (ONE, REPLICATED, SHARDED, EAGER)


@dataclasses.dataclass(frozen=True)
class Job:
    """What one contender measures.

    Attributes:
        contender: One of ``CONTENDERS``.
        model: A name in ``benchmarks.models``.
        tiny: Whether the model is made tiny.
        layers: The number of decoder layers; None for all.
        length: The number of tokens of a batch.
        accumulation: The number of batches in a step of each GPU.
        steps: The number of steps that are timed.
        device: "cuda" or "cpu".
    """

    contender: str
    model: str
    tiny: bool
    layers: int | None
    length: int
    accumulation: int
    steps: int
    device: str

    def make_model(self) -> Model:
        """Returns the model that is trained."""
        model = Model(self.model, BY_NAME[self.model].config())
        model = model.tiny() if self.tiny else model
        return model if self.layers is None else model.shortened(self.layers)

    @property
    def shards(self) -> bool:
        """Whether the processes divide the model."""
        return self.contender in (SHARDED, EAGER)

    def options(self, output: str) -> Options:
        """Returns the options of the run."""
        graphs = False if self.contender == EAGER else None
        return random_options(
            torch.device(self.device), output, self.length, self.steps + READY,
            gradient_accumulation=self.accumulation, shard=self.shards, cuda_graphs=graphs,
        )  # fmt: skip

    def plan(self, options: Options, device: torch.device, process: Process) -> MemoryPlan:
        """Returns the plan of the run on a GPU, which need not be here."""
        return plan_run(set_up(options, self.make_model().config(), device, process), plain_text=True)


def measure(job: Job) -> dict[str, float] | None:
    """Measures a contender in this process, which is one of its processes. Only the first returns what was measured."""
    use_expandable_segments()
    disable_progress_bars()
    process = Process.of_environment(os.environ)
    device = torch.device(job.device, process.local_rank) if job.device == "cuda" else torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    peers = Peers(process)
    with tempfile.TemporaryDirectory() as output:
        options = job.options(output)
        if not process.is_alone:
            peers.connect(device, options)
        sizes = job.make_model()
        model = full_model.build(sizes, device, seed=SEED, processes=process.world_size if job.shards else 1)
        full_model.run_fused(recompute=False)
        plan = job.plan(options, device, process)
        milliseconds, peak, used = _train(model, plan, peers)
        frozen = (value for value in full_model.storage(model) if not value.requires_grad)
        weights = sum(local(value).nbytes for value in frozen) / MIB
    peers.leave()
    if not process.is_main:
        return None
    tokens = job.length * job.accumulation * process.world_size
    return {
        "ms": milliseconds,
        "peak": peak,
        "gpus": process.world_size,
        "accumulation": job.accumulation,
        "tokens_per_second": 1e3 * tokens / milliseconds,
        "weights_mib": weights,
        "used_mib": used,
        "predicted_mib": plan.prediction.allocated / MIB,
    }


def _train(model: Any, plan: MemoryPlan, peers: Peers) -> tuple[float, float, float]:
    """Trains for the steps of a run, and returns the milliseconds of a step, the peak in MiB, and the MiB in use."""
    run, device = plan.run, plan.run.device
    sharding = Sharding(model, run, peers) if run.options.shard else None
    adapted = adapt(model, run)
    rows = random_rows(run.batching.accumulation * run.batching.processes * 2, run.batching.length, run.vocabulary)
    dataset = fit(Dataset.from_dict({"input_ids": rows, "labels": rows}), run.batching)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer: Any = make_trainer(adapted, tokenizer(), dataset, run, peers=peers, sharding=sharding)
    trainer.args.save_strategy = SaveStrategy.NO
    timer = Timer(trainer, device)
    trainer.add_callback(timer)
    trainer.train_from(None)
    if device.type != "cuda":
        return statistics.median(timer.steps[READY:]), 0.0, 0.0
    free, total = torch.cuda.mem_get_info(device)
    return statistics.median(timer.steps[READY:]), torch.cuda.max_memory_reserved(device) / MIB, (total - free) / MIB


def launch(job: Job, gpus: int) -> dict[str, float]:
    """Measures a contender in new processes.

    Raises:
        RuntimeError: They failed; the error has the end of what they said.
    """
    found: dict[str, float] = runner.in_processes(NAME, job.contender, job, 1 if job.contender == ONE else gpus)
    return found


def row_of(job: Job, found: Mapping[str, float], device: torch.device, one: float | None) -> Row:
    """The row of a contender.

    Args:
        found: What ``measure`` returned.
        device: A device of the kind that it ran on.
        one: The tokens per second of one GPU, if they were measured.
    """
    model = job.make_model()
    batches = int(found["gpus"]) * job.accumulation
    row = new_row(
        current_environment(device),
        benchmark=NAME,
        layer=model.name,
        tokens=job.length,
        implementation=job.contender,
        phase=PHASE if job.accumulation == 1 else f"{PHASE}_of_{job.accumulation}",
        weights=QUANT_TYPE,
        ms=found["ms"],
        flops=batches * model_flops(model, job.length),
        peak_mib=found["peak"] or None,
        lora_rank=Options.expert_rank,
    )
    details = {name: value for name, value in found.items() if name not in ("ms", "peak")}
    if one is not None and job.contender != ONE:
        details["over_one_gpu"] = found["tokens_per_second"] / one
    return dataclasses.replace(row, details={key: float(f"{value:.6g}") for key, value in details.items()})


def job_of(row: Row) -> tuple[Job, int]:
    """Returns what a row of a full-size model was measured with, and the number of GPUs."""
    shortened = re.fullmatch(r"(.+)-(\d+)-layers", row.layer)
    model, layers = (shortened[1], int(shortened[2])) if shortened else (row.layer, None)
    job = Job(row.implementation, model, False, layers, row.tokens, int(row.details["accumulation"]), 1, "cuda")
    return job, int(row.details["gpus"])


def main(
    gpus: Annotated[int, typer.Option(help="How many GPUs take part.", min=1)] = 2,
    model_name: Annotated[str, typer.Option("--model", help="One of benchmarks.models, by its name.")] = DEFAULT_MODEL,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a batch.", min=8)] = None,
    accumulation: Annotated[
        list[int] | None, typer.Option(help="Batches in a step of each GPU; may be given again.", min=1)
    ] = None,
    contender: Annotated[
        list[str] | None, typer.Option(help="one_gpu, replicated, sharded or sharded_eager; may be given again.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Decoder layers. Writes only to --output.", min=1)] = None,
    steps: Annotated[int, typer.Option(help="Steps that are timed.", min=1)] = 8,
    output: Annotated[Path | None, typer.Option(help="The JSON to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model. Writes only to --output.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures fine-tuning on several GPUs, and writes rows under benchmarks/results."""
    if job is not None:
        found = measure(Job(**json.loads(job)))
        if found is not None and output is not None:
            output.write_text(json.dumps(found), encoding="utf-8")
        return
    runner.choices("model", [model_name], tuple(BY_NAME), ())
    contenders = runner.choices("contender", contender, CONTENDERS, CONTENDERS)
    runner.check_device(device, quick)
    runner.check_output(output)
    chosen = runner.pick_device(device, "--device cpu --quick")
    runner.check_gpus(device, gpus, "--gpus")
    console, environment = runner.make_console(), current_environment(chosen)
    console.print(
        f"{gpus} × {environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}"
    )
    shared = runner.ROOT / "results" / f"{NAME.replace('_', '-')}_{slug(environment.gpu)}.json"
    path = output or (None if quick or layers is not None or contender else shared)
    rows: list[Row] = []
    for batches in accumulation or ([1, 2] if quick else [1, 4]):
        one = None
        for name in contenders:
            task = Job(name, model_name, quick, layers, tokens or (32 if quick else 4096), batches, steps, device)
            found = launch(task, gpus)
            one = found["tokens_per_second"] if name == ONE else one
            rows.append(row_of(task, found, chosen, one))
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in rows[-1].details.items())
            console.print(f"{name}: {found['ms']:.1f} ms, {found['peak'] / 1024:.2f} GiB; {numbers}")
            if path is not None:
                with runner.one_line_errors():
                    write_rows(path, merge(read_rows(path) if path.exists() else [], rows))
    moe_fused.disable()
    if path is not None:
        console.print(f"Wrote {path}")


if __name__ == "__main__":
    typer.run(main)
