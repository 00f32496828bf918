"""Shows the progress of a run on the terminal, writes it to ``log.jsonl``, and ends the run after a signal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_fused.memory import GIB
from moe_fused.staging import replace_file

from .endings import writing
from .output import LOG
from .parallel import Peers

__all__ = ["LOG", "Follower", "Log", "Stop", "memory_gib", "perplexity", "read_log"]

# The entries of the trainer's records that are logged, with their names in log.jsonl.
_LOGGED = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "mean_token_accuracy": "accuracy",
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
    "num_tokens": "tokens",
    "epoch": "epoch",
}


_EVALUATED = {key: _LOGGED[key] for key in ("mean_token_accuracy", "rewards/accuracies", "rewards/margins")}


def _rewards(record: Mapping[str, float | None]) -> str:
    """Says by how much the chosen answers are preferred, if the record is of preferences."""
    margin = record.get("reward_margin")
    return "" if margin is None else f"margin {margin:.4f}, "


def perplexity(loss: float) -> float:
    """Returns the perplexity of a loss in nats per token; infinity where no float is as large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def memory_gib(device: torch.device, graphs: bool) -> float | None:
    """Returns the peak of GPU memory so far, in GiB, or None on a CPU.

    Args:
        device: The device of the run.
        graphs: Whether the run has CUDA graphs. Graphs keep memory between their replays, so reserved memory is counted
            instead of allocated memory.
    """
    if device.type == "cpu":
        return None
    most = torch.accelerator.max_memory_reserved if graphs else torch.accelerator.max_memory_allocated
    return most(device) / GIB


def largest_memory(peers: Peers, device: torch.device, graphs: bool) -> float | None:
    """Returns the largest of the numbers that ``memory_gib`` returns in the processes, all of which must call this."""
    memory = memory_gib(device, graphs)
    return None if memory is None else peers.largest([memory])[0]


class Follower(TrainerCallback):
    """Does in the other processes what ``Log`` needs of them in the first.

    Args:
        peers: The processes of the run.
        device: The device of this process.
        graphs: Whether there are CUDA graphs.
    """

    def __init__(self, peers: Peers, device: torch.device, graphs: bool) -> None:
        self._peers, self._device, self._graphs = peers, device, graphs

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"] and "eval_loss" not in kwargs["logs"]:
            largest_memory(self._peers, self._device, self._graphs)


class Log(TrainerCallback):
    """Writes each record of the trainer as a line of log.jsonl, and shows it on the console. It must be the first callback.

    A resumed run first removes the lines after its checkpoint, because it writes them again.

    Args:
        path: The path of log.jsonl.
        console: The console that shows the progress: a terminal as a bar, anything else as a line for each record.
        device: The device of the run.
        graphs: Whether there are CUDA graphs.
        tokens: Returns the number of tokens that the trainer has gone through.
        evaluated: The number of tokens of an evaluation.
        per_token: Whether losses are nats per token, which have a perplexity.
        peers: The processes of the run. The memory that is shown is that of the GPU that has used most.

    Raises:
        CannotWrite: A line cannot be written.
    """

    def __init__(
        self,
        path: Path,
        console: Console,
        device: torch.device,
        graphs: bool,
        tokens: Callable[[], int],
        evaluated: int = 0,
        per_token: bool = True,
        peers: Peers | None = None,
    ) -> None:
        self._peers = peers or Peers()
        self._path, self._console, self._tokens, self._evaluated = path, console, tokens, evaluated
        self._per_token = per_token
        self._device, self._graphs = device, graphs
        words, left = TextColumn("{task.description}"), TimeRemainingColumn(elapsed_when_finished=True)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), words, left)
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._last = self._first = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end_after(state.global_step)
        self._last = (time.perf_counter(), self._tokens())
        self._first = (self._last[0], state.global_step)
        self._bar.start()
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)

    def end_after(self, step: int) -> None:
        """Removes the lines after a step from log.jsonl, and one that a killed process did not finish."""
        kept = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        lines = [line for line in kept if _step_of(line) <= step] if step else []
        with writing(LOG):
            replace_file(self._path, "".join(f"{line}\n" for line in lines).encode())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, Any] = kwargs["logs"]
        if "eval_loss" in logs:
            self._log_evaluation(state, logs)
            return
        if "loss" not in logs:  # this is the summary at the end
            return
        now, tokens = time.perf_counter(), self._tokens()
        rate = (tokens - self._last[1]) / (now - self._last[0])
        self._last = (now, tokens)
        record = {"step": state.global_step} | {
            name: logs[key] for key, name in _LOGGED.items() if logs.get(key) is not None
        }
        speed = {"tokens_per_second": round(rate, 1)}
        if (memory := largest_memory(self._peers, self._device, self._graphs)) is not None:
            speed["memory_gib"] = round(memory, 3)
        record |= speed
        logs |= speed  # for trackers
        self._write(record)
        words = f"loss {record['loss']:.4f}, {_rewards(record)}{rate:,.0f} tokens/s" + (
            f", {memory:.1f} GiB" if memory else ""
        )
        self._bar.update(self._task, description=words)
        if not self._console.is_terminal:
            step = (now - self._first[0]) / (state.global_step - self._first[1])
            left = timedelta(seconds=round(step * (state.max_steps - state.global_step)))
            self._console.print(f"step {state.global_step}/{state.max_steps}: {words}, {left} left", highlight=False)

    def _log_evaluation(self, state: TrainerState, logs: dict[str, Any]) -> None:
        loss, seconds = float(logs["eval_loss"]), float(logs["eval_runtime"])
        # Training is as fast as it was: the time of the evaluation does not count.
        self._last = (self._last[0] + seconds, self._last[1])
        self._first = (self._first[0] + seconds, self._first[1])
        record: dict[str, Any] = {"step": state.global_step, "eval_loss": loss}
        words = _rewards({name: logs.get(f"eval_{key}") for key, name in _LOGGED.items()})
        if self._per_token:
            if math.isfinite(value := perplexity(loss)):
                record["perplexity"] = value
            logs["eval_perplexity"] = value
            words = f"perplexity {value:.2f}, "
        for key, name in _EVALUATED.items():
            if (found := logs.get(f"eval_{key}")) is not None:
                record[f"eval_{name}"] = found
        record |= {"eval_seconds": seconds, "eval_tokens_per_second": round(self._evaluated / max(seconds, 1e-3), 1)}
        self._write(record)
        self._console.print(
            f"step {state.global_step}/{state.max_steps}: evaluation: loss {loss:.4f}, {words}"
            f"{record['eval_tokens_per_second']:,.0f} tokens/s",
            highlight=False,
        )

    def _write(self, record: dict[str, Any]) -> None:
        with writing(LOG), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the bar. It is also called after errors, for which the trainer has no callback."""
        self._bar.stop()


def _step_of(line: str) -> float:
    """Returns the step of a line of log.jsonl. The step is infinite if a killed process did not finish the line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reads the records of log.jsonl: those of steps have a ``loss``, those of evaluations an ``eval_loss``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Stop(TrainerCallback):
    """Ends the training after the step during which a signal came, and saves a checkpoint.

    Args:
        received: Returns the signal that came, or None.
        peers: The processes of the run. If a signal came to one of them, all end after the same step.

    Attributes:
        signum: The signal that ends the training, or None.
    """

    def __init__(self, received: Callable[[], int | None], peers: Peers | None = None) -> None:
        self._received, self._peers = received, peers or Peers()
        self.signum: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.signum = int(self._peers.largest([self._received() or 0])[0]) or None
        if self.signum is not None:
            control.should_save = control.should_training_stop = True
