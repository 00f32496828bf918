"""Starts a run on several GPUs (``--gpus``): this process becomes torchrun, with the same command in each of its processes.

This module imports torch only to count GPUs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from .options import Options
from .precheck import Process, check_shared

# How many seconds torchrun gives the processes to save a checkpoint after Ctrl-C, unless the user's environment says.
_SAVING = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300"


def check_gpus(gpus: int, options: Options, process: Process, *, only_plans: bool = False) -> None:
    """Checks ``--gpus`` before torchrun starts, and in the processes that it has started.

    Args:
        only_plans: Whether the run is only planned, for GPUs that need not be here.

    Raises:
        ValueError: This machine does not have as many GPUs, or the run cannot have them.
    """
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    if not process.is_alone:
        if gpus != process.world_size:
            raise ValueError(
                f"--gpus {gpus}: there are {process.world_size} processes already; leave it out beside torchrun and "
                "accelerate launch"
            )
        return
    if gpus == 1:
        return
    if options.device == "cpu":
        raise ValueError(f"--gpus {gpus}: --device cpu has no GPUs")
    check_shared(options)
    if only_plans:
        return
    there = count_gpus()
    if gpus > there:
        raise ValueError(f"--gpus {gpus}: this machine has {there} GPU{'' if there == 1 else 's'}")


def count_gpus() -> int:
    """Returns the number of GPUs that a run may use, without initializing them."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def launch(gpus: int, arguments: Sequence[str]) -> None:
    """Replaces this process by torchrun, which starts ``moe-fused`` with ``arguments`` once for each GPU."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command(gpus, arguments), environment(gpus, os.environ))


def command(gpus: int, arguments: Sequence[str]) -> list[str]:
    """Returns the command line of torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    return [*torchrun, "-m", "moe_fused", *arguments]


def environment(gpus: int, ours: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of torchrun: ours, with what it would otherwise warn about."""
    threads = str(max(1, (os.cpu_count() or 1) // gpus))
    return {"OMP_NUM_THREADS": threads, _SAVING[0]: _SAVING[1], **ours}
