"""Measures the two ways in which processes divide 4-bit experts without ``finetune``: kept apart, and sharded.

    python -m benchmarks.experts_apart --gpus 2
    python -m benchmarks.experts_apart --gpus 2 --device cpu --quick

The model has a few layers of Qwen3-30B-A3B with random weights, and adapters of rank 8 on its experts, queries and values.
All contenders load the same checkpoint and run without CUDA graphs, one after the other, in processes of their own:

- ``one_gpu``: all experts on one GPU.
- ``apart``: expert parallelism of Transformers. Each GPU has some of the experts, and all have the same batch: tokens go to
  the GPUs of their experts, and attention is computed on each.
- ``sharded``: FSDP2, a unit per decoder layer. Each GPU has a batch of its own and gathers the experts of each layer.

A row's ``tokens`` are those of a batch. Phases are ``forward``, without gradients, and ``train_step``, forward and backward
with activations computed anew. ``details`` has the GPUs and the tokens per second of all of them together: with experts
apart, that is one batch, and with sharding it is one for each GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, distributed

import moe_fused
from moe_fused.benchmark.harness import MIB, current_environment
from moe_fused.benchmark.layers import LAYERS
from moe_fused.checkpoints.share import is_divided

from . import runner
from .experts_4bit import QUANT_TYPE
from .finetune_gpus import ONE, SHARDED
from .loading import VOCABULARY, in_new_process, quiet, save_model
from .rows import Row, new_row, slug, write_rows

NAME = "experts_apart"
APART = "apart"
CONTENDERS = (ONE, APART, SHARDED)
FORWARD, TRAIN = "forward", "train_step"
RANK = 8
TARGETS = ["q_proj", "v_proj"]
WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Job:
    """What one contender measures.

    Attributes:
        contender: One of ``CONTENDERS``.
        directory: That of the checkpoint.
        tokens: The numbers of tokens of a batch.
        repeats: How often each is measured.
        device: "cuda" or "cpu".
    """

    contender: str
    directory: str
    tokens: tuple[int, ...]
    repeats: int
    device: str


def measure(job: Job) -> dict[str, dict[str, float]]:
    """Measures a contender in this process, which is one of its processes.

    Returns:
        The milliseconds and the peak in MiB by phase and tokens, as in "forward 512".
    """
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(job.device, int(os.environ["LOCAL_RANK"])) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    quiet()
    moe_fused.enable()
    if processes > 1:
        distributed.init_process_group(device_id=device if device.type == "cuda" else None)
    model = _adapted(_load(job, device, processes), sharded=job.contender == SHARDED)
    torch.manual_seed(rank if job.contender == SHARDED else 0)
    found = {}
    for tokens in job.tokens:
        ids = [torch.randint(VOCABULARY, (1, tokens), device=device) for _ in range(job.repeats + WARM_UP)]
        for phase, call in ((FORWARD, _forward), (TRAIN, _train)):
            found[f"{phase} {tokens}"] = _time(lambda batch, call=call: call(model, batch), ids, device)  # type: ignore[misc]
    if processes > 1:
        distributed.destroy_process_group()
    return found


def _load(job: Job, device: torch.device, processes: int) -> Any:
    from transformers import Qwen3MoeForCausalLM

    from moe_fused.integrations.quantizer.packed_experts import four_bit_config

    dtype = torch.bfloat16
    quantization = four_bit_config(dtype, QUANT_TYPE)
    options: dict[str, Any] = {"device_map": {"": device}}
    if job.contender == APART:
        from transformers.distributed import DistributedConfig  # type: ignore[attr-defined]

        plan = DistributedConfig(tp_size=processes, ep_size=processes, tp_plan={})
        options = {"distributed_config": plan}
    if job.contender == SHARDED:
        quantization.bnb_4bit_quant_storage = dtype
    return Qwen3MoeForCausalLM.from_pretrained(job.directory, dtype=dtype, quantization_config=quantization, **options)


def _adapted(model: Any, *, sharded: bool) -> Any:
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted: Any = get_peft_model(model, LoraConfig(r=RANK, target_modules=TARGETS, target_parameters=parameters))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if sharded:
        # What FSDP2 takes are the experts and their adapters.
        decoder = adapted.get_base_model().model
        layers = decoder.layers
        for layer in layers:
            whole = {value for name, value in layer.named_parameters() if ".experts." not in f".{name}"}
            fully_shard(layer, ignored_params=whole)
        fully_shard(decoder, ignored_params={value for value in decoder.parameters() if not is_divided(value)})
        for layer, following in itertools.pairwise(layers):
            layer.set_modules_to_forward_prefetch([following])
    return adapted


def _forward(model: Any, batch: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        model.base_model.model.model(input_ids=batch)


def _train(model: Any, batch: Tensor) -> None:
    model.train()
    hidden = model.base_model.model.model(input_ids=batch).last_hidden_state
    hidden.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def _time(call: Callable[[Tensor], None], batches: list[Tensor], device: torch.device) -> dict[str, float]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        if distributed.is_initialized():
            distributed.barrier()

    milliseconds = []
    for number, batch in enumerate(batches):
        if number == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait()
        start = time.perf_counter()
        call(batch)
        wait()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() / MIB if device.type == "cuda" else 0.0
    return {"ms": statistics.median(milliseconds[WARM_UP:]), "peak": peak}


def launch(job: Job, gpus: int) -> dict[str, dict[str, float]]:
    """Measures a contender in new processes.

    Raises:
        RuntimeError: They failed; the error has the end of what they said.
    """
    found: dict[str, dict[str, float]] = runner.in_processes(
        NAME, job.contender, job, 1 if job.contender == ONE else gpus
    )
    return found


def main(
    gpus: Annotated[int, typer.Option(help="How many GPUs take part.", min=1)] = 2,
    layers: Annotated[int, typer.Option(help="Decoder layers.", min=1)] = 4,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a batch; may be given again.", min=1)] = None,
    repeats: Annotated[int, typer.Option(help="How often each is measured.", min=1)] = 7,
    output: Annotated[Path | None, typer.Option(help="The JSON to write.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model. Writes only to --output.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu to smoke-test the benchmark.")] = "cuda",
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measures experts apart against sharded ones, and writes rows under benchmarks/results."""
    if job is not None:
        given = json.loads(job)
        found = measure(Job(**given | {"tokens": tuple(given["tokens"])}))
        if int(os.environ["RANK"]) == 0 and output is not None:
            output.write_text(json.dumps(found), encoding="utf-8")
        return
    runner.check_device(device, quick)
    runner.check_output(output)
    chosen = runner.pick_device(device, "--device cpu --quick")
    runner.check_gpus(device, gpus, "--gpus")
    layer, environment, console = (
        LAYERS["tiny" if quick else "qwen3-30b-a3b"],
        current_environment(chosen),
        runner.make_console(),
    )
    console.print(
        f"{gpus} × {environment.gpu}, torch {environment.torch}, Triton {environment.triton}, {environment.date}"
    )
    sizes = tuple(tokens or ([16] if quick else [512, 4096, 16384]))
    rows: list[Row] = []
    with runner.one_line_errors(), tempfile.TemporaryDirectory(prefix="apart-") as directory:
        in_new_process(save_model, Path(directory), layer, layers, chosen)
        for contender in CONTENDERS:
            measured = launch(Job(contender, directory, sizes, repeats, device), gpus)
            number = 1 if contender == ONE else gpus
            for name, values in measured.items():
                phase, _, size = name.partition(" ")
                together = int(size) * (gpus if contender == SHARDED else 1)
                row = new_row(
                    environment, benchmark=NAME, layer=f"{layer.name}, {layers} layers", tokens=int(size),
                    implementation=contender, phase=phase, weights=QUANT_TYPE, ms=values["ms"], flops=0.0,
                    peak_mib=values["peak"] or None, lora_rank=RANK,
                )  # fmt: skip
                details = {"gpus": float(number), "tokens_per_second": float(f"{1e3 * together / values['ms']:.6g}")}
                rows.append(dataclasses.replace(row, tflops=None, details=details))
                console.print(
                    f"{contender} {phase} {size}: {values['ms']:.1f} ms, {details['tokens_per_second']:.0f} tokens/s"
                )
        path = output or (
            None if quick else runner.ROOT / "results" / f"{NAME.replace('_', '-')}_{slug(environment.gpu)}.json"
        )
        if path is not None:
            write_rows(path, rows)
            console.print(f"Wrote {path}")
    moe_fused.disable()


if __name__ == "__main__":
    typer.run(main)
