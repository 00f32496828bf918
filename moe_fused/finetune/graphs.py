"""Runs the decoder's forward and backward pass as two CUDA graphs, for batches of one shape.

A layer of Qwen3-30B-A3B takes some hundred kernel launches, including those that compute it again in the backward pass.
At 1024 tokens these launches take the host 10 to 20 ms and the GPU 3 ms. A graph is one launch. The loss stays outside
of the graphs, because TRL's loss selects the tokens that count and waits for their number.

Graphs read and write the memory that they were recorded with. Each batch is therefore copied to where the recorded
batch was. Gradients appear in the graphs' memory, in blocks that the next forward pass overwrites. They are handed out
where they are, and copied to other memory only if a forward pass comes before the optimizer has used them, as with
gradient accumulation.

The layers of a decoder that FSDP2 has divided are gathered by the graphs, and the gradients that appear are this process'
parts. FSDP2 takes the gradients of gathered parameters from ``grad``, so that this backward pass accumulates them there.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moe_fused.checkpoints.share import is_divided, local
from moe_fused.cuda_graphs import cause_of, clear_workspaces, reason_of, takes

from .batches import entries_of, with_room
from .endings import CannotRecord
from .kept_attention import Place
from .sharding import forget_gathered, gathering


class GraphedDecoder:
    """Replaces the forward pass of ``decoder`` by one that runs passes as graphs, those of an evaluation included.

    The first batch of ``shape`` runs eagerly, so that code that compiles, tunes or allocates on its first call does so.
    The second batch is recorded. From then on a pass without gradients, such as one of an evaluation, replays the forward
    graph of the training. If other adapters of PEFT are in use than in training, or none, as for the reference of
    preferences, such passes have a graph of their own, whose memory comes on top.

    A batch of fewer rows is filled up, and so are boundaries of fewer documents. A batch of the training with boundaries of
    more documents runs eagerly, like the first, and the one after it is recorded. Where the collator does not know how many
    there will be, it rounds up to powers of two, so that this is rare. Other batches run eagerly, and so does a decoder that
    returns more than hidden states. A forward pass raises CannotRecord if something in the decoder cannot be recorded, for
    example because it waits for the GPU.

    Args:
        decoder: A model of Transformers from token ids to hidden states. No part of it may be random, and it must
            compute the same in training and in evaluation.
        shape: The shape of the token ids, (B, T).
        kept: Where gradient checkpointing keeps what attention computed, if it keeps that.

    Attributes:
        enabled: Whether graphs are used. Without them, everything runs eagerly.
    """

    def __init__(self, decoder: Any, shape: tuple[int, int], kept: Place | None = None) -> None:
        self.enabled = True
        self._decoder, self._shape, self._kept = decoder, torch.Size(shape), kept
        self._forward_before = vars(decoder).get("forward")
        self._eager: Callable[..., Any] = decoder.forward
        self._is_warm = False
        self._recording: _Recording | None = None
        # The number of entries of boundaries that the recordings have.
        self._room = 0
        # PEFT switches adapters in all layers alike, so one layer shows which are in use.
        self._adapted: Any = next((module for module in decoder.modules() if isinstance(module, BaseTunerLayer)), None)
        self._trained: object = None
        self._references: dict[object, _Forward] = {}
        self._seen: set[object] = set()
        decoder.forward = self._forward

    def close(self) -> None:
        """Restores the decoder and frees the graphs' memory, together with the gradients in it."""
        del self._decoder.forward
        if self._forward_before is not None:
            self._decoder.forward = self._forward_before
        if self._recording is not None:
            self._recording.drop_gradients()
        self.forget()

    def forget(self) -> None:
        """Frees the graphs' memory. The next batch then counts as the first one."""
        self._is_warm = False
        self._seen.clear()
        if self._recording is not None:
            self._recording.move_gradients()
            self._recording = None
            self._references.clear()
            if self._kept is not None:
                self._kept.forget()
            gc.collect()
            torch.cuda.empty_cache()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        tokens = kwargs.get("input_ids")
        if args or tokens is None or not self._takes(tokens):
            return self._eager(*args, **kwargs)
        rows = len(tokens)
        run = self._with_gradients if torch.is_grad_enabled() else self._without_gradients
        if rows == self._shape[0]:
            return run(kwargs)
        output = run({name: _filled(value, rows, self._shape[0]) for name, value in kwargs.items()})
        if set(output) == {"last_hidden_state"}:
            output["last_hidden_state"] = output["last_hidden_state"][:rows]
            return output
        return self._eager(**kwargs)

    def _with_gradients(self, kwargs: dict[str, Any]) -> Any:
        kwargs = with_room(kwargs, self._room)
        if entries_of(kwargs) > self._room:
            self._room = entries_of(kwargs)
            if self._recording is not None:
                # This batch then runs eagerly, because a kernel may have to be built for this number of boundaries.
                self.forget()
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

    def _without_gradients(self, kwargs: dict[str, Any]) -> Any:
        kwargs = with_room(kwargs, self._room)
        trained, adapters = self._recording, self._adapters_in_use()
        if trained is None or trained.is_stale or not trained.takes(kwargs):
            self._seen.add(adapters)
            return self._eager(**kwargs)
        if adapters == self._trained:
            # The backward pass of a batch needs what the forward graph wrote for it.
            return self._eager(**kwargs) if trained.is_waiting else trained.evaluate(kwargs)
        if adapters not in self._seen:
            self._seen.add(adapters)
            return self._eager(**kwargs)
        if adapters not in self._references:
            self._references[adapters] = self._recorded(_Forward, kwargs)
        return self._references[adapters].evaluate(kwargs)

    def _adapters_in_use(self) -> object:
        layer = self._adapted
        return None if layer is None else (bool(layer.disable_adapters), tuple(layer.active_adapters))

    def _record(self, inputs: Mapping[str, Any]) -> _Recording:
        self._trained = self._adapters_in_use()
        return self._recorded(_Recording, inputs)

    def _recorded(self, kind: type[_Kind], inputs: Mapping[str, Any]) -> _Kind:
        gc.collect()  # the last pass may have left tensors in reference cycles
        if self._kept is not None:
            self._kept.join()  # a recording cannot wait for copies that began before it
        torch.cuda.empty_cache()
        try:
            with _no_collection():
                return kind(self._decoder, self._eager, inputs, self._kept)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = cause_of(error)
            reason = reason_of(cause)
            if isinstance(cause, torch.OutOfMemoryError) or "out of memory" in reason:
                raise torch.OutOfMemoryError(reason) from error
            # The pass cannot go on eagerly, because torch's random state is still that of a recording.
            name = type(self._decoder).__name__
            raise CannotRecord(
                f"{name} cannot run as CUDA graphs, --no-cuda-graphs runs it without them: {reason}"
            ) from error

    def _takes(self, tokens: Tensor) -> bool:
        return (
            self.enabled
            and (self._decoder.training or not torch.is_grad_enabled())
            and tokens.shape[1:] == self._shape[1:]
            and 0 < len(tokens) <= self._shape[0]
            and not torch.is_autocast_enabled(tokens.device.type)
        )


def _errors_of() -> str:
    """Whose calls may not wait for the GPU during a recording, for torch.cuda.graph.

    With several processes, a thread of NCCL looks at the GPU all the time, which is not part of the recording.
    """
    return "thread_local" if torch.distributed.is_initialized() else "global"


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Turns off the garbage collector within the block. It might free tensors of another stream and wait for it."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _own_leaves(module: nn.Module) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """Gives the trained parameters of ``module``, within the block, leaves that no pass has used and that have no gradient.

    A parameter's node in autograd belongs to the stream of the pass that made it, and lives as long as anything refers
    to that pass. A backward pass through this node would wait for that stream, which no recording may do.

    Yields:
        The leaf of each parameter: another one over the same memory, or the parameter itself if FSDP2 has divided it, since
        FSDP2 then makes a leaf of what it gathers.
    """
    forget_gathered(module)
    trained = {parameter for parameter in module.parameters() if parameter.requires_grad}
    divided = {parameter: parameter.grad for parameter in trained if is_divided(parameter)}
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter in trained and parameter not in divided
    ]
    leaves = {parameter: nn.Parameter(parameter.detach()) for _, _, parameter in places}
    try:
        for owner, name, parameter in places:
            owner._parameters[name] = leaves[parameter]
        for parameter in divided:
            parameter.grad = None
        yield leaves | {parameter: parameter for parameter in divided}
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter
        for parameter, grad in divided.items():
            parameter.grad = grad


def _gradients(hidden: Tensor, grad: Tensor, leaves: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Returns the gradients of ``leaves`` from that of ``hidden``. FSDP2 accumulates those of parameters it has divided."""
    if not any(map(is_divided, leaves)):
        return list(torch.autograd.grad(hidden, leaves, grad, allow_unused=True))
    torch.autograd.backward(hidden, grad)
    return [leaf.grad for leaf in leaves]


class _Forward:
    """Records the forward pass of one decoder with ``inputs`` as a graph, without gradients, and replays it.

    Raises:
        RuntimeError: Something in the decoder cannot be recorded, for example because it waits for the GPU.
    """

    def __init__(
        self, decoder: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any], kept: Place | None
    ) -> None:
        self._kept_attention = kept
        self._inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        self._forward_graph = torch.cuda.CUDAGraph()
        self._record(decoder, forward)

    def _record(self, decoder: nn.Module, forward: Callable[..., Any]) -> None:
        forget_gathered(decoder)
        with torch.cuda.graph(self._forward_graph, capture_error_mode=_errors_of()), gathering(decoder):
            output = forward(**self._inputs)
        self._hidden, self._output_type = output.last_hidden_state, type(output)

    def takes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether ``inputs`` have the names, shapes and values that the graphs were recorded with."""
        return takes(inputs, self._inputs)

    def evaluate(self, inputs: Mapping[str, Any]) -> Any:
        """Computes the decoder's output for ``inputs`` without gradients. The next pass overwrites it."""
        self._put(inputs)
        return self._output_type(last_hidden_state=self.replay_forward())

    def _put(self, inputs: Mapping[str, Any]) -> None:
        """Copies ``inputs`` to where the graphs read them."""
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self._inputs[name].copy_(value)

    def replay_forward(self) -> Tensor:
        self._forward_graph.replay()
        return self._hidden


_Kind = TypeVar("_Kind", bound=_Forward)


class _Recording(_Forward):
    """Records the forward and the backward pass of one decoder with ``inputs`` as graphs, and replays them.

    Attributes:
        is_waiting: Whether a forward pass has run whose backward pass has not.
    """

    is_waiting = False

    def _record(self, decoder: nn.Module, forward: Callable[..., Any]) -> None:
        self._backward_graph = torch.cuda.CUDAGraph()
        with _own_leaves(decoder) as leaves:
            with torch.cuda.graph(self._forward_graph, capture_error_mode=_errors_of()), gathering(decoder):
                output = forward(**self._inputs)
                self._join()
            hidden: Tensor = output.last_hidden_state
            # The backward pass may then use the memory that cuBLAS' workspaces had in the forward pass.
            clear_workspaces()
            graph, pool = self._backward_graph, self._forward_graph.pool()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode=_errors_of()), gathering(decoder):
                self._grad = torch.empty_like(hidden)
                grads = _gradients(hidden, self._grad, list(leaves.values()))
                self._join()
        self._keep(output, dict(zip(leaves, grads, strict=True)))

    def _join(self) -> None:
        """Makes the recording wait for copies beside it, because it must end with all that it began."""
        if self._kept_attention is not None:
            self._kept_attention.join()

    def _keep(self, output: Any, grads: Mapping[nn.Parameter, Tensor | None]) -> None:
        """Notes what the graphs write: the output, and the gradients of parameters."""
        self._hidden, self._output_type = output.last_hidden_state.detach(), type(output)
        used = [(parameter, grad) for parameter, grad in grads.items() if grad is not None]
        self._parameters, self._grads = [parameter for parameter, _ in used], [grad for _, grad in used]
        self._places = [local(parameter).data_ptr() for parameter in self._parameters]
        self._buffers: list[Tensor] | None = None
        # What autograd needs to call the backward pass.
        self._cause = self._hidden.new_zeros((), requires_grad=True)

    @property
    def is_stale(self) -> bool:
        """Whether a trained parameter is in other memory than when it was recorded. The graphs read the old memory."""
        return self._places != [local(parameter).data_ptr() for parameter in self._parameters]

    def run(self, inputs: Mapping[str, Any]) -> Any:
        """Computes the decoder's output for ``inputs`` with the graphs."""
        self._put(inputs)
        self.is_waiting = True
        return self._output_type(last_hidden_state=_Replay.apply(self._cause, self))

    def _put(self, inputs: Mapping[str, Any]) -> None:
        """Also copies gradients out of the memory that the graphs overwrite."""
        self.move_gradients()
        super()._put(inputs)

    def replay_backward(self, grad: Tensor) -> None:
        self.is_waiting = False
        self._grad.copy_(grad)
        self._backward_graph.replay()
        before = [parameter.grad for parameter in self._parameters]
        if all(grad is None for grad in before):
            for parameter, new in zip(self._parameters, self._grads, strict=True):
                parameter.grad = new
            return
        held, added = [], []
        for parameter, old, new in zip(self._parameters, before, self._grads, strict=True):
            if old is None:
                parameter.grad = new.clone()
            else:
                held.append(local(old))
                added.append(local(new))
        torch._foreach_add_(held, added)

    def _kept(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Returns the parameters whose gradients are still in the graphs' memory, with these gradients."""
        return [
            (parameter, new)
            for parameter, new in zip(self._parameters, self._grads, strict=True)
            if parameter.grad is not None and local(parameter.grad).data_ptr() == local(new).data_ptr()
        ]

    def drop_gradients(self) -> None:
        for parameter, _ in self._kept():
            parameter.grad = None

    def move_gradients(self) -> None:
        """Copies gradients out of the graphs' memory, which the next pass overwrites."""
        kept = self._kept()
        if not kept:
            return
        if self._buffers is None or len(self._buffers) != len(kept):
            self._buffers = [torch.empty_like(new) for _, new in kept]
        torch._foreach_copy_([local(buffer) for buffer in self._buffers], [local(new) for _, new in kept])
        for (parameter, _), buffer in zip(kept, self._buffers, strict=True):
            parameter.grad = buffer


def _filled(value: Any, rows: int, wanted: int) -> Any:
    """Adds rows of zeros to a tensor that has ``rows`` rows."""
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) != rows:
        return value
    return torch.cat([value, value.new_zeros(wanted - rows, *value.shape[1:])])


class _Replay(torch.autograd.Function):
    """Replays a recording. Forward returns its hidden states (B, T, H), and backward writes the parameters' gradients."""

    @staticmethod
    def forward(ctx: Any, cause: Tensor, recording: _Recording) -> Tensor:
        ctx.recording = recording
        # This is another tensor over the same memory, because autograd changes the tensor that is returned.
        return recording.replay_forward().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.recording.replay_backward(grad)
        return None, None
