"""Checks, before a run begins, that there is room on disk for what it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_fused.staging import check_writable

from .checkpoints import CHECKPOINTS

if TYPE_CHECKING:
    from .resolve import ModelSetup

# The bytes of optimizer state for each trainable parameter: two moments, which in 8 bits have scales for their blocks.
_STATE_BYTES = {"paged_adamw_8bit": 2.1, "adamw_8bit": 2.1, "paged_adamw_32bit": 8.0, "sgd": 0.0}
# A generous number of bytes for the tokenizer, the log, the plot and the state of Trainer.
_OTHERS = 32 << 20


def bytes_of_run(setup: ModelSetup, trainable: int) -> int:
    """Returns the most bytes that a run has on disk: adapter, export, and one checkpoint more than it keeps.

    Args:
        setup: The record of the run.
        trainable: The number of parameters that are trained.
    """
    itemsizes = [setup.adapter_dtype.itemsize, *([setup.dtype.itemsize] if setup.whole.names else [])]
    adapter = trainable * max(itemsizes)
    # torch's AdamW has its moments in the dtype of the parameters.
    is_torch = setup.optimizer.startswith("adamw_torch")
    state = 2 * adapter if is_torch else round(_STATE_BYTES[setup.optimizer] * trainable)
    results = 1 if setup.options.export == "none" else 2
    checkpoints = setup.options.keep_checkpoints + 1 + setup.options.keep_best
    return checkpoints * (adapter + state) + results * adapter + _OTHERS


def check_space(setup: ModelSetup, trainable: int) -> None:
    """Raises OSError if the output directory cannot be written to, or has too little room for what the run writes."""
    inside = setup.output / CHECKPOINTS if setup.output.is_dir() else setup.output
    check_writable(inside, f"--output {setup.output}", bytes_of_run(setup, trainable))
