"""What recordings of CUDA graphs share: which inputs a graph takes, and why a recording failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def takes(inputs: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Whether ``inputs`` have the names, shapes and values that a graph was recorded with."""
    return inputs.keys() == recorded.keys() and all(_alike(value, recorded[name]) for name, value in inputs.items())


def _alike(value: Any, recorded: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(recorded, Tensor) and value.shape == recorded.shape and value.dtype == recorded.dtype
    return value is recorded or (type(value) is type(recorded) and bool(value == recorded))


def cause_of(error: BaseException) -> BaseException:
    """Returns the error that has the reason. A recording that failed raises once more when it ends."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def reason_of(cause: BaseException) -> str:
    """Returns the first line of an error's text."""
    return str(cause).strip().partition("\n")[0]
