"""Trackers of experiments, which Trainer's own integrations serve: where they write, and whether they are installed.

Without a setting of the user, a tracker writes into the output directory and sends nothing. Every tracker has variables
of its environment for that, and one that is set already stays as it is. This module imports nothing heavy.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# The entries of an output directory that belong to trackers.
TRACKED = ("tensorboard", "wandb", "mlflow.db", "mlartifacts", "trackio")


def _variables(tracker: str, output: Path) -> dict[str, str]:
    """Returns the variables that make a tracker write into ``output``."""
    where = output.resolve()
    return {
        "none": {},
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": str(where / "tensorboard")},
        "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": str(where), "WANDB_PROJECT": "moe-fused"},
        "mlflow": {"MLFLOW_TRACKING_URI": f"sqlite:///{where / 'mlflow.db'}"},
        "trackio": {"TRACKIO_DIR": str(where / "trackio")},
    }[tracker]


def check_tracker(tracker: str) -> None:
    """Raises ValueError if ``tracker``, the value of ``--report-to``, is not installed."""
    if tracker != "none" and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"--report-to {tracker}: {tracker} is not installed: pip install {tracker}")


def keep_local(tracker: str, output: Path) -> None:
    """Makes ``tracker`` write into ``output`` in this process, unless its own variables say otherwise."""
    for name, value in _variables(tracker, output).items():
        os.environ.setdefault(name, value)
