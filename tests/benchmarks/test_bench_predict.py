"""The model of kernel times: by hand where that is possible, and against everything that was measured."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from typer.testing import CliRunner

from benchmarks import orders, predict
from benchmarks.compiled import Facts, Loop, key_of, main_loop, read_facts, write_facts
from benchmarks.gpus import BY_NAME, CARDS, Card
from benchmarks.predict import (
    BF16,
    NF4,
    QWEN3,
    Constants,
    Demand,
    Launch,
    Predictor,
    constants,
    demand,
    fit,
    measured,
    median_error,
    order_of_ways,
    products,
    ratios,
    row_tiles,
    seconds_of,
)
from moe_fused.benchmark.layers import FORWARD, FORWARD_BACKWARD, RECOMPUTE, flops

RTX_4090 = BY_NAME["RTX 4090"]


# Against what was measured.


@pytest.mark.parametrize("fitted, left_out", [("H200", "H100"), ("H100", "H200")])
def test_times_of_a_gpu_that_was_left_out(fitted: str, left_out: str) -> None:
    found = fit([fitted])
    assert len(measured(left_out)) >= 30
    assert median_error(left_out, found) <= 0.15
    assert max(abs(math.log(ratio)) for ratio in ratios(left_out, found)) < math.log(1.7)


@pytest.mark.parametrize("card", ["H100", "H200"])
def test_the_order_of_ways(card: str) -> None:
    """Whatever differs by more than a few percent."""
    right, pairs = order_of_ways(card, constants(), 0.05)
    assert pairs >= 10
    assert right >= 0.95 * pairs


def test_the_order_of_configurations() -> None:
    """No measured alternative is predicted to be faster; of the shipped table, most where the prediction is clear."""
    facts = {key_of(each): each for each in read_facts()}
    tuning = Predictor(BY_NAME["H100"]).tuning
    assert [round(orders.predicted_ratio(each, facts), 2) >= 1 for each in orders.measured(tuning)] == [True] * 5
    shipped = [orders.predicted_ratio(each, facts) for each in orders.shipped(tuning)]
    clear = [ratio for ratio in shipped if abs(math.log(ratio)) > math.log(1 + orders.CLEAR)]
    assert len(clear) >= 10
    assert sum(ratio > 1 for ratio in clear) >= 0.6 * len(clear)
    assert statistics.geometric_mean(shipped) > 1


def test_the_error_is_not_that_of_any_constants() -> None:
    """What was fitted matters: without overlap, or with programs that cost nothing, times would be off."""
    assert median_error("H200", replace(constants(), norm=1.0)) > 2 * median_error("H200", constants())
    assert median_error("H200", replace(constants(), tensor=0.35)) > 2 * median_error("H200", constants())


# What a call launches.


def test_operations_of_a_pass_are_those_of_the_layer() -> None:
    for phase in (FORWARD, FORWARD_BACKWARD):
        found = list(products(QWEN3, 4096, phase, BF16, in_product=lambda *_: True))
        assert sum(2 * each.rows * each.n * each.k for each in found) == flops(QWEN3, 4096, phase)


def test_bytes_of_a_forward() -> None:
    """The up projection moves all weights once, the tokens, and h."""
    (up,) = [each for each in products(QWEN3, 4096, FORWARD, BF16, in_product=lambda *_: True) if each.name == "up"]
    weights = 128 * 1536 * 2048
    assert up.bytes == pytest.approx(2 * (weights + 4096 * 2048 + 32768 * 768), rel=1e-3)
    (packed,) = [each for each in products(QWEN3, 4096, FORWARD, NF4, in_product=lambda *_: True) if each.name == "up"]
    assert up.bytes - packed.bytes == pytest.approx(weights * (2 - 0.5 - 1 / 64), rel=1e-3)
    assert (up.family, packed.family) == ("up", "up_4bit")


def test_packed_weights_by_way_of_the_workspace() -> None:
    found = list(products(QWEN3, 4096, FORWARD, NF4, in_product=lambda *_: False))
    assert [each.name for each in found] == ["route", "dequantize, up", "up", "dequantize, down", "down", "combine"]
    assert [each.family for each in found if each.family] == ["up", "gemm_short"]
    assert found[1].launches == 3, "768 MiB in parts of 256"


def test_recomputing_runs_the_up_projection_again() -> None:
    layer = replace(QWEN3, lora_rank=16)
    names = {
        phase: [each.name for each in products(layer, 512, phase, NF4, in_product=lambda *_: True)]
        for phase in (FORWARD_BACKWARD, RECOMPUTE)
    }
    assert names[RECOMPUTE].count("up") == 2
    assert names[FORWARD_BACKWARD].count("up") == 1
    assert sum(name.startswith("grad ") for name in names[RECOMPUTE]) == 4
    frozen = products(replace(QWEN3, lora_rank=0), 512, FORWARD_BACKWARD, NF4, in_product=lambda *_: True)
    assert not any(each.name.startswith(("grad ", "shrink")) for each in frozen)


def test_row_tiles() -> None:
    """A token for each of one expert's rows: no chance in it."""
    assert row_tiles(100, 1, 1, 64, half=False) == (2, 2)
    assert row_tiles(70, 1, 1, 64, half=True) == (2, 1.5)
    assert row_tiles(100, 1, 1, 64, half=True) == (2, 2)
    tiles, _ = row_tiles(32768, 128, 8, 128, half=False)
    # 256 rows on average, so half of the experts need a third tile.
    assert 2.4 < tiles / 128 < 2.6
    few, _ = row_tiles(8, 128, 8, 16, half=False)
    assert few == pytest.approx(8), "one token has eight experts"


# What limits a launch.


def asked(**numbers: float) -> Demand:
    nothing = Demand(0.0, 0.0, math.inf, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 13200.0, 2, 1)
    return replace(nothing, **numbers)


CARD = Card("a card", 90, 80, BY_NAME["H100"].ceilings, 132, 1e9)
EXACT = Constants(
    memory=1.0, cache=1.0, tensor=1.0, shared=1.0, latency=1e-6, trip=1e-6, stall=2.0, program=0.0, norm=10.0, launch=0.0
)  # fmt: skip


@pytest.mark.parametrize(
    "numbers, bound, seconds",
    [
        ({"bytes": 3350e9}, "memory", 1.0),
        ({"bytes": 3350e9, "flying": 3350e9 * 1e-6 / 132 / 4}, "memory", 4.0),
        ({"flops": 989e12}, "tensor cores", 1.0),
        ({"cached": 64 * 132e9}, "cache", 1.0),
        ({"issued": 132e9}, "issue", 1.0),
        ({"shared": 128 * 132e9}, "shared memory", 1.0),
        ({"steps": 132e9}, "waiting", 1.0),
        ({"steps": 132e9, "resident": 1}, "waiting", 2.0),
        ({"trips": 132e6}, "waiting", 0.5),
    ],
    ids=str,
)
def test_the_longest_time_is_the_bound(numbers: dict[str, float], bound: str, seconds: float) -> None:
    found, which = seconds_of(asked(**numbers), CARD, EXACT)
    assert which == bound
    assert found == pytest.approx(seconds, rel=0.02), "but for the last programs, which leave multiprocessors idle"


def test_what_a_program_needs_around_its_loop_is_hidden_by_others() -> None:
    costly = replace(EXACT, program=1e6)
    alone, four = (seconds_of(asked(bytes=1.0, resident=resident), CARD, costly)[0] for resident in (1, 4))
    assert alone == pytest.approx(100 * 1e6 / 1e9, rel=1e-3), "100 programs a multiprocessor, a millisecond each"
    assert four == pytest.approx(alone / 4, rel=1e-3)


def test_one_program_a_multiprocessor_takes_longer() -> None:
    """Where each program waits for its own dequantizing."""
    launch = Launch("up", "up_4bit", True, False, 32768, 128, 8, 1536, 2048, 0.0)
    config = {"block_m": 128, "block_n": 64, "block_k": 64, "num_warps": 8, "num_stages": 3, "half_tiles": False}
    loop = Loop(370, 32, 2**20, 12, 1, 20, 20000, 180)
    facts = Facts(89, "up_4bit", 128, False, config, 45056, 116, 0, 8, 2, loop)
    two = seconds_of(demand(launch, facts), RTX_4090, constants())[0]
    one = seconds_of(demand(launch, replace(facts, programs=1)), RTX_4090, constants())[0]
    assert 1.2 < one / two < 2


def test_spills_take_time() -> None:
    launch = Launch("up", "up", False, False, 32768, 128, 8, 1536, 2048, 0.0)
    config = {"block_m": 128, "block_n": 64, "block_k": 64, "num_warps": 8, "num_stages": 3, "half_tiles": False}
    facts = Facts(89, "up", 128, False, config, 45056, 116, 0, 8, 2, Loop(160, 64, 2**21, 12, 0, 20, 20000, 0))
    spilling = demand(launch, replace(facts, spills=1000))
    assert spilling.cached > demand(launch, facts).cached


def test_a_faster_card_is_faster() -> None:
    layer = replace(QWEN3, lora_rank=16)

    def step(card: Card) -> float:
        predictor = Predictor(card)
        return sum(
            predictor.predict(launch).seconds for launch in predictor.launches(layer, 4096, FORWARD_BACKWARD, NF4)
        )

    assert step(BY_NAME["H100"]) < step(BY_NAME["A100"]) < step(RTX_4090) < step(BY_NAME["L4"])
    assert step(replace(RTX_4090, clock=RTX_4090.clock / 2)) > step(RTX_4090)


# What is read from compiled code.

AMPERE = """
Function:k
--:-:-:-:1\tMOV R1, c[0x0][0x28];
LBB0:
--:-:0:-:1\tLDG.E R4, [R2.64];
01:-:1:-:1\tLDG.E R5, [R4.64];
02:-:-:-:1\tLDGSTS.E.BYPASS.128 [R3], [R4.64];
--:-:-:-:1\tLDSM.16.M88.4 R8, [R9];
--:-:-:-:1\tHMMA.16816.F32.BF16 R12, R8, R10, R12;
--:-:-:-:1\tHMMA.16816.F32.BF16 R16, R8, R11, R16;
--:-:-:-:5\t@P0 BRA LBB0;
--:-:-:-:5\tEXIT;
"""

CDNA = """
\ts_mov_b32 s0, 1
.LBB0_3:  ; =>This Inner Loop
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\ts_waitcnt vmcnt(0)
\tds_read_b128 v[4:7], v8
\tv_mfma_f32_32x32x8_bf16 v[2:17], v[0:1], v[4:5], v[2:17]
\ts_cbranch_scc1 .LBB0_3
\ts_endpgm
"""


def test_the_main_loop_of_machine_code() -> None:
    loop = main_loop(AMPERE, warps=4)
    assert (loop.instructions, loop.products, loop.copies, loop.shared) == (7, 2, 3, 1)
    assert loop.flops == 2 * 4 * 2 * 16 * 8 * 16
    assert loop.trips == 2, "one load gives the address of the next"
    assert loop.shared_bytes == 4 * 4 * 128


def test_other_machine_code() -> None:
    """Jumps to an address, of which one instruction takes 16 bytes; wide instructions; AMD's."""
    hopper = AMPERE.replace("HMMA.16816", "HGMMA.64x128x16").replace("@P0 BRA LBB0", "BRA.U UP0, 0x10")
    loop = main_loop(hopper, warps=8)
    assert (loop.instructions, loop.flops) == (7, 2 * 2 * 2 * 64 * 128 * 16)
    annotated = AMPERE.replace("BRA LBB0;", "BRA 0x10     ?trans5;")
    assert main_loop(annotated, warps=4).instructions == 7
    loop = main_loop(CDNA, warps=8)
    assert (loop.instructions, loop.products, loop.trips) == (5, 1, 1)
    assert loop.flops == 8 * 2 * 32 * 32 * 8
    assert main_loop("--:-:-:-:1\tMOV R1, R2;", warps=4).products == 0


def test_facts_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    facts = read_facts()
    write_facts(reversed(facts), path)
    assert path.read_text() == predict.RESULTS.joinpath("compiled.json").read_text()
    path.write_text('[{"arch": 80}]')
    with pytest.raises(ValueError, match="does not hold what kernels take"):
        read_facts(path)


def test_a_configuration_that_was_not_compiled() -> None:
    predictor = Predictor(RTX_4090, facts=[])
    (up,) = [each for each in predictor.launches(QWEN3, 512, FORWARD, BF16) if each.name == "up"]
    with pytest.raises(ValueError, match=r"run python -m benchmarks\.compiled --arch 89"):
        predictor.predict(up)


# The command.


def test_predicts_on_the_terminal() -> None:
    import typer

    app = typer.Typer()
    app.command()(predict.main)
    ended = CliRunner().invoke(app, ["--gpu", "MI300X", "--tokens", "512", "--weights", "nf4", "--rank", "16"])
    assert ended.exit_code == 0, ended.output
    assert "back through down" in ended.output
    assert "programs" in ended.output
    assert CliRunner().invoke(app, ["--gpu", "H1000"]).exit_code == 2
    checked = CliRunner().invoke(app, ["--check"])
    assert "H100: median error" in checked.output


def test_the_cards_are_those_of_the_page() -> None:
    names = ["L4", "A10", "RTX 3090", "RTX 4090", "RTX 5090", "A100", "L40S", "B200", "MI300X"]
    assert [card.name for card in CARDS] == names
