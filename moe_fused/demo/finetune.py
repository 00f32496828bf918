"""Fine-tunes the 4-bit model on other text with ``moe-fused finetune``, and loads the adapter in stock PEFT.

Each runs in a process of its own: the first is the command as a user types it, and the second must not import moe_fused.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

import moe_fused
from moe_fused.checkpoints.adapters import Layout
from moe_fused.checkpoints.adapters.convert import convert_adapter
from moe_fused.checkpoints.adapters.saved import WEIGHTS
from moe_fused.checkpoints.models import plan_model
from moe_fused.commands.loading import load_adapter
from moe_fused.finetune.progress import LOG, read_log

from . import compare, stock
from .data import source_text, windows
from .model import Size
from .output import ADAPTER, DEQUANTIZED, EXPORTED, PACKED
from .train import held_out_loss

DATASET, HELD_OUT, PROBE, SCRIPT = "source-code.txt", "held-out-code.txt", "probe.safetensors", "stock.py"
_RECORDS, _EVALUATIONS = 30, 5  # points of the loss curve and of the evaluation's
_RANK = 8


def _arguments(size: Size, device: torch.device, seed: int) -> list[str]:
    """Returns the arguments of ``moe-fused finetune``, which runs in the directory of the models."""
    options = {
        "model": PACKED,
        "dataset": DATASET,
        "output": ADAPTER,
        "packing": "wrapped",
        "sequence-length": size.sequence_length,
        "batch-size": size.batch_size,
        "gradient-accumulation": 1,
        "max-steps": size.finetuning_steps,
        "learning-rate": size.finetuning_rate,
        "attention-rank": _RANK,
        "expert-rank": _RANK,
        "export": Layout.PER_EXPERT.value,
        "eval-dataset": HELD_OUT,
        "eval-steps": math.ceil(size.finetuning_steps / _EVALUATIONS),
        "save-steps": size.finetuning_steps,
        "log-steps": max(1, size.finetuning_steps // _RECORDS),
        "device": str(device),
        "seed": seed,
    }
    return ["finetune", "--no-gradient-checkpointing"] + [
        word for name, value in options.items() for word in (f"--{name}", str(value))
    ]


def _environment(device: torch.device) -> dict[str, str]:
    # The path finds a checkout that is not installed. On a CPU, one thread is used, as in this process.
    path = [str(Path(moe_fused.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {"OMP_NUM_THREADS": "1"} if device.type == "cpu" else {}
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path)}


def run_python(what: str, arguments: list[str], directory: Path, device: torch.device) -> None:
    """Runs Python in ``directory``. Its standard error goes to our output, and an interruption ends it, too.

    Raises:
        RuntimeError: it ended with an error.
    """
    sys.stdout.flush()
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=_environment(device),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=sys.__stdout__,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{what} ended with status {ended.returncode}; the output above says why")


def check_round_trip(directory: Path) -> None:
    """Raises RuntimeError unless the exported adapter, converted back, has the bits of the adapter that was trained."""
    adapter, back = directory / ADAPTER, directory / ".round-trip"
    convert_adapter(directory / EXPORTED, back, to=Layout.PEFT_FUSED)
    ours, other = (load_file(path / WEIGHTS) for path in (adapter, back))
    shutil.rmtree(back)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    scaling = config["lora_alpha"] / config["r"]  # a power of two, by which the export multiplied lora_B
    for name, tensor in ours.items():
        expected = tensor * scaling if ".lora_B." in name else tensor
        if name not in other or not torch.equal(other[name].to(tensor.dtype), expected):
            raise RuntimeError(f"{name} has other bits after an export for each expert and the way back")


def finetune(
    model: Qwen3MoeForCausalLM,
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    size: Size,
    seed: int,
    console: Console,
) -> tuple[Any, dict[str, Any]]:
    """Fine-tunes ``directory / PACKED``, loaded as ``model``, on Python's source code, and writes ``directory / ADAPTER``.

    Returns:
        PEFT's model, and the numbers for results.json.

    Raises:
        RuntimeError: the command failed, or the adapter changes its bits when it is exported.
        OSError: a file could not be written.
    """
    start = time.perf_counter()
    text, held_out = source_text()
    tokens = windows(held_out, tokenizer, size.sequence_length, model.device)
    before = held_out_loss(model, tokens, size.batch_size)
    for name, content in ((DATASET, text), (HELD_OUT, held_out)):
        (directory / name).write_text(content, encoding="utf-8")
    arguments = _arguments(size, model.device, seed)
    command = f"moe-fused {shlex.join(arguments)}"
    console.print(f"$ {command}", soft_wrap=True, markup=False)
    run_python("moe-fused finetune", ["-m", "moe_fused", *arguments], directory, model.device)

    records = read_log(directory / ADAPTER / LOG)
    adapted = load_adapter(model, str(directory / ADAPTER))
    check_round_trip(directory)
    numbers = {
        "command": command,
        "held_out_loss": {"before": before, "after": held_out_loss(adapted, tokens, size.batch_size)},
        "trained_parameters": sum(tensor.numel() for tensor in load_file(directory / ADAPTER / WEIGHTS).values()),
        "history": {record["step"]: record["loss"] for record in records if "loss" in record},
        "evaluations": {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record},
        "seconds": time.perf_counter() - start,
    }
    probe = tokens[: size.batch_size].contiguous()
    save_file({"tokens": probe, "logits": compare.logits(adapted, probe)}, directory / PROBE)
    return adapted, numbers


def reload(directory: Path, device: torch.device) -> dict[str, Any]:
    """Dequantizes ``directory / PACKED``, and lets stock PEFT load the result with the adapter in both layouts.

    Returns:
        The numbers for results.json.

    Raises:
        RuntimeError: stock Transformers and PEFT give other logits, or fail.
        OSError: a file could not be written.
    """
    start = time.perf_counter()
    plan_model(directory / PACKED, directory / DEQUANTIZED, "per-expert", dequantize=True).write()
    shutil.copyfile(stock.__file__, directory / SCRIPT)
    saved = directory / ".logits.safetensors"
    run_python(SCRIPT, [SCRIPT, str(device), saved.name], directory, device)
    expected = load_file(directory / PROBE)["logits"]
    differences = {layout: compare.largest_difference(expected, logits) for layout, logits in load_file(saved).items()}
    saved.unlink()
    return {"largest_logit_difference": differences, "seconds": time.perf_counter() - start}
