"""Predicts how long a run takes, where steps of the same model have been measured on the same GPU.

``speeds/*.json`` hold what was measured, and ``scripts/speeds.py`` makes them from the rows of the benchmark
``finetune_30b``. A prediction needs a run like the measured ones: the same model, 4-bit format and adapters, with CUDA
graphs, so that the time does not depend on the host. Of any other run the time is unknown, because no rows show how far
off a prediction would be.

The time of a batch has two parts. One follows the number of tokens and is interpolated between the measured lengths. The
other is that of attention's scores, which follows the square of the length.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .architecture import attention_modules
from .batches import is_full, lengths_of
from .options import DEFAULTS, MAPPINGS, flag
from .stream import Streamed

if TYPE_CHECKING:
    from .data import Prepared
    from .resolve import Batching, ResolvedRun


# Options with which a step takes another time. None but their defaults were measured.
_AS_DEFAULT = ("lora_dropout", "router_aux_loss", "trainer", "lora")
# The optimizer that was measured, and its paged variant, which does the same work where memory is not short.
_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit")


@dataclass(frozen=True)
class Measured:
    """The steps of one sequence that were measured for one model on one GPU, all with CUDA graphs.

    Attributes:
        gpu: The name of the GPU, as torch gives it.
        model: The name of the model, for people.
        config: The entries that the config of such a model has.
        weights: The 4-bit format of the weights.
        attention_rank, expert_rank: The ranks of the adapters.
        tokens: The numbers of tokens of a step, ascending.
        ms: The milliseconds of each of these steps.
        optimizer_ms: The part of the optimizer in each step.
        attention_ms: The part of attention in each step, its projections included.
    """

    gpu: str
    model: str
    config: dict[str, Any]
    weights: str
    attention_rank: int
    expert_rank: int
    tokens: Sequence[int]
    ms: Sequence[float]
    optimizer_ms: Sequence[float]
    attention_ms: Sequence[float]

    @property
    def _score_ms(self) -> float:
        """The milliseconds of attention's scores for each squared token."""
        tokens, attention = np.asarray(self.tokens, dtype=float), np.asarray(self.attention_ms)
        terms = np.stack([tokens**0, tokens, tokens**2], axis=1) / attention[:, None]
        factors, *_ = np.linalg.lstsq(terms, np.ones_like(attention))
        return float(factors[2])

    def batch_ms(self, sequences: int, length: int) -> float | None:
        """Returns the milliseconds of the passes over a batch, without the optimizer.

        Args:
            sequences: The number of sequences in the batch.
            length: The number of tokens of each sequence.

        Returns:
            The time, or None if fewer or more tokens were measured than the batch has.
        """
        count = sequences * length
        if not self.tokens[0] <= count <= self.tokens[-1]:
            return None
        tokens: Any = np.asarray(self.tokens, dtype=float)
        others = np.asarray(self.ms) - np.asarray(self.optimizer_ms) - self._score_ms * tokens**2
        return float(np.interp(count, tokens, others)) + self._score_ms * sequences * length**2

    @property
    def step_ms(self) -> float:
        """The milliseconds of the optimizer in a step."""
        return max(self.optimizer_ms)


@functools.cache
def measured() -> tuple[Measured, ...]:
    """Reads all that was measured, from the files that ship with the package."""
    files = [file for file in resources.files(__package__).joinpath("speeds").iterdir() if file.name.endswith(".json")]
    return tuple(Measured(**entry) for file in files for entry in json.loads(file.read_text(encoding="utf-8")))


def duration_line(run: ResolvedRun, prepared: Prepared | Streamed, gpu: str | None) -> str:
    """Returns the line of the plan that says how long the run takes, or why this is unknown.

    Args:
        run: The record of the run.
        prepared: The sequences of the run.
        gpu: The name of the GPU, or None on another device.
    """
    if run.batching.processes > 1:
        return "time: unknown with several processes: it was not measured"
    if run.options.has_preferences:
        return f"time: unknown with --method {run.options.method}: it was not measured"
    held = prepared.evaluation
    lengths = [] if held is None else lengths_of(held.dataset)
    # A stream is filled up to the length of the run.
    lengths += [run.batching.length] if isinstance(prepared, Streamed) else lengths_of(prepared.dataset)
    found = _measured_for(run, lengths, gpu)
    if isinstance(found, str):
        return f"time: unknown {found}"
    batch_ms = found.batch_ms(run.batching.batch_size, max(lengths))
    if batch_ms is None:
        return (
            f"time: unknown on this GPU for batches of {run.batching.batch_size * max(lengths):,} tokens: from "
            f"{found.tokens[0]:,} to {found.tokens[-1]:,} were measured"
        )
    if isinstance(prepared, Streamed):
        steps = run.options.max_steps or 0
        batches = steps * run.batching.accumulation
    else:
        steps = prepared.report.steps or 0
        batches = batches_of(len(prepared.dataset), run.batching, steps)
    seconds = (batches * batch_ms + steps * found.step_ms) / 1000
    # Documents attend to themselves alone, which takes less time than one long sequence.
    is_most = run.batching.has_documents or run.options.early_stopping is not None
    apart = "loading and checkpoints" if held is None else "loading, checkpoints and evaluations"
    return (
        f"time: {'at most' if is_most else 'about'} {_words(seconds)} for {steps:,} step{'' if steps == 1 else 's'} on this "
        f"{gpu}, {seconds / max(steps, 1):.2f} s each; {apart} are not counted"
    )


def batches_of(sequences: int, batching: Batching, steps: int) -> int:
    """Returns the number of batches in ``steps`` steps over ``sequences``. The last step of an epoch may have fewer."""
    of_epoch = math.ceil(sequences / batching.batch_size)
    epochs, rest = divmod(steps, math.ceil(of_epoch / batching.accumulation))
    return epochs * of_epoch + min(rest * batching.accumulation, of_epoch)


def _measured_for(run: ResolvedRun, lengths: Sequence[int], gpu: str | None) -> Measured | str:
    """Returns what was measured for such a run, or the reason why its time is unknown."""
    if gpu is None:
        return "on a GPU that is not here" if run.device.type == "cuda" else f"on this device, a {run.device.type}"
    here = [each for each in measured() if each.gpu == gpu]
    if not here:
        return f"on this GPU: no {gpu} was measured"
    config = run.config.get_text_config()
    of_model = [each for each in here if all(getattr(config, name, None) == each.config[name] for name in each.config)]
    if not of_model:
        return f"for this model on this GPU: only {', '.join(each.model for each in here)} was measured"
    differences = [list(_differences(run, each)) for each in of_model]
    if [] not in differences:
        return f"on this GPU with {', '.join(differences[0])}: it was not measured"
    if not run.graphs or not (run.graphs_asked_for or is_full(lengths)):
        return "without CUDA graphs, because it depends on the host"
    return of_model[differences.index([])]


def _differences(run: ResolvedRun, found: Measured) -> Iterator[str]:
    """Yields what a run has that the measured ones have not."""
    options, weights = run.options, _weights(run)
    if weights != found.weights:
        yield f"weights in {weights}"
    if run.dtype is not torch.bfloat16 or run.adapter_dtype is not torch.bfloat16:
        yield "another dtype than bfloat16"
    ranks = {
        "attention_rank": (run.ranks.attention, found.attention_rank),
        "expert_rank": (run.ranks.expert, found.expert_rank),
        "shared_expert_rank": (run.ranks.shared_expert, 0),
        "router_rank": (run.ranks.router, 0),
    }
    for name, (rank, of_measured) in ranks.items():
        if rank != of_measured:
            yield f"{flag(name)} {rank}"
    if run.whole.names:
        yield flag("modules_to_save")
    if set(run.attention_modules) != set(attention_modules(run.skeleton)):
        yield "--attention-modules"
    for name in _AS_DEFAULT:
        if (value := getattr(options, name)) and value != DEFAULTS[name]:
            yield name if name in MAPPINGS else flag(name)
    if not options.gradient_checkpointing:
        yield "--no-gradient-checkpointing"
    if options.keep_attention != "none":
        yield f"--keep-attention {options.keep_attention}"
    if run.optimizer not in _OPTIMIZERS:
        yield f"--optimizer {run.optimizer}"
    if not run.liger:
        yield "--no-liger"
    if run.attention != "sdpa":
        yield f"--attn {run.attention}"


def _weights(run: ResolvedRun) -> str:
    """Names the format of the weights."""
    return run.quant_type or "bf16"


def _words(seconds: float) -> str:
    """Writes a time in two units at most."""
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"
