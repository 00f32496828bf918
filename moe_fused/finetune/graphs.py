"""The decoder's forward and its backward as two CUDA graphs, for batches of one shape.

A layer of Qwen3-30B-A3B is some hundred launches with its recomputation, which take the host 10 to 20 ms and, at 1024
tokens, a GPU 3 ms. A graph is one launch. The loss stays outside: TRL's selects the tokens that count, and waits for their
number.

Graphs read and write where they were recorded. A batch is therefore copied to where the first one was, and gradients appear
in the graphs' memory, in blocks that the next forward overwrites; they are handed out as they are, and moved out only if a
forward comes before somebody took them (gradient accumulation).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class GraphedDecoder:
    """``decoder`` with graphs in its training forward; everything else about it stays as it is.

    A forward raises RuntimeError if something in the decoder cannot be recorded, such as waiting for the GPU.
    A decoder that gives more than hidden states is left to run eagerly.

    The first batch of ``shape`` runs eagerly, and with it whatever compiles, tunes or allocates on a first call; the
    second is recorded. Batches of other shapes, and passes without gradients, always run eagerly.

    Args:
        decoder: a model of Transformers, from token ids to hidden states, that does nothing random.
        shape: of the token ids, (B, T).

    Attributes:
        enabled: False runs everything eagerly.
    """

    def __init__(self, decoder: Any, shape: tuple[int, int]) -> None:
        self.enabled = True
        self._decoder, self._shape = decoder, torch.Size(shape)
        self._own = vars(decoder).get("forward")
        self._eager: Callable[..., Any] = decoder.forward
        self._is_warm = False
        self._recording: _Recording | None = None
        decoder.forward = self._forward

    def close(self) -> None:
        """Leaves the decoder as it was, and gives the graphs' memory back, with the gradients in it."""
        del self._decoder.forward
        if self._own is not None:
            self._decoder.forward = self._own
        if self._recording is not None:
            self._recording.drop_gradients()
        self.forget()

    def forget(self) -> None:
        """Gives the graphs' memory back; the next batch is a first one again."""
        self._is_warm = False
        if self._recording is not None:
            self._recording.move_gradients()
            self._recording = None
            gc.collect()
            torch.cuda.empty_cache()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        tokens = kwargs.get("input_ids")
        if args or tokens is None or not self._takes(tokens):
            return self._eager(*args, **kwargs)
        if not self._is_warm:
            self._is_warm = True
            output = self._eager(**kwargs)
            self.enabled = set(output) == {"last_hidden_state"}
            return output
        if self._recording is None:
            self._recording = self._record(kwargs)
        if not self._recording.takes(kwargs):
            return self._eager(**kwargs)
        if self._recording.is_stale:
            self.forget()
            self._is_warm = True
            return self._eager(**kwargs)
        return self._recording.run(kwargs)

    def _record(self, inputs: Mapping[str, Any]) -> _Recording:
        gc.collect()  # what the pass before left in cycles
        torch.cuda.empty_cache()
        try:
            with _no_collection():
                return _Recording(self._decoder, self._eager, inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Ending a recording that failed fails, too: what came first says why.
            first: BaseException = error
            while first.__context__ is not None:
                first = first.__context__
            reason = str(first).strip().partition("\n")[0]
            if isinstance(first, torch.OutOfMemoryError) or "out of memory" in reason:
                raise torch.OutOfMemoryError(reason) from error
            # No going on eagerly: torch's random numbers are left as if the recording still went on.
            name = type(self._decoder).__name__
            raise RuntimeError(f"{name} cannot run as CUDA graphs, --no-cuda-graphs does without: {reason}") from error

    def _takes(self, tokens: Tensor) -> bool:
        return (
            self.enabled
            and self._decoder.training
            and torch.is_grad_enabled()
            and tokens.shape == self._shape
            and not torch.is_autocast_enabled(tokens.device.type)
        )


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """The collector might free, and so wait for, what belongs to another stream."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _other_leaves(module: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Each trained parameter of ``module``, and what takes its place meanwhile: a leaf of its own over the same memory.

    A parameter's node of autograd is on the stream of the pass that made it, and lives as long as anything refers to that
    pass. A backward through it would wait across streams, which no recording may do.
    """
    places = [
        (owner, name, own)
        for owner in module.modules()
        for name, own in owner._parameters.items()
        if own is not None and own.requires_grad
    ]
    leaves = {own: nn.Parameter(own.detach()) for _, _, own in places}
    try:
        for owner, name, own in places:
            owner._parameters[name] = leaves[own]
        yield leaves
    finally:
        for owner, name, own in places:
            owner._parameters[name] = own


class _Recording:
    """The graphs of one decoder for inputs like ``inputs``.

    Raises:
        RuntimeError: something in the decoder cannot be recorded, such as waiting for the GPU.
    """

    def __init__(self, decoder: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
        self._inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        self._forward_graph, self._backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with _other_leaves(decoder) as leaves:
            with torch.cuda.graph(self._forward_graph):
                output = forward(**self._inputs)
            hidden: Tensor = output.last_hidden_state
            # The backward may have what cuBLAS works in during the forward.
            torch._C._cuda_clearCublasWorkspaces()
            with torch.cuda.graph(self._backward_graph, pool=self._forward_graph.pool()):
                self._grad = torch.empty_like(hidden)
                grads: Sequence[Tensor | None] = torch.autograd.grad(
                    hidden, list(leaves.values()), self._grad, allow_unused=True
                )
        self._hidden, self._output_type = hidden.detach(), type(output)
        used = [(own, grad) for own, grad in zip(leaves, grads, strict=True) if grad is not None]
        self._parameters, self._grads = [own for own, _ in used], [grad for _, grad in used]
        self._places = [own.data_ptr() for own in self._parameters]
        self._buffers: list[Tensor] | None = None

    @property
    def is_stale(self) -> bool:
        """Whether a trained parameter has moved since; the graphs would go on with what it was."""
        return self._places != [own.data_ptr() for own in self._parameters]

    def takes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether ``inputs`` are like those that were recorded."""
        if inputs.keys() != self._inputs.keys():
            return False
        return all(_alike(value, self._inputs[name]) for name, value in inputs.items())

    def run(self, inputs: Mapping[str, Any]) -> Any:
        self.move_gradients()
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self._inputs[name].copy_(value)
        # Of all parameters only one is needed for autograd to know that there is a backward.
        return self._output_type(last_hidden_state=_Replay.apply(self._parameters[0], self))

    def replay_forward(self) -> Tensor:
        self._forward_graph.replay()
        return self._hidden

    def replay_backward(self, grad: Tensor) -> None:
        self._grad.copy_(grad)
        self._backward_graph.replay()
        own = [parameter.grad for parameter in self._parameters]
        if all(grad is None for grad in own):
            for parameter, new in zip(self._parameters, self._grads, strict=True):
                parameter.grad = new
            return
        held, added = [], []
        for parameter, old, new in zip(self._parameters, own, self._grads, strict=True):
            if old is None:
                parameter.grad = new.clone()
            else:
                held.append(old)
                added.append(new)
        torch._foreach_add_(held, added)

    def _kept(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters whose gradients are still where the next pass writes."""
        return [
            (parameter, new)
            for parameter, new in zip(self._parameters, self._grads, strict=True)
            if parameter.grad is not None and parameter.grad.data_ptr() == new.data_ptr()
        ]

    def drop_gradients(self) -> None:
        for parameter, _ in self._kept():
            parameter.grad = None

    def move_gradients(self) -> None:
        """Gradients that are still where the next pass writes go to memory of their own."""
        kept = self._kept()
        if not kept:
            return
        if self._buffers is None or len(self._buffers) != len(kept):
            self._buffers = [torch.empty_like(new) for _, new in kept]
        torch._foreach_copy_(self._buffers, [new for _, new in kept])
        for (parameter, _), buffer in zip(kept, self._buffers, strict=True):
            parameter.grad = buffer


def _alike(value: Any, recorded: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(recorded, Tensor) and value.shape == recorded.shape and value.dtype == recorded.dtype
    return type(value) is type(recorded) and bool(value == recorded)


class _Replay(torch.autograd.Function):
    """Hidden states (B, T, H) of a recording; gradients go straight to the parameters."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, recording: _Recording) -> Tensor:
        ctx.recording = recording
        # A tensor of its own over the same memory: autograd marks what it returns.
        return recording.replay_forward().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.recording.replay_backward(grad)
        return None, None
