"""Runs the steps of the demo in order."""

from __future__ import annotations

import dataclasses
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

import moe_fused
from moe_fused.devices import choose_device
from moe_fused.signals import check_interrupted

from . import compare, report
from .data import Corpus, byte_tokenizer
from .model import CPU_SIZE, GPU_SIZE, Size, new_model
from .output import ADAPTER, DENSE, DEQUANTIZED, EXPORTED, PACKED, write_results
from .train import History, autocast, train

_PROMPT, _CODE_PROMPT = "The value of ", "    def "
_SAMPLE_BYTES = 300


def _train_with_progress(
    model: Qwen3MoeForCausalLM, corpus: Corpus, size: Size, seed: int, console: Console
) -> tuple[History, float]:
    """Trains with a progress bar, and returns the losses and the seconds."""
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


def _sample(model: Any, tokenizer: PreTrainedTokenizerFast, text: str, seed: int, temperature: float = 0.7) -> str:
    torch.manual_seed(seed)  # so that samples of two models differ only because the models do
    prompt = tokenizer(text, return_tensors="pt").to(model.device)
    options = {"do_sample": True, "temperature": temperature, "top_p": 0.95, "min_new_tokens": _SAMPLE_BYTES}
    with autocast(model.device):
        tokens = model.eval().generate(**prompt, **options, max_new_tokens=_SAMPLE_BYTES, pad_token_id=0)
    return str(tokenizer.decode(tokens[0]))


def _bytes(directory: Path) -> int:
    """Returns the size of the tensors in the directory of a model or an adapter, in bytes."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _compared(
    model: Qwen3MoeForCausalLM,
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    size: Size,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    """Saves the trained model and compares it with Transformers alone. Returns the numbers for results.json."""
    with console.status("saving, sampling, comparing with Transformers' eager experts"):
        model.save_pretrained(directory / DENSE)
        tokenizer.save_pretrained(directory / DENSE)
        probe = corpus.held_out[: size.batch_size]
        compare.check_reload(model, directory / DENSE, probe)
        return {
            "largest_logit_difference": compare.largest_logit_difference(model, probe),
            "step_ms": compare.step_milliseconds(model, corpus, size, rounds=min(10, size.steps)),
            "sample": _sample(model, tokenizer, _PROMPT, seed),
        }


def run(
    directory: Path, steps: int | None, device_name: str, seed: int, load_in_4bit: bool = True
) -> tuple[Console, dict[str, Any]]:
    """Trains, compares and writes everything into ``directory``.

    Args:
        directory: an existing, empty directory.
        steps: the number of training steps and the largest number of fine-tuning steps. The default depends on the device.
        device_name: as for ``choose_device``.
        seed: the seed of the weights, the batches and the samples.
        load_in_4bit: whether to continue with the saved model in 4 bits, fine-tune it and reload the adapter elsewhere.

    Returns:
        The console that shows the progress, and the content of results.json.

    Raises:
        ValueError: the device ``device_name`` cannot be used here.
        typer.BadParameter: ``load_in_4bit`` is set, and bitsandbytes is too old or cannot hold the model.
        RuntimeError: there is no usable kernel, the fused experts differ from Transformers', or a command failed.
        OSError, safetensors.SafetensorError: a file could not be written.
    """
    start = time.perf_counter()
    console = Console(highlight=False)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = choose_device(device_name)
    size = CPU_SIZE if device.type == "cpu" else GPU_SIZE
    steps = steps or size.steps
    size = dataclasses.replace(size, steps=steps, finetuning_steps=min(steps, size.finetuning_steps))

    if device.type == "cpu":
        # On matrices this small, a second thread saves a quarter of the time. But if another process wants its core, the two
        # threads wait for each other at every matrix, and a step takes ten times as long.
        torch.set_num_threads(1)
    transformers.set_seed(seed)
    moe_fused.enable()
    # The demo must show the fused experts, so a warning that Transformers' experts are used instead becomes an error.
    warnings.filterwarnings("error", message=".*(keeps its own implementation|stays dense)")
    tokenizer = byte_tokenizer()
    model = new_model(size, tokenizer, device)
    if load_in_4bit:
        from . import four_bit  # imports bitsandbytes

        four_bit.check_usable(model)
    corpus = Corpus.load(tokenizer, size.sequence_length, device)
    console.print(
        f"Qwen3-MoE, {model.num_parameters() / 1e6:.1f} M parameters, {size.num_experts} experts, top {size.top_k}, on "
        f"{device.type}; {len(corpus.train) >> 10} KiB of text, {corpus.held_out.numel() >> 10} KiB held out",
        soft_wrap=True,
    )
    history, seconds = _train_with_progress(model, corpus, size, seed, console)

    results = {
        "held_out_loss": {"before": history.held_out[0], "after": history.held_out[size.steps]},
        **_compared(model, directory, tokenizer, corpus, size, seed, console),
        "training_seconds": seconds,
        "size": dataclasses.asdict(size),
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": _versions(),
        "history": dataclasses.asdict(history),
    }
    if load_in_4bit:
        results |= _in_4bit(model, directory, tokenizer, corpus, size, seed, console)
    report.draw_loss_curves(results, directory / "loss.png")
    results["seconds"] = time.perf_counter() - start
    names = [DENSE] + ([PACKED, DEQUANTIZED, ADAPTER, EXPORTED] if load_in_4bit else [])
    results["bytes"] = {name: _bytes(directory / name) for name in names}
    write_results(directory, results)
    return console, results


def _in_4bit(
    model: Qwen3MoeForCausalLM,
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    size: Size,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    """Runs the second half: quantizes, fine-tunes and reloads. Returns the numbers of each part for results.json."""
    from . import finetune, four_bit

    with console.status("quantizing, saving, sampling, comparing"):
        packed, quantized = four_bit.convert(model, directory, tokenizer, corpus, size.batch_size)
        quantized["sample"] = _sample(packed, tokenizer, _PROMPT, seed)
    adapted, tuned = finetune.finetune(packed, directory, tokenizer, size, seed, console)
    with console.status("loading the adapter in stock Transformers and PEFT"):
        # At a lower temperature, the long runs of blanks in code would not end.
        tuned["sample"] = _sample(adapted, tokenizer, _CODE_PROMPT, seed, temperature=1.0)
        reloaded = finetune.reload(directory, packed.device)
    return {"four_bit": quantized, "finetune": tuned, "stock": reloaded}
