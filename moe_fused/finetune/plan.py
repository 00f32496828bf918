"""What a run needs, and what is chosen by it: printed before anything is loaded, and refused if it cannot fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_fused.memory import CONTEXT, GIB, MIB, Prediction, Sizes, Workload, predict, sizes_of, skeleton

from .model import (
    ATTENTION,
    adapter_dtype,
    attends_packed,
    compute_dtype,
    graphs_serve,
    is_packed,
    liger_serves,
    lora_config,
    optimizer_of,
    quantizes,
)
from .options import Options, flag

# Tokens of a sequence that are tried, and of a step that are aimed at, unless the options say.
LENGTHS = (4096, 2048, 1024, 512, 256)
STEP_TOKENS = 16384
# Room for what the allocator cannot use: blocks between others.
SLACK = 256 * MIB


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        length: tokens of a sequence.
        accumulation: batches of a step.
        packing: not "auto".
        prediction: of its memory.
        limit: bytes of GPU memory to plan for; None on a CPU.
        batch: sequences of a batch.
        graphs: whether the decoder runs as CUDA graphs.
    """

    length: int
    accumulation: int
    packing: str
    prediction: Prediction
    limit: int | None
    batch: int
    graphs: bool

    @property
    def step_tokens(self) -> int:
        return self.length * self.batch * self.accumulation

    def settle(self, options: Options, device: torch.device) -> Options:
        """``options`` with what they left open, so that a run that goes on elsewhere or later chooses nothing anew."""
        settled: dict[str, Any] = {
            "sequence_length": self.length,
            "gradient_accumulation": self.accumulation,
            "packing": self.packing,
            "dtype": str(compute_dtype(options, device)).removeprefix("torch."),
            "adapter_dtype": str(adapter_dtype(options, device)).removeprefix("torch."),
            "optimizer": optimizer_of(options, device),
        }
        return dataclasses.replace(options, **settled)

    def show(self, console: Console) -> None:
        """Prints the plan: parts, and what a step is."""
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column()
        table.add_column(justify="right")
        for part, size in self.prediction.parts.items():
            table.add_row(part, _gib(size))
        table.add_row("predicted peak", _gib(self.prediction.total), style="bold")
        if self.limit is not None:
            table.add_row("limit", _gib(self.limit))
        console.print(table)
        console.print(
            f"{self.prediction.trainable:,} trainable parameters; {self.step_tokens:,} tokens to a step at most: "
            f"{self.batch} x {self.length} x {self.accumulation} (batch x length x accumulation), packing {self.packing}",
            highlight=False,
            soft_wrap=True,
        )


def make_plan(options: Options, config: Any, device: torch.device, *, plain_text: bool) -> Plan:
    """Chooses what the options leave open, by what fits.

    Raises:
        ValueError: it cannot fit, says by which option it would; the model has not what the options adapt.
    """
    model = skeleton(config)
    lora_config(options, model)
    sizes = sizes_of(model)
    packing = options.packing if options.packing != "auto" else ("bfd_split" if plain_text else "bfd")
    limit = _limit(options, device)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or LENGTHS[0]
    if options.sequence_length is not None:
        lengths = [options.sequence_length]
        if options.sequence_length > longest:
            raise ValueError(f"--sequence-length must be at most {longest} for {options.model}, got {lengths[0]}")
    else:
        lengths = sorted({min(length, longest) for length in LENGTHS}, reverse=True)
    # Rather without graphs, which take some memory, than shorter.
    ways = [options] if options.cuda_graphs is not None else [options, dataclasses.replace(options, cuda_graphs=False)]
    for length in lengths:
        for way in ways:
            plan = _plan(way, config, sizes, device, length, packing, limit)
            if limit is None or plan.prediction.total + SLACK <= limit:
                return plan
    raise ValueError(_advice(plan, options, config, sizes, device))


def _plan(
    options: Options, config: Any, sizes: Sizes, device: torch.device, length: int, packing: str, limit: int | None
) -> Plan:
    accumulation = options.gradient_accumulation or max(1, STEP_TOKENS // (options.batch_size * length))
    packed = is_packed(packing)
    apart = packed and attends_packed(options, config, device, packing)
    graphs = graphs_serve(options, config, device, packing)
    work = Workload(
        # Documents side by side go through the model as one sequence, of a batch's tokens.
        batch=1 if packed else options.batch_size,
        length=length * options.batch_size if packed else length,
        accumulation=accumulation,
        quantized=quantizes(options, config),
        itemsize=compute_dtype(options, device).itemsize,
        adapter_itemsize=adapter_dtype(options, device).itemsize,
        attention_rank=options.attention_rank,
        attention_modules=tuple(options.attention_modules or ATTENTION),
        expert_rank=options.expert_rank,
        dropout=options.lora_dropout > 0,
        optimizer=optimizer_of(options, device),
        checkpointing=options.gradient_checkpointing,
        masked=packed and options.attn in ("sdpa", "eager") and not apart,
        documents=apart,
        fused_norms=liger_serves(options, config, device),
        gpu=device.type != "cpu",
        graphs=graphs,
    )
    return Plan(length, accumulation, packing, predict(sizes, work), limit, options.batch_size, graphs)


def _limit(options: Options, device: torch.device) -> int | None:
    if options.memory_limit is not None:
        return int(options.memory_limit * GIB)
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + CONTEXT  # which this process has taken by asking


def _changes(options: Options, length: int) -> Iterator[dict[str, Any]]:
    """Single options that would lower the peak, those that cost the least first."""
    if not options.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if options.quantization == "none":
        yield {"quantization": "nf4"}
    if options.cuda_graphs is not False:
        yield {"cuda_graphs": False}
    if options.batch_size > 1:
        yield {"batch_size": 1}
    for shorter in LENGTHS:
        if shorter < length:
            yield {"sequence_length": shorter}
    rank = options.expert_rank
    while rank > 1:
        rank //= 2
        yield {"expert_rank": rank}


def _advice(plan: Plan, options: Options, config: Any, sizes: Sizes, device: torch.device) -> str:
    limit = plan.limit or 0
    allowed = f"{_gib(limit)} {'are free' if options.memory_limit is None else 'is the --memory-limit'}"
    begin = f"the run needs {_gib(plan.prediction.total + SLACK)} of GPU memory, {allowed}"
    for change in _changes(options, plan.length):
        length = change.get("sequence_length", plan.length)
        other = _plan(dataclasses.replace(options, **change), config, sizes, device, length, plan.packing, plan.limit)
        if other.prediction.total + SLACK <= limit:
            ((name, value),) = change.items()
            switches = {True: flag(name), False: flag(name).replace("--", "--no-", 1)}
            words = switches[value] if isinstance(value, bool) else f"{flag(name)} {value}"
            return f"{begin}; with {words} it would need {_gib(other.prediction.total + SLACK)}"
    largest = max(plan.prediction.parts.items(), key=lambda part: part[1])
    return f"{begin}; no single option makes it fit, the largest part is {largest[0]}, {_gib(largest[1])}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 10 * MIB else f"{size / MIB:.2f} MiB"
