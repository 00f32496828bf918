"""How a run ends early, and what the user is told: after which step, why, and how to go on.

Errors that need no bug to happen are raised as ``Expected`` at the places where they are expected: a full disk where a
file is written, damage where a checkpoint is read. Every other error is a bug, here or in a library, and shows its
traceback, too.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from moe_fused.launched import Silent
from moe_fused.memory import GIB
from moe_fused.signals import Interrupted, ignore_next_signal, signals_ignored

from .checkpoints import last_checkpoint
from .handed_through import names_given
from .output import has_begun
from .words import said_by

if TYPE_CHECKING:
    from .parallel import Peers
    from .plan import MemoryPlan
    from .resolve import ResolvedRun
    from .trainer import Finetuning


# The seconds in which a process that ends is noticed by those that miss it.
_NOTICE = 3.0


class Stopped(Exception):
    """A run ended early, with its checkpoints in place. The message says how to go on.

    Attributes:
        exit_code: The exit status of the process.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Expected(Exception):
    """The base of the errors that a run expects while it trains. Their messages are written for users."""


class NotFinite(Expected, RuntimeError):
    """A loss, a gradient or a weight is not a number, or infinite."""


class CannotWrite(Expected):
    """A file could not be written, as on a full disk."""


class CannotResume(Expected):
    """A checkpoint cannot be read, or is not one of this run."""


class Lost(Expected):
    """Another process of the run has ended, which did not say why."""


class Diverged(Expected, RuntimeError):
    """The processes of a run have different adapters."""


class CannotRecord(Expected, RuntimeError):
    """Something in the decoder cannot run as CUDA graphs."""


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Raises CannotWrite if writing ``what`` fails within the block.

    The libraries that write files raise RuntimeError for it (torch) and SafetensorError, beside OSError.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CannotWrite(f"{what} cannot be written: {said_by(error)}") from error


@contextlib.contextmanager
def resuming() -> Iterator[None]:
    """Raises CannotResume if reading a checkpoint fails within the block, or the checkpoint does not fit."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise CannotResume(str(error)) from error


@contextlib.contextmanager
def explained(trainer: Finetuning, plan: MemoryPlan, peers: Peers) -> Iterator[None]:
    """Raises Stopped for an error within the block, which says after which step it came and how to go on.

    Errors before the first step are raised as they are, unless their advice does not depend on the step. A bug prints
    its traceback in both cases. If another process has ended, which leads to errors of many kinds, it raises Silent, or
    Stopped if that process could not say why.
    """
    try:
        with _errors_explained(trainer, plan, peers):
            yield
    except Interrupted:  # by the user, or by the launcher because another process has ended
        _explain_lost(trainer, plan.run, peers)
        raise


@contextlib.contextmanager
def _errors_explained(trainer: Finetuning, plan: MemoryPlan, peers: Peers) -> Iterator[None]:
    """Does what ``explained`` says for all that is no signal. A signal may also come while an error is explained."""
    run, output, graphs = plan.run, plan.run.output, trainer.shape is not None
    try:
        yield
    except (Stopped, CannotResume):
        raise
    except NotFinite as error:
        # Not --resume, which would come to the same end.
        advice = f"{_again(output)} a lower --learning-rate, or look at the rows around it"
        raise Stopped(f"{said_by(error)}: {advice}; {_where(last_checkpoint(output))}") from error
    except torch.OutOfMemoryError as error:
        advice = f"predicted were {plan.prediction.total / GIB:.2f} GiB; {_again(output)} a lower --sequence-length"
        where = _way_on(run, " --no-cuda-graphs") if graphs else _where(last_checkpoint(output))
        raise Stopped(f"out of memory after step {trainer.state.global_step}: {advice}; {where}") from error
    except Exception as error:
        if _may_be_of_others(error):
            _explain_lost(trainer, run, peers)
        is_bug, step = not isinstance(error, Expected), trainer.state.global_step
        if not step and (fields := names_given(plan.run.options, "trainer")) and _is_of_trl(error):
            raise ValueError(f"{fields}: {said_by(error)}") from error
        if is_bug:
            traceback.print_exception(error)
        if not step:
            raise
        reason = f"{type(error).__name__}: {said_by(error)}" if is_bug else said_by(error)
        raise Stopped(f"stopped after step {step}: {reason}; {_way_on(run)}") from error


def _is_of_trl(error: Exception) -> bool:
    """Whether TRL itself raised an error, as it does for a value that one of its trainers does not know."""
    if not isinstance(error, (ValueError, TypeError, NotImplementedError)):
        return False
    module = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__"))
    return module.partition(".")[0] == "trl"


def _explain_lost(trainer: Finetuning, run: ResolvedRun, peers: Peers) -> None:
    """Raises Silent or Stopped if another process has ended, the former if it has said why."""
    with signals_ignored():  # of the launcher, which notices it, too
        lost = peers.ended(wait=0.0 if peers.is_alone else _NOTICE)
    if lost is None:
        return
    ignore_next_signal()
    raise Stopped(f"stopped after step {trainer.state.global_step}: {lost}; {_way_on(run)}") if lost else Silent


def _may_be_of_others(error: Exception) -> bool:
    """Whether ``error`` may come from a collective that another process has left."""
    return isinstance(error, RuntimeError | Lost) or isinstance(error.__cause__, RuntimeError)


def stopped_by(signum: int, run: ResolvedRun) -> Stopped:
    """The end of a run that a signal ended."""
    return Stopped(f"interrupted by {signal.Signals(signum).name}; {_way_on(run)}", 128 + signum)


def _where(checkpoint: Path | None) -> str:
    return "no checkpoint was saved yet" if checkpoint is None else f"the last checkpoint is {checkpoint}"


def _again(output: Path) -> str:
    return "start again with --overwrite and" if has_begun(output) else "start again with"


def _way_on(run: ResolvedRun, options: str = "") -> str:
    """Names the last checkpoint and the command that goes on from it, with as many processes as the run has."""
    checkpoint = last_checkpoint(run.output)
    if checkpoint is None:
        return _where(checkpoint)
    process, again = run.process, ""
    if not process.is_alone:
        if run.device.type != "cpu" and process.local_world_size == process.world_size:
            options += f" --gpus {process.world_size}"
        else:  # --gpus does not start these
            again = f", again in {process.world_size} processes,"
    command = f"moe-fused finetune --resume --output {shlex.quote(str(run.output))}{options}"
    return f"{_where(checkpoint)}, go on{again} with: {command}"
