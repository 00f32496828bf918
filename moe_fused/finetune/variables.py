"""The environment variables that turn on what no GPU has run yet. Only the standard library is needed here.

The variables are no options, because options are for good, and are written into ``finetune.yaml``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

# One kernel for the steps of 8-bit AdamW (``adamw``), and fewer passes of linear layers with adapters (``projections``).
ADAMW, QKV = "MOE_FUSED_ADAMW", "MOE_FUSED_QKV"
ALL = (ADAMW, QKV)


def is_on(name: str) -> bool:
    """Whether the environment turns a variable on."""
    return os.environ.get(name) == "1"


def check_variables(environment: Mapping[str, str]) -> None:
    """Raises ValueError unless each variable is 1, 0, empty or absent."""
    for name in ALL:
        if (value := environment.get(name, "")) not in ("", "0", "1"):
            raise ValueError(f"the variable {name} must be 1 or 0, got {value!r}")


def lines(*, device: str, optimizer: str, linear_rank: int, dropout: float, sharded: bool) -> Iterator[str]:
    """Says for people what the variables that are on change in a run, and why if they change nothing.

    Args:
        device: The type of the device of the run.
        optimizer: Its optimizer.
        linear_rank: The rank of the adapters on linear layers.
        dropout: The dropout of adapters.
        sharded: Whether the model is divided among GPUs.
    """
    if is_on(ADAMW):
        reasons = {
            f"the optimizer is {optimizer}, not adamw_8bit or paged_adamw_8bit": "adamw_8bit" not in optimizer,
            "it needs a GPU": device == "cpu",
        }
        yield _line(ADAMW, "one kernel makes the steps of 8-bit AdamW", reasons)
    if is_on(QKV):
        reasons = {
            "no linear layer has an adapter": not linear_rank,
            "PEFT computes layers with --lora-dropout": dropout > 0,
            "PEFT computes the layers of a run with --shard": sharded,
        }
        yield _line(QKV, "linear layers with adapters are computed in fewer passes than by PEFT", reasons)


def _line(name: str, effect: str, reasons: Mapping[str, bool]) -> str:
    reason = next((text for text, applies in reasons.items() if applies), None)
    if reason is not None:
        return f"note: {name}=1 has no effect: {reason}"
    return f"note: {name}=1: {effect}, which no GPU has run yet"
