"""``moe-fused finetune`` killed, as by ``kill -9``, while it keeps rows and their tokens in the cache of ``datasets``."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from .finetuning import Command, Death, Ended, chats, finetune, finetune_killed, save_model, write_jsonl

OTHERS = [
    {"messages": [{"role": "user", "content": "?" * i}, {"role": "assistant", "content": f"{i} " * i}]}
    for i in range(1, 12)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("killed") / "model")


def cache_in(directory: Path, processes: int = 1) -> None:
    """The cache of ``datasets`` is in a directory of the test. This runs in the process of a command."""
    from moe_fused.finetune import tokenizing

    datasets.config.HF_DATASETS_CACHE = directory
    tokenizing._cores = lambda: processes  # type: ignore[assignment]
    tokenizing._ROWS_OF_A_PROCESS = 1


# Files of rows and of their tokens are finished, and moved to their places.
FINISHED, MOVED = "datasets.arrow_writer:ArrowWriter.finalize", "shutil:move"
SOME = [Death(FINISHED, 2), Death("moe_fused.finetune.tokenizing:_Worker.__call__", 3), Death(MOVED, 2, done=True)]
ALL = [Death(place, call, done) for place in (FINISHED, MOVED) for call in (1, 2, 3) for done in (False, True)]


@pytest.mark.parametrize(
    ("processes", "deaths"),
    [(1, SOME), pytest.param(1, ALL, marks=pytest.mark.slow), pytest.param(2, ALL, marks=pytest.mark.slow)],
    ids=["some", "all", "all-2"],
)
def test_killed_while_rows_are_read_and_kept(processes: int, deaths: list[Death], model: Path, tmp_path: Path) -> None:
    """The next start reads what is whole, makes the rest again, and has the same data as with an empty cache."""
    write_jsonl(tmp_path / "a.jsonl", chats(12))
    write_jsonl(tmp_path / "b.jsonl", OTHERS)
    write_jsonl(tmp_path / "c.jsonl", OTHERS[:5])
    arguments = (
        "--model", model, "--dataset", "a.jsonl", "--dataset", "b.jsonl", "--eval-dataset", "c.jsonl",
        "--sequence-length", "64", "--max-steps", "1", "--output", "out", "--dry-run",
    )  # fmt: skip

    def start(cache: str) -> Ended:
        return finetune(*arguments, cwd=tmp_path, before=partial(cache_in, tmp_path / cache, processes))

    expected = start("whole")
    assert expected.status == 0, expected
    assert "evaluation: 5 rows" in expected.stderr
    for death in deaths:
        finetune_killed(death, *arguments, cwd=tmp_path, before=partial(cache_in, tmp_path / str(death), processes))
        for _ in range(2):  # the second start has what the first one has kept
            ended = start(str(death))
            assert (ended.status, ended.stderr) == (0, expected.stderr), death


def slow_workers(cache: Path) -> None:
    """Rows take long, in two processes, which write down their numbers. This runs in the process of a command."""
    from moe_fused.finetune.render import Renderer

    cache_in(cache, 2)
    render = Renderer.__call__

    def slow(self: Renderer, row: Any) -> Any:
        (cache / f"worker-{os.getpid()}").touch()
        time.sleep(0.2)
        return render(self, row)

    Renderer.__call__ = slow  # type: ignore[method-assign]


def test_no_process_goes_on_when_its_run_is_killed(model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", chats(2000))
    cache = tmp_path / "cache"
    cache.mkdir()
    arguments = ("--model", model, "--dataset", "rows.jsonl", "--output", "out", "--dry-run")
    running = Command("finetune", *arguments, cwd=tmp_path, before=partial(slow_workers, cache))
    for _ in range(600):
        workers = [int(path.name.partition("-")[2]) for path in cache.glob("worker-*")]
        if len(workers) == 2:
            break
        time.sleep(0.1)
    assert len(workers) == 2
    running.signal(signal.SIGKILL)
    running.process.join()
    for _ in range(100):
        alive = [number for number in workers if is_alive(number)]
        if not alive:
            return
        time.sleep(0.1)
    for number in alive:
        os.kill(number, signal.SIGKILL)
    pytest.fail(f"{len(alive)} processes go on")


def is_alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
