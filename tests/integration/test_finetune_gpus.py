"""On how many GPUs a run would fit that does not fit one: what the error of the plan says, and what it is made of."""

from __future__ import annotations

import dataclasses
import functools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from benchmarks.models import BY_NAME
from moe_fused.finetune.endings import stopped_by
from moe_fused.finetune.options import Options
from moe_fused.finetune.plan import SLACK, plan_run, plans_of, suggest_gpus, workload_of
from moe_fused.finetune.precheck import Process
from moe_fused.finetune.resolve import ModelSetup, ResolvedRun, set_up
from moe_fused.memory import GIB, predict, sizes_of

CARD = 24 * GIB


@functools.cache
def setup_of(model: str, device: str = "cuda", processes: int = 1, **options: Any) -> ModelSetup:
    """The set-up of a model's default run on GPUs that need not be here."""
    process = Process(world_size=processes, local_world_size=processes)
    given = Options(model="m", dataset="d", output="o", **{"sequence_length": 2048, "memory_limit": 24} | options)
    return set_up(given, BY_NAME[model].config(), torch.device(device), process)


def run_of(model: str, **options: Any) -> ResolvedRun:
    """The record of such a run that needs the least memory."""
    return list(plans_of(setup_of(model, **options), plain_text=False))[-1].run


def needed(model: str, processes: int, *, sharded: bool, **options: Any) -> int:
    """The bytes that each of the GPUs must have."""
    run = run_of(model, processes=processes, **options)
    work = dataclasses.replace(workload_of(run), sharded=sharded)
    return predict(sizes_of(run.skeleton), work).total + SLACK


def suggested(run: ResolvedRun, limit: int | None = CARD) -> str | None:
    return suggest_gpus(run, sizes_of(run.skeleton), limit)


def test_the_fewest_gpus_are_named() -> None:
    """GLM-4.5-Air needs more than 48 GB replicated and sharded on 2; one more doubling is enough."""
    run = run_of("glm-4.5-air")
    on_two, on_four = (needed("glm-4.5-air", gpus, sharded=True) for gpus in (2, 4))
    assert on_four < CARD < on_two < needed("glm-4.5-air", 4, sharded=False)
    assert suggested(run) == f"with --gpus 4 --shard it would need {on_four / GIB:.2f} GiB on each GPU"
    assert suggested(run, on_two) == f"with --gpus 2 --shard it would need {on_two / GIB:.2f} GiB on each GPU"
    assert suggested(run, 4 * GIB) is None


def test_a_replica_that_accumulates_nothing_may_fit() -> None:
    """A step of 16384 tokens is two batches on one GPU, whose graph keeps the gradients of both, and one on each of two."""
    options: dict[str, Any] = {"sequence_length": 8192, "cuda_graphs": True, "expert_rank": 16, "memory_limit": 30}
    run = run_of("qwen3-30b-a3b", **options)
    alone, on_two = (needed("qwen3-30b-a3b", gpus, sharded=False, **options) for gpus in (1, 2))
    assert on_two < alone
    assert suggested(run, on_two) == f"with --gpus 2 it would need {on_two / GIB:.2f} GiB on each GPU"
    sharded = needed("qwen3-30b-a3b", 2, sharded=True, **options)
    assert suggested(run, on_two - 1) == f"with --gpus 2 --shard it would need {sharded / GIB:.2f} GiB on each GPU"


def test_only_more_than_there_are() -> None:
    run = run_of("glm-4.5-air", processes=4)
    assert (said := suggested(run)) is not None
    assert said.startswith("with --gpus 4 --shard ")
    assert suggested(run_of("glm-4.5-air", processes=8), needed("glm-4.5-air", 4, sharded=True)) == (
        f"with --gpus 8 --shard it would need {needed('glm-4.5-air', 8, sharded=True) / GIB:.2f} GiB on each GPU"
    )


@pytest.mark.parametrize(
    "options", [{"streaming": True, "max_steps": 1}, {"method": "dpo"}, {"device": "cpu"}], ids=str
)
def test_not_where_processes_cannot_share_the_run(options: dict[str, Any]) -> None:
    assert suggested(run_of("qwen3-30b-a3b", **options), 16 * GIB) is None
    assert suggested(run_of("qwen3-30b-a3b"), 16 * GIB) is not None


@pytest.mark.parametrize(
    ("model", "limit", "option"),
    [("glm-4.5-air", 24, "no single option makes it fit; .*"), ("qwen3-30b-a3b", 19, "with --sequence-length 256 .*")],
)
def test_the_error_says_it(model: str, limit: int, option: str) -> None:
    setup = setup_of(model, sequence_length=4096, memory_limit=limit)
    with pytest.raises(ValueError, match=f"{option}; with --gpus [248] --shard it would need .* GiB on each GPU$"):
        plan_run(setup, plain_text=False)


def test_sharding_without_need_gets_a_hint() -> None:
    options: dict[str, Any] = {"processes": 2, "shard": True}
    (note,) = plan_run(setup_of("qwen3-30b-a3b", **options), plain_text=False).notes
    whole = needed("qwen3-30b-a3b", 2, sharded=False, cuda_graphs=True) / GIB
    assert note == f"note: without --shard the run needs {whole:.2f} GiB, which fits, too, and is faster"
    assert not plan_run(setup_of("qwen3-30b-a3b", memory_limit=15, **options), plain_text=False).notes


def test_the_way_on_has_as_many_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o" / "checkpoints" / "checkpoint-4").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    command = "moe-fused finetune --resume --output o"
    run = run_of("qwen3-30b-a3b", processes=2)
    assert str(stopped_by(signal.SIGINT, run)).endswith(f"checkpoint-4, go on with: {command} --gpus 2")
    on_two_machines = dataclasses.replace(run, process=Process(world_size=4, local_world_size=2))
    assert str(stopped_by(signal.SIGINT, on_two_machines)).endswith(f", go on, again in 4 processes, with: {command}")
    assert str(stopped_by(signal.SIGINT, run_of("qwen3-30b-a3b"))).endswith(f", go on with: {command}")


def test_dense_experts_are_not_to_be_sharded() -> None:
    run = run_of("qwen3-30b-a3b", quantization="none")
    assert needed("qwen3-30b-a3b", 4, sharded=True, quantization="none") < CARD
    assert suggested(run) is None
