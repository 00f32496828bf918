"""What a training step does on the host besides launching: as little as its results allow.

With CUDA graphs the GPU is done before Trainer is: of 221 ms for 1024 tokens of Qwen3-30B-A3B an H100 was idle for 80. What
costs most is walking through the thousands of modules of a model with adapters, several times a step, and bitsandbytes'
optimizers, which wait for the GPU after each parameter, so that none of their launches overlaps with the backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def without_walks(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Puts ``model`` into training mode once, and clears the gradients of what is ``trained``; nothing else has any."""

    def train(mode: bool = True) -> nn.Module:
        return model if mode and model.training else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    model.train()
    vars(model).update(train=train, zero_grad=zero_grad)
    try:
        yield
    finally:
        for name in ("train", "zero_grad"):
            vars(model).pop(name, None)


def queued(optimizer_class: type[Any]) -> type[Any]:
    """An optimizer of bitsandbytes whose steps only queue work on the GPU, on the stream that all else runs on.

    States that are paged are memory of the host, too, so whoever reads them must wait: ``state_dict`` does.
    ``allocate`` makes the states of all parameters that have none.
    """

    class Queued(optimizer_class):
        initialized: bool

        def allocate(self) -> None:
            self._initialize()
            for group_index, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if not self.state[parameter]:
                        self.init_state(group, parameter, group_index, index)

        def _initialize(self) -> None:
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()
                self.initialized = True

        @torch.no_grad()
        def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._initialize()
            for group_index, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, group_index, index)
                    self.prefetch_state(parameter)
                    self.update_step(group, parameter, group_index, index)
            return loss

        def state_dict(self) -> dict[str, Any]:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            state: dict[str, Any] = super().state_dict()
            return state

    Queued.__name__ = Queued.__qualname__ = optimizer_class.__name__
    return Queued
