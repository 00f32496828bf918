"""Keeps what attention computed in the forward pass, so that gradient checkpointing does not compute it again.

Gradient checkpointing keeps the input of a layer and computes the rest of the layer again in the backward pass. Attention
takes most of that time in long sequences, since it grows with the square of their length, while its output has the size of
the queries. This module keeps that output, and the log-sum-exp that attention's backward pass needs. Everything else is
computed again as before, the queries, keys and values included. The loss has the same bits.

``--keep-attention device`` keeps them on the GPU. ``--keep-attention host`` copies them to pinned memory of the host while
the next layers compute, and copies those of one layer back while the layer after it runs backward.

For Qwen3-30B-A3B, attention keeps 8.1 KiB for each token and layer: 1.5 GiB for 4,096 tokens and 6.1 GiB for 16,384. At
the 535 TFLOP/s that attention reached on an H200, its forward pass over all layers takes 12 ms of a step of 338 ms, and
197 ms of one of 1643 ms. These times are the most that can be saved. No GPU has run it.

torch's own ``create_selective_checkpoint_contexts`` keeps outputs of operators on the GPU as well. It has no other place for
them, and refuses an output that is changed in place.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_fused.memory import COPIES

if TYPE_CHECKING:
    from .options import KeepAttention

# The operators whose results are kept, by their names in torch's dispatcher: those that scaled_dot_product_attention may
# choose, torch's attention over documents, and cuDNN's of the package nvidia-cudnn-frontend.
OPERATORS = frozenset(
    {
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_flash_attention_forward",
        "torch_attn::_varlen_attn",
        "cudnn::sdpa_fwd",
    }
)
# Smaller tensors stay on the GPU, for example the random state that attention returns.
_SMALLEST = 4096


class Group(Protocol):
    """The tensors that one call of an operator returned."""

    def take(self) -> Sequence[Tensor]:
        """Returns the tensors on the device that computed them. A group gives them once."""


class Place(Protocol):
    """Where tensors are kept."""

    def keep(self, tensors: Sequence[Tensor]) -> Group:
        """Keeps tensors until the group that it returns is asked for them."""

    def join(self) -> None:
        """Makes the current stream wait for all copies that have begun. A recording of a CUDA graph may end then."""

    def forget(self) -> None:
        """Notes that no recorded CUDA graph is used any more."""


class _Held:
    """Tensors that stay where they are."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors: Sequence[Tensor] = tensors

    def take(self) -> Sequence[Tensor]:
        tensors, self._tensors = self._tensors, ()
        return tensors


class OnDevice:
    """Keeps tensors on the device that computed them."""

    def keep(self, tensors: Sequence[Tensor]) -> Group:
        return _Held(tensors)

    def join(self) -> None:
        """Does nothing, because nothing is copied."""

    def forget(self) -> None:
        """Does nothing, because nothing is used twice."""


class OnHost:
    """Keeps tensors in pinned memory of the host, which it copies them to and from beside the computation.

    The memory on the host is used again by later passes, those of other shapes included, so a pass that is recorded as a
    CUDA graph allocates none if a pass of its shape ran before. All copies run on one stream, one after the other.

    Args:
        device: The device of the tensors. On a CPU, the copies are made at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Memory on the host that nothing uses, by ascending size, and the memory that recorded graphs copy to and from.
        self._unused: list[Tensor] = []
        self._recorded: list[Tensor] = []
        # Groups whose copy to the host has begun and whose tensors are still on the device, the oldest first.
        self._leaving: deque[_Away] = deque()
        # All groups that were not taken, in the order in which they came. The backward pass takes the last one first.
        self._kept: list[weakref.ref[_Away]] = []

    def keep(self, tensors: Sequence[Tensor]) -> Group:
        while len(self._leaving) >= COPIES:
            self._leaving.popleft().leave()
        group = _Away(self, tensors)
        self._leaving.append(group)
        self._kept.append(weakref.ref(group))
        return group

    def join(self) -> None:
        for group in self._alive():
            group.wait()

    def forget(self) -> None:
        recorded, self._recorded = self._recorded, []
        for memory in recorded:
            self.give_back(memory)

    def taken(self, group: _Away) -> None:
        """Notes that a group was taken, and begins to copy back the group that came before it."""
        if group in self._leaving:
            self._leaving.remove(group)
        alive = self._alive()
        place = alive.index(group)
        # Groups that came after this one may still be taken, as those of a layer that computes attention twice.
        self._kept = [weakref.ref(other) for other in alive if other is not group]
        if place:
            alive[place - 1].come()

    def _alive(self) -> list[_Away]:
        return [group for group in (kept() for kept in self._kept) if group is not None]

    def memory(self, size: int) -> Tensor:
        """Returns memory on the host of at least ``size`` bytes.

        Raises:
            OutOfMemoryError: The host has too little memory, or does not let this process pin as much.
        """
        place = bisect.bisect_left(self._unused, size, key=_size)
        if place < len(self._unused):
            return self._unused.pop(place)
        if self._unused and self._copies is not None:
            # It takes the place of memory that is too small, so that batches of many lengths do not take more and more.
            self._copies.synchronize()
        if self._unused:
            del self._unused[-1]
        return _bytes(size) if self._copies is None else _pinned(size)

    def give_back(self, memory: Tensor) -> None:
        """Takes back what ``memory`` returned. Copies that use it may not have ended, but later ones come after them."""
        if self._copies is not None and torch.cuda.is_current_stream_capturing():
            self._recorded.append(memory)
        else:
            bisect.insort(self._unused, memory, key=_size)

    def beside(self, copy: Callable[[], None]) -> torch.cuda.Event | None:
        """Runs ``copy`` on the stream of copies, after what the current stream has been given so far.

        Returns:
            The event that the copies have ended, or None if they have.
        """
        if self._copies is None:
            copy()
            return None
        self._copies.wait_stream(torch.cuda.current_stream(self._copies.device))
        with torch.cuda.stream(self._copies):
            copy()
            return self._copies.record_event()

    def wait(self, ended: torch.cuda.Event) -> None:
        """Makes the current stream wait for an event."""
        if self._copies is not None:
            torch.cuda.current_stream(self._copies.device).wait_event(ended)


class _Away:
    """Tensors whose values go to the host and come back.

    Their memory on the device is freed by the current stream, never by that of the copies. So it is held until the current
    stream has been told to wait for the copy.
    """

    def __init__(self, place: OnHost, tensors: Sequence[Tensor]) -> None:
        self._place, self._there = place, list(tensors)
        self._ended: torch.cuda.Event | None = None
        self._memory: list[Tensor] = []
        for tensor in tensors:
            self._memory.append(place.memory(tensor.nbytes))
        self._shapes = [(tensor.dtype, tensor.shape, tensor.stride(), tensor.device) for tensor in tensors]
        self._ended = place.beside(self._send)

    def __del__(self) -> None:
        # A copy back to memory that is freed now may be under way. Events of a recording that failed cannot be waited for.
        with contextlib.suppress(RuntimeError):
            self.wait()
        for memory in self._memory:
            self._place.give_back(memory)

    def _send(self) -> None:
        for memory, tensor in zip(self._memory, self._there, strict=True):
            memory[: tensor.nbytes].copy_(_flat(tensor), non_blocking=True)

    def _fetch(self) -> None:
        for memory, tensor in zip(self._memory, self._there, strict=True):
            _flat(tensor).copy_(memory[: tensor.nbytes], non_blocking=True)

    def wait(self) -> None:
        """Makes the current stream wait for the copy that has begun, if one has."""
        if self._ended is not None:
            self._place.wait(self._ended)
            self._ended = None

    def leave(self) -> None:
        """Frees the tensors' memory on the device, after their copy to the host."""
        self.wait()
        self._there = []

    def come(self) -> None:
        """Begins to copy the tensors back to the device, if they have left it."""
        if not self._there:
            self.wait()
            self._there = [
                torch.empty_strided(shape, stride, dtype=dtype, device=device)
                for dtype, shape, stride, device in self._shapes
            ]
            self._ended = self._place.beside(self._fetch)

    def take(self) -> Sequence[Tensor]:
        self.come()
        self.wait()
        self._place.taken(self)
        tensors, self._there = self._there, []
        return tensors


def _size(memory: Tensor) -> int:
    return memory.numel()


def _bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _pinned(size: int) -> Tensor:
    """Returns pinned memory. torch's own allocator of such memory would round its size up to a power of two.

    Raises:
        OutOfMemoryError: The host has too little memory, or does not let this process pin as much.
    """
    try:
        memory = _bytes(size)
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), size, 0)))
    except RuntimeError as error:  # of torch, also for memory that is missing on the host
        raise torch.OutOfMemoryError(
            f"the host cannot pin {size} more bytes for --keep-attention host, use device or none instead: {error}"
        ) from error
    weakref.finalize(memory, _unpin, memory.data_ptr()).atexit = False
    return memory


def _unpin(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a tensor fill a block of memory, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _flat(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as bytes."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class _Call:
    """What one call of an operator returned, with its larger tensors in a group."""

    def __init__(self, place: Place, results: Any) -> None:
        self._is_one = isinstance(results, Tensor)
        # Aliases, because the results themselves become part of autograd's graph, which would then keep itself alive.
        self._results = [
            result.detach() if isinstance(result, Tensor) else result
            for result in ([results] if self._is_one else results)
        ]
        self._places = [
            i
            for i, result in enumerate(self._results)
            if isinstance(result, Tensor) and result.nbytes >= _SMALLEST and _is_dense(result)
        ]
        self._group = place.keep([self._results[i] for i in self._places])
        for i in self._places:
            self._results[i] = None

    def results(self) -> Any:
        """Returns the results again. It can be called once."""
        for i, tensor in zip(self._places, self._group.take(), strict=True):
            self._results[i] = tensor
        results, self._results = self._results, []
        return results[0] if self._is_one else tuple(results)


class _Keeping(TorchDispatchMode):
    """Runs operators and keeps the results of those of attention."""

    def __init__(self, place: Place, calls: deque[_Call]) -> None:
        super().__init__()
        self._place, self._calls = place, calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        if function._schema.name in OPERATORS:
            self._calls.append(_Call(self._place, results))
        return results


class _Giving(TorchDispatchMode):
    """Runs operators except those of attention, whose results were kept."""

    def __init__(self, calls: deque[_Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name not in OPERATORS:
            return function(*args, **(kwargs or {}))
        if not self._calls:
            raise RuntimeError(
                "attention's output was kept for one backward pass, and this is another one through the same layer"
            )
        return self._calls.popleft().results()


def contexts(place: Place) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """Returns the contexts of one layer's forward pass and of its recomputation, for ``torch.utils.checkpoint``."""
    calls: deque[_Call] = deque()
    return _Keeping(place, calls), _Giving(calls)


def place_for(where: KeepAttention, device: torch.device) -> Place | None:
    """Returns the place that a value of ``--keep-attention`` means for tensors of ``device``, or None."""
    if where == "none":
        return None
    return OnDevice() if where == "device" else OnHost(device)


def use(model: nn.Module, place: Place) -> None:
    """Makes the gradient checkpointing of ``model`` keep what attention computed.

    Args:
        model: A model of Transformers whose gradient checkpointing is on, without reentrance. Attention in it must not be
            random.
        place: Where it is kept.
    """
    module: Any
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            module._gradient_checkpointing_func = functools.partial(
                function, context_fn=functools.partial(contexts, place)
            )
