"""Decides which of the processes that torchrun or accelerate started tells the user why all of them end.

An error that all processes come to is told once, by the first process. An error of one process is told by that process:
the launcher then ends the others with a signal, and what they would say about that is nothing new. This module imports
nothing heavy.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable

from .signals import Interrupted

# How long a process other than the first waits for the first to tell the same error, in seconds.
PATIENCE = 5.0


class Silent(Exception):
    """This process ends because of what another process has told, or is about to tell. Nothing is printed for it."""

    exit_code = 1


class Word:
    """Who may tell why the processes end.

    Attributes:
        claim: Claims the word for this process, and returns whether no other has claimed it. Before the processes are
            connected it is None.
        is_claimed: Whether a process has claimed the word.
        trains: Whether the processes train. What goes wrong then is seldom the same in all of them.
    """

    def __init__(self) -> None:
        self.claim: Callable[[], bool] | None = None
        self.is_claimed: Callable[[], bool] = lambda: False
        self.trains = False

    def is_ours(self, error: BaseException) -> bool:
        """Whether this process is to tell ``error``. A process other than the first may wait for the first to tell it."""
        if not is_launched():
            return True
        if isinstance(error, Silent):
            return False
        try:
            if is_end_of_all(error):
                return rank() == 0 and not self.is_claimed()
            if rank() and not self.trains:
                self._wait()
            return self.claim is None or self.claim()
        except Interrupted:  # the launcher ends this process, because another has failed
            return False
        except RuntimeError:  # what the processes share is gone, and with it the process that held it
            return True

    def _wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not self.is_claimed():
            time.sleep(0.1)

    def leave(self, status: int) -> None:
        """Ends this process at once if it is connected to others, without waiting for them in a collective."""
        if self.claim is None or not status:
            return
        with contextlib.suppress(Interrupted):
            if rank():  # otherwise the launcher might end the first process while it still speaks
                time.sleep(0.5)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


WORD = Word()


def rank() -> int:
    """Returns the number of this process among those that were started together, counted from 0."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdecimal() else 0


def is_launched() -> bool:
    """Whether this process is one of several that were started together."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def is_end_of_all(error: BaseException) -> bool:
    """Whether ``error`` is the end that a signal brings to all processes alike."""
    return isinstance(error, Interrupted) or int(getattr(error, "exit_code", 1)) > 128
