"""``moe-fused finetune`` in several processes, which train together with gloo on a CPU.

The processes are those of ``finetuning.Command``, and the test is their launcher: as torchrun does, it holds the store by
which they find each other, and ends the others with SIGTERM when one fails. Slow tests run torchrun itself.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support import REPOSITORY, python_path

from .finetuning import (
    Command,
    chats,
    checkpoints,
    evaluations,
    finetune,
    leftovers,
    save_model,
    write_jsonl,
)
from .together import Case, Together, as_torchrun, assert_alike, assert_ended, assert_refused, signal_after, together

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="processes on a CPU; GPUs have tests of their own")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("parallel")
    save_model(directory / "model")
    write_jsonl(directory / "chat.jsonl", chats(23))
    return Case(directory)


# What the runs have that are compared with ``alone``, behind the number of batches in a step.
TWO_EPOCHS = (
    "--epochs", "2", "--packing", "none", "--eval-share", "0.2", "--eval-steps", "2", "--save-steps", "3",
)  # fmt: skip


@pytest.fixture(scope="module")
def alone(case: Case) -> Path:
    """A run of one process: two epochs of 6 steps over the sequences, six in a step, and an evaluation."""
    ended = finetune(*case.arguments, "6", *TWO_EPOCHS, "--output", "alone", cwd=case.directory)
    assert ended.status == 0, ended
    return case.directory / "alone"


@pytest.mark.parametrize("number", [2, 3])
def test_processes_train_as_one_does(case: Case, alone: Path, number: int) -> None:
    output = case.directory / f"out-{number}"
    ended = together(
        number, *case.arguments, str(6 // number), *TWO_EPOCHS, "--output", output.name, cwd=case.directory
    )
    assert_ended(ended)
    assert_alike(alone, output)
    assert evaluations(output) == pytest.approx(evaluations(alone), rel=1e-5)
    assert checkpoints(output) == checkpoints(alone)
    assert not leftovers(output)
    (last,) = list((output / "checkpoints").glob("checkpoint-6"))
    assert {path.name for path in last.glob("rng*")} == {
        "rng_state.pth",
        *(f"rng_state_{r}.pth" for r in range(1, number)),
    }
    assert f"{number} × cpu" in (output / "README.md").read_text()


def test_packed_rows_and_batches_of_two(case: Case) -> None:
    """An odd number of sequences, of which the last batch of each process lacks some, in steps of several batches."""
    options = ("--packing", "bfd", "--sequence-length", "128", "--epochs", "2")
    for number in (1, 2):
        arguments = (
            *case.arguments, str(4 // number), *options, "--batch-size", "2", "--output", f"packed-{number}"
        )  # fmt: skip
        ended = together(number, *arguments, cwd=case.directory)
        assert_ended(ended)
    assert_alike(case.directory / "packed-1", case.directory / "packed-2")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on(case: Case, alone: Path, before: int, after: int) -> None:
    output = case.directory / f"from-{before}-to-{after}"
    options = ("--packing", "none", "--eval-share", "0.2", "--eval-steps", "2", "--save-steps", "2", "--epochs", "2")
    number = 6 // before
    kill = {before - 1: partial(signal_after, 3)}  # the others stop after the same step
    ended = together(
        before, *case.arguments, str(number), *options, "--output", output.name, cwd=case.directory, before=kill
    )
    assert all(each.status == 128 + signal.SIGTERM for each in ended), ended
    assert checkpoints(output) == [2, 3]
    ended = together(after, "--resume", "--output", output.name, cwd=case.directory)
    assert_ended(ended)
    assert f"the run had {before} process" in ended[0].stderr
    assert yaml.safe_load((output / "finetune.yaml").read_text())["gradient_accumulation"] == 6 // after
    assert_alike(alone, output)
    assert evaluations(output) == pytest.approx(evaluations(alone), rel=1e-5)


def test_a_number_that_does_not_divide_a_step_is_refused(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.directory / "model", tmp_path / "model")
    shutil.copy(case.directory / "chat.jsonl", tmp_path)
    assert_ended(together(2, *case.arguments, "1", "--max-steps", "2", "--output", "out", cwd=tmp_path))
    assert_refused(
        together(3, "--resume", "--output", "out", cwd=tmp_path), "2 batches in a step, which 3 processes cannot share"
    )
    # With --gpus, before torchrun starts.
    options = ("--resume", "--gpus", "3", "--device", "cuda", "--output", "out")
    ended = finetune(*options, cwd=tmp_path, before=_claim_three_gpus)
    assert ended.status == 1
    assert ended.stderr.startswith("error: the run in out has 2 batches in a step, which 3 processes cannot share")


def _claim_three_gpus() -> None:
    """This runs in the process of a command."""
    from moe_fused.finetune import launch

    launch.count_gpus = lambda: 3


def test_random_states_that_are_missing_are_told(case: Case, tmp_path: Path) -> None:
    for name in ("model", "chat.jsonl"):
        (tmp_path / name).symlink_to(case.directory / name)
    assert_ended(together(2, *case.arguments, "1", "--max-steps", "2", "--output", "out", cwd=tmp_path))
    (tmp_path / "out" / "checkpoints" / "checkpoint-2" / "rng_state_1.pth").unlink()
    ended = together(2, "--resume", "--max-steps", "4", "--output", "out", cwd=tmp_path)
    assert_refused(ended, "rng_state_1.pth is missing: 2 processes have saved the checkpoint")


def _fail_in_step(step: int, how: str) -> None:
    """This runs in the process of a command."""
    from moe_fused.finetune.trainer import Finetuning

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stuck":  # until it is killed by its watch, as one that waits in a collective of NCCL
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
                time.sleep(60)
            raise KeyError("a bug")
        return original(self, *args, **kwargs)

    original = Finetuning.training_step
    Finetuning.training_step = training_step  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", ("rank 1: ", "stopped after step 2: KeyError: 'a bug'", "checkpoint-2", "--resume")),
        ("killed", ("stopped after step 2: rank 1 (process", "has ended", "checkpoint-2", "--resume")),
    ],
)
def test_one_process_that_fails_ends_all(case: Case, how: str, words: tuple[str, ...]) -> None:
    output = case.directory / f"failed-{how}"
    begin = time.monotonic()
    ended = together(
        2, *case.arguments, "1", "--max-steps", "4", "--save-steps", "2", "--output", output.name, cwd=case.directory,
        before={1: partial(_fail_in_step, 3, how)},
    )  # fmt: skip
    assert time.monotonic() - begin < 40
    assert_refused(ended, *words)
    assert "Traceback" not in ended[0].stderr
    assert checkpoints(output) == [2]
    assert_ended(together(2, "--resume", "--output", output.name, cwd=case.directory))
    assert not leftovers(output)


@pytest.mark.slow
def test_a_process_that_is_stuck_ends_with_the_others(case: Case) -> None:
    ended = together(
        2, *case.arguments, "1", "--max-steps", "4", "--output", "stuck", cwd=case.directory,
        before={0: partial(_fail_in_step, 3, "stuck"), 1: partial(_fail_in_step, 3, "raises")},
    )  # fmt: skip
    assert_refused(ended, "rank 1: ", "a bug")


def _impatient(*, alone: bool) -> None:
    """Says at once that others are missing. This runs in the process of a command.

    Args:
        alone: Whether there is no launcher, so that the process with rank 0 holds the store.
    """
    from moe_fused.finetune import parallel

    parallel._SOON = 0.2
    if alone:
        del os.environ["TORCHELASTIC_USE_AGENT_STORE"]


def _one_of_two(case: Case, rank: int, port: int, *options: str, alone: bool) -> Command:
    prepare = partial(as_torchrun, rank, 2, port, partial(_impatient, alone=alone))
    arguments = (*case.arguments, "1", "--output", "missing", *options)
    return Command("finetune", *arguments, cwd=case.directory, before=prepare)


def test_a_process_that_does_not_come_is_named(case: Case) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ended = _one_of_two(case, 0, store.port, "--set", "trainer.ddp_timeout=1", alone=False).end()
    assert (ended.status, ended.stderr) == (
        1,
        "note: waiting for rank 1 of 2 processes\nerror: rank 1 of 2 processes did not come within 1 s\n",
    )
    assert not (case.directory / "missing").exists()


def test_another_number_of_processes_is_told(case: Case) -> None:
    """One of three finds one of two."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = (*case.arguments, "1", "--output", "missing")
    ended = [
        Command("finetune", *arguments, cwd=case.directory, before=partial(as_torchrun, rank, number, store.port, None))
        for rank, number in ((0, 2), (1, 3))
    ]
    lines = [line for each in ended for line in each.end().stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert re.search("WORLD_SIZE is [23] for rank [01] and [23] for rank [01]: it must be the number of all", lines[0])
    assert not (case.directory / "missing").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_can_be_interrupted(case: Case, rank: int) -> None:
    """torch waits for the store half an hour, without handling signals."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = _one_of_two(case, rank, port, alone=True)
    where = f"the other processes at 127.0.0.1:{port}"
    while f"note: rank {rank} of 2 processes waits for {where}\n" not in command.stderr():
        assert command.process.exitcode is None, command.end()
        time.sleep(0.05)
    command.signal(signal.SIGINT)
    ended = command.end(timeout=20)
    assert ended.status == 128 + signal.SIGINT
    assert (f"error: interrupted by SIGINT while waiting for {where}\n" in ended.stderr) == (rank == 0)
    assert not (case.directory / "missing").exists()


def test_a_port_that_is_taken_is_told(case: Case) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ended = _one_of_two(case, 0, store.port, alone=True).end()
    assert ended.status == 1
    (line,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: cannot connect to the other processes at 127.0.0.1:{store.port}: The server socket")


def test_a_signal_to_all_saves_once(case: Case) -> None:
    output = case.directory / "interrupted"
    processes = Together(
        2, *case.arguments, "1", "--max-steps", "2000", "--save-steps", "1000", "--output", output.name,
        cwd=case.directory,
    )  # fmt: skip
    while "step 2/2000" not in processes.commands[0].stderr():
        assert processes.commands[0].process.exitcode is None, processes.end()
        time.sleep(0.05)
    processes.signal(signal.SIGINT)
    ended = processes.end()
    assert [each.status for each in ended] == [128 + signal.SIGINT] * 2, ended
    words = "go on, again in 2 processes, with: moe-fused finetune --resume --output interrupted"
    assert_refused(ended, "interrupted by SIGINT", words)
    assert len(checkpoints(output)) == 1
    assert not leftovers(output)


def test_other_options_or_data_are_refused(case: Case) -> None:
    write_jsonl(case.directory / "other.jsonl", chats(22))
    ours = (*case.arguments, "1", "--max-steps", "2", "--output", "refused")
    others = (*ours, "--learning-rate", "0.02")
    assert_refused(together(2, *ours, cwd=case.directory, others=others), "rank 1", "--learning-rate 0.02", "0.01")
    ended = together(2, *ours, cwd=case.directory, before={1: _see_other_rows})
    assert_refused(ended, "rank 1 sees rows sha256:", "all processes of a run must have the same")
    assert not (case.directory / "refused").exists()


def _see_other_rows() -> None:
    """This runs in the process of a command."""
    from moe_fused.finetune import data

    original = data.read_rows
    data.read_rows = lambda name, **kwargs: original("other.jsonl", **kwargs)  # type: ignore[assignment]


def test_bad_input_is_told_once(case: Case) -> None:
    arguments = (*case.arguments, "1", "--max-steps", "2", "--output", "bad")
    assert_refused(together(2, *arguments, "--eval-dataset", "gone.jsonl", cwd=case.directory), "gone.jsonl is missing")
    assert_refused(together(2, *arguments, "--streaming", cwd=case.directory), "--streaming cannot be shared")
    assert_refused(together(2, *arguments, "--epochs", "many", cwd=case.directory), "--epochs must be a number")
    write_jsonl(case.directory / "bad.jsonl", [{"messages": []}])
    others = (*arguments, "--dataset", "bad.jsonl")
    assert_refused(together(2, *others, cwd=case.directory), "bad.jsonl:1")


def test_adapters_that_differ_end_the_run(case: Case) -> None:
    ended = together(
        2, *case.arguments, "1", "--max-steps", "2", "--output", "differ", cwd=case.directory, before={1: _differ}
    )
    assert_refused(ended, "rank 1 has other adapters than rank 0 before the first step")


def _differ() -> None:
    """This runs in the process of a command."""
    from moe_fused.finetune.trainer import Finetuning

    original = Finetuning.train_from

    def train_from(self: Any, checkpoint: Path | None) -> None:
        with torch.no_grad():
            self._trained[0].add_(1)
        original(self, checkpoint)

    Finetuning.train_from = train_from  # type: ignore[method-assign]


def test_gradients_are_averaged_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fused.finetune import parallel

    monkeypatch.setattr(parallel, "BUCKET", 64)
    gradients = [torch.zeros(8), torch.zeros(8), torch.zeros(4), torch.zeros(100), torch.zeros(2, dtype=torch.bfloat16)]
    found = [[len(each) for each in bucket] for bucket in parallel.buckets(gradients)]
    assert found == [[8, 8], [4], [100], [2]]


# torchrun itself, which takes the time of importing everything in each process.


def _start(*arguments: str, cwd: Path, module: str = "torch.distributed.run") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": python_path(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


TORCHRUN = ("--standalone", "--nproc-per-node", "2", "-m", "moe_fused", "finetune")


@pytest.mark.slow
def test_torchrun_trains(case: Case, alone: Path) -> None:
    process = _start(*TORCHRUN, *map(str, case.arguments), "3", *TWO_EPOCHS, "--output", "torchrun", cwd=case.directory)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_alike(alone, case.directory / "torchrun")


@pytest.mark.slow
def test_accelerate_trains(case: Case, alone: Path) -> None:
    # Its launcher for GPUs, which does not look for them. Its launcher for CPUs needs MPI.
    launch = (
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    )
    process = _start(
        *launch, "-m", "moe_fused", "finetune", *map(str, case.arguments), "3", *TWO_EPOCHS, "--output", "accelerate",
        cwd=case.directory, module="accelerate.commands.launch",
    )  # fmt: skip
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_alike(alone, case.directory / "accelerate")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_is_interrupted(case: Case, signum: int) -> None:
    output = case.directory / f"torchrun-{signum}"
    process = _start(
        *TORCHRUN, *map(str, case.arguments), "1", "--max-steps", "5000", "--output", output.name, cwd=case.directory
    )
    log = output / "log.jsonl"
    until = time.monotonic() + 200
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert len([line for line in errors.splitlines() if line.startswith("error: interrupted by")]) == 1, errors
    assert len(checkpoints(output)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "killed", "stuck"])
def test_torchrun_ends_when_a_process_fails(case: Case, tmp_path: Path, how: str) -> None:
    program = tmp_path / "failing.py"
    program.write_text(
        "import os, sys\n"
        "from tests.integration.test_finetune_parallel import _fail_in_step\n"
        "from moe_fused.__main__ import main\n"
        f"rank, how = os.environ['RANK'], {how!r}\n"
        "if how == 'stuck':\n"
        "    _fail_in_step(3, 'raises' if rank == '1' else 'stuck')\n"
        "elif rank == '1':\n"
        "    _fail_in_step(3, how)\n"
        "sys.exit(main())\n"
    )
    output = case.directory / f"torchrun-{how}"
    process = _start(
        *TORCHRUN[:3], str(program), "finetune", *map(str, case.arguments), "1", "--max-steps", "4", "--save-steps", "2",
        "--output", output.name, cwd=case.directory,
    )  # fmt: skip
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert len([line for line in errors.splitlines() if line.startswith("error: ")]) == 1, errors
    assert checkpoints(output) == [2]


@pytest.mark.slow
def test_gpus_start_torchrun(case: Case) -> None:
    """On a machine that claims to have two GPUs. The processes that torchrun starts find none and take the CPU."""
    program = (
        "import sys\n"
        "from moe_fused.finetune import launch\n"
        "launch.count_gpus = lambda: 2\n"
        "from moe_fused.__main__ import main\n"
        "sys.exit(main())\n"
    )
    (case.directory / "gpus.py").write_text(program)
    arguments = [str(each) for each in case.arguments if each not in ("--device", "cpu")]
    environment = {**os.environ, "PYTHONPATH": python_path(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "gpus.py", "finetune", "--gpus", "2", *arguments, "1", "--max-steps", "2", "--output", "gpus"],
        cwd=case.directory, env=environment, text=True, capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended
    assert "2 processes" in (case.directory / "gpus" / "README.md").read_text()
