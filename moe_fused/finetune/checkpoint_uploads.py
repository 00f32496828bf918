"""Uploads the checkpoints of a run while it trains, in a process of its own, so that the training does not wait."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_fused.signals import Interrupted, signals_ignored

from .checkpoints import CHECKPOINTS, checkpoints_of
from .next_commands import push_command
from .output import CONFIG, LOG

# What the process of an upload runs, with the arguments of ``moe-fused`` behind it.
_PROGRAM = """
from moe_fused.signals import end_with_input
end_with_input()
from moe_fused.__main__ import main
raise SystemExit(main())
"""


class CheckpointUploads(TrainerCallback):
    """Uploads the checkpoints after each one that is saved, and those that a resumed run begins with.

    It is entered around the training, and waits at its end.

    The process runs ``moe-fused push --checkpoints`` on links to the files, because the run may remove a checkpoint
    meanwhile. It ends with the run, even if the run is killed, and the run removes the links when it goes on. While an
    upload lasts, no other begins: the next one takes what is there then. An upload that fails is a warning, and the next
    one makes up for it.

    Args:
        output: The directory of the run.
        repository: The repository on the Hub.
        private: Whether it is created as a private one.
        console: The console for what the user is told.
    """

    def __init__(self, output: Path, repository: str, private: bool, console: Console) -> None:
        self._output, self._repository, self._private, self._console = output, repository, private, console
        self._process: subprocess.Popen[bytes] | None = None
        self._links = Path()
        self._newest = ""
        self._waits = self._failed = False

    def __enter__(self) -> None:
        # A run that was killed may have left checkpoints that are not on the Hub.
        self._waits = bool(checkpoints_of(self._output))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, Interrupted):
                self._finish()
        finally:
            self._abandon()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._waits = True
        self._go_on()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._go_on()

    def _go_on(self) -> None:
        """Reports the upload that has ended, if one has, and begins the next, if none lasts."""
        if self._process is not None:
            if self._process.poll() is None:
                return
            self._report(self._ended(self._process))
        if self._waits:
            self._begin()

    def _begin(self) -> None:
        self._waits = False
        self._newest = checkpoints_of(self._output)[-1].name
        try:
            self._links = Path(tempfile.mkdtemp(prefix=".upload-", suffix=".partial", dir=self._output))
            run = self._links / "run"
            run.mkdir()
            for name in (CONFIG, LOG):
                shutil.copy(self._output / name, run / name)
            shutil.copytree(self._output / CHECKPOINTS, run / CHECKPOINTS, copy_function=_link, ignore=_hidden)
            command = [sys.executable, "-c", _PROGRAM, "push", str(run), self._repository, "--checkpoints"]
            command += ["--private"] * self._private
            with (self._links / "stderr").open("wb") as errors:
                # In a session of its own: Ctrl-C saves a checkpoint and must not end the upload of one.
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
                )
        except OSError as error:  # as on a full disk
            self._remove_links()
            self._warn(f"{error.strerror or error}")

    def _ended(self, process: subprocess.Popen[bytes]) -> int:
        """Waits until the process of an upload has ended, and returns its status."""
        status = process.wait()
        assert process.stdin is not None
        process.stdin.close()
        self._process = None
        return status

    def _report(self, status: int) -> None:
        lines = (self._links / "stderr").read_text(encoding="utf-8", errors="replace").splitlines()
        self._remove_links()
        if status:
            said = lines[-1].removeprefix("error: ") if lines else f"the upload ended with status {status}"
            self._warn(said.removeprefix(f"ID {self._repository}: "))
        else:
            self._failed = False
            self._print(f"uploaded {self._newest} to {self._repository}")

    def _warn(self, reason: str) -> None:
        self._failed = True
        self._print(f"warning: {self._newest} was not uploaded: {reason}; the next checkpoint is uploaded with it")

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _finish(self) -> None:
        """Waits for the upload that lasts, and makes the one that waits for it. A signal ends the waiting."""
        if self._process is not None and self._process.poll() is None:
            self._print(f"waiting for the upload of {self._newest}; Ctrl-C ends it")
        while self._process is not None or self._waits:
            if self._process is not None:
                self._process.wait()
            self._go_on()
        if self._failed:
            self._advise()

    def _abandon(self) -> None:
        """Ends the upload that lasts, if one does. The branch on the Hub is then as it was before."""
        if self._process is None:
            return
        with signals_ignored():
            self._process.kill()
            self._ended(self._process)
            self._remove_links()
        self._print(f"warning: {self._newest} was not uploaded")
        self._advise()

    def _advise(self) -> None:
        again = push_command(self._output, self._repository, private=self._private, checkpoints=True)
        self._print(f"to upload the last checkpoints: {again}")

    def _remove_links(self) -> None:
        if self._links.name:
            shutil.rmtree(self._links, ignore_errors=True)
            self._links = Path()


def _link(source: str, target: str) -> None:
    """Links ``target`` to a file, or copies it where the file system has no links. Files of checkpoints never change."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _hidden(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(".")]
