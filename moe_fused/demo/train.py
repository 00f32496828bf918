"""The training loop: AdamW with a warm-up and a cosine schedule, on a GPU in bfloat16 autocast over float32 weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM, get_cosine_schedule_with_warmup

from .data import Corpus
from .model import Size


@dataclass
class History:
    """Cross-entropy in nats per byte."""

    train: list[float] = field(default_factory=list)  # the loss of every step
    held_out: dict[int, float] = field(default_factory=dict)  # the loss after a step; step 0 is before training


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu")


def new_optimizer(model: Qwen3MoeForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)


def train_step(model: Qwen3MoeForCausalLM, batch: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Updates ``model`` on token ids ``batch`` (B, L), and returns the cross-entropy before it, a scalar on the device."""
    with autocast(batch.device):
        output = model(batch, labels=batch, output_router_logits=True, use_cache=False)
    output.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    # The training loss also contains the router's balance, which is not part of predicting text.
    return (output.loss - model.router_aux_loss_coef * output.aux_loss).detach()


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, windows: Tensor, batch_size: int) -> float:
    """Returns the mean cross-entropy over all token ids ``windows`` (N, L)."""
    model.eval()
    total = torch.zeros((), device=windows.device)
    for batch in windows.split(batch_size):
        with autocast(batch.device):
            total += model(batch, labels=batch, use_cache=False).loss.float() * len(batch)
    model.train()
    return total.item() / len(windows)


def train(
    model: Qwen3MoeForCausalLM,
    corpus: Corpus,
    size: Size,
    seed: int,
    on_step: Callable[[int, History], None],
) -> History:
    """Trains ``model`` for ``size.steps`` steps. ``on_step`` is called after each, with the losses so far."""
    optimizer = new_optimizer(model, size.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, size.steps // 10), size.steps)
    generator = torch.Generator().manual_seed(seed)
    every = math.ceil(size.steps / 8)
    history = History(held_out={0: held_out_loss(model, corpus.held_out, size.batch_size)})
    for step in range(1, size.steps + 1):
        loss = train_step(model, corpus.batch(size.batch_size, generator), optimizer)
        schedule.step()
        history.train.append(loss.item())
        if step % every == 0 or step == size.steps:
            history.held_out[step] = held_out_loss(model, corpus.held_out, size.batch_size)
        on_step(step, history)
    return history
