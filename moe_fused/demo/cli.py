"""Options of the demo and the order of its steps."""

from __future__ import annotations

import dataclasses
import platform
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

import moe_fused

from . import compare, report
from .data import Corpus, byte_tokenizer
from .model import CPU_SIZE, GPU_SIZE, Size, choose_device, new_model
from .output import staged_output, write_results
from .signals import check_interrupted
from .train import History, autocast, train

_PROMPT = "The value of "
_SAMPLE_BYTES = 300

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def _train_with_progress(
    model: Qwen3MoeForCausalLM, corpus: Corpus, size: Size, seed: int, console: Console
) -> tuple[History, float]:
    """The losses, and the seconds it took."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=size.steps, loss=float("nan"))

        def show(step: int, history: History) -> None:
            check_interrupted()
            progress.update(task, completed=step, loss=history.train[-1])
            if step in history.held_out:
                console.print(f"step {step:4d}: held-out loss {history.held_out[step]:.3f}")

        history = train(model, corpus, size, seed, show)
    return history, time.perf_counter() - start


def _sample(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    prompt = tokenizer(_PROMPT, return_tensors="pt").to(model.device)
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": _SAMPLE_BYTES}
    with autocast(model.device):
        tokens = model.eval().generate(**prompt, **options, pad_token_id=0)
    return str(tokenizer.decode(tokens[0]))


@app.command()
def run(
    output: Annotated[Path, typer.Option(help="Directory to write; an earlier output of the demo is replaced.")] = Path(
        "demo-output"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps  [default: by device]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu ...")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Fixes the result on a CPU.")] = 0,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    """Train a small Qwen3-MoE on Python's reference text with fused experts and compare them with Transformers' own."""
    del traceback  # read by __main__, which prints errors
    console = Console(highlight=False)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    chosen = choose_device(device)
    size = CPU_SIZE if chosen.type == "cpu" else GPU_SIZE
    size = dataclasses.replace(size, steps=steps or size.steps)

    transformers.set_seed(seed)
    moe_fused.enable()
    # What is shown here must be the fused experts: falling back to Transformers' own is a failure, not a warning.
    warnings.filterwarnings("error", message=".*keeps its own implementation")
    tokenizer = byte_tokenizer()
    model = new_model(size, tokenizer, chosen)
    corpus = Corpus.load(tokenizer, size.sequence_length, chosen)
    needed_bytes = sum(p.numel() * p.element_size() for p in model.parameters()) + (4 << 20)

    with staged_output(output, needed_bytes) as staging:
        console.print(
            f"Qwen3-MoE, {model.num_parameters() / 1e6:.1f} M parameters, {size.num_experts} experts, top {size.top_k}, "
            f"on {chosen.type}; {len(corpus.train) >> 10} KiB of text, {corpus.held_out.numel() >> 10} KiB held out",
            soft_wrap=True,
        )
        history, seconds = _train_with_progress(model, corpus, size, seed, console)
        with console.status("sampling, comparing with Transformers' eager experts, saving"):
            sample = _sample(model, tokenizer)
            probe = corpus.held_out[: size.batch_size]
            difference = compare.largest_logit_difference(model, probe)
            step_ms = compare.step_milliseconds(model, corpus, size, rounds=min(20, size.steps))
            model.save_pretrained(staging / "model")
            tokenizer.save_pretrained(staging / "model")
            compare.check_reload(model, staging / "model", probe)
            report.draw_loss_curve(history, staging / "loss.png")
        results: dict[str, Any] = {
            "held_out_loss": {"before": history.held_out[0], "after": history.held_out[size.steps]},
            "largest_logit_difference": difference,
            "step_ms": step_ms,
            "training_seconds": seconds,
            "sample": sample,
            "size": dataclasses.asdict(size),
            "seed": seed,
            "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "history": dataclasses.asdict(history),
        }
        write_results(staging, results)
    report.print_summary(console, results, output)
