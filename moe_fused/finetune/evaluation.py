"""The evaluations of a run: their loss, and the callbacks that evaluate after the last step and end the training early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .arguments import LOSS
from .render import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

    from .parallel import Peers


def evaluations(state: TrainerState) -> dict[int, float]:
    """Returns the losses of all evaluations so far, by the steps after which they were made."""
    return {int(entry["step"]): float(entry[LOSS]) for entry in state.log_history if LOSS in entry}


def waited(state: TrainerState) -> int:
    """Returns the number of evaluations after the one with the lowest loss."""
    losses = list(evaluations(state).values())
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


class EvaluateLast(TrainerCallback):
    """Evaluates after the last step, too."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class StopEarly(TrainerCallback):
    """Ends the training, with a checkpoint, when the loss of the evaluation has not become lower for a while.

    Transformers' own callback counts in memory. This one counts in the history that checkpoints hold, so a resumed run
    ends where an uninterrupted one does, and one with another patience counts anew.

    Args:
        patience: The number of evaluations without a lower loss.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if waited(state) >= self._patience:
            control.should_training_stop = control.should_save = True


class TokenMean:
    """The mean of losses over all tokens that are learned from, those of all processes together."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._total: Tensor | None = None
        self._count: Tensor | None = None

    def add(self, loss: Tensor, labels: Tensor) -> None:
        """Counts a batch with its mean loss. The first token of a sequence is predicted by nothing."""
        count = (labels[..., 1:] != IGNORED).sum()
        total = loss.detach().double() * count
        self._total = total if self._total is None else self._total + total
        self._count = count if self._count is None else self._count + count

    def value(self) -> float | None:
        """Returns the mean, or None without any token. All processes must call this."""
        here = (0.0, 0.0) if self._total is None or self._count is None else (float(self._total), float(self._count))
        total, count = self._peers.total(here)
        return total / count if count else None
