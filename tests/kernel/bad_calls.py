"""A call that must fail, for tests of error messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class BadCall:
    """A call, the error it ends in and all of its message."""

    id: str
    call: Callable[[], object]
    error: type[Exception]
    message: str

    def check(self) -> None:
        with pytest.raises(self.error) as caught:
            self.call()
        assert str(caught.value) == self.message
