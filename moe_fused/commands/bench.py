"""The command ``moe-fused bench``, which measures in a minute how fast experts are on this machine.

The benchmarks of the repository measure more, and keep their results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe_fused.benchmark.layers import FORWARD, FORWARD_BACKWARD, LAYERS, Layer, roofline_ms
from moe_fused.quantized import QUANT_TYPES, QuantType, quantization_of

from .options import Traceback, check_device, check_finite_options, check_report, read_source

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe_fused.benchmark.harness import Call
    from moe_fused.benchmark.inputs import Inputs
    from moe_fused.benchmark.layers import Ceilings

OURS, THEIRS = "moe_fused", "grouped_mm"

Experts = Callable[["Inputs", str], "dict[str, Tensor]"]
"""``run(inputs, phase)`` makes a pass through the experts and returns its results by name."""


def bench(
    layer: Annotated[str, typer.Option(help=f"Layer to time: {', '.join(LAYERS)}.")] = "qwen3-30b-a3b",
    model: Annotated[
        str | None, typer.Option(help="Model whose layer to time instead: a directory, or a name on the Hub.")
    ] = None,
    quant_type: Annotated[
        str | None,
        typer.Option(
            "--format",
            help=f"4-bit format to time: {', '.join(QUANT_TYPES)}.  [default: that of the checkpoint of --model, else nf4]",
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of tokens; can be given several times.  [default: 1, 512, 4096]"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.001, help="Seconds to spend on each implementation and size.")] = 0.3,
    device: Annotated[str, typer.Option(help="Device: auto, cuda, or cpu for a small layer.")] = "auto",
    report: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write, with the GPU, the versions and the times, to attach to an issue. It must not exist."
        ),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Time one layer of experts, dense and in 4 bits, against Transformers' experts on the same inputs."""
    del traceback  # read by console.run, which prints errors
    check_finite_options(seconds=seconds)
    if layer not in LAYERS:
        raise ValueError(f"--layer must be one of {', '.join(LAYERS)}, got {layer}")
    if quant_type not in (None, *QUANT_TYPES):
        raise ValueError(f"--format must be one of {', '.join(QUANT_TYPES)}, got {quant_type}")
    check_device(device)
    check_report(report)
    if model is not None and (content := read_source("--model", model, "config.json")) is not None:
        _format_of(model, content, quant_type)
    _check_served(device.partition(":")[0], LAYERS[layer] if model is None else None)

    import torch

    from moe_fused.benchmark import harness
    from moe_fused.devices import choose_device

    chosen, shape, held = choose_device(device), LAYERS[layer], None
    if model is not None:
        from moe_fused.benchmark.shapes import layer_of

        from .loading import read_config

        config = read_config(model, "--model")
        shape, held = layer_of(model, config), _format_of(model, config, quant_type)
    form: str = quant_type or held or "nf4"
    unfit = _unfit(shape, form)
    if unfit is not None and quant_type is not None:
        raise ValueError(f"--format {form} cannot hold the experts of {shape.name}: {unfit}")
    _check_served(chosen.type, shape)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log file has no width, and the default of 80 columns would cut off names
    environment = harness.current_environment(chosen)
    if chosen.type == "cpu":
        ceilings = harness.measure_ceilings(chosen, copy_bytes=2**20, matmul_size=128, seconds=0.01)
    else:
        ceilings = harness.measure_ceilings(chosen)
    console.print(
        f"{environment.gpu}, torch {environment.torch}, Triton {environment.triton}: copies "
        f"{ceilings.bytes_per_second / 1e12:.2f} TB/s, multiplies {ceilings.flops_per_second / 1e12:.3g} TFLOP/s in bf16"
    )
    results = _Results(
        Table(title=f"{shape.name}: H{shape.hidden} I{shape.intermediate} E{shape.experts} k{shape.top_k}, bf16")
    )
    table = results.table
    for column in ("tokens", "phase", "implementation", "ms", "±", f"× {THEIRS}", "of the roofline", "peak MiB"):
        table.add_column(column, justify="left" if column in ("phase", "implementation") else "right", no_wrap=True)
    generator = torch.Generator(chosen).manual_seed(0)
    sizes = list(dict.fromkeys(tokens or (1, 512, 4096)))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=2 * len(sizes))
        contenders = _contenders(shape, generator, form if unfit is None else None)
        for size in sizes:
            for phase in (FORWARD, FORWARD_BACKWARD):
                progress.update(task, description=f"{size} tokens, {phase}")
                _measure(results, shape, size, phase, contenders, ceilings, seconds, generator)
                progress.advance(task)
    console.print(table)
    if unfit is None:
        console.print(
            f"4-bit weights are in {form}{'' if held is None else ', as in the checkpoint'}, and frozen: the backward "
            "computes no gradient for them"
        )
    else:
        console.print(f"4-bit weights are left out, because {form} cannot hold these experts: {unfit}")
    console.print("roofline: what reading, writing and multiplying alone would take at the rates above")
    if report is not None:
        from moe_fused.reports import new_report, write_report

        write_report(report, new_report("bench", chosen, shape, results.rows, ceilings))
        console.print(f"{report} has these times, the GPU and the versions; it names neither this machine nor you")


@dataclass
class _Results:
    """What was measured: a table for the terminal, and rows for a report."""

    table: Table
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, tokens: int, phase: str, name: str, ms: float | None, spread: float | None, peak: float | None
    ) -> None:
        """Adds a row to the report; ms is None for what could not run."""
        numbers = {"ms": ms, "spread": spread, "peak_mib": peak}
        rounded = {key: None if value is None else round(value, 5) for key, value in numbers.items()}
        self.rows.append({"tokens": tokens, "phase": phase, "implementation": name, **rounded})


def _format_of(model: str, config: Any, wanted: str | None) -> QuantType | None:
    """Returns the 4-bit format of a checkpoint, None for a dense one.

    Args:
        config: its configuration, an object of Transformers or the content of its file.
        wanted: the value of ``--format``.

    Raises:
        ValueError: the checkpoint is in 4 bits, and another format is wanted.
    """
    found = quantization_of(config)
    if found is not None and wanted not in (None, found.quant_type):
        raise ValueError(
            f"--format {wanted} is not possible: --model {model} is in 4 bits already, as {found.quant_type}; leave it "
            "out, or give the sizes by --layer"
        )
    return None if found is None else found.quant_type


def _unfit(layer: Layer, quant_type: str) -> str | None:
    """Says why the experts of a layer cannot be held in a 4-bit format, or returns None."""
    import moe_fused

    format4bit = moe_fused.get_kernel().Format4bit
    experts, hidden, intermediate = layer.experts, layer.hidden, layer.intermediate
    try:
        format4bit((experts, 2 * intermediate, hidden), quant_type, projections=2)
        format4bit((experts, hidden, intermediate), quant_type)
    except ValueError as error:
        return str(error)
    return None


def _check_served(device: str, layer: Layer | None) -> None:
    """Raises ValueError if a kind of device cannot be timed, or not with this layer. ``layer`` is None if not known yet."""
    if device == "xpu":
        raise ValueError("--device xpu cannot be timed yet: use cuda or cpu")
    if device == "cpu" and layer is not None and layer.parameters > 2**24:
        raise ValueError(f"--device cpu takes minutes for {layer.name}, in plain torch: give --layer tiny")


def _contenders(layer: Layer, generator: torch.Generator, quant_type: str | None) -> dict[str, Experts]:
    """Returns the implementations by name. One has a copy of the weights in ``quant_type``, unless that is None."""
    import torch
    from torch import nn
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import moe_fused
    from moe_fused.benchmark.inputs import random_weights

    kernel: Any = moe_fused.get_kernel()
    weights = [nn.Parameter(weight) for weight in random_weights(layer, generator)]
    packed = None
    if quant_type is not None:
        quantize = partial(kernel.Packed4bitWeights.quantize, quant_type=quant_type)
        packed = [quantize(weights[0].detach(), projections=2), quantize(weights[1].detach())]
    config = Qwen3MoeConfig(
        hidden_size=layer.hidden, moe_intermediate_size=layer.intermediate, num_experts=layer.experts, hidden_act="silu"
    )
    config._experts_implementation = THEIRS
    with torch.device("meta"):
        theirs = Qwen3MoeExperts(config)
    theirs.gate_up_proj, theirs.down_proj = weights

    def passes(forward: Callable[..., Tensor], trained: list[nn.Parameter]) -> Experts:
        def run(inputs: Inputs, phase: str) -> dict[str, Tensor]:
            arguments = (inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
            if phase == FORWARD:
                with torch.no_grad():
                    return {"output": forward(*arguments)}
            y = forward(*arguments)
            gradients = torch.autograd.grad(
                y, [inputs.hidden_states, inputs.top_k_weights, *trained], inputs.grad_output
            )
            names = ("hidden_states.grad", "top_k_weights.grad", "gate_up.grad", "down.grad")
            return {"output": y, **dict(zip(names, gradients, strict=False))}

        return run

    contenders = {
        OURS: passes(lambda *arguments: kernel.moe_experts(*arguments, *weights), weights),
        THEIRS: passes(theirs, weights),
    }
    if packed is not None:
        contenders[f"{OURS}, {quant_type}"] = passes(lambda *arguments: kernel.moe_experts(*arguments, *packed), [])
    return contenders


def _attempt(name: str, call: Call, problems: dict[str, str]) -> dict[str, Tensor] | None:
    """Makes the first call, which also compiles, and returns its results.

    If the implementation cannot run, it returns None and notes the reason in ``problems``.
    """
    import torch

    try:
        result: dict[str, Tensor] = call(0)
    except torch.OutOfMemoryError:
        problems[name] = "out of memory"
    except RuntimeError as error:
        if name != THEIRS:  # our kernels run with every shape
            raise
        problems[name] = f"cannot run: {str(error).splitlines()[0]}"
    else:
        return result
    return None


def _measure(
    results: _Results,
    layer: Layer,
    tokens: int,
    phase: str,
    contenders: dict[str, Experts],
    ceilings: Ceilings,
    seconds: float,
    generator: torch.Generator,
) -> None:
    """Times one size and phase, and adds the rows to the results.

    Raises:
        MismatchError: the dense implementations disagree, or a result is not finite.
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
    found = {name: result for name, call in calls.items() if (result := _attempt(name, call, problems)) is not None}
    for name, result in found.items():
        # Rounding weights to 4 bits changes the results, so these are only checked to be finite.
        harness.compare(name, result, found.get(THEIRS, result) if name == OURS else result)
    calls = {name: calls[name] for name in found}
    found.clear()
    harness.release_memory(device)
    peaks = {name: harness.peak_mib(call, device) for name, call in calls.items()}
    timings = harness.time_interleaved(calls, harness.clock_for(device), seconds=seconds)
    roofline = roofline_ms(layer, tokens, active, phase, ceilings, DTYPE.itemsize)
    theirs = timings.get(THEIRS)
    for name in contenders:
        timing = timings.get(name)
        if timing is None:
            results.table.add_row(str(tokens), phase, name, problems.get(name, "out of memory"))
            results.add(tokens, phase, name, None, None, None)
            continue
        peak = peaks[name]
        results.add(tokens, phase, name, timing.ms, timing.spread, peak)
        results.table.add_row(
            str(tokens),
            phase,
            name,
            f"{timing.ms:.3g}",
            f"{timing.spread:.0%}",
            "–" if theirs is None else f"{theirs.ms / timing.ms:.2f}",
            # The roofline is that of dense weights. The packed implementation reads a quarter of the bytes.
            "–" if name not in (OURS, THEIRS) else f"{roofline / timing.ms:.0%}",
            "–" if peak is None else f"{peak:.0f}",
        )
    results.table.add_section()
