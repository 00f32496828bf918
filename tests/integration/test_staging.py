"""What killed processes leave beside a target, what living ones keep, and who may write where."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_fused import locks, staging
from moe_fused.locks import Holder, InUse, locked_file
from moe_fused.staging import claimed, staged_directory, staged_files
from tests.support import REPOSITORY, python_path

from .cli import Command

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="which has no such locks")

_HOLDS = """
import sys, time
from pathlib import Path
from moe_fused.locks import locked_file
from moe_fused.staging import claimed, staged_directory, staged_files

target = Path(sys.argv[2])
manager = {
    "directory": lambda: staged_directory(target, "OUTPUT", lambda path: None, 0),
    "claim": lambda: claimed(target, "OUTPUT", lambda path: None),
    "files": lambda: staged_files(target, "TARGET", lambda: None, 0),
    "lock": lambda: locked_file(target / ".lock", "--output out"),
}[sys.argv[1]]()
with manager as staging:
    if sys.argv[1] in ("directory", "files"):
        (staging / "half").write_text("of the weights")
    print("holds", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holding(kind: str, target: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is writing ``target``; killed after the block, as by ``kill -9``."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDS, kind, str(target)],
        env={**os.environ, "PYTHONPATH": python_path(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def anything(path: Path) -> None:
    """Whatever is there may be replaced."""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def write(target: Path, text: str = "new") -> None:
    with staged_directory(target, "OUTPUT", anything, 0) as directory:
        (directory / "weights").write_text(text)


def left_by_a_dead_process(target: Path, kind: str = "partial", token: str = "0badcafe") -> Path:
    path = target.with_name(f".{target.name}-4194304-{token}.{kind}")  # beyond the largest process id
    path.mkdir()
    (path / "weights").write_text("old" if kind == "old" else "half")
    return path


# staged_directory


@pytest.mark.parametrize("kind", ["directory", "claim"])
def test_the_next_one_removes_what_a_killed_one_left(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with holding(kind, target):
        pass
    assert [name.endswith(".partial") for name in names(tmp_path)] == [True]
    write(target)
    assert names(tmp_path) == ["out"]


def test_what_belongs_to_others_stays(tmp_path: Path) -> None:
    others = [left_by_a_dead_process(tmp_path / name) for name in ("out-4bit", "outer", "model", "out.old")]
    (tmp_path / ".out-notes.partial").write_text("mine")
    write(tmp_path / "out")
    assert all(path.is_dir() for path in others)
    assert (tmp_path / ".out-notes.partial").read_text() == "mine"


@pytest.mark.parametrize("kind", ["directory", "claim"])
def test_what_a_living_process_writes_stays_and_is_named(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with holding(kind, target) as process:
        before = names(tmp_path)
        with pytest.raises(InUse, match=rf"OUTPUT .*out is being written by process {process.pid}: wait until it ends"):
            write(target)
        assert names(tmp_path) == before
        write(tmp_path / "other")  # which is nobody's concern
    write(target)
    assert names(tmp_path) == ["other", "out"]


def test_two_of_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with staged_directory(tmp_path / "out", "OUTPUT", anything, 0), pytest.raises(InUse), _unclaimed(target):
        write(target)
    assert names(tmp_path) == ["out"]


@contextlib.contextmanager
def _unclaimed(target: Path) -> Iterator[None]:
    """As if this process knew nothing of what it is writing."""
    claim = staging._claims.pop(target.resolve())
    try:
        yield
    finally:
        staging._claims[target.resolve()] = claim


def test_killed_between_the_two_moves(tmp_path: Path) -> None:
    """The old one is back before anything else is asked, and is replaced only if it may be."""
    target = tmp_path / "out"
    left_by_a_dead_process(target)
    left_by_a_dead_process(target, "old")

    def nothing(path: Path) -> None:
        if path.exists():
            raise FileExistsError(f"{path} exists")

    with pytest.warns(UserWarning, match="out is back"), pytest.raises(FileExistsError, match="out exists"):
        staged_directory(target, "OUTPUT", nothing, 0).__enter__()
    assert names(tmp_path) == ["out"]
    assert (target / "weights").read_text() == "old"
    write(target)
    assert (target / "weights").read_text() == "new"


def test_killed_after_both_moves(tmp_path: Path) -> None:
    write(tmp_path / "out", "complete")
    left_by_a_dead_process(tmp_path / "out", "old")
    with claimed(tmp_path / "out", "OUTPUT", anything):
        assert (tmp_path / "out" / "weights").read_text() == "complete"
        assert [name.rpartition(".")[2] for name in names(tmp_path)] == ["partial", "out"]
    assert names(tmp_path) == ["out"]


def test_without_locks_what_is_left_is_named_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For nobody knows whether it is still being written."""
    left = left_by_a_dead_process(tmp_path / "out")
    monkeypatch.setattr(locks, "try_lock", lambda descriptor: None)
    with pytest.warns(UserWarning, match=r"\.out-4194304-0badcafe\.partial is left by process 4194304, or still being"):
        write(tmp_path / "out")
    assert names(tmp_path) == [left.name, "out"]


def test_a_claim_is_what_is_written_then(tmp_path: Path) -> None:
    with claimed(tmp_path / "out", "OUTPUT", anything):
        before = names(tmp_path)
        with staged_directory(tmp_path / "out", "OUTPUT", anything, 0) as directory:
            assert names(tmp_path) == before == [directory.name]
            (directory / "weights").write_text("new")
    assert names(tmp_path) == ["out"]
    with pytest.raises(OSError, match="cannot create OUTPUT"), claimed(tmp_path / "no" / "out", "OUTPUT", anything):
        pytest.fail("began the work")


def test_what_was_left_before_there_were_locks(tmp_path: Path) -> None:
    (tmp_path / ".out-0badcafe.partial").mkdir()
    (tmp_path / ".out-0badf00d.old").mkdir()
    with pytest.warns(UserWarning, match=r"\.out-0badf00d\.old is left by a process that was killed: remove it"):
        write(tmp_path / "out")
    assert names(tmp_path) == [".out-0badf00d.old", "out"]


# staged_files


def test_files_within_a_directory(tmp_path: Path) -> None:
    with holding("files", tmp_path) as process, pytest.raises(InUse, match=f"by process {process.pid}"):
        staged_files(tmp_path, "TARGET", lambda: None, 0).__enter__()
    assert len(names(tmp_path)) == 1
    with staged_files(tmp_path, "TARGET", lambda: None, 0) as directory:
        (directory / "optimizer.pt").write_text("state")
    assert names(tmp_path) == ["optimizer.pt"]


# The commands.


@pytest.mark.parametrize("command_line", ["quantize", "merge", "convert model", "convert adapter"])
def test_commands_clear_up_first(
    command_line: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they import what does the work, which here fails at once."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    arguments = {
        "quantize": ("model", "out"),
        "merge": ("model", "adapter", "out"),
        "convert model": ("model", "out", "--to", "fused"),
        "convert adapter": ("adapter", "out"),
    }[command_line]
    left_by_a_dead_process(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert command(*command_line.split(), *arguments, "--dry-run").status == 1
    assert len(list(tmp_path.glob(".out-*"))) == 1  # a dry run changes nothing
    assert command(*command_line.split(), *arguments).status == 1
    assert names(tmp_path) == ["adapter", "model"]
    with holding("claim", tmp_path / "out") as process:
        assert f"is being written by process {process.pid}" in command(*command_line.split(), *arguments).error


# locked_file


def test_a_lock_names_who_holds_it(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with holding("lock", place) as process:
        with pytest.raises(InUse) as caught, locked_file(place / ".lock", "--output out"):
            pytest.fail("two hold it")
        holder = Holder(process.pid, os.uname().nodename, Holder.this_process().since[:10])
        assert str(caught.value).startswith(f"--output out is in use by {holder}")
        assert str(caught.value).endswith(": wait until it ends, or choose another place")
    # The file is still there, the lock is not.
    assert names(place) == [".lock"]
    with locked_file(place / ".lock", "--output out") as ours:
        assert ours
        assert json.loads((place / ".lock").read_text())["pid"] == os.getpid()
    assert names(place) == []


def test_a_lock_leaves_no_directory_that_it_made(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with pytest.raises(ValueError, match="wrong"), locked_file(place / ".lock", "--output"):
        raise ValueError("wrong")
    assert names(tmp_path) == []
    with locked_file(place / ".lock", "--output"):
        (place / "result").write_text("kept")
    assert names(place) == ["result"]


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """As workers of data sets are, which may outlive a process that was killed."""
    program = f"""
import os, sys, time
from pathlib import Path
from moe_fused.locks import locked_file
with locked_file(Path({str(tmp_path / ".lock")!r}), "it"):
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, b"alive")
        time.sleep(30)
        os._exit(0)
    os.read(reading, 5)
    os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "PYTHONPATH": python_path(REPOSITORY)}
    subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    with locked_file(tmp_path / ".lock", "it") as ours:
        assert ours


_COUNTS = """
import sys, time
from pathlib import Path
from moe_fused.locks import InUse, locked_file
place, count = Path(sys.argv[1]), 0
end = time.monotonic() + 3
while count < 40 and time.monotonic() < end:
    try:
        with locked_file(place / "out" / ".lock", "it"):
            (place / "one").mkdir()  # fails if another one is here
            (place / "one").rmdir()
            count += 1
    except InUse:
        pass
print(count)
"""


def test_nobody_else_while_it_is_held(tmp_path: Path) -> None:
    """Though each removes the file, and the directory, that the others are about to open."""
    environment = {**os.environ, "PYTHONPATH": python_path(REPOSITORY)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _COUNTS, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert int(out) > 0
    # One that made the directory and lost it to another may leave it, empty.
    assert names(tmp_path) in ([], ["out"])
    assert not list(tmp_path.glob("out/*"))


def test_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "fcntl", None)
    with locked_file(tmp_path / ".lock", "it") as ours:
        assert not ours
    assert names(tmp_path) == []
