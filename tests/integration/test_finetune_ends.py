"""``moe-fused finetune`` however it ends: nothing broken is left behind, and it goes on as if it had not ended."""

from __future__ import annotations

import errno
import itertools
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from .finetuning import (
    Command,
    Run,
    assert_error,
    checkpoints,
    finetune,
    finetune_signalled,
    leftovers,
    losses,
    records,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_a_checkpoint(signum: signal.Signals, whole: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = (*whole.arguments, "--save-steps", "100", "--output", "out")
    ended = finetune_signalled(signum, 4, *arguments, cwd=tmp_path)
    assert_error(
        ended, f"interrupted by {signum.name}", "moe-fused finetune --resume --output out", status=128 + signum
    )
    assert checkpoints(output) == [4]
    assert not (output / "adapter_config.json").exists()
    assert not leftovers(output)
    resumed = finetune("--resume", "--output", "out", cwd=tmp_path)
    assert resumed.status == 0, resumed
    assert "step 4/" not in resumed.stderr
    whole.assert_as_uninterrupted(output)


def test_goes_on_in_bf16(tmp_path: Path) -> None:
    """A run with bf16 adapters and 8-bit moments, the default on GPUs, resumes exactly."""
    options = ("--adapter-dtype", "bfloat16", "--optimizer", "adamw_8bit")
    whole = Run(tmp_path, *options)
    ended = finetune_signalled(signal.SIGINT, 3, *whole.arguments, "--output", "again", cwd=tmp_path)
    assert ended.status == 128 + signal.SIGINT
    assert finetune("--resume", "--output", "again", cwd=tmp_path).status == 0
    whole.assert_as_uninterrupted(tmp_path / "again")


def test_a_signal_before_the_first_step(whole: Run, tmp_path: Path) -> None:
    command = Command("finetune", *whole.arguments, "--output", "out", cwd=tmp_path, before=_interrupt_while_loading)
    assert_error(command.end(), "interrupted by SIGINT", status=130)
    assert finetune("--resume", "--output", "out", cwd=tmp_path).status == 0
    whole.assert_as_uninterrupted(tmp_path / "out")


def _interrupt_while_loading() -> None:
    from moe_fused.finetune import run

    def load_model(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    run.load_model = load_model


def test_resuming_what_is_done_writes_the_adapter_again(whole: Run, tmp_path: Path) -> None:
    arguments = ("--output", "out", "--max-steps", "2")
    assert finetune(*whole.arguments, *arguments, cwd=tmp_path).status == 0
    (tmp_path / "out" / "adapter_config.json").unlink()  # as if killed right before
    ended = finetune("--resume", "--output", "out", cwd=tmp_path)
    assert ended.status == 0, ended
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert sorted(losses(tmp_path / "out")) == [1, 2]


def test_a_run_goes_on_longer_but_not_otherwise(whole: Run, tmp_path: Path) -> None:
    assert finetune(*whole.arguments, "--output", "out", "--max-steps", "2", cwd=tmp_path).status == 0
    ended = finetune("--resume", "--output", "out", "--expert-rank", "4", cwd=tmp_path)
    assert_error(ended, "--expert-rank is 8", "cannot become 4")
    # What the run chose for itself stays as it was.
    ended = finetune("--resume", "--output", "out", "--max-steps", "4", "--packing", "auto", cwd=tmp_path)
    assert ended.status == 0, ended
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4]
    # The learning rate follows the course of the new length from the first step on.
    assert finetune(*whole.arguments, "--output", "straight", "--max-steps", "4", cwd=tmp_path).status == 0
    longer, straight = (
        {record["step"]: record["learning_rate"] for record in records(tmp_path / name, "learning_rate")}
        for name in ("out", "straight")
    )
    assert (longer[3], longer[4]) == (straight[3], straight[4])


def test_a_loss_that_is_not_finite(whole: Run, tmp_path: Path) -> None:
    """A loss that is not finite ends the run.

    At this learning rate the weights are infinite after two steps, so step 3 sees it.
    """
    ended = finetune(
        *whole.arguments, "--output", "out", "--learning-rate", "1e37", "--max-grad-norm", "0", cwd=tmp_path
    )
    assert_error(ended, "of step 3 is", "--learning-rate", "the last checkpoint is out/checkpoints/checkpoint-2")
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert checkpoints(tmp_path / "out") == [2]
    assert not leftovers(tmp_path / "out")


def _no_memory() -> None:
    from moe_fused.finetune.trainer import Finetuner

    step = Finetuner.training_step

    def third_fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args, **kwargs)

    Finetuner.training_step = third_fails  # type: ignore[method-assign]


def test_out_of_memory(whole: Run, tmp_path: Path) -> None:
    """Running out of memory is reported with advice.

    Dropout keeps CUDA graphs off, so the advice is not to do without them.
    """
    ended = finetune(*whole.arguments, "--output", "out", cwd=tmp_path, before=_no_memory)
    assert_error(ended, "out of memory after step 2: predicted were", "--sequence-length", "checkpoint-2")
    assert "--no-cuda-graphs" not in ended.stderr.splitlines()[-1]
    assert checkpoints(tmp_path / "out") == [2]
    assert not leftovers(tmp_path / "out")


def _third_step_has_a_bug(error: Exception) -> None:
    from moe_fused.finetune.trainer import Finetuner

    step = Finetuner.training_step

    def third_step_fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise error
        return step(self, *args, **kwargs)

    Finetuner.training_step = third_step_fails  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("shapes differ"), OSError("shapes differ")]
)
def test_a_bug_is_reported_as_one(error: Exception, whole: Run, tmp_path: Path) -> None:
    """An unexpected error is reported as itself, not as a full disk or as too little memory."""
    ended = finetune(*whole.arguments, "--output", "out", cwd=tmp_path, before=partial(_third_step_has_a_bug, error))
    kind = type(error).__name__
    assert_error(ended, f"stopped after step 2: {kind}: shapes differ", "checkpoint-2", "--resume --output out")
    assert "Traceback (most recent call last)" in ended.stderr
    assert "in third_step_fails" in ended.stderr
    for words in ("cannot be written", "out of memory", "predicted were", "No space left"):
        assert words not in ended.stderr
    assert checkpoints(tmp_path / "out") == [2]


def _no_log_lines() -> None:
    from moe_fused.finetune import progress

    write = progress.json.dumps

    def dumps(content: Any, *args: Any, **kwargs: Any) -> str:
        if isinstance(content, dict) and "tokens_per_second" in content and content["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "log.jsonl")
        return write(content, *args, **kwargs)

    progress.json.dumps = dumps


def test_no_room_for_the_log(whole: Run, tmp_path: Path) -> None:
    ended = finetune(*whole.arguments, "--output", "out", cwd=tmp_path, before=_no_log_lines)
    assert_error(
        ended, "stopped after step 3: log.jsonl cannot be written", "No space left", "checkpoint-2", "--resume"
    )
    assert "Traceback" not in ended.stderr


def _full_disk(after: int) -> None:
    """Makes saving the optimizer fail the way a full disk does, after having worked ``after`` times."""
    save, count = torch.save, itertools.count()

    def full(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith("optimizer.pt") and next(count) >= after:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(content, path, *args, **kwargs)

    torch.save = full


def test_a_full_disk(whole: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ended = finetune(*whole.arguments, "--output", "out", cwd=tmp_path, before=partial(_full_disk, 1))
    assert_error(ended, "stopped after step 4", "No space left", "checkpoint-2", "--resume")
    assert "Traceback" not in ended.stderr
    assert checkpoints(output) == [2]
    assert not leftovers(output)
    assert finetune("--resume", "--output", "out", cwd=tmp_path).status == 0
    whole.assert_as_uninterrupted(output)


def _small_files() -> None:
    """Limits files to 80 kB, which is enough for the adapter and too little for the optimizer's state."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, 80_000))


def test_writing_that_fails(whole: Run, tmp_path: Path) -> None:
    """A write that the system refuses is reported in one line, whatever exception the library raises."""
    ended = finetune(*whole.arguments, "--output", "out", cwd=tmp_path, before=_small_files)
    assert_error(ended, "stopped after step 2", "no checkpoint was saved yet")
    assert "Traceback" not in ended.stderr
    assert checkpoints(tmp_path / "out") == []
    assert not leftovers(tmp_path / "out")


def _no_room_for_the_adapter() -> None:
    from moe_fused.finetune import results

    def draw(records: Any, path: Path, **_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    results.draw_loss = draw


def test_no_room_for_the_adapter(whole: Run, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ended = finetune(*whole.arguments, "--output", "out", cwd=tmp_path, before=_no_room_for_the_adapter)
    assert_error(ended, "No space left", "checkpoint-8", "--resume")
    assert "Traceback" not in ended.stderr
    assert not (output / "adapter_model.safetensors").exists()
    assert not leftovers(output)
    assert finetune("--resume", "--output", "out", cwd=tmp_path).status == 0
    whole.assert_as_uninterrupted(output)
