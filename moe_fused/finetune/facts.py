"""The facts about a run that its card states, in words."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_fused import __version__
from moe_fused.hub import installed
from moe_fused.memory import GIB

from .stream import Streamed

if TYPE_CHECKING:
    from .data import Prepared, Report
    from .formats import Kind
    from .options import Options
    from .plan import MemoryPlan
    from .resolve import Batching, ResolvedRun
    from .trainer import Finetuning

Table = Mapping[str, str]
# What is learned from, by the kinds of rows.
_LEARNED: Mapping[Kind, str] = {
    "chat": "all tokens of the chats, the words of the user included",
    "text": "all tokens of the texts",
    "completion": "the completions, without their prompts",
    "preference": "pairs of answers, without their prompts",
    "rated completion": "answers with a label, without their prompts",
}
_OF_THE_ASSISTANT: Mapping[Kind, str] = {
    "chat": "what the assistant says in the chats",
    "completion": "what the assistant says in the completions",
}
_PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Facts:
    """The tables of a card, each of words by their names. A table without entries is left out.

    Attributes:
        data: The rows that the run learned from and was evaluated on.
        training: The options that matter, and the course of the training.
        evaluation: The results of the evaluation of the adapter that is written.
        machine: The versions of the libraries, the device, the time and the memory.
    """

    data: Table
    training: Table
    evaluation: Table
    machine: Table


def facts(
    trainer: Finetuning,
    plan: MemoryPlan,
    prepared: Prepared | Streamed,
    kinds: Collection[Kind],
    begin: float,
    memory: float | None,
) -> Facts:
    """Collects the facts about a run that has ended.

    Args:
        trainer: The trainer, after the training.
        plan: The plan of the run.
        prepared: The data of the run.
        kinds: The kinds of its rows.
        begin: The time at which the run was started, by ``time.perf_counter``.
        memory: The peak of the memory of a GPU in GiB, the largest of all GPUs; None on a CPU.
    """
    run, device = plan.run, plan.run.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    options = run.options
    data = {"trained on": _trained_on(options, prepared)}
    if prepared.evaluation is not None:
        source = f"{options.eval_share} of these rows, set aside"
        if options.eval_dataset is not None:
            source = _source(options.eval_dataset, None, options.eval_split)
        data["evaluated on"] = _rows(source, prepared.evaluation.report)
    machine = {package: version for package in _PACKAGES if (version := installed(package)) is not None}
    machine |= {
        "moe-fused": __version__,
        "device": kind if run.batching.processes == 1 else f"{run.batching.processes} × {kind}",
        "time since the last start": f"{time.perf_counter() - begin:.0f} s",
    }
    if memory is not None:
        machine["peak memory of tensors"] = f"{memory:.2f} GiB, predicted {plan.prediction.allocated / GIB:.2f} GiB"
    course = {"steps": str(trainer.state.global_step), "tokens": f"{trainer.tokens:,}"}
    return Facts(data, {**course, **choices(run, kinds)}, trainer.evaluation_facts(), machine)


def choices(run: ResolvedRun, kinds: Collection[Kind]) -> Table:
    """The options of a run that matter most for its result, and what the run has chosen for those left open.

    Args:
        run: The record of the run.
        kinds: The kinds of the rows that it learned from.
    """
    options, batching = run.options, run.batching
    beta = f", beta {run.beta:g}" if options.has_preferences else ""
    chosen = {
        "method": f"{options.method}{beta}",
        "weights": _weights(run),
        "computation": str(run.dtype).removeprefix("torch."),
        **_adapters(run),
        "dropout of adapters": f"{options.lora_dropout:g}",
        "sequences": f"{batching.length} tokens, packing {batching.packing}",
        "step": _step(batching),
        "epochs": f"{options.epochs:g}" if options.max_steps is None else f"until step {options.max_steps}",
        "learning rate": f"{run.learning_rate:g}, {options.scheduler}, warmup over {options.warmup:g} of all steps",
        "optimizer": f"{run.optimizer}, weight decay {options.weight_decay:g}",
        "learned from": learned(kinds, assistant_only=options.assistant_only_loss),
        "seed": str(options.seed),
    }
    for name in ("trainer", "lora"):
        chosen |= {f"{name}.{field}": str(value) for field, value in (getattr(options, name) or {}).items()}
    return chosen


def learned(kinds: Collection[Kind], *, assistant_only: bool) -> str:
    """What a run learns from in rows of these kinds, in words.

    Args:
        kinds: The kinds of the rows.
        assistant_only: Whether it learns only from what the assistant says.
    """
    words = {**_LEARNED, **(_OF_THE_ASSISTANT if assistant_only else {})}
    return "; ".join(words[kind] for kind in words if kind in kinds)


def _step(batching: Batching) -> str:
    rows = "1 sequence" if batching.sequences == 1 else f"{batching.sequences} sequences"
    batches = f"1 batch of {rows}" if batching.accumulation == 1 else f"{batching.accumulation} batches of {rows} each"
    share = f" on each of {batching.processes} processes" if batching.processes > 1 else ""
    return f"{batches}{share}, at most {batching.step_tokens:,} tokens"


def _weights(run: ResolvedRun) -> str:
    """Names the format of the weights."""
    if run.quant_type is None:
        return "dense"
    if run.quantize_to is None:
        return f"{run.quant_type if run.linears_in_4bit else f'experts in {run.quant_type}'}, as in the checkpoint"
    return f"{run.quantize_to}, double quantization" if run.linears_in_4bit else f"experts in {run.quantize_to}"


def _adapters(run: ResolvedRun) -> Table:
    """The adapters and what is trained in full."""
    whole = {"trained in full": ", ".join(run.whole.names)} if run.whole.names else {}
    if run.start is not None:
        layers = {name: run.start.described(experts=name == "experts") for name in ("linear layers", "experts")}
        return {f"adapters on {name}": _described(*found) for name, found in layers.items()} | whole
    ranks = run.ranks
    kinds = {
        "attention": (ranks.attention, run.attention_alpha, ", ".join(run.attention_modules)),
        "experts": (ranks.expert, run.expert_alpha, ""),
        "shared experts": (ranks.shared_expert, run.shared_expert_alpha, ""),
        "routers": (ranks.router, 2.0 * ranks.router, ""),
    }
    found = {}
    for name, (rank, alpha, modules) in kinds.items():
        words = f"rank {rank}, alpha {alpha:g}{modules and ': '}{modules}"
        found[f"adapters on {name}"] = words if rank else "none"
    if not ranks.shared_expert:
        del found["adapters on shared experts"]
    return found | whole


def _described(ranks: Collection[int], alphas: Collection[float], names: Collection[str]) -> str:
    """The adapters that a run went on from, in words. Their layers may have several ranks and alphas."""
    words = (" and ".join(f"{number:g}" for number in numbers) for numbers in (ranks, alphas))
    return "rank {}, alpha {}: {}".format(*words, ", ".join(names)) if names else "none"


def _trained_on(options: Options, prepared: Prepared | Streamed) -> str:
    sources = [
        (f"{part.share:g} of " if part.share is not None else "")
        + _source(part.dataset, part.config or options.dataset_config, part.split or options.split)
        for part in options.datasets
    ]
    if isinstance(prepared, Streamed):
        return "; ".join(f"{source}: {read}" for source, read in zip(sources, prepared.read.values(), strict=True))
    report = prepared.report
    if len(sources) == 1:
        return _rows(sources[0], report)
    used = zip(sources, report.used.values(), strict=True)
    return _rows("; ".join([*(f"{source}: {counts}" for source, counts in used), "together"]), report)


def _source(name: str, config: str | None, split: str) -> str:
    """A data set in words. Of a path only the last part is told, because cards are published."""
    if Path(name).exists():
        return Path(name).resolve().name
    return f"{name}, {f'configuration {config}, ' if config else ''}split {split}"


def _rows(source: str, report: Report) -> str:
    left_out = f"; {len(report.left_out):,} rows left out" if report.left_out else ""
    return f"{source}: {report.rows:,} rows, {report.tokens:,} tokens, {report.learned:,} to learn from{left_out}"
