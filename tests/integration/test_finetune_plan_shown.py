"""The table of the memory plan, as ``moe-fused finetune`` prints it."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from moe_fused.finetune.options import Options
from moe_fused.finetune.plan import PARTS, MemoryPlan, plan_run
from moe_fused.finetune.resolve import set_up
from moe_fused.memory import GIB, MIB, Prediction

from .models import QWEN3_MOE


def shown(parts: dict[str, int]) -> list[str]:
    options = Options(model="m", dataset="d", output="o", sequence_length=64)
    run = plan_run(set_up(options, QWEN3_MOE.build().config, torch.device("cpu")), plain_text=False).run
    console = Console(file=io.StringIO(), width=80)
    MemoryPlan(run, Prediction(parts, "layer", 1, frozenset()), 24 * GIB).show(console)
    file: Any = console.file
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize(("largest", "unit"), [(13 * GIB, "GiB"), (30 * MIB, "MiB")])
def test_one_unit_below_a_heading(largest: int, unit: str) -> None:
    lines = shown({**dict.fromkeys(PARTS, 3 * MIB // 2), "experts": largest})
    assert re.fullmatch(rf"memory +{unit}  what it is", lines[0])
    assert len(lines) == len(PARTS) + 4, "no line is broken at 80 columns"
    scale = {"GiB": GIB, "MiB": MIB}[unit]
    for line, (part, words) in zip(lines[1:], PARTS.items(), strict=False):
        size = largest if part == "experts" else 3 * MIB // 2
        assert re.fullmatch(rf"{re.escape(part)} +{size / scale:.2f}  {re.escape(words)}", line)
    assert not any(re.search(r"\d (GiB|MiB)", line) for line in lines)
