"""``moe-fused bench``: how fast experts are here, in a minute; the repository's benchmarks measure more, and keep it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe_fused.benchmark.layers import FORWARD, FORWARD_BACKWARD, LAYERS, Layer, floor_ms

from .options import Traceback

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe_fused.benchmark.harness import Call
    from moe_fused.benchmark.inputs import Inputs
    from moe_fused.benchmark.layers import Ceilings

OURS, PACKED, THEIRS = "moe_fused", "moe_fused, nf4", "grouped_mm"

Experts = Callable[["Inputs", str], "dict[str, Tensor]"]
"""``run(inputs, phase)``: a pass over the experts, and its results by name."""


def bench(
    layer: Annotated[str, typer.Option(help=f"A layer: {', '.join(LAYERS)}.")] = "qwen3-30b-a3b",
    model: Annotated[str | None, typer.Option(help="The layer of a model instead: a directory, or a name.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="A number of tokens; may be given again.  [default: 1, 512, 4096]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Time per implementation and size.")] = 0.3,
    device: Annotated[str, typer.Option(help="auto, cuda, or cpu for a small layer.")] = "auto",
    traceback: Traceback = False,
) -> None:
    """Time one layer of experts, dense and in 4 bits, against those of Transformers, on the same inputs."""
    del traceback  # read by console.run, which prints errors
    if layer not in LAYERS:
        raise ValueError(f"--layer must be one of {', '.join(LAYERS)}, got {layer}")

    import torch

    from moe_fused.benchmark import harness
    from moe_fused.devices import choose_device

    chosen, shape = choose_device(device), LAYERS[layer]
    if model is not None:
        from moe_fused.benchmark.shapes import layer_of

        from .loading import read_config

        shape = layer_of(model, read_config(model))
    if chosen.type == "xpu":
        raise ValueError("--device xpu cannot be timed yet: use cuda or cpu")
    if chosen.type == "cpu" and shape.parameters > 2**24:
        raise ValueError(f"--device cpu takes minutes for {shape.name}, in plain torch: give --layer tiny")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has no width: 80 columns would cut names off
    environment = harness.current_environment(chosen)
    if chosen.type == "cpu":
        ceilings = harness.measure_ceilings(chosen, copy_bytes=2**20, matmul_size=128, seconds=0.01)
    else:
        ceilings = harness.measure_ceilings(chosen)
    console.print(
        f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}: copies "
        f"{ceilings.bytes_per_second / 1e12:.2f} TB/s, multiplies {ceilings.flops_per_second / 1e12:.3g} TFLOP/s in bf16"
    )
    table = Table(title=f"{shape.name}: H{shape.hidden} I{shape.intermediate} E{shape.experts} k{shape.top_k}, bf16")
    for column in ("tokens", "phase", "implementation", "ms", "±", f"× {THEIRS}", "of the floor", "peak MiB"):
        table.add_column(column, justify="left" if column in ("phase", "implementation") else "right", no_wrap=True)
    generator = torch.Generator(chosen).manual_seed(0)
    sizes = list(dict.fromkeys(tokens or (1, 512, 4096)))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=2 * len(sizes))
        contenders = _contenders(shape, generator)
        for size in sizes:
            for phase in (FORWARD, FORWARD_BACKWARD):
                progress.update(task, description=f"{size} tokens, {phase}")
                _measure(table, shape, size, phase, contenders, ceilings, seconds, generator)
                progress.advance(task)
    console.print(table)
    console.print("4-bit weights are frozen: the backward makes no gradient of them")
    console.print("floor: what reading, writing and multiplying alone would take at the rates above")


def _contenders(layer: Layer, generator: torch.Generator) -> dict[str, Experts]:
    """The implementations by name; the packed one has weights of its own, in 4 bits."""
    import torch
    from torch import nn
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import moe_fused
    from moe_fused.benchmark.inputs import random_weights

    kernel: Any = moe_fused.get_kernel()
    weights = [nn.Parameter(weight) for weight in random_weights(layer, generator)]
    packed = None
    if layer.hidden * layer.intermediate % 64 == 0:
        quantize = kernel.Packed4bitWeights.quantize
        packed = [quantize(weights[0].detach(), projections=2), quantize(weights[1].detach())]
    config = Qwen3MoeConfig(
        hidden_size=layer.hidden, moe_intermediate_size=layer.intermediate, num_experts=layer.experts, hidden_act="silu"
    )
    config._experts_implementation = THEIRS
    with torch.device("meta"):
        theirs = Qwen3MoeExperts(config)
    theirs.gate_up_proj, theirs.down_proj = weights

    def passes(forward: Callable[..., Tensor], trained: list[nn.Parameter]) -> Experts:
        def run(own: Inputs, phase: str) -> dict[str, Tensor]:
            arguments = (own.hidden_states, own.top_k_index, own.top_k_weights)
            if phase == FORWARD:
                with torch.no_grad():
                    return {"output": forward(*arguments)}
            y = forward(*arguments)
            gradients = torch.autograd.grad(y, [own.hidden_states, own.top_k_weights, *trained], own.grad_output)
            names = ("hidden_states.grad", "top_k_weights.grad", "gate_up.grad", "down.grad")
            return {"output": y, **dict(zip(names, gradients, strict=False))}

        return run

    contenders = {
        OURS: passes(lambda *arguments: kernel.moe_experts(*arguments, *weights), weights),
        THEIRS: passes(theirs, weights),
    }
    if packed is not None:
        contenders[PACKED] = passes(lambda *arguments: kernel.moe_experts(*arguments, *packed), [])
    return contenders


def _attempt(name: str, call: Call, problems: dict[str, str]) -> dict[str, Tensor] | None:
    """What a first call gives, which also compiles it; None, and an entry in ``problems``, if it cannot run."""
    import torch

    try:
        result: dict[str, Tensor] = call(0)
    except torch.OutOfMemoryError:
        problems[name] = "out of memory"
    except RuntimeError as error:
        if name != THEIRS:  # ours takes every shape
            raise
        problems[name] = f"cannot run: {str(error).splitlines()[0]}"
    else:
        return result
    return None


def _measure(
    table: Table,
    layer: Layer,
    tokens: int,
    phase: str,
    contenders: dict[str, Experts],
    ceilings: Ceilings,
    seconds: float,
    generator: torch.Generator,
) -> None:
    """Times one size and phase, and adds the rows.

    Raises:
        MismatchError: the dense implementations disagree, or one gives something that is not finite.
    """

    from moe_fused.benchmark import harness
    from moe_fused.benchmark.inputs import DTYPE, Inputs

    device = generator.device
    first = Inputs.random(layer, tokens, generator)
    active = first.top_k_index.unique().numel()
    count = harness.input_sets(active * layer.expert_parameters * DTYPE.itemsize, device)
    inputs = [first, *(Inputs.random(layer, tokens, generator) for _ in range(count - 1))]

    def call_of(run: Experts) -> Call:
        return lambda i: run(inputs[i % count], phase)

    calls = {name: call_of(run) for name, run in contenders.items()}
    problems: dict[str, str] = {}
    results = {name: result for name, call in calls.items() if (result := _attempt(name, call, problems)) is not None}
    for name, result in results.items():
        # 4 bits round weights, so that their results are their own: finite at least.
        harness.compare(name, result, result if name == PACKED else results.get(THEIRS, result))
    calls = {name: calls[name] for name in results}
    results.clear()
    harness.release_memory(device)
    peaks = {name: harness.peak_mib(call, device) for name, call in calls.items()}
    timings = harness.time_interleaved(calls, harness.clock_for(device), seconds=seconds)
    floor = floor_ms(layer, tokens, active, phase, ceilings, DTYPE.itemsize)
    theirs = timings.get(THEIRS)
    for name in contenders:
        timing = timings.get(name)
        if timing is None:
            table.add_row(str(tokens), phase, name, problems.get(name, "out of memory"))
            continue
        peak = peaks[name]
        table.add_row(
            str(tokens),
            phase,
            name,
            f"{timing.ms:.3g}",
            f"{timing.spread:.0%}",
            "–" if theirs is None else f"{theirs.ms / timing.ms:.2f}",
            # Of the dense weights: the other reads a quarter of them, and makes no gradient of them.
            "–" if name == PACKED else f"{floor / timing.ms:.0%}",
            "–" if peak is None else f"{peak:.0f}",
        )
    table.add_section()
