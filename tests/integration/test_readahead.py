"""Checkpoints are read ahead of the loader, no farther than they may be, and not twice."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_fused.checkpoints import readahead
from moe_fused.checkpoints.converter import ExpertsConverter
from moe_fused.checkpoints.readahead import Readahead
from moe_fused.checkpoints.share import Share, taking

from .conftest import DEVICE
from .four_bit import build, config

pytestmark = pytest.mark.skipif(not readahead.is_possible(), reason="needs what Linux has")
CHUNK = 1000
NAME = "moe_fused readahead"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three files of 2, 1 and 3 chunks, one of which is not full; none is in the page cache."""
    monkeypatch.setattr(readahead, "CHUNK", CHUNK)
    monkeypatch.setattr(readahead, "READ", CHUNK)
    monkeypatch.setattr(readahead, "_is_cached", lambda *_: False)
    paths = [tmp_path / name for name in "abc"]
    for path, size in zip(paths, (2 * CHUNK, CHUNK // 2, 3 * CHUNK), strict=True):
        path.write_bytes(bytes(size))
    return paths


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The offsets and sizes of all reads."""
    noted: list[tuple[int, int]] = []
    preadv: Callable[..., int] = os.preadv

    def note(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count = preadv(file, buffers, offset, flags)
        noted.append((offset, count))
        return count

    monkeypatch.setattr(os, "preadv", note)
    return noted


def ended(thread: Readahead, seconds: float = 5) -> bool:
    thread._thread.join(seconds)
    return not thread._thread.is_alive()


def soon(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


ALL = [(0, CHUNK), (CHUNK, CHUNK), (0, CHUNK // 2), (0, CHUNK), (CHUNK, CHUNK), (2 * CHUNK, CHUNK)]


def test_reads_all_once_in_order(files: list[Path], reads: list[tuple[int, int]]) -> None:
    assert ended(Readahead(files, lambda: 0.0, window=10**6).start())
    assert reads == ALL


def test_stays_within_its_window(files: list[Path], reads: list[tuple[int, int]]) -> None:
    used = [0.0]
    thread = Readahead(files, lambda: used[0], window=2 * CHUNK).start()
    assert soon(lambda: len(reads) == 2)
    time.sleep(0.1)
    assert reads == ALL[:2]
    used[0] = 2 / 5.5  # the first file
    assert soon(lambda: len(reads) == 4)
    used[0] = 1.0
    assert ended(thread)
    assert reads == ALL


def test_a_chunk_is_read_in_parts(
    files: list[Path], reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "READ", 400)
    assert ended(Readahead(files[:2], lambda: 0.0, window=10**6).start())
    assert reads == [(0, 400), (400, 400), (800, 200), (1000, 400), (1400, 400), (1800, 200), (0, 400), (400, 100)]


def test_what_is_cached_is_not_read(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(readahead, "CHUNK", CHUNK)
    read: list[int] = []
    preadv: Callable[..., int] = os.preadv

    def note(file: int, buffers: Any, offset: int, flags: int = 0) -> int:
        read.extend([offset] * (flags == 0))
        return preadv(file, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", note)
    monkeypatch.setattr(os, "RWF_NOWAIT", 0)  # every file system then has what was asked for
    assert ended(Readahead(files, lambda: 0.0, window=10**6).start())
    middles = [CHUNK // 2, 3 * CHUNK // 2, CHUNK // 4, CHUNK // 2, 3 * CHUNK // 2, 5 * CHUNK // 2]
    assert read == middles, "the looks alone"


@pytest.mark.parametrize("how", ["stop", "gone", "patience", "missing"])
def test_ends(how: str, files: list[Path], reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float | None] = [0.0]
    if how == "missing":
        files[1].unlink()
    if how == "patience":
        monkeypatch.setattr(readahead, "PATIENCE", 0.05)
    thread = Readahead(files, lambda: used[0], window=CHUNK).start()
    if how == "stop":
        assert soon(lambda: len(reads) == 1)
        thread.stop()
    used[0] = None if how == "gone" else used[0]
    assert ended(thread)
    assert len(reads) <= 1


def test_free_memory_is_known() -> None:
    assert 2**20 < readahead.free_bytes() < 2**50


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Readahead]]:
    noted: list[Readahead] = []
    start = Readahead.start
    monkeypatch.setattr(Readahead, "start", lambda self: (noted.append(self), start(self))[1])
    yield noted
    assert not [thread for thread in threading.enumerate() if thread.name == NAME]


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map=DEVICE, quantization_config=config(bnb_4bit_compute_dtype=torch.float32)
    )


@pytest.mark.usefixtures("enabled")
def test_a_model_in_4_bits_is_read_ahead(
    tmp_path: Path, started: list[Readahead], reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files of a checkpoint; the thread ends with the load, also with one that fails."""
    monkeypatch.setattr(readahead, "_is_cached", lambda *_: False)
    build().save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    with monkeypatch.context() as changed:
        changed.setattr(Readahead, "stop", ended)  # a model as small as this is loaded before the thread has read it
        model = load(tmp_path)
    assert [thread._paths for thread in started] == [shards]
    assert sum(count for _, count in reads) == sum(path.stat().st_size for path in shards)
    assert model.hf_quantizer._readahead is None

    def fail(*_: object, **__: object) -> None:
        raise KeyError("broken")

    monkeypatch.setattr(ExpertsConverter, "convert", fail)
    with pytest.raises(KeyError, match="broken"):
        load(tmp_path)
    assert len(started) == 2
    assert ended(started[1])


@pytest.mark.usefixtures("enabled")
def test_a_share_of_the_experts_is_not(tmp_path: Path, started: list[Readahead]) -> None:
    """It reads a part of the files."""
    build().save_pretrained(tmp_path)
    files = dict.fromkeys(("",), tmp_path / "model.safetensors")
    with taking(Share(0, 2, torch.device(DEVICE), torch.float32, files)):
        load(tmp_path)
    assert started == []
