"""Predicts the memory of a run before anything is loaded, and refuses a run that cannot fit.

``plan_run`` predicts the memory of one record of ``resolve.candidates`` after another, and takes the first that fits.
``suggest_gpus`` says on how many GPUs a run that does not fit would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_fused.memory import (
    CONNECTIONS,
    CONTEXT,
    GIB,
    MIB,
    Prediction,
    Sizes,
    Workload,
    attention_layers,
    attention_results,
    predict,
    sizes_of,
)

from .options import flag
from .precheck import check_shared
from .resolve import LENGTHS, ModelSetup, ResolvedRun, candidates, shard_refusal, with_options

# What the parts of a prediction are, in a few words; docs/finetuning.md says more.
PARTS = {
    "experts": "weights of the experts",
    "other weights": "attention, embeddings, head, norms, routers",
    "adapters": "the factors that are trained",
    "modules trained in full": "copies of the modules of --modules-to-save",
    "optimizer state": "what stays on the GPU",
    "optimizer state, paged": "what may move to the host",
    "cuBLAS": "workspaces of the library",
    "CUDA context": "what CUDA takes for itself",
    "NCCL": "what connects the GPUs of a run",
    "gradient buckets": "gradients that GPUs average together",
    "gathered weights": "shared weights that are whole for a moment",
    "gradients": "of all that is trained",
    "activations": "what layers keep for the backward pass",
    "copies of attention": "on their way to or from the host",
    "layer": "kept by a layer that is computed again",
    "expert rows": "made by the backward pass of the experts",
    "expert workspace": "experts that are dequantized for a moment",
    "attention": "made by the backward pass of attention",
    "recurrence": "made by a recurrent layer",
    "loss": "logits, hidden states and their gradient",
    "reference pass": "the model without adapters, for preferences",
    "optimizer step": "made by the step of the optimizer",
}
# Room for gaps between the allocator's blocks, which it cannot use.
SLACK = 256 * MIB
# The numbers of GPUs on which a run is tried that does not fit.
GPUS = (2, 4, 8)


@dataclass(frozen=True)
class MemoryPlan:
    """A run with the prediction of its memory and the limit for it.

    Attributes:
        run: The run that was planned.
        prediction: The prediction of its memory.
        limit: The bytes of GPU memory that the run may use; None on a CPU.
        notes: What the user should know about recurrent layers.
    """

    run: ResolvedRun
    prediction: Prediction
    limit: int | None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the run needs no more memory than it may use."""
        return self.limit is None or self.needed <= self.limit

    @property
    def needed(self) -> int:
        """The bytes that must be free for the run."""
        return self.prediction.total + SLACK

    def show(self, console: Console) -> None:
        """Prints the parts of the memory, the trainable parameters and the tokens of a step."""
        batching = self.run.batching
        unit, size_of_unit = ("GiB", GIB) if self.prediction.total >= GIB // 2 else ("MiB", MIB)
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("memory")
        table.add_column(unit, justify="right")
        table.add_column("what it is")
        for part, size in self.prediction.parts.items():
            table.add_row(part, f"{size / size_of_unit:.2f}", PARTS[part])
        table.add_row("predicted peak", f"{self.prediction.total / size_of_unit:.2f}", "", style="bold")
        if self.limit is not None:
            table.add_row("limit", f"{self.limit / size_of_unit:.2f}", "")
        console.print(table)
        answers = {} if batching.answers == 1 else {"answers": batching.answers}
        sizes = {"batch": batching.batch_size, **answers, "length": batching.length}
        sizes["accumulation"] = batching.accumulation
        if batching.processes > 1:
            sizes["processes"] = batching.processes
        console.print(
            f"{self.prediction.trainable:,} trainable parameters; {batching.step_tokens:,} tokens to a step at most: "
            f"{' x '.join(map(str, sizes.values()))} ({' x '.join(sizes)}), packing {batching.packing}",
            highlight=False,
            soft_wrap=True,
        )
        for note in self.notes:
            console.print(note, highlight=False, markup=False, soft_wrap=True)


def _own(limit: int | None) -> int | None:
    """Returns the limit of a process that is alone."""
    return limit


def plan_run(
    setup: ModelSetup, *, plain_text: bool, rows: int = 0, agreed: Callable[[int | None], int | None] = _own
) -> MemoryPlan:
    """Plans the run with the longest sequences that fit, and with CUDA graphs if they fit as well.

    Args:
        setup: The record of everything that does not depend on the data.
        plain_text: Whether the rows are plain text.
        rows: The number of rows, or 0 if it is not known.
        agreed: Returns the limit of all processes for that of this one, so that all plan the same run.

    Raises:
        ValueError: The run cannot fit, and the error names an option with which it would. It is also raised if the
            model or the device does not support what the options ask for.
    """
    for plan in plans_of(setup, plain_text=plain_text, rows=rows, agreed=agreed):
        if plan.fits:
            return plan
    raise ValueError(_advice(plan, sizes_of(setup.skeleton, setup.dense.names)))


def plans_of(
    setup: ModelSetup, *, plain_text: bool, rows: int = 0, agreed: Callable[[int | None], int | None] = _own
) -> Iterator[MemoryPlan]:
    """Yields the plans of all runs that ``plan_run`` chooses from, in the order in which they are preferred.

    The arguments are those of ``plan_run``.
    """
    sizes, limit = sizes_of(setup.skeleton, setup.dense.names), agreed(_limit(setup))
    for run in candidates(setup, plain_text=plain_text, rows=rows):
        yield _plan(run, sizes, limit)


def _plan(run: ResolvedRun, sizes: Sizes, limit: int | None) -> MemoryPlan:
    work = workload_of(run)
    notes = list(_notes(sizes, work))
    if work.sharded and limit is not None:
        whole = MemoryPlan(run, predict(sizes, replace(work, sharded=False)), limit)
        if whole.fits:
            notes.append(f"note: without --shard the run needs {_gib(whole.needed)}, which fits, too, and is faster")
    return MemoryPlan(run, predict(sizes, work), limit, tuple(notes))


def workload_of(run: ResolvedRun) -> Workload:
    """Returns how a run trains its model, as far as memory depends on it."""
    options, batching = run.options, run.batching
    # Documents side by side go through the model as one sequence with all tokens of the batch.
    batch, joined = (1, batching.batch_size) if batching.has_documents else (batching.sequences, 1)
    return Workload(
        batch=batch,
        length=joined * batching.length,
        accumulation=batching.accumulation,
        quantized=run.is_4bit,
        quant_type=run.quant_type or "nf4",
        itemsize=run.dtype.itemsize,
        adapter_itemsize=run.adapter_dtype.itemsize,
        factors=None if run.start is None else run.start.factors,
        attention_rank=run.ranks.attention,
        attention_modules=run.attention_modules,
        expert_rank=run.ranks.expert,
        shared_expert_rank=run.ranks.shared_expert,
        shared_expert_modules=run.shared_expert_modules,
        whole=run.whole.tensors,
        whole_modules=run.whole.names,
        whole_itemsize=run.dtype.itemsize,
        dropout=options.lora_dropout > 0,
        optimizer=run.optimizer,
        checkpointing=options.gradient_checkpointing,
        kept_attention=options.keep_attention,
        masked=batching.has_documents and run.attention == "sdpa" and not run.maskless,
        eager=run.attention == "eager" and not run.maskless,
        flash=run.kernel is not None,
        documents=batching.has_documents,
        fused_norms=run.liger,
        gpu=run.device.type != "cpu",
        graphs=run.graphs,
        reference=options.has_preferences,
        packages=run.packages,
        processes=batching.processes,
        sharded=options.shard,
    )


def _notes(sizes: Sizes, work: Workload) -> Iterator[str]:
    """Says what computes the recurrent layers, and what of them the plan does not count.

    Raises:
        ValueError: The package that would compute a layer cannot read its weights.
    """
    for kind in sizes.recurrent:
        mixer, count = kind.mixer, f"{kind.layers} layer{'s' if kind.layers > 1 else ''} of {kind.mixer.title}"
        in_4bit = any(kind.has(linear.name) and work.packs_linear(linear) for linear in sizes.linears)
        if mixer.package in work.packages:
            if mixer.needs_dense and in_4bit:
                raise ValueError(
                    f"{mixer.distribution} computes {count} and cannot read their weights in 4 bits: uninstall it, or use "
                    "--quantization none"
                )
            yield f"{mixer.distribution} computes {count}"
            continue
        plain = (
            f"Transformers computes {count} in plain torch, and each keeps {_gib(mixer.kept(work))} for its backward"
        )
        if work.gpu and not (mixer.needs_dense and in_4bit):
            yield f"note: {plain}; the kernels of `pip install {mixer.distribution}` keep less and are faster"
        else:
            yield plain
    if work.kept_attention == "host":
        size = attention_layers(sizes) * attention_results(sizes, work)
        yield f"--keep-attention host takes {_gib(size)} of the host's memory"
    if sizes.uncounted:
        names = " and ".join(sizes.uncounted)
        yield f"note: the plan does not count what layers of type {names} keep, the run may need more memory than predicted"


def _limit(setup: ModelSetup) -> int | None:
    if setup.options.memory_limit is not None:
        return int(setup.options.memory_limit * GIB)
    if setup.device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(setup.device)
    # The question itself made this process allocate its CUDA context, and connecting it to others the memory for that.
    return free + CONTEXT + (0 if setup.process.is_alone else CONNECTIONS)


def _changes(run: ResolvedRun) -> Iterator[dict[str, Any]]:
    """Yields changes of a single option that would lower the peak, the least costly first."""
    options = run.options
    if not options.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if options.keep_attention == "device":
        if run.device.type == "cuda":
            yield {"keep_attention": "host"}
        yield {"keep_attention": "none"}
    if not run.is_4bit:
        yield {"quantization": "nf4"}
    if run.graphs_asked_for:
        yield {"cuda_graphs": False}
    if run.batching.batch_size > 1:
        yield {"batch_size": 1}
    for shorter in LENGTHS:
        if shorter < run.batching.length:
            yield {"sequence_length": shorter}
    rank = 0 if run.start is not None else run.ranks.expert
    while rank > 1:
        rank //= 2
        yield {"expert_rank": rank}


def suggest_gpus(run: ResolvedRun, sizes: Sizes, limit: int | None) -> str | None:
    """Says with how many GPUs like this one a run would fit, replicated on each or sharded, and what it would need there.

    Args:
        run: The run, which does not fit.
        sizes: The sizes of its model.
        limit: The bytes that it may use of each GPU, or None on a device without a limit.

    Returns:
        The words for the fewest of ``GPUS`` that are enough, replicated if that is enough; None if not even the most of
        them are, or if several processes cannot share the run.
    """
    if limit is None or run.device.type != "cuda":
        return None
    try:
        check_shared(run.options)
    except ValueError:
        return None
    tried = run.batching.processes, workload_of(run).sharded
    for gpus in GPUS:
        process = replace(run.process, rank=0, local_rank=0, world_size=gpus, local_world_size=gpus)
        # Each GPU takes fewer of a step's batches, so that it may not have to accumulate gradients.
        shared = with_options(replace(run, process=process))
        for sharded in (False, True):
            if (gpus, sharded) <= tried or (sharded and shard_refusal(run, gpus) is not None):
                continue
            work = replace(workload_of(shared), sharded=sharded, graphs=run.graphs)
            needed = predict(sizes, work).total + SLACK
            if needed <= limit:
                return f"with --gpus {gpus}{' --shard' if sharded else ''} it would need {_gib(needed)} on each GPU"
    return None


def _advice(plan: MemoryPlan, sizes: Sizes) -> str:
    """Makes the text of the error for a run that does not fit: its memory, and what makes it fit.

    That is a single option, and more GPUs.
    """
    limit = plan.limit or 0
    allowed = f"{_gib(limit)} {'are free' if plan.run.options.memory_limit is None else 'is the --memory-limit'}"
    begin = f"the run needs {_gib(plan.needed)} of GPU memory, but {allowed}"
    suggested = suggest_gpus(plan.run, sizes, plan.limit)
    end = "" if suggested is None else f"; {suggested}"
    for change in _changes(plan.run):
        other = _plan(with_options(plan.run, **change), sizes, plan.limit)
        if other.fits:
            ((name, value),) = change.items()
            switches = {True: flag(name), False: flag(name).replace("--", "--no-", 1)}
            words = switches[value] if isinstance(value, bool) else f"{flag(name)} {value}"
            return f"{begin}; with {words} it would need {_gib(other.needed)}{end}"
    largest = max(plan.prediction.parts.items(), key=lambda part: part[1])
    return f"{begin}; no single option makes it fit; the largest part is {largest[0]} with {_gib(largest[1])}{end}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 10 * MIB else f"{size / MIB:.2f} MiB"
