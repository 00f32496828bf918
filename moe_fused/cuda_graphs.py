"""What recordings of CUDA graphs share.

They ask which inputs a graph takes, replace functions of Transformers meanwhile, clean up behind a recording, and say why
one failed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def takes(inputs: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Whether ``inputs`` have the names, shapes and values that a graph was recorded with."""
    return inputs.keys() == recorded.keys() and all(_alike(value, recorded[name]) for name, value in inputs.items())


def _alike(value: Any, recorded: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(recorded, Tensor) and value.shape == recorded.shape and value.dtype == recorded.dtype
    return value is recorded or (type(value) is type(recorded) and bool(value == recorded))


def cause_of(error: BaseException, handled: BaseException | None = None) -> BaseException:
    """Returns the error that has the reason. A recording that failed raises once more when it ends.

    Args:
        error: The error of a recording.
        handled: The error that the caller was handling when the recording began, which is no reason.
    """
    while error.__context__ is not None and error.__context__ is not handled:
        error = error.__context__
    return error


def reason_of(cause: BaseException) -> str:
    """Returns the first line of an error's text."""
    return str(cause).strip().partition("\n")[0]


@contextlib.contextmanager
def registered(registry: Any, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Lets a registry of Transformers, such as that of attention functions, have other functions within the block.

    Args:
        registry: The registry.
        functions: The functions by their names in it.
    """
    before = {name: registry._local_mapping.get(name) for name in functions}
    try:
        for name, function in functions.items():
            registry[name] = function
        yield
    finally:
        for name, earlier in before.items():
            if earlier is None:
                del registry[name]
            else:
                registry[name] = earlier


def clear_workspaces() -> None:
    """Frees the memory that cuBLAS keeps. During a recording it comes from the pool of the graph."""
    torch._C._cuda_clearCublasWorkspaces()


def close_pool(pool: Any) -> None:
    """Ends a recording that failed for torch's allocator of GPU memory.

    torch ends its own use of the pool only if CUDA has ended the recording without an error. Otherwise its allocator goes on
    as during a recording: it returns no memory that several streams have used, and asks a graph that no longer exists which
    memory belongs to it.

    Args:
        pool: The ``torch.cuda.graph_pool_handle`` that the recording was given.
    """
    device = torch.cuda.current_device()
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        end: Any = getattr(torch._C, name, None)
        if end is not None:  # torch 2.9 to 2.13 have both
            end(device, pool)
