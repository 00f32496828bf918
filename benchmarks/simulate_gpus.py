"""What fine-tuning a published model takes on several GPUs that nobody here has: a simulation, not a measurement.

    python -m benchmarks.simulate_gpus --model qwen3-235b-a22b --gpu "RTX 4090"
    python -m benchmarks.simulate_gpus --model qwen3-30b-a3b --gpu A100 --link "NVLink 3" --gpus 2 --tokens 8192

The memory is that of ``moe-fused finetune``'s plan for its default run. The time of a step is counted as follows. The GPUs
of a sharded model gather each decoder layer twice for each batch, once before its forward and once before its backward,
while the layer before it is computed. A pass through a layer therefore takes the longer of the two times:

    max(computing + copying, gathering)    where gathering in the backward also scatters the gradients of the adapters

Copying is what FSDP2 does with each layer that it has gathered, from the buffer to where it is computed. The first layer is
gathered before anything is computed. ``benchmarks.step_cost`` says how long computing takes. Without
CUDA graphs, a batch takes at least as long as the host that was measured needs to launch the kernels of all layers. GPUs
that hold the whole model average their gradients after the last batch of a step.

Not counted is what NCCL takes from the kernels beside it: multiprocessors and memory traffic. On two H200s, a layer of
Qwen3-30B-A3B takes some 0.3 ms longer while the next one is gathered.

The speed of the H200 was measured and is below its data sheet. For every other GPU, the simulation uses the data sheet, so
their steps come out too fast. Every link carries its nominal bytes at any size of a message. GPUs without NVLink and without
direct access to each other go through the memory of the host, which may be slower than their links. Steps can therefore take
longer than simulated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from moe_fused.benchmark.layers import Ceilings
from moe_fused.finetune.options import Options, flag
from moe_fused.finetune.plan import SLACK, workload_of
from moe_fused.finetune.precheck import Process
from moe_fused.finetune.resolve import ModelSetup, ResolvedRun, candidates, set_up, shard_refusal
from moe_fused.memory import GIB, Sizes, Workload, gathered_layer, predict, sizes_of

from .gpus import BY_NAME as DATA_SHEETS
from .models import BY_NAME
from .rows import Row, read_rows
from .step_cost import H200, RESULTS, Batch, batch_of, fitted, host_seconds, shortened

# The share of a GPU's memory that a run may use: firmware, driver and screen take the rest.
USABLE = 0.96
NO_LIMIT = 4096.0
# What a table has in the place of the time of a run that does not fit.
NONE = "–"
# The numbers of GPUs that are simulated if none is given.
NUMBERS = (1, 2, 4, 8)
# Batches are looked at up to so many tokens, in steps of so many.
LONGEST, TOKENS_STEP = 65536, 256


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: What users call it.
        gib: Its nominal memory in GiB.
        ceilings: What its products and its memory reach.
        is_measured: Whether they were measured, and not taken from a data sheet.
    """

    name: str
    gib: int
    ceilings: Ceilings
    is_measured: bool = False

    @property
    def usable(self) -> int:
        """The bytes that a run may use."""
        return int(USABLE * self.gib * GIB)


@dataclass(frozen=True)
class Link:
    """What connects each GPU to the others: nominal bytes per second each way."""

    name: str
    bandwidth: float


# Dense bf16 products with sums in fp32, and memory bandwidths, as NVIDIA publishes them.
GPUS = (
    *(
        Gpu(name, DATA_SHEETS[name].gib, DATA_SHEETS[name].ceilings)
        for name in ("RTX 3090", "RTX 4090", "L40S", "A100")
    ),
    Gpu("H200", 141, H200, is_measured=True),
)
LINKS = (Link("PCIe 4 x16", 32e9), Link("NVLink 3", 300e9), Link("NVLink 4", 450e9))
GPU_BY_NAME = {gpu.name: gpu for gpu in GPUS}
LINK_BY_NAME = {link.name: link for link in LINKS}


@dataclass(frozen=True)
class Traffic:
    """The bytes that each GPU receives for a batch of a sharded model.

    Attributes:
        layer: For a decoder layer, on average, each time it is gathered.
        gradients: For the gradients of a layer's adapters.
        embedding: For the rows of the embedding that others have.
        layers: The number of decoder layers.
        copied: The bytes that are read and written to copy a gathered layer, which are not in ``total``.
    """

    layer: float
    gradients: float
    embedding: float
    layers: int
    copied: float

    @property
    def total(self) -> float:
        """The bytes for the batch."""
        return self.layers * (2 * self.layer + self.gradients) + self.embedding


@dataclass(frozen=True)
class Simulated:
    """A step that was simulated.

    Attributes:
        gpus: The number of GPUs.
        sharded: Whether they share the weights.
        graphs: Whether the decoder runs as CUDA graphs.
        tokens: The number of tokens of a batch.
        batches: The number of batches that each GPU takes in a step.
        needed: The bytes of memory that must be free on each GPU.
        received: The bytes that each GPU receives in a step.
        seconds: The time of the step.
        computing: The time of the step without any exchange between GPUs and without waiting for the host.
    """

    gpus: int
    sharded: bool
    graphs: bool
    tokens: int
    batches: int
    needed: int
    received: float
    seconds: float
    computing: float

    @property
    def step_tokens(self) -> int:
        """The number of tokens of a step, those of all GPUs together."""
        return self.gpus * self.tokens * self.batches

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs together."""
        return self.step_tokens / self.seconds

    @property
    def received_for_token(self) -> float:
        """The bytes that a GPU receives for each token that it trains on."""
        return self.received / (self.tokens * self.batches)


@functools.cache
def _setup(model: str) -> ModelSetup:
    options = Options(model=model, dataset="data", output="out", memory_limit=NO_LIMIT)
    return set_up(options, BY_NAME[model].config(), torch.device("cuda"))


@functools.cache
def sizes_by_name(model: str) -> Sizes:
    """Returns the sizes of a published model."""
    return sizes_of(_setup(model).skeleton)


def runs(model: str, gpus: int, tokens: int) -> tuple[ResolvedRun, ...]:
    """The records of finetune's default run on chats of so many tokens, with CUDA graphs first, then without.

    Raises:
        ValueError: The model has no positions for so many tokens.
    """
    setup = _setup(model)
    options = dataclasses.replace(setup.options, sequence_length=tokens)
    process = Process(world_size=gpus, local_world_size=gpus)
    return tuple(candidates(dataclasses.replace(setup, options=options, process=process), plain_text=False))


def refusal(model: str, gpus: int) -> str | None:
    """Returns why ``finetune --shard`` refuses to divide a model among so many GPUs, or None if it does not."""
    return shard_refusal(_setup(model), gpus)


def workloads(model: str, gpus: int, tokens: int, sharded: bool) -> list[Workload]:
    """What these runs are to the memory plan, the preferred one first."""
    return [dataclasses.replace(workload_of(run), sharded=sharded) for run in runs(model, gpus, tokens)]


@functools.cache
def needed(model: str, gpus: int, tokens: int, sharded: bool) -> int:
    """Returns the bytes that must be free on each GPU for the run that needs the least."""
    works = workloads(model, gpus, tokens, sharded)
    return min(predict(sizes_by_name(model), work).total for work in works) + SLACK


def traffic(sizes: Sizes, work: Workload) -> Traffic:
    """Returns what each of N GPUs receives for a batch: (N-1)/N of everything that is gathered or scattered."""
    others = (work.processes - 1) / work.processes
    sharded = dataclasses.replace(work, sharded=True)
    adapters = predict(sizes, dataclasses.replace(work, processes=1, sharded=False)).parts["adapters"]
    with_experts = len(sizes.stacks) // 2 or sizes.layers
    layer = gathered_layer(sizes, sharded) * with_experts / sizes.layers
    return Traffic(
        layer=others * layer,
        copied=2 * layer,
        gradients=others * adapters / sizes.layers,
        embedding=(work.processes - 1) * work.tokens * sizes.hidden * work.itemsize if sizes.embedding else 0.0,
        layers=sizes.layers,
    )


def sharded_batch_seconds(batch: Batch, received: Traffic, gpu: Gpu, link: Link, *, graphs: bool) -> float:
    """Returns the time of a batch whose layers are gathered while the layers before them are computed."""
    layers, bandwidth, cost = received.layers, link.bandwidth, fitted()
    gather, scatter = received.layer / bandwidth, received.gradients / bandwidth
    forward, backward, head = (cost.seconds(work, gpu.ceilings) for work in (batch.forward, batch.backward, batch.head))
    copying = received.copied / gpu.ceilings.bytes_per_second
    passes = max(forward / layers + copying, gather) + max(backward / layers + copying, gather + scatter)
    first = received.embedding / bandwidth + gather
    return first + max(layers * passes + head, 0.0 if graphs else layers * host_seconds())


def step_seconds(batch: Batch, sizes: Sizes, work: Workload, gpu: Gpu, link: Link) -> tuple[float, float, float]:
    """Returns the seconds of a step, the seconds of computing in it, and the bytes that each GPU receives."""
    cost, batches, trainable = fitted(), work.accumulation, predict(sizes, work).trainable
    optimizer = cost.optimizer_seconds(trainable / work.shards, gpu.ceilings)
    computing = batches * cost.seconds(batch.whole, gpu.ceilings) + optimizer
    if work.sharded:
        gathered = traffic(sizes, work)
        one = sharded_batch_seconds(batch, gathered, gpu, link, graphs=work.graphs)
        return batches * one + optimizer, computing, batches * gathered.total
    # A sum over all GPUs passes each gradient on twice.
    received = 2 * (work.processes - 1) / work.processes * trainable * work.adapter_itemsize
    host = 0.0 if work.graphs else batches * sizes.layers * host_seconds()
    return max(computing, host + optimizer) + received / link.bandwidth, computing, received


def simulate(model: str, gpu: Gpu, link: Link, gpus: int, tokens: int, *, sharded: bool) -> Simulated:
    """Simulates a step of finetune's default run, with sequences of so many tokens.

    Args:
        model: The name of a published model.
        gpu: The GPU, of which there are ``gpus``.
        link: What connects them.
        gpus: Their number.
        tokens: The number of tokens of a sequence. Each GPU takes one at a time.
        sharded: Whether the GPUs share the weights. It runs with CUDA graphs where these fit.

    Raises:
        ValueError: The cost model does not cover the model, the model has no positions for so many tokens, or a single
            GPU should be sharded.
    """
    if sharded and gpus < 2:
        raise ValueError("sharding needs at least 2 GPUs")
    batch, sizes = batch_of(model, tokens), sizes_by_name(model)
    predictions = [(work, predict(sizes, work)) for work in workloads(model, gpus, tokens, sharded)]
    work, prediction = next(
        ((work, each) for work, each in predictions if each.total + SLACK <= gpu.usable), predictions[-1]
    )
    seconds, computing, received = step_seconds(batch, sizes, work, gpu, link)
    return Simulated(
        gpus, sharded, work.graphs, tokens, work.accumulation, prediction.total + SLACK, received, seconds, computing
    )


def measured_steps() -> Iterator[tuple[Row, int, float]]:
    """Yields the measured steps of several H200s, each with the bytes of the plan and the simulated seconds."""
    from .finetune_gpus import job_of

    for file in sorted(RESULTS.glob("finetune-gpus*_h200.json")):
        for row in read_rows(file):
            job, gpus = job_of(row)
            process = Process(world_size=gpus, local_world_size=gpus)
            plan = job.plan(job.options("out"), torch.device("cuda"), process)
            sizes = sizes_of(plan.run.skeleton)
            batch = shortened(batch_of(job.model, row.tokens), sizes.layers / sizes_by_name(job.model).layers)
            work, link = workload_of(plan.run), LINK_BY_NAME["NVLink 4"]
            yield row, plan.prediction.allocated, step_seconds(batch, sizes, work, GPU_BY_NAME["H200"], link)[0]


def hidden_from(model: str, gpu: Gpu, link: Link, gpus: int) -> int | None:
    """Returns the fewest tokens of a batch whose computing takes as long as the gathering of a sharded model.

    Returns:
        A multiple of ``TOKENS_STEP``, or None if ``LONGEST`` are too few.
    """
    received = traffic(sizes_by_name(model), Workload(processes=gpus)).total / link.bandwidth
    for tokens in range(TOKENS_STEP, LONGEST + 1, TOKENS_STEP):
        if fitted().seconds(batch_of(model, tokens).whole, gpu.ceilings) >= received:
            return tokens
    return None


def results_table(results: Sequence[Simulated], gpu: Gpu, title: str) -> Table:
    """What was simulated, for the terminal."""
    table = Table(title=title, title_justify="left")
    columns = (
        "GPUs",
        "weights",
        "GiB per GPU",
        "fits",
        "GB received",
        "MB per token",
        "s per step",
        "computing",
        "tokens/s",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "weights" else "right", no_wrap=True)
    for each in results:
        fits = each.needed <= gpu.usable
        times = f"{each.seconds:.2f}", f"{each.computing / each.seconds:.0%}", f"{each.tokens_per_second:.0f}"
        table.add_row(
            str(each.gpus),
            "sharded" if each.sharded else "whole",
            f"{each.needed / GIB:.2f}",
            "yes" if fits else "no",
            f"{each.received / 1e9:.1f}",
            f"{each.received_for_token / 1e6:.2f}",
            *(times if fits else [NONE] * len(times)),
        )
    return table


def _chosen(given: str, known: dict[str, Any], option: str) -> Any:
    if given not in known:
        raise typer.BadParameter(f"{option} {given} is not known: one of {', '.join(known)}")
    return known[given]


def main(
    model: Annotated[str, typer.Option(help=f"The model: {', '.join(BY_NAME)}.")],
    gpu_name: Annotated[str, typer.Option("--gpu", help=f"The GPU: {', '.join(GPU_BY_NAME)}.")] = "RTX 4090",
    link_name: Annotated[
        str, typer.Option("--link", help=f"What connects the GPUs: {', '.join(LINK_BY_NAME)}.")
    ] = "PCIe 4 x16",
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            help="The number of GPUs; may be given again.", min=1, show_default=", ".join(str(each) for each in NUMBERS)
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a sequence.", min=1)] = 4096,
) -> None:
    """Simulates steps of a published model on one GPU and on several."""
    _chosen(model, BY_NAME, "--model")
    gpu, link = _chosen(gpu_name, GPU_BY_NAME, "--gpu"), _chosen(link_name, LINK_BY_NAME, "--link")
    numbers = gpus or NUMBERS
    try:
        refused = {
            number: reason for number in numbers if number > 1 and (reason := refusal(model, number)) is not None
        }
        results = [
            simulate(model, gpu, link, number, tokens, sharded=sharded)
            for number in numbers
            for sharded in ((False, True) if number > 1 and number not in refused else (False,))
        ]
    except ValueError as error:
        # The run that is simulated has another name for the option.
        typer.echo(f"error: {str(error).replace(flag('sequence_length'), '--tokens')}", err=True)
        raise typer.Exit(1) from error
    source = "measured ceilings" if gpu.is_measured else "published ceilings"
    title = f"simulated: {model}, {tokens} tokens, {gpu.name} ({source}), {link.name}"
    Console(width=120).print(results_table(results, gpu, title))
    for number, reason in refused.items():
        typer.echo(f"not sharded among {number} GPUs: {reason}")


if __name__ == "__main__":
    typer.run(main)
