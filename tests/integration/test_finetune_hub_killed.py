"""Uploads of ``moe-fused finetune`` and ``moe-fused push`` that are killed, as by ``kill -9``, or fail during training."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import re
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.packaging.hub import Answer, Drop, Hub

from .finetuning import Command, Death, Ended, Run, checkpoints, finetune, finetune_killed, leftovers, pause_in_step
from .test_finetune_hub import NAME, PUSH, assert_checkpoint, files_of, published, use


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub().serving() as hub:
        hub.large = re.compile(r"\.(safetensors|pt)$")  # so that some files go to the storage of large files
        yield hub


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupts and that uploads nothing."""
    return Run(tmp_path_factory.mktemp("whole"))


def environment(hub: Hub, cwd: Path) -> Callable[[], object]:
    return partial(use, hub.environment(str(cwd / "home")))


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def kill(command: Command) -> None:
    """Kills a command and waits until it has ended. Another thread may wait for it, too."""
    command.signal(signal.SIGKILL)
    multiprocessing.connection.wait([command.process.sentinel], 60)


class Killing:
    """Kills a command once the Hub gets a request, before it carries the request out or before it answers."""

    def __init__(self, hub: Hub, pattern: str, *, done: bool) -> None:
        self.command: Command | None = None
        self._hub, self._pattern, self._started = hub, pattern, threading.Event()
        self._hooks = hub.done_hooks if done else hub.hooks
        self._hooks.append(self._kill)

    def _kill(self, request: str) -> None:
        if re.search(self._pattern, request):
            self._hooks.remove(self._kill)
            assert self._started.wait(60)
            assert self.command is not None
            kill(self.command)
            raise Drop

    def run(self, *arguments: str | Path, cwd: Path) -> None:
        self.command = Command(*arguments, cwd=cwd, before=environment(self._hub, cwd))
        self._started.set()
        ended = self.command.end()
        assert ended.status == -signal.SIGKILL, ended


# The requests of an upload in their order, and whether they are carried out when the command is killed.
ADAPTER = (
    ("repos/create", False), ("repos/create", True), ("preupload/main", True), ("PUT /storage", True),
    ("commit/main", False), ("commit/main", True),
)  # fmt: skip
CHECKPOINTS = (
    ("branch/checkpoints", True), ("PUT /storage", True), ("commit/checkpoints", False), ("commit/checkpoints", True),
)  # fmt: skip


@pytest.mark.parametrize(("request_", "done"), ADAPTER)
def test_push_of_an_adapter(request_: str, done: bool, whole: Run, hub: Hub, tmp_path: Path) -> None:
    """Nothing is lost here, the Hub never has a part of the adapter, and the same command completes the upload."""
    shutil.copytree(whole.directory / "out", tmp_path / "out")
    before = content(tmp_path / "out")
    Killing(hub, request_, done=done).run("push", "out", NAME, "--private", cwd=tmp_path)
    assert content(tmp_path / "out") == before
    if NAME in hub.repositories:
        assert published(hub) == (files_of(tmp_path / "out") if request_ == "commit/main" and done else {})
    again = Command("push", "out", NAME, "--private", cwd=tmp_path, before=environment(hub, tmp_path)).end()
    assert again.status == 0, again
    assert published(hub) == files_of(tmp_path / "out")
    assert hub.repositories[NAME].private
    assert hub.repositories[NAME].messages == ["main: initial commit", "main: Upload the adapter"]
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(("request_", "done"), CHECKPOINTS)
def test_push_of_checkpoints(request_: str, done: bool, whole: Run, hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(whole.directory / "out", tmp_path / "out")
    before = content(tmp_path / "out")
    push = ("push", "out", NAME, "--checkpoints")
    Killing(hub, request_, done=done).run(*push, cwd=tmp_path)
    assert content(tmp_path / "out") == before
    expected = {name: data for name, data in before.items() if name.startswith("checkpoints/")}
    expected |= {name: before[name] for name in ("finetune.yaml", "log.jsonl")}
    if NAME in hub.repositories and "checkpoints" in hub.repositories[NAME].branches:
        found = published(hub, "checkpoints")
        assert found == (expected if request_ == "commit/checkpoints" and done else {})
    again = Command(*push, cwd=tmp_path, before=environment(hub, tmp_path)).end()
    assert again.status == 0, again
    assert published(hub, "checkpoints") == expected
    assert hub.repositories[NAME].messages == ["main: initial commit", "checkpoints: Upload checkpoint-8"]


# A run.


def arguments(whole: Run, *options: str) -> tuple[str | Path, ...]:
    return ("finetune", *whole.arguments, "--output", "out", *PUSH, *options)


def resume(hub: Hub, cwd: Path) -> Ended:
    ended = finetune("--resume", "--output", "out", cwd=cwd, before=environment(hub, cwd))
    assert ended.status == 0, ended
    return ended


@pytest.mark.parametrize("done", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["before", "after"])
def test_a_run_that_uploads_its_adapter(done: bool, whole: Run, hub: Hub, tmp_path: Path) -> None:
    """The adapter is there, and both the run and ``push`` can repeat the upload."""
    Killing(hub, "commit/main", done=done).run(*arguments(whole), cwd=tmp_path)
    whole.assert_as_uninterrupted(tmp_path / "out")
    assert published(hub) == (files_of_run(tmp_path) if done else {})
    again = Command("push", "out", NAME, cwd=tmp_path, before=environment(hub, tmp_path)).end()
    assert again.status == 0, again
    assert published(hub) == files_of_run(tmp_path)
    resume(hub, tmp_path)
    whole.assert_as_uninterrupted(tmp_path / "out")
    assert published(hub) == files_of_run(tmp_path)
    assert not leftovers(tmp_path / "out")


def files_of_run(cwd: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(cwd / "out").items() if name[0] != "."}


@pytest.mark.parametrize(
    "death",
    [
        pytest.param(
            Death("moe_fused.finetune.results:draw_loss", done=True), marks=pytest.mark.slow
        ),  # before the card
        pytest.param(Death("moe_fused.finetune.results:_publish"), marks=pytest.mark.slow),  # after the card
        Death("pathlib:Path.replace", 2, done=True),
    ],
    ids=str,
)
def test_a_run_that_writes_its_card(death: Death, whole: Run, hub: Hub, tmp_path: Path) -> None:
    finetune_killed(death, *arguments(whole)[1:], cwd=tmp_path, before=environment(hub, tmp_path))
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert hub.repositories == {}
    push = Command("push", "out", NAME, cwd=tmp_path, before=environment(hub, tmp_path)).end()
    assert "out has no adapter_config.json: its run has not ended" in push.stderr
    assert hub.repositories == {}
    resume(hub, tmp_path)
    whole.assert_as_uninterrupted(tmp_path / "out")
    assert published(hub) == files_of_run(tmp_path)
    assert not leftovers(tmp_path / "out")


@pytest.mark.parametrize("step", [4, pytest.param(None, marks=pytest.mark.slow)], ids=["training", "trained"])
def test_a_run_whose_checkpoint_is_on_its_way(step: int | None, whole: Run, hub: Hub, tmp_path: Path) -> None:
    """The upload ends with the run, and the resumed run makes up for it.

    If the last request of the killed upload is late nevertheless, it undoes nothing of later uploads.
    """
    started, killed, go_on = threading.Event(), threading.Event(), threading.Event()
    running: list[Command] = []

    def hold(request: str) -> None:
        if "commit/checkpoints" in request:
            hub.hooks.remove(hold)
            assert started.wait(60)
            kill(running[0])
            killed.set()
            assert go_on.wait(120)

    hub.hooks.append(hold)
    before, pipe = environment(hub, tmp_path), multiprocessing.Pipe()
    if step is not None:
        before = partial(pause_in_step, step, pipe[1], before)  # until it is killed
    running.append(Command(*arguments(whole, "--push-checkpoints"), cwd=tmp_path, before=before))
    started.set()
    assert killed.wait(120)
    (links,) = (tmp_path / "out").glob(".upload-*.partial")
    await_end_of(links)
    resumed = resume(hub, tmp_path)
    assert "uploaded checkpoint-8 to" in resumed.stderr
    whole.assert_as_uninterrupted(tmp_path / "out")
    assert not leftovers(tmp_path / "out")
    expected = published(hub, "checkpoints")
    requests = {thread for thread in threading.enumerate() if "process_request" in thread.name}
    assert requests
    go_on.set()
    for thread in requests:
        thread.join(60)
    assert published(hub, "checkpoints") == expected
    assert_checkpoint(hub, 8)
    steps = {name.split("/")[1] for name in expected if "/" in name}
    assert steps == {f"checkpoint-{step}" for step in checkpoints(tmp_path / "out")}
    assert expected["log.jsonl"] == (tmp_path / "out" / "log.jsonl").read_bytes()


def await_end_of(path: Path) -> None:
    """Waits until no process has the name of ``path`` in its arguments."""
    for _ in range(600):
        if not any(os.fsencode(path.name) in arguments for arguments in _arguments_of_processes()):
            return
        time.sleep(0.05)
    pytest.fail("the upload goes on after its run was killed")


def _arguments_of_processes() -> Iterator[bytes]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ends at this moment
            yield (process / "cmdline").read_bytes()


# An upload that fails while a run trains.


@pytest.mark.parametrize(
    ("how", "words"),
    [
        pytest.param(Answer(500, {"error": "oops"}), "the Hub answers 500: oops", marks=pytest.mark.slow),
        (Answer(401, {"error": "no"}), "the Hub does not know the token (401"),
        pytest.param(Drop(), "the Hub does not answer", marks=pytest.mark.slow),
    ],
    ids=["500", "401", "no connection"],
)
def test_a_hub_that_is_gone_after_the_first_checkpoint(
    how: Exception, words: str, whole: Run, hub: Hub, tmp_path: Path
) -> None:
    """The run goes on to its end, everything is here, and the commands that it prints complete both uploads."""
    ours, theirs = multiprocessing.Pipe()

    def refuse(request: str) -> None:
        raise how

    def gone(request: str) -> None:
        if "commit/checkpoints" in request:
            hub.hooks.append(refuse)
            ours.send("go on")

    hub.done_hooks.append(gone)
    before = partial(pause_in_step, 4, theirs, environment(hub, tmp_path))
    ended = Command(*arguments(whole, "--push-checkpoints"), cwd=tmp_path, before=before).end()
    assert ended.status == 1, ended
    lines = ended.stderr.splitlines()
    assert "the adapter is in out and was not uploaded: cannot" in lines[-1]
    assert words in lines[-1]
    whole.assert_as_uninterrupted(tmp_path / "out")
    warned = [line for line in lines if line.startswith("warning: checkpoint-")]
    assert warned
    assert all(words in line for line in warned), warned
    assert published(hub) == {}
    hub.hooks.clear()
    hub.done_hooks.clear()
    (line,) = (line for line in lines if line.startswith("to upload the last checkpoints: "))
    for printed in (line.partition(": ")[2], lines[-1].rpartition("upload it with: ")[2]):
        program, *others = shlex.split(printed)
        again = Command(*others, cwd=tmp_path, before=environment(hub, tmp_path)).end()
        assert (program, again.status) == ("moe-fused", 0), again
    assert published(hub) == files_of_run(tmp_path)
    assert_checkpoint(hub, 8)
    assert not leftovers(tmp_path / "out")
