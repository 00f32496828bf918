"""Turns signals that end a run into an exception, so that ``with`` and ``finally`` clean up after them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_received: list[int] = []


class Interrupted(BaseException):
    """The run was asked to end. It is no Exception, so that no library catches it as one of its own errors."""

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum  # the status that shells report for a process that a signal ended
        super().__init__(f"interrupted by {signal.Signals(signum).name}")


def _raise(signum: int, _frame: FrameType | None) -> None:
    _received.append(signum)
    raise Interrupted(signum)


def check_interrupted() -> None:
    """Raises Interrupted if a signal came. An exception within a destructor or a callback from C may have been lost."""
    if _received:
        raise Interrupted(_received[0])


def raise_on_signals() -> None:
    """Makes SIGINT, SIGTERM and SIGHUP raise Interrupted in the main thread from now on."""
    for signum in _ENDING:
        if signum == getattr(signal, "SIGHUP", None) and signal.getsignal(signum) == signal.SIG_IGN:
            continue  # the process was started under nohup
        signal.signal(signum, _raise)


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """Ignores signals for a few milliseconds of renaming or removing, which must not stop half-way."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # signals reach, and are set in, the main thread alone
        yield
        return
    previous = {signum: signal.signal(signum, signal.SIG_IGN) for signum in _ENDING}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def ignore_next_signal() -> None:
    """Lets the next SIGINT, SIGTERM or SIGHUP do nothing. The one after it does what the next one would have done.

    It is for a process that is about to say why it ends, and whose launcher may send it a signal meanwhile.
    """
    handled = [signum for signum in _ENDING if signal.getsignal(signum) != signal.SIG_IGN]
    previous = {signum: signal.getsignal(signum) for signum in handled}

    def ignore(_signum: int, _frame: FrameType | None) -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    for signum in handled:
        signal.signal(signum, ignore)


# The number of an operation of Linux' prctl: the signal that a process gets when its parent ends.
_SIGNAL_AT_END_OF_PARENT = 1
# This list has an element for each ``workers_forked`` that is active.
_pools: list[object] = []


def _end_with_parent() -> None:
    """Runs in each process that was forked from this one, and does what ``workers_forked`` says."""
    if _pools:
        for signum in _ENDING:
            signal.signal(signum, signal.SIG_IGN if signum == signal.SIGINT else signal.SIG_DFL)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_SIGNAL_AT_END_OF_PARENT, signal.SIGKILL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_with_parent)


@contextlib.contextmanager
def workers_forked() -> Iterator[None]:
    """Makes processes that are forked within the block ignore Ctrl-C, and end at once on SIGTERM and SIGHUP.

    Otherwise they would inherit the handlers of this process and raise an exception instead of ending, and a pool would
    wait for them for ever. On Linux they also end when this process is killed. Otherwise they would finish their work and
    then wait for more for ever.
    """
    _pools.append(None)
    try:
        yield
    finally:
        _pools.pop()


def end_with_input() -> None:
    """Makes this process end at once when the pipe that is its standard input is closed.

    A parent that holds the other end, and never writes to it, takes this process along however it ends itself.
    """

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Lets the first signal raise Interrupted only at the end of the block.

    It is for importing torch, whose C++ code ends the process if a signal handler raises within it.
    """
    with first_signal_noted() as received:
        yield
    if (signum := received()) is not None:
        raise Interrupted(signum)


@contextlib.contextmanager
def first_signal_noted(apart: float = 0.0) -> Iterator[Callable[[], int | None]]:
    """Notes the first SIGINT, SIGTERM or SIGHUP instead of raising, and yields a function that returns it, or None.

    It is for work that ends by itself soon after it was asked to. A second signal raises Interrupted, for users who do not
    want to wait.

    Args:
        apart: The seconds after the first signal in which others are the same one: a launcher may hand a signal on that
            all of its processes got already.
    """
    noted: list[int] = []
    first = 0.0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if not noted:
            noted.append(signum)
            first = time.monotonic()
        elif time.monotonic() - first >= apart:
            _raise(signum, frame)

    handled = [signum for signum in _ENDING if signal.getsignal(signum) != signal.SIG_IGN]
    previous = {signum: signal.signal(signum, note) for signum in handled}
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
