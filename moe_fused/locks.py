"""Locks that the system releases when the process that holds them ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Windows has no fcntl.
fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None
# Errors of file systems that have no locks, or none on files that are opened for reading only.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL)
_held: set[int] = set()


class InUse(RuntimeError):
    """Another process works on the same file or directory. The message names the process."""


def _close_in_child() -> None:
    # A forked process shares the lock, and would keep it after the process that took it has ended.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or directory for this process, without waiting.

    Returns:
        Whether this process holds the lock now; None where the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        raise
    _held.add(descriptor)
    return True


def release(descriptor: int) -> None:
    """Closes ``descriptor``, which ends its lock."""
    _held.discard(descriptor)
    with contextlib.suppress(OSError):
        os.close(descriptor)


@contextlib.contextmanager
def locked_directory(path: Path) -> Iterator[bool | None]:
    """Locks a directory itself, without a lock file in it, for the time of the block.

    Yields:
        What ``try_lock`` returns; None also for a directory that cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield try_lock(descriptor)
    finally:
        release(descriptor)


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        pid, host: the number of the process, and the machine that it runs on.
        since: when it took the lock, in local time.
    """

    pid: int
    host: str
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        return cls(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def read(cls, descriptor: int) -> Holder | None:
        """Reads what ``write`` wrote. Returns None if the file does not hold all of it."""
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            content = json.loads(os.read(descriptor, 4096))
            return cls(int(content["pid"]), str(content["host"]), str(content["since"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(vars(self)).encode())

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def check_unlocked(path: Path, name: str) -> None:
    """Raises InUse if another process holds ``path`` through ``locked_file``. Does not create the file."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:  # there is no such file, or taking the lock will fail with a better message
        return
    try:
        if try_lock(descriptor) is False:
            raise _in_use(name, descriptor)
    finally:
        release(descriptor)


def _in_use(name: str, descriptor: int) -> InUse:
    holder = Holder.read(descriptor) or "another process"
    return InUse(f"{name} is in use by {holder}: wait until it ends, or choose another place")


@contextlib.contextmanager
def locked_file(path: Path, name: str, *, parents: bool = False) -> Iterator[bool]:
    """Holds the file ``path`` as a lock for the time of the block. The file says who holds it, and is removed afterwards.

    A file that a killed process left is not locked, because the system released the lock.

    Args:
        path: the file. Its directory is made if it is missing, and is removed afterwards if it is empty then.
        name: what is locked, for messages.
        parents: also makes the directories above that directory; they are not removed.

    Yields:
        Whether there is a lock: False where the file system has no locks.

    Raises:
        InUse: another process holds the lock.
        OSError: the file cannot be written.
    """
    made, process = False, os.getpid()
    for _ in range(100):  # a process that ends at this moment removes the file, and the directory, that was just found
        made |= _make_directory(path.parent, name, parents)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue
        except OSError as error:
            if made:
                _remove_if_empty(path.parent)
            raise OSError(error.errno, f"cannot write in {name}: {error.strerror}", str(path.parent)) from error
        ours = try_lock(descriptor)
        if ours is False:
            refusal = _in_use(name, descriptor)
            release(descriptor)
            raise refusal
        if _is(path, descriptor):
            break
        release(descriptor)
    else:
        raise InUse(f"{name} is in use by other processes, which begin and end: {path} cannot be locked")
    try:
        Holder.this_process().write(descriptor)
        yield ours is not None
    finally:
        if os.getpid() == process:  # a forked process must not do this
            # The file is removed while the lock is held, so that it is never the file of another process.
            with contextlib.suppress(OSError):
                path.unlink()
            release(descriptor)
            if made:
                _remove_if_empty(path.parent)


def _make_directory(directory: Path, name: str, parents: bool) -> bool:
    """Makes ``directory``, and returns False if it was there already."""
    try:
        directory.mkdir(parents=parents)
    except FileExistsError:
        return False
    except OSError as error:
        raise OSError(error.errno, f"cannot create {name}: {error.strerror}", str(directory)) from error
    return True


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _is(path: Path, descriptor: int) -> bool:
    """Whether the open file ``descriptor`` is still the file at ``path``."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
