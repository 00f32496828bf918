"""Makes a training step cheaper for the host by leaving out work that does not change its results.

With CUDA graphs, the GPU finishes before Trainer does: an H100 was idle for 80 of the 221 ms that a step of 1024 tokens
of Qwen3-30B-A3B took. Two things cost most. Trainer walks several times a step through the modules of the model, of
which a model with adapters has thousands. bitsandbytes' optimizers wait for the GPU after each parameter, so that none
of their launches overlaps with the backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import variables


@contextlib.contextmanager
def without_walks(model: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Keeps Trainer, within the block, from walking through all modules of ``model`` in each step.

    The model is put into training mode once. ``zero_grad`` clears the gradients of ``trained`` only, because no other
    parameter has a gradient.
    """

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
    """Makes a subclass of one of bitsandbytes' optimizers whose steps queue work on the GPU and do not wait for it.

    The work runs on the same stream as everything else. The host can access paged states as well, so ``state_dict``
    waits for the GPU before it reads them. The method ``allocate`` makes the states of all parameters that have none.
    With ``MOE_FUSED_ADAMW=1`` in the environment, a kernel of our own (``adamw``) updates parameters with 8-bit states of
    AdamW from then on, and bitsandbytes all others.
    """

    class Queued(optimizer_class):
        initialized: bool
        _together: Any = None

        def allocate(self) -> None:
            self._initialize()
            for group_index, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if not self.state[parameter]:
                        self.init_state(group, parameter, group_index, index)
            self._together = _together(self)

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
            if self._together is not None and not self._together.is_current(self):
                self._together = _together(self)
            updated = set() if self._together is None else self._together.step(self)
            for group_index, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is None or id(parameter) in updated:
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
    # Trainer knows bitsandbytes' optimizers by this, and then keeps the state of embeddings in 32 bits.
    Queued.__module__ = optimizer_class.__module__
    return Queued


def _together(optimizer: Any) -> Any:
    """Returns the ``adamw.Together`` of an optimizer, or None where the kernel cannot run or must not."""
    if not variables.is_on(variables.ADAMW) or optimizer.optimizer_name != "adam":
        return None
    try:
        from . import adamw
    except ImportError:  # Triton is missing, as with torch for CPUs
        return None
    devices = {parameter.device for group in optimizer.param_groups for parameter in group["params"]}
    return adamw.Together(optimizer) if any(map(adamw.runs_on, devices)) else None
