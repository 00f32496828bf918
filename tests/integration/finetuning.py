"""``moe-fused finetune`` as a user types it, without the ten seconds that importing TRL takes each time.

A server process (multiprocessing's forkserver) has everything imported and forks a process for each command, which runs
it from its arguments to its exit status; signals reach that process as they would reach the real one. With a GPU every
command is a process from scratch: importing bitsandbytes initializes CUDA, which cannot be forked.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")
pytest.importorskip("datasets")

from moe_fused.demo.data import byte_tokenizer

from .four_bit import build

# What a command would import sooner or later, and the tables that it would make.
_PRELOADED = [
    "tests.integration.finetuning", "tests.integration.warm", "moe_fused.finetune.run", "moe_fused.cli", "bitsandbytes",
    "peft", "matplotlib.figure", "matplotlib.backends.backend_agg", "transformers.models.qwen3_moe.modeling_qwen3_moe",
]  # fmt: skip

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The seconds that a command may take. On a GPU it starts afresh, and compiles what no cache has.
TIMEOUT = 300.0 if torch.cuda.is_available() else 120.0
STEPS = 8
# Options of the runs that are compared: a checkpoint every other step, and dropout that a resumed run must repeat.
OPTIONS = (
    "--sequence-length", "64", "--gradient-accumulation", "1", "--max-steps", str(STEPS), "--save-steps", "2",
    "--learning-rate", "0.01", "--lora-dropout", "0.1", "--seed", "3",
)  # fmt: skip


def warm_context() -> Any:
    """Multiprocessing whose processes have everything imported, but for those on a GPU."""
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str


class Command:
    """A ``moe-fused`` that runs in ``cwd``.

    Args:
        arguments: of the command, as ``finetune`` and its options.
        before: called in the process before the command.
        main: a function that runs another command. It reads the arguments from ``sys.argv``, and gives the exit status or
            raises SystemExit.
    """

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path,
        before: Callable[[], object] | None = None,
        main: Callable[[], object] | None = None,
    ) -> None:
        self._streams = [cwd / f".{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr")]
        self.process = warm_context().Process(
            target=_run, args=([str(argument) for argument in arguments], cwd, self._streams, before, main)
        )
        self.process.start()

    def signal(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended before
            os.kill(self.process.pid, signum)

    def stderr(self) -> str:
        """What the command has said so far."""
        return self._streams[1].read_text(encoding="utf-8") if self._streams[1].exists() else ""

    def end(self, timeout: float = TIMEOUT) -> Ended:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"the command did not end within {timeout} s: {self._streams[1].read_text()}")
        texts = [path.read_text(encoding="utf-8") if path.exists() else "" for path in self._streams]
        return Ended(self.process.exitcode, *texts)


def _run(
    arguments: list[str],
    cwd: Path,
    streams: list[Path],
    before: Callable[[], object] | None,
    main: Callable[[], object] | None,
) -> None:
    from moe_fused.__main__ import main as moe_fused

    gc.freeze()  # what the server imported is no garbage: looking through it takes a second each time
    os.chdir(cwd)
    for number, path in zip((1, 2), streams, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
    sys.argv = ["moe-fused", *arguments]
    if before is not None:
        before()
    status: Any = (main or moe_fused)()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def finetune(*arguments: str | Path, cwd: Path, before: Callable[[], object] | None = None) -> Ended:
    return Command("finetune", *arguments, cwd=cwd, before=before).end()


def save_model(path: Path) -> Path:
    """A tiny Qwen3-MoE with a tokenizer of bytes and a chat template."""
    build(
        vocab_size=272, num_hidden_layers=1, num_experts=4, num_experts_per_tok=2, max_position_embeddings=128
    ).save_pretrained(path)
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    """A tokenizer of bytes with a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|pad|>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)


def chats(number: int = 24) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{i} + {i}?"},
                {"role": "assistant", "content": f"{2 * i}."},
            ]
        }
        for i in range(number)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def records(output: Path, name: str) -> list[dict[str, Any]]:
    """The records of the log that have a value of that name, one for each step."""
    lines = map(json.loads, (output / "log.jsonl").read_text(encoding="utf-8").splitlines())
    found = [record for record in lines if name in record]
    assert [record["step"] for record in found] == sorted({record["step"] for record in found})
    return found


def losses(output: Path) -> dict[int, float]:
    """The loss of each step."""
    return {record["step"]: record["loss"] for record in records(output, "loss")}


def evaluations(output: Path) -> dict[int, float]:
    """The loss of each evaluation, by the step after which it was made."""
    return {record["step"]: record["eval_loss"] for record in records(output, "eval_loss")}


def finetune_signalled(
    signum: int, step: int, *arguments: str | Path, cwd: Path, before: Callable[[], object] | None = None
) -> Ended:
    """Runs ``finetune``, which receives ``signum`` in training step ``step`` however fast the machine is."""
    ours, theirs = multiprocessing.Pipe()
    command = Command("finetune", *arguments, cwd=cwd, before=partial(pause_in_step, step, theirs, before))
    while not ours.poll(0.1):
        assert command.process.exitcode is None, command.end()
    ours.recv()
    command.signal(signum)
    ours.send("go on")
    return command.end()


def pause_in_step(step: int, connection: Connection, before: Callable[[], object] | None) -> None:
    """Training waits for the test at the beginning of ``step``. This runs in the process of the command."""
    if before is not None:
        before()
    from moe_fused.finetune.trainer import Finetuning

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            connection.send(step)
            connection.recv()
        return super(Finetuning, self).training_step(*args, **kwargs)

    Finetuning.training_step = training_step  # type: ignore[method-assign]


@dataclass(frozen=True)
class Death:
    """A moment at which a process ends as by ``kill -9``, however fast the machine is.

    Attributes:
        place: A module and a function in it, as ``module:function`` or ``module:Class.function``.
        call: The number of the call of that function, counted from 1.
        done: Whether the process ends after the call instead of before it.
    """

    place: str
    call: int = 1
    done: bool = False

    def __str__(self) -> str:
        return f"{self.place.partition(':')[2]}-{self.call}{'-done' * self.done}"

    def await_(self) -> None:
        """Lets this process, that of a command, end at the moment."""
        module, _, names = self.place.partition(":")
        owner: Any = importlib.import_module(module)
        *classes, name = names.split(".")
        for each in classes:
            owner = getattr(owner, each)
        function, numbers = getattr(owner, name), itertools.count(1)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            ends = next(numbers) == self.call
            if ends and not self.done:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if ends:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, call)


def finetune_killed(
    death: Death, *arguments: str | Path, cwd: Path, before: Callable[[], object] | None = None
) -> Ended:
    """Runs ``finetune``, which is killed at the moment ``death``."""
    ended = finetune(*arguments, cwd=cwd, before=partial(_both, death, before))
    assert ended.status == -signal.SIGKILL, (death, ended)
    return ended


def _both(death: Death, before: Callable[[], object] | None) -> None:
    if before is not None:
        before()
    death.await_()


def nothing_loads() -> None:
    """Whoever loads a model fails. This runs in the process of a command."""
    from moe_fused.checkpoints import loading

    def from_pretrained(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    loading.AutoModelForCausalLM.from_pretrained = from_pretrained  # type: ignore[method-assign]


def assert_error(ended: Ended, *words: str, status: int = 1) -> None:
    """One line, the last on stderr, that begins with "error: " and has all the words."""
    assert ended.status == status, ended
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("error: "), ended
    for word in words:
        assert word in line, ended


def leftovers(output: Path) -> list[str]:
    """What a run should have cleaned up."""
    return [str(path) for path in output.rglob(".*")]


def checkpoints(output: Path) -> list[int]:
    """The steps of the checkpoints, each of which must have all of its parts."""
    steps = []
    for path in (output / "checkpoints").glob("checkpoint-*"):
        assert json.loads((path / "trainer_state.json").read_text())["global_step"] == int(path.name.split("-")[1])
        assert load_file(path / "adapter_model.safetensors")
        assert torch.load(path / "optimizer.pt", weights_only=True)["state"]
        steps.append(int(path.name.split("-")[1]))
    return sorted(steps)


class Run:
    """A run that tests interrupt, with what it gives when nothing happens to it.

    Args:
        options: beside ``OPTIONS``.
        before: called in the process before the command.
    """

    def __init__(self, directory: Path, *options: str, before: Callable[[], object] | None = None) -> None:
        self.directory = directory
        save_model(directory / "model")
        write_jsonl(directory / "chat.jsonl", chats())
        self.arguments = ("--model", directory / "model", "--dataset", directory / "chat.jsonl", *OPTIONS, *options)
        ended = finetune(*self.arguments, "--output", "out", cwd=directory, before=before)
        assert ended.status == 0, ended
        self.losses = losses(directory / "out")
        self.adapter = load_file(directory / "out" / "adapter_model.safetensors")

    def assert_as_uninterrupted(self, output: Path) -> None:
        assert losses(output) == self.losses
        adapter = load_file(output / "adapter_model.safetensors")
        assert adapter.keys() == self.adapter.keys()
        assert all(torch.equal(adapter[name], value) for name, value in self.adapter.items())
