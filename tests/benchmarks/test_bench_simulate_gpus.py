"""Steps simulated on several GPUs: what is moved, by hand, and that the longer of computing and moving counts."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("trl")

import typer
from typer.testing import CliRunner

from benchmarks import simulate_gpus
from benchmarks.finetune_gpus import ONE, REPLICATED, SHARDED, job_of
from benchmarks.models import BY_NAME
from benchmarks.simulate_gpus import (
    GPU_BY_NAME,
    LINK_BY_NAME,
    Link,
    Simulated,
    measured_steps,
    simulate,
    sizes_by_name,
    step_seconds,
    traffic,
)
from benchmarks.step_cost import batch_of, fitted, host_seconds
from moe_fused.memory import GIB, MIB, Workload, predict
from tests.support import unboxed

CARD, PCIE = GPU_BY_NAME["RTX 4090"], LINK_BY_NAME["PCIe 4 x16"]
NO_WAITING = Link("at once", 1e30)


def step(gpus: int, tokens: int = 4096, *, sharded: bool, model: str = "qwen3-30b-a3b", link: Link = PCIE) -> Simulated:
    return simulate(model, CARD, link, gpus, tokens, sharded=sharded)


def test_the_large_model_is_as_published() -> None:
    text = BY_NAME["qwen3-235b-a22b"].config()
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads) == (
        4096,
        94,
        64,
        4,
    )
    assert (text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size, text.head_dim) == (
        128,
        8,
        1536,
        128,
    )
    assert text.vocab_size == 151936


def test_what_is_moved_by_hand() -> None:
    """Qwen3-235B-A22B on 8 GPUs: 7/8 of the experts and adapters twice, of the gradients once, and rows of the embedding."""
    received = traffic(sizes_by_name("qwen3-235b-a22b"), Workload(processes=8, length=1024))
    experts = 128 * 3 * 4096 * 1536 * (0.5 + 1 / 64)
    adapters = 2 * 128 * 8 * (2 * 4096 + 3 * 1536) + 2 * 16 * (4096 + 8192 + 2 * (4096 + 512) + 8192 + 4096)
    assert received.layer == pytest.approx(7 / 8 * (experts + adapters), rel=0.002)
    assert received.gradients == pytest.approx(7 / 8 * adapters, rel=0.002)
    assert received.embedding == 7 * 2 * 1024 * 4096  # for each token what seven others find
    assert received.total == 94 * (2 * received.layer + received.gradients) + received.embedding


def test_bytes_of_a_token_shrink_with_the_batch_and_not_with_accumulation() -> None:
    short, long = (step(2, tokens, sharded=True) for tokens in (1024, 4096))
    assert (short.batches, long.batches) == (8, 2)
    assert short.step_tokens == long.step_tokens == 16384
    assert short.received == pytest.approx(4 * long.received, rel=2e-3)  # rows of the embedding do not shrink
    assert short.received_for_token == pytest.approx(4 * long.received_for_token, rel=2e-3)


def test_the_longer_of_computing_and_gathering_counts() -> None:
    """Over a slow link the link decides, and with long sequences computing does."""
    slow = Link("slow", PCIE.bandwidth / 8)
    moved, computed = step(2, 1024, sharded=True, link=slow), step(2, 16384, sharded=True)
    assert moved.seconds == pytest.approx(moved.received / slow.bandwidth, rel=0.05)
    assert moved.computing < 0.25 * moved.seconds
    assert computed.computing <= computed.seconds < 1.05 * computed.computing
    slower = step(2, 1024, sharded=True, link=Link("half", slow.bandwidth / 2))
    assert slower.seconds - moved.seconds == pytest.approx(moved.received / slow.bandwidth, rel=0.05)


def test_a_fast_link_leaves_computing_and_copying() -> None:
    """Each gathered layer is copied once, from the buffer to where it is computed: read and written, before both passes."""
    free = step(2, 4096, sharded=True, link=NO_WAITING)
    experts = 128 * 3 * 2048 * 768 * (0.5 + 1 / 64)
    adapters = predict(sizes_by_name("qwen3-30b-a3b"), Workload()).parts["adapters"] / 48
    copying = 2 * 48 * 2 * (experts + adapters) / CARD.ceilings.bytes_per_second
    assert free.seconds - free.computing == pytest.approx(free.batches * copying, rel=0.01)


def test_the_host_limits_a_fast_gpu_without_graphs() -> None:
    """On an H200, layers of Qwen3-30B-A3B are computed faster than they are launched."""
    fast, link = GPU_BY_NAME["H200"], LINK_BY_NAME["NVLink 4"]
    batch, sizes = batch_of("qwen3-30b-a3b", 4096), sizes_by_name("qwen3-30b-a3b")
    for sharded in (True, False):
        work = Workload(processes=4, sharded=sharded)
        eager, graphs = (
            step_seconds(batch, sizes, replace(work, graphs=value), fast, link)[0] for value in (False, True)
        )
        assert eager == pytest.approx(48 * host_seconds(), rel=0.05)
        assert graphs < 0.5 * eager


def test_the_measured_steps() -> None:
    """The simulation is within 15 % of the steps that were measured on two GPUs, and the plan within 5 % of their peaks."""
    steps = list(measured_steps())
    assert {(row.implementation, row.details["accumulation"]) for row, *_ in steps} >= {
        (name, batches) for name in (ONE, REPLICATED, SHARDED) for batches in (1, 4)
    }
    for row, allocated, seconds in steps:
        assert 1e3 * seconds == pytest.approx(row.ms, rel=0.15), row
        # FSDP2 gathered the embedding when the sharded rows were measured, which the plan does not count any more.
        embedding = 2 * sizes_by_name(job_of(row)[0].model).embedding * 2 if row.implementation == SHARDED else 0
        assert allocated / MIB <= row.peak_mib * 1.05, row
        assert (allocated + embedding) / MIB >= row.peak_mib * 0.95, row


def test_replicas_average_their_gradients_after_the_step() -> None:
    one, two = step(1, sharded=False), step(2, sharded=False)
    assert (one.received, one.batches, two.batches) == (0, 4, 2)
    assert one.seconds == one.computing
    averaged = 327_942_144 * 2  # each gradient twice, of which the half that others have is moved
    assert two.received == averaged
    assert two.seconds == pytest.approx(two.computing + averaged / PCIE.bandwidth)
    # Each takes half of the batches, and the optimizer's step as a whole.
    batch = fitted().seconds(batch_of("qwen3-30b-a3b", 4096).whole, CARD.ceilings)
    assert one.computing - two.computing == pytest.approx(2 * batch)


def test_memory_is_that_of_the_plan() -> None:
    whole, shared = step(8, model="qwen3-235b-a22b", sharded=False), step(8, model="qwen3-235b-a22b", sharded=True)
    assert shared.needed < 30 * GIB < 120 * GIB < whole.needed
    assert step(2, sharded=True).needed < step(1, sharded=False).needed
    # Graphs are left out where they do not fit, and the plan is then that without them.
    small = dataclasses.replace(CARD, gib=1)
    assert [simulate("qwen3-30b-a3b", gpu, PCIE, 1, 4096, sharded=False).graphs for gpu in (CARD, small)] == [
        True,
        False,
    ]


def test_the_fewest_tokens_that_hide_the_gathering() -> None:
    tokens = simulate_gpus.hidden_from("qwen3-30b-a3b", CARD, PCIE, 2)
    assert tokens is not None
    received = traffic(sizes_by_name("qwen3-30b-a3b"), Workload(processes=2)).total / PCIE.bandwidth
    computing = [
        fitted().seconds(batch_of("qwen3-30b-a3b", number).whole, CARD.ceilings)
        for number in (tokens - simulate_gpus.TOKENS_STEP, tokens)
    ]
    assert computing[0] < received <= computing[1]
    assert simulate_gpus.hidden_from("qwen3-30b-a3b", CARD, Link("none", 1e6), 2) is None
    assert simulate_gpus.hidden_from("qwen3-30b-a3b", CARD, NO_WAITING, 2) == simulate_gpus.TOKENS_STEP


def test_one_gpu_shares_nothing() -> None:
    with pytest.raises(ValueError, match="at least 2 GPUs"):
        step(1, sharded=True)


def command(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(simulate_gpus.main)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "1000", "NO_COLOR": "1"})


def test_the_command() -> None:
    ran = command("--model", "olmoe-1b-7b", "--gpus", "2", "--tokens", "1024")
    assert ran.exit_code == 0
    assert "simulated: olmoe-1b-7b, 1024 tokens, RTX 4090 (published ceilings), PCIe 4 x16" in ran.stdout
    assert ran.stdout.count("yes") == 2
    assert " sharded " in ran.stdout
    for arguments, words, status in (
        (["--model", "qwen3.5-35b-a3b"], "is not modelled", 1),
        (["--model", "no-such"], "no-such is not known", 2),
        (["--model", "olmoe-1b-7b", "--gpu", "Z80"], "Z80 is not known", 2),
        (["--model", "olmoe-1b-7b", "--tokens", "9999999"], "--tokens must be at most 4096", 1),
        (["--model", "olmoe-1b-7b", "--tokens", "1"], "--tokens must be at least 8", 1),
    ):
        failed = command(*arguments)
        assert failed.exit_code == status
        assert words in failed.output


def test_the_command_leaves_out_what_finetune_refuses() -> None:
    """Mixtral has 8 experts, which leave some of 16 GPUs without one. Replicas can be as many as there are."""
    ran = command("--model", "mixtral-8x7b", "--gpus", "8", "--gpus", "16")
    assert ran.exit_code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ran.stdout.splitlines() if "│" in line]
    assert [row[:2] for row in rows] == [["8", "whole"], ["8", "sharded"], ["16", "whole"]]
    refusal = "not sharded among 16 GPUs: 8 experts to a layer cannot be divided among 16 GPUs"
    assert ran.stdout.splitlines()[-1] == refusal


def test_the_command_has_no_speed_where_the_run_does_not_fit() -> None:
    ran = command("--model", "qwen3-235b-a22b", "--gpus", "8")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ran.stdout.splitlines() if "│" in line]
    assert [(row[3], row[-3:]) for row in rows] == [("no", ["–"] * 3)] * 2


def test_the_help_lists_what_can_be_given() -> None:
    def in_one_word(text: str) -> str:
        """The text without the box, colours and line breaks of a terminal, which may be narrow."""
        return re.sub(r"\x1b\[[0-9;]*m|\s", "", unboxed(text))

    shown = in_one_word(command("--help").stdout)
    for names in (BY_NAME, GPU_BY_NAME, LINK_BY_NAME):
        assert in_one_word(", ".join(names)) in shown
    assert "1,2,4,8" in shown
