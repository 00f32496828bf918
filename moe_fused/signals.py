"""Signals that end a run, as an exception, so that ``with`` and ``finally`` clean up after SIGTERM as after Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_received: list[int] = []


class Interrupted(BaseException):
    """The run was asked to end. Not an Exception, so that no library on the way takes it for an error of its own."""

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum  # what shells report for a process that the signal ended
        super().__init__(f"interrupted by {signal.Signals(signum).name}")


def _raise(signum: int, _frame: FrameType | None) -> None:
    _received.append(signum)
    raise Interrupted(signum)


def check_interrupted() -> None:
    """Raises Interrupted if a signal came: what is raised within a destructor or a callback from C may get lost."""
    if _received:
        raise Interrupted(_received[0])


def raise_on_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP raise Interrupted in the main thread."""
    for signum in _ENDING:
        if signum == getattr(signal, "SIGHUP", None) and signal.getsignal(signum) == signal.SIG_IGN:
            continue  # started under nohup
        signal.signal(signum, _raise)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """For a few milliseconds of renaming or removing that must not stop half-way."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # the only one that signals reach, or that may do this
        yield
        return
    previous = {signum: signal.signal(signum, signal.SIG_IGN) for signum in _ENDING}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """For importing torch, whose C++ ends the process if a signal raises within it: the first one raises at the end."""
    with first_signal_noted() as received:
        yield
    if (signum := received()) is not None:
        raise Interrupted(signum)


@contextlib.contextmanager
def first_signal_noted() -> Iterator[Callable[[], int | None]]:
    """For work that ends by itself soon after it is asked to: gives a function that returns the signal that came, or None.

    The first SIGINT, SIGTERM or SIGHUP is noted; a second raises Interrupted, for who does not want to wait.
    """
    noted: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if noted:
            _raise(signum, frame)
        noted.append(signum)

    handled = [signum for signum in _ENDING if signal.getsignal(signum) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, note) for signum in handled}
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
