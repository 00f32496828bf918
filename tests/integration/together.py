"""Runs of ``moe-fused finetune`` in several processes, which train together with gloo on a CPU."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .finetuning import Command, Ended, losses, records

# Without dropout, because each process drops something else, and without padding, which the processes would count.
OPTIONS = (
    "--sequence-length", "64", "--learning-rate", "0.01", "--seed", "3", "--device", "cpu", "--scheduler", "constant",
    "--gradient-accumulation",
)  # fmt: skip


def as_torchrun(rank: int, number: int, port: int, before: Callable[[], object] | None) -> None:
    """Sets what torchrun sets. This runs in the process of a command."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    if before is not None:
        before()


class Together:
    """The processes of one run."""

    def __init__(
        self,
        number: int,
        *arguments: str | Path,
        cwd: Path,
        others: tuple[str | Path, ...] | None = None,
        before: dict[int, Callable[[], object]] | None = None,
    ) -> None:
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.commands = []
        for rank in range(number):
            where = cwd / f".rank-{rank}-{time.monotonic_ns()}"
            where.mkdir()
            said = arguments if others is None or not rank else others
            prepare = partial(as_torchrun, rank, number, self._store.port, (before or {}).get(rank))
            self.commands.append(Command("finetune", *said, cwd=where, before=partial(_in_parent, prepare)))

    def signal(self, signum: int) -> None:
        for command in self.commands:
            command.signal(signum)

    def end(self, timeout: float = 120) -> list[Ended]:
        """Waits for the end as torchrun does."""
        until, failed = time.monotonic() + timeout, False
        while any(command.process.exitcode is None for command in self.commands):
            if not failed and any(command.process.exitcode for command in self.commands):
                failed = True
                self.signal(signal.SIGTERM)
                until = time.monotonic() + 20
            if time.monotonic() > until:
                said = [command.stderr() for command in self.commands]
                for command in self.commands:
                    command.process.kill()
                pytest.fail(f"the processes did not end: {said}")
            time.sleep(0.02)
        return [command.end() for command in self.commands]


def _in_parent(prepare: Callable[[], object]) -> None:
    os.chdir("..")  # all processes run in one directory, and write what they say to directories of their own
    prepare()


def together(number: int, *arguments: str | Path, cwd: Path, **kwargs: Any) -> list[Ended]:
    return Together(number, *arguments, cwd=cwd, **kwargs).end()


def assert_ended(ended: list[Ended]) -> None:
    assert [each.status for each in ended] == [0] * len(ended), ended
    assert all(not each.stdout and not each.stderr for each in ended[1:]), ended


def assert_refused(ended: list[Ended], *words: str) -> None:
    """All fail, and one line says why."""
    assert all(each.status for each in ended), ended
    lines = [line for each in ended for line in each.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended
    for word in words:
        assert word in lines[0], ended


@dataclass(frozen=True)
class Case:
    """A model and data in a directory, with options for them."""

    directory: Path

    @property
    def arguments(self) -> tuple[str | Path, ...]:
        return ("--model", "model", "--dataset", "chat.jsonl", *OPTIONS)


def assert_alike(first: Path, second: Path, atol: float = 2e-4) -> None:
    """The losses and the adapters of two runs are equal up to rounding."""
    assert losses(first).keys() == losses(second).keys()
    for step, loss in losses(first).items():
        assert losses(second)[step] == pytest.approx(loss, rel=1e-5, abs=1e-6), step
    norms = [[record["grad_norm"] for record in records(output, "grad_norm")] for output in (first, second)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    ours, others = (load_file(output / "adapter_model.safetensors") for output in (first, second))
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=atol)


def signal_after(step: int) -> None:
    """This process alone gets SIGTERM in the step. This runs in the process of a command."""
    from moe_fused.finetune.trainer import Finetuning

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1 and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    sent: list[int] = []
    original = Finetuning.training_step
    Finetuning.training_step = training_step  # type: ignore[method-assign]
