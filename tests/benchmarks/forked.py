"""Processes of benchmarks without the seconds that importing Transformers and TRL takes each time.

They are forked from the server of ``tests.integration.finetuning``. A test of each way to start processes still starts
them as a user does.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from tests.integration.finetuning import Command
from tests.integration.together import as_torchrun


def run_benchmark(name: str) -> None:
    """What ``python -m benchmarks.NAME`` does, in a process of ``Command``."""
    typer.run(importlib.import_module(f"benchmarks.{name}").main)


def in_processes(module: str, contender: str, job: Any, number: int) -> Any:
    """Stands in for ``runner.in_processes``: runs the same command in as many processes, with torchrun's variables."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        arguments = ("--job", json.dumps(dataclasses.asdict(job)), "--output", result)
        commands = [
            Command(
                *arguments, cwd=Path(directory), before=partial(as_torchrun, rank, number, store.port, None),
                main=partial(run_benchmark, module),
            )
            for rank in range(number)
        ]  # fmt: skip
        for ended in [command.end() for command in commands]:
            assert ended.status == 0, (contender, ended)
        return json.loads(result.read_text(encoding="utf-8"))
