"""The command ``moe-fused doctor``, which says what is wrong with an installation."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from moe_fused import __version__
from moe_fused.diagnosis import Status, environment, examine

from .options import Traceback

_MARKS = {Status.OK: ("ok", "green"), Status.ABSENT: ("--", "yellow"), Status.PROBLEM: ("!!", "red")}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    traceback: Traceback = False,
) -> None:
    """Check versions, GPU and kernel, and compare a few experts with float64. The exit status is 1 if something is wrong."""
    del traceback  # read by console.run, which prints errors
    checks = []
    console = Console(soft_wrap=True, highlight=False)
    for check in examine():
        checks.append(check)
        if as_json:
            continue
        mark, style = _MARKS[check.status]
        console.print(Text.assemble((mark, style), f"  {check.name}: {check.found}"))
        if check.advice:
            console.print(Text(f"    {check.advice}"))
    fits = all(check.status is not Status.PROBLEM for check in checks)
    if as_json:
        content = {"moe_fused": __version__, "fits": fits, "environment": environment()}
        print(json.dumps({**content, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        problems = sum(check.status is Status.PROBLEM for check in checks)
        console.print("all fits" if fits else f"{problems} problem{'s' * (problems > 1)}, marked !!")
    if not fits:
        raise typer.Exit(1)
