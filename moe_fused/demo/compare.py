"""The trained model against Transformers' own eager experts: the same logits, and how long a step takes."""

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

# Float32 sums in another order differ by about 1e-6; a kernel that computes something else, by far more than this.
_TOLERANCE = 1e-3
# Where two experts are almost equally likely, the last bit of the layer below decides, and a byte differs for no fault.
_ALLOWED_SHARE = 0.01


@torch.no_grad()
def logits(model: Qwen3MoeForCausalLM, batch: Tensor) -> Tensor:
    return model.eval()(batch, use_cache=False).logits


def largest_logit_difference(model: Qwen3MoeForCausalLM, batch: Tensor) -> float:
    """Largest difference between the logits of the fused and the eager experts, in float32, for token ids (B, L).

    Raises:
        RuntimeError: the two do not compute the same function.
    """
    fused = logits(model, batch)
    with experts(model, "eager"):
        return largest_difference(fused, logits(model, batch))


def largest_difference(fused: Tensor, eager: Tensor) -> float:
    """Largest difference between logits (B, L, V) of the fused and of the eager experts.

    Raises:
        RuntimeError: it is none that rounding explains.
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
    """Raises RuntimeError unless ``reloaded``, which is ``directory`` loaded, has the very logits of ``model``."""
    if not torch.equal(logits(model, batch), logits(reloaded, batch)):
        raise RuntimeError(f"the model saved in {directory.name}/ gives other logits when it is loaded again")


def check_reload(model: Qwen3MoeForCausalLM, directory: Path, batch: Tensor) -> None:
    """Raises RuntimeError unless stock Transformers reads ``directory`` back as the model that was saved."""
    reloaded = AutoModelForCausalLM.from_pretrained(directory, experts_implementation="eager").to(batch.device)  # type: ignore[arg-type]
    with experts(model, "eager"):
        check_same_logits(model, reloaded, directory, batch)


def step_milliseconds(model: Qwen3MoeForCausalLM, corpus: Corpus, size: Size, rounds: int) -> dict[str, float]:
    """Median time of a training step for the fused and the eager experts, on the same batches, taken in turns."""
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
            if turn >= 3:  # the first ones compile kernels and fill caches
                samples.append((time.perf_counter() - start) * 1e3)
    return {implementation: statistics.median(samples) for implementation, samples in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
