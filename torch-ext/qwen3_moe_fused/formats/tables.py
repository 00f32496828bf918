"""Small constant tensors that are made once for each device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ..ops._torch_compat import intercepted

T = TypeVar("T")


class Table(Generic[T]):
    """A function whose results are kept, except those it computes under a tracer, which may have no values."""

    def __init__(self, make: Callable[..., T]) -> None:
        functools.update_wrapper(self, make)
        self.make = make
        self.kept: dict[tuple[Any, ...], T] = {}
        self.cache_clear = self.kept.clear

    def __call__(self, *key: Any) -> T:
        value = self.kept.get(key)  # first, because every launch asks
        if value is None:
            value = self.make(*key)
            if not intercepted():
                self.kept[key] = value
        return value
