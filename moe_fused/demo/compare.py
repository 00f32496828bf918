"""Compares the trained model with Transformers' eager experts: its logits, and the time of a training step."""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from .data import Corpus
from .model import Size, experts
from .train import new_optimizer, train_step

# Float32 sums in another order differ by about 1e-6. A kernel that computes something else differs by far more than this.
_TOLERANCE = 1e-3
# Where two experts are almost equally likely, a rounding in the layer below decides between them, and a byte may differ.
_ALLOWED_SHARE = 0.01


@torch.no_grad()
def logits(model: Qwen3MoeForCausalLM, batch: Tensor) -> Tensor:
    return model.eval()(batch, use_cache=False).logits


def largest_logit_difference(model: Qwen3MoeForCausalLM, batch: Tensor) -> float:
    """Returns the largest difference between the float32 logits of the fused and the eager experts for token ids (B, L).

    Raises:
        RuntimeError: the two do not compute the same function.
    """
    fused = logits(model, batch)
    with experts(model, "eager"):
        return largest_difference(fused, logits(model, batch))


def largest_difference(fused: Tensor, eager: Tensor) -> float:
    """Returns the largest difference between logits (B, L, V) of the fused and of the eager experts.

    Raises:
        RuntimeError: rounding does not explain the difference.
    """
    difference = (fused - eager).abs().amax(-1)
    wrong = (~(difference <= _TOLERANCE)).float().mean().item()  # not <=: NaN counts as wrong
    if wrong > _ALLOWED_SHARE:
        raise RuntimeError(
            f"logits of the fused experts differ from Transformers' eager experts at {wrong:.0%} of bytes"
        )
    return difference.max().item()


def check_same_logits(
    model: Qwen3MoeForCausalLM, reloaded: Qwen3MoeForCausalLM, directory: Path, batch: Tensor
) -> None:
    """Raises RuntimeError unless ``reloaded``, loaded from ``directory``, has exactly the logits of ``model``."""
    if not torch.equal(logits(model, batch), logits(reloaded, batch)):
        raise RuntimeError(f"the model saved in {directory.name}/ gives other logits when it is loaded again")


def check_reload(model: Qwen3MoeForCausalLM, directory: Path, batch: Tensor) -> None:
    """Raises RuntimeError unless Transformers alone loads ``directory`` as the model that was saved."""
    reloaded = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").to(batch.device)  # type: ignore[arg-type]
    with experts(model, "eager"):
        check_same_logits(model, reloaded, directory, batch)


def step_milliseconds(model: Qwen3MoeForCausalLM, corpus: Corpus, size: Size, rounds: int) -> dict[str, float]:
    """Measures the median time of a training step with fused and with eager experts, in turns on the same batches."""
    model = copy.deepcopy(model).train()
    optimizer = new_optimizer(model, size.learning_rate)
    generator = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {"moe_fused": [], "eager": []}
    for turn in range(rounds + 3):
        batch = corpus.batch(size.batch_size, generator)
        for implementation, samples in times.items():
            with experts(model, implementation):
                _synchronize(batch.device)
                start = time.perf_counter()
                train_step(model, batch, optimizer)
                _synchronize(batch.device)
            if turn >= 3:  # the first turns compile kernels and fill caches
                samples.append((time.perf_counter() - start) * 1e3)
    return {implementation: statistics.median(samples) for implementation, samples in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
