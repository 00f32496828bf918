"""Reads the files of a checkpoint into the system's page cache ahead of the loader.

While Transformers quantizes a checkpoint, it reads and converts tensors one after another. The files are mapped into memory,
so the disk waits during each conversion, and each conversion waits for the disk. Here a thread reads the files meanwhile. It
leaves out what the page cache already has, and it stays at most a quarter of the free memory ahead of the loader, so that
nothing is evicted before it was used.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# The bytes that are asked of the system at a time, and those of a read. The disk works on two of these chunks at once.
CHUNK, READ = 32 * 2**20, 2**20
# The part of the free memory that may hold what the loader has not used yet.
SHARE = 0.25
# The seconds between two looks at how far the loader is, and those after which it has surely given up.
PAUSE, PATIENCE = 0.02, 60.0


def is_possible() -> bool:
    """Whether this system has what it takes: Linux does."""
    return all(hasattr(os, name) for name in ("preadv", "posix_fadvise", "RWF_NOWAIT"))


def free_bytes() -> int:
    """The memory that programs can take before the system has to swap, 0 where it does not tell."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


class Readahead:
    """A thread that reads files in their order.

    It ends with the last byte, with ``stop``, when a file cannot be read, or a minute after the loader has got no further.

    Args:
        paths: The files.
        progress: Returns which part of all bytes the loader has used, from 0 to 1. None ends the thread.
        window: How many bytes it may be ahead of the loader; a quarter of the free memory by default.
    """

    def __init__(
        self, paths: Iterable[str | Path], progress: Callable[[], float | None], window: int | None = None
    ) -> None:
        self._paths = [Path(path) for path in paths]
        self._progress = progress
        self._window = int(SHARE * free_bytes()) if window is None else window
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moe_fused readahead", daemon=True)

    def start(self) -> Readahead:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread after the chunk that it reads, and waits for that."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        # The loader meets the same error, and says which file it was.
        with contextlib.suppress(OSError):
            sizes = [path.stat().st_size for path in self._paths]
            total, before = sum(sizes), 0
            for path, size in zip(self._paths, sizes, strict=True):
                with path.open("rb", buffering=0) as file:
                    if not self._read(file.fileno(), size, before, total):
                        return
                before += size

    def _read(self, file: int, size: int, before: int, total: int) -> bool:
        """Reads one file of ``size`` bytes, the first of which is number ``before`` of all. False ends the thread."""
        buffer = bytearray(min(READ, size))
        for offset in range(0, size, CHUNK):
            if not self._may_read(before + offset + CHUNK, total):
                return False
            count = min(CHUNK, size - offset)
            if not _is_cached(file, offset + count // 2):
                os.posix_fadvise(file, offset, 2 * CHUNK, os.POSIX_FADV_WILLNEED)
                for start in range(offset, offset + count, READ):
                    os.preadv(file, [memoryview(buffer)[: offset + count - start]], start)
        return True

    def _may_read(self, end: int, total: int) -> bool:
        """Waits until the first ``end`` bytes may be read. False ends the thread."""
        seen, since = self._progress(), time.monotonic()
        while not self._stopped.is_set():
            used = self._progress()
            if used is None or time.monotonic() - since > PATIENCE:
                return False
            if end - used * total <= self._window:
                return True
            if used != seen:
                seen, since = used, time.monotonic()
            self._stopped.wait(PAUSE)
        return False

    def __deepcopy__(self, memo: dict[int, object]) -> Readahead:
        return self  # Transformers copies quantizers while it loads


def _is_cached(file: int, offset: int) -> bool:
    """Whether the page cache has the byte at an offset. Not all file systems tell."""
    try:
        return os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # it would have to wait, or the file system cannot tell
        return False
