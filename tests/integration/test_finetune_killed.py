"""``moe-fused finetune`` killed, as by ``kill -9``, and resumed each time.

One test kills a run twenty times. The moments are drawn from all phases of a run, with a seed: 20, or what the variable
KILL_SEED says. A process says when the phase in which it is to be killed begins, and waits at its end; the test kills it a
random part of the phase's usual time after its beginning. The other tests kill runs at moments that are always the same.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from .finetuning import (
    Command,
    Death,
    Run,
    checkpoints,
    evaluations,
    finetune,
    finetune_killed,
    leftovers,
    losses,
    save_model,
    write_jsonl,
)
from .test_finetune_evaluation import OTHERS, say
from .test_finetune_preferences import PAIRS, RATED
from .test_finetune_streaming import small_blocks, texts

# Files and signals do not depend on the device. That a run on a GPU resumes exactly is tested in test_finetune_ends.
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="22 processes that take 15 s each to start with a GPU"
)

SEED = int(os.environ.get("KILL_SEED", "20"))
STEPS, SAVE_STEPS = 16, 2


@dataclass(frozen=True)
class Kill:
    """The ``call``-th call of a phase within a process, counted from 1."""

    phase: str
    call: int = 1


def _phases() -> list[tuple[str, Any, str]]:
    """(phase, where its function is, name of the function)."""
    from moe_fused.finetune import run
    from moe_fused.finetune.trainer import Finetuner

    return [
        ("preparing", run, "_prepare_output"),
        ("loading", run, "load_model"),
        ("training", Finetuner, "training_step"),
        ("saving", Finetuner, "_save_checkpoint"),
        ("renaming", Path, "rename"),  # of a checkpoint's files, and of the checkpoint
        ("results", run, "write_results"),
        ("moving", Path, "replace"),  # of the adapter's files to where they belong
    ]


def _around_calls(around: Callable[[Kill, Callable[[], Any]], Any]) -> None:
    """Hands each call of a phase to ``around``, with its number. This runs in the process of the command."""
    calls: Counter[str] = Counter()

    def wrap(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[phase] += 1
            return around(Kill(phase, calls[phase]), lambda: function(*args, **kwargs))

        return call

    for phase, owner, name in _phases():
        setattr(owner, name, wrap(phase, getattr(owner, name)))


def _report_seconds(sending: Connection) -> None:
    def timed(kill: Kill, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        sending.send((kill.phase, time.perf_counter() - begin))
        return result

    _around_calls(timed)


def _await(wanted: Kill, sending: Connection) -> None:
    def announced(kill: Kill, call: Callable[[], Any]) -> Any:
        if kill != wanted:
            return call()
        sending.send(kill)
        result = call()
        time.sleep(60)  # the kill is on its way
        return result

    _around_calls(announced)


def _plan(rng: random.Random, calls: Counter[str]) -> list[Kill]:
    """Twenty kills.

    Those while results are written come last, because a run that has done its last step has nothing else left.
    """
    saves = STEPS // SAVE_STEPS
    early = [Kill("preparing"), *[Kill("loading")] * 4, *[Kill("saving")] * 3]
    # Training is killed in the two steps before a checkpoint, and right after it.
    early += [Kill("training", step) for step in (1, 2, SAVE_STEPS + 1) for _ in range(2)]
    early += [Kill("renaming", rng.randint(1, calls["renaming"] // saves)) for _ in range(2)]
    rng.shuffle(early)
    late = [Kill("results"), Kill("moving", rng.randint(1, calls["moving"]))]
    rng.shuffle(late)
    # The first of these is right after the first move, when the output has no other file of an adapter yet. The last is
    # after the last move, when all files are there.
    return [*early, Kill("moving"), *late, Kill("moving", calls["moving"])]


def _await_file(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    pytest.fail(f"{path.name} does not appear")


def _logged(output: Path) -> list[int]:
    """The steps in log.jsonl, without a line that was not finished."""
    if not (output / "log.jsonl").exists():
        return []
    lines = (output / "log.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.slow
def test_killed_and_resumed_twenty_times(tmp_path: Path) -> None:
    receiving, sending = multiprocessing.Pipe(duplex=False)
    options = ("--max-steps", str(STEPS), "--save-steps", str(SAVE_STEPS))
    (tmp_path / "whole").mkdir()
    whole = Run(tmp_path / "whole", *options, before=partial(_report_seconds, sending))
    seconds: dict[str, list[float]] = defaultdict(list)
    while receiving.poll():
        phase, duration = receiving.recv()
        seconds[phase].append(duration)
    assert sorted(seconds) == sorted(phase for phase, _, _ in _phases())

    print(f"KILL_SEED={SEED}")
    output, rng, done = tmp_path / "out", random.Random(SEED), 0
    plan = _plan(rng, Counter({phase: len(durations) for phase, durations in seconds.items()}))
    assert len(plan) == 20
    for number, kill in enumerate(plan, start=1):
        delay = rng.uniform(0, max(seconds[kill.phase]))
        print(f"kill {number}: {kill}, {delay:.4f} s after its beginning; checkpoint {done}")
        arguments = ("--resume",) if (output / "finetune.yaml").exists() else whole.arguments
        command = Command(
            "finetune", *arguments, "--output", "out", cwd=tmp_path, before=partial(_await, kill, sending)
        )
        while not receiving.poll(0.1):
            assert command.process.exitcode is None, command.end()
        assert receiving.recv() == kill
        time.sleep(delay)
        if number == len(plan):
            _await_file(output / "adapter_config.json")
        command.signal(signal.SIGKILL)
        command.process.join()
        assert command.process.exitcode == -signal.SIGKILL

        # If the adapter can be loaded, it is the finished one.
        if (output / "adapter_config.json").exists():
            assert kill.phase in ("results", "moving")
            whole.assert_as_uninterrupted(output)
        else:
            assert number < len(plan)
        # Checkpoints are whole, and at most the steps since the last are lost.
        began, done = done, max(checkpoints(output), default=0)
        logged = _logged(output)
        assert logged == list(range(1, len(logged) + 1))
        assert began <= done
        assert done <= len(logged) <= done + SAVE_STEPS
        # It went on from the last checkpoint, neither earlier nor later.
        if kill.phase == "training":
            assert len(logged) == began + kill.call - 1
        elif kill.phase in ("saving", "renaming"):
            assert len(logged) == began + SAVE_STEPS
    assert done == STEPS
    ended = finetune("--resume", "--output", "out", cwd=tmp_path)
    assert ended.status == 0, ended
    whole.assert_as_uninterrupted(output)
    assert not leftovers(output)


# Runs with an evaluation and --keep-best, killed at moments that are always the same.

TRAINER = "moe_fused.finetune.trainer"


def moments(trainer: str) -> list[Death]:
    """A step in the middle of its passes, a checkpoint that is half written, and an evaluation."""
    return [
        Death(f"{TRAINER}:{trainer}.compute_loss", 2, done=True),
        Death("torch:save", 2, done=True),
        Death(f"{TRAINER}:{trainer}.prediction_step", 2, done=True),
    ]


def all_moments(trainer: str) -> list[Death]:
    """Also a checkpoint before the older ones are removed, an old one that is half removed, and the end of the run."""
    return [
        *moments(trainer),
        Death(f"{TRAINER}:{trainer}.evaluation_loop"),
        Death(f"{TRAINER}:sort_checkpoints"),
        Death(f"{TRAINER}:shutil.rmtree"),
        Death(f"{TRAINER}:{trainer}.check_adapters", 2),
        Death(f"{TRAINER}:{trainer}._take_best"),
        Death("moe_fused.finetune.run:write_results"),
    ]


def assert_ends_as_uninterrupted(
    arguments: tuple[str | Path, ...], deaths: list[Death], cwd: Path, before: Callable[[], object] | None = None
) -> None:
    """Kills a run again and again, and each time a step or more after its last checkpoint."""
    ended = finetune(*arguments, "--output", "whole", cwd=cwd, before=before)
    assert ended.status == 0, ended
    whole, output = cwd / "whole", cwd / "out"
    for death in deaths:
        given = ("--resume",) if (output / "finetune.yaml").exists() else arguments
        finetune_killed(death, *given, "--output", "out", cwd=cwd, before=before)
        assert not (output / "adapter_config.json").exists()
        checkpoints(output)  # each of which must be whole
    ended = finetune("--resume", "--output", "out", cwd=cwd, before=before)
    assert ended.status == 0, ended
    assert losses(output) == losses(whole)
    assert evaluations(output) == evaluations(whole)
    assert checkpoints(output) == checkpoints(whole)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert not leftovers(output)


COMMON = (
    "--sequence-length", "64", "--gradient-accumulation", "1", "--learning-rate", "0.01", "--seed", "3", "--max-steps", "8",
    "--save-steps", "2", "--eval-steps", "2", "--keep-best", "--keep-checkpoints", "1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "deaths"),
    [
        ("dpo", moments("PairFinetuner")),
        pytest.param("dpo", all_moments("PairFinetuner"), marks=pytest.mark.slow),
        pytest.param("kto", all_moments("RatedFinetuner"), marks=pytest.mark.slow),
    ],
    ids=["dpo", "dpo-all", "kto-all"],
)
def test_preferences(method: str, deaths: list[Death], tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", 2 * (RATED if method == "kto" else PAIRS))
    arguments = (
        "--model", "model", "--dataset", "rows.jsonl", "--method", method, "--batch-size", "2", "--eval-share", "0.25",
        *COMMON,
    )  # fmt: skip
    assert_ends_as_uninterrupted(arguments, deaths, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("shares", ["", "=1"], ids=["joined", "mixed"])
def test_streams(shares: str, tmp_path: Path) -> None:
    """Two data sets that come while the run trains, and another for the evaluation."""
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "a.jsonl", texts(15))
    write_jsonl(tmp_path / "b.jsonl", texts(9, "b"))
    write_jsonl(tmp_path / "c.jsonl", OTHERS)
    arguments = (
        "--model", "model", "--dataset", f"a.jsonl{shares}", "--dataset", f"b.jsonl{shares}", "--eval-dataset", "c.jsonl",
        "--streaming", "--lora-dropout", "0.1", *COMMON,
    )  # fmt: skip
    assert_ends_as_uninterrupted(arguments, all_moments("Finetuner"), tmp_path, before=small_blocks)


def _best_in_the_middle() -> None:
    say([4.0, 1.0, 2.0, 3.0])


@pytest.mark.slow
def test_the_best_adapter(tmp_path: Path) -> None:
    """The best one is not the last one, and the run writes it however often it was killed."""
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "a.jsonl", texts(15))
    arguments = ("--model", "model", "--dataset", "a.jsonl", "--eval-share", "0.25", *COMMON)
    assert_ends_as_uninterrupted(arguments, all_moments("Finetuner"), tmp_path, before=_best_in_the_middle)
    assert checkpoints(tmp_path / "out") == [4, 8]


def test_a_killed_run_that_ends_where_its_last_checkpoint_is(tmp_path: Path) -> None:
    """With a smaller number of steps. The log has later steps, and a line that was not finished."""
    save_model(tmp_path / "model")
    write_jsonl(tmp_path / "a.jsonl", texts(15))
    arguments = ("--model", "model", "--dataset", "a.jsonl", *COMMON[: COMMON.index("--eval-steps")])
    finetune_killed(Death(f"{TRAINER}:Finetuner.training_step", 4), *arguments, "--output", "out", cwd=tmp_path)
    output = tmp_path / "out"
    assert checkpoints(output) == [2]
    assert list(losses(output)) == [1, 2, 3]
    with (output / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')
    ended = finetune("--resume", "--output", "out", "--max-steps", "2", cwd=tmp_path)
    assert ended.status == 0, ended
    assert list(losses(output)) == [1, 2]
    assert not leftovers(output)
