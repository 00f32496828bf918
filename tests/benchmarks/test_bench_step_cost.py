"""The cost model against the measured steps that it is fitted to, with each of them and without it."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("trl")

from benchmarks.rows import EAGER, OURS
from benchmarks.step_cost import (
    DEQUANTIZE_ROWS,
    H200,
    RESULTS,
    batch_of,
    fit,
    fitted,
    host_seconds,
    measured_rows,
    model_of,
    read_rows,
    trained_parameters,
)
from moe_fused.benchmark.layers import Ceilings
from moe_fused.hub import get_kernel, submodule

ROWS = measured_rows()
IDS = [f"{row.layer}-{row.tokens}" for row in ROWS]


def test_the_rows_are_the_whole_steps_with_graphs() -> None:
    names = {(row.layer, row.tokens) for row in ROWS}
    assert {("qwen3-30b-a3b", tokens) for tokens in (1024, 2048, 4096, 8192, 16384)} < names
    assert {layer for layer, _ in names} == {"qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b"}
    assert {row.implementation for row in ROWS} == {OURS}
    assert {row.gpu for row in ROWS} == {"NVIDIA H200"}


def test_the_ceilings_are_those_that_were_measured() -> None:
    """A roofline is the larger of operations and bytes at the ceilings: many tokens have the operations, one the bytes."""
    rows = [row for row in read_rows(RESULTS / "experts-4bit_h200.json") if row.implementation == "roofline"]
    assert max(row.tflops for row in rows if row.tflops) * 1e12 == pytest.approx(H200.flops_per_second, rel=0.005)
    (one,) = (row for row in rows if (row.layer, row.tokens, row.phase) == ("qwen3-30b-a3b", 1, "forward"))
    weights = 8 * 3 * 2048 * 768 * (0.5 + 1 / 64)  # packed, with a byte for each block of 64
    assert one.ms is not None
    assert weights / (one.ms / 1e3) == pytest.approx(H200.bytes_per_second, rel=0.01)


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_each_row_is_met(row: object) -> None:
    """Within 15 %, if it is among the rows that the constants are fitted to, and if it is not."""
    (index,) = (i for i, other in enumerate(ROWS) if other is row)
    found = ROWS[index]
    assert found.ms is not None
    for cost in (fitted(), fit(ROWS[:index] + ROWS[index + 1 :])):
        assert 1e3 * cost.step_seconds(found.layer, found.tokens) == pytest.approx(found.ms, rel=0.15)


def test_the_constants_are_possible() -> None:
    """Nothing is faster than the ceilings, and a layer and a parameter take some time."""
    cost = fitted()
    assert 1 < cost.scores < cost.products < 2.5
    assert 1 < cost.dequantize < 3
    assert 0 < cost.layer < 2e-3
    assert cost.optimizer > 2 + 2 + 2 * 1  # at least the parameter, its gradient and two moments of 8 bits


def test_another_time_for_all_rows_gives_other_constants() -> None:
    slow = [
        dataclasses.replace(row, ms=2 * (row.ms or 0), details={name: 2 * value for name, value in row.details.items()})
        for row in ROWS
    ]
    for name, value in dataclasses.asdict(fit(slow)).items():
        assert value == pytest.approx(2 * getattr(fitted(), name))


def test_work_is_counted_as_by_the_benchmark() -> None:
    """The operations of a step with the recomputation, which leaves out the experts' down projections."""
    from benchmarks.finetune_30b import model_flops, recomputed_flops

    model = model_of("qwen3-30b-a3b")
    whole = batch_of("qwen3-30b-a3b", 4096).whole
    counted = model_flops(model, 4096) + recomputed_flops(model, 4096, down=False)
    assert whole.products + whole.scores == pytest.approx(counted, rel=1e-9)
    assert whole.layers == 48
    # The experts' weights, dense and in 4 bits with their scales, in a forward, two thirds of one, and a backward.
    numel = 48 * 128 * 3 * 2048 * 768
    assert whole.dequantized == pytest.approx(8 / 3 * numel * (2 + 0.5 + 1 / 64), rel=0.01)
    # 64 rows to an expert of 192.
    assert batch_of("qwen3-30b-a3b", 1024).whole.dequantized == pytest.approx(whole.dequantized / 3)
    # Experts that are packed transposed are always dequantized at once.
    few, many = (batch_of("gpt-oss-20b", tokens).whole.dequantized for tokens in (16, 4096))
    assert few == many


def test_the_kernels_decide_by_the_same_rows() -> None:
    pytest.importorskip("triton")
    assert submodule(get_kernel(), "tuning").DEFAULT_DEQUANTIZE_ROWS == DEQUANTIZE_ROWS


def test_a_slower_gpu_takes_longer() -> None:
    half = Ceilings(H200.bytes_per_second / 2, H200.flops_per_second / 2)
    fast, slow = (fitted().step_seconds("qwen3-30b-a3b", 4096, ceilings) for ceilings in (H200, half))
    layers = fitted().layer * 48
    assert slow - layers == pytest.approx(2 * (fast - layers))


@pytest.mark.parametrize("name", ["qwen3.5-35b-a3b", "qwen3-next-80b-a3b", "granite-4.0-h-tiny"])
def test_recurrent_layers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"the time of {name} is not modelled: it has recurrent layers"):
        batch_of(name, 1024)


def test_steps_without_graphs_wait_for_the_host() -> None:
    """The longer of the host's time and the GPU's is within 20 % of each row."""
    rows = measured_rows(EAGER)
    assert len(rows) == 5
    for row in rows:
        assert row.ms is not None
        seconds = max(fitted().step_seconds(row.layer, row.tokens), 48 * host_seconds())
        assert 1e3 * seconds == pytest.approx(row.ms, rel=0.2)


def test_default_adapters_are_those_of_the_rows() -> None:
    """An adapter takes six bytes for each parameter: itself, its gradient and two moments."""
    (row,) = (row for row in ROWS if (row.layer, row.tokens) == ("qwen3-30b-a3b", 4096))
    assert row.details["training_mib"] * 2**20 / 6 == pytest.approx(trained_parameters(row.layer), rel=0.02)
