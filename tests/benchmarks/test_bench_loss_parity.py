"""The benchmark of losses on a CPU: that all train the same on the same, that what differs is noticed, and what is drawn."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math

import pytest
import torch
import typer
from typer.testing import CliRunner

import moe_fused
from benchmarks import experts_lora, loss_parity
from benchmarks.full_model import as_bitsandbytes, dequantized
from benchmarks.loss_parity import BF16, DEQUANTIZED, QUICK, TOLERANCE, WEIGHTS, WINDOW, LossRow, Task
from benchmarks.rows import OURS
from moe_fused.demo.data import reference_text
from moe_fused.integrations.quantizer.packed_experts import get_packed, packed_modules
from moe_fused.integrations.transformers.experts_module import projections_of
from tests.support import REPOSITORY, unboxed

CPU = torch.device("cpu")
SHORT = ("--device", "cpu", "--quick", "--steps", "2", "--base-steps", "1")

for _module in loss_parity.NEEDED:
    pytest.importorskip(_module)


@pytest.fixture(autouse=True)
def _leave_transformers_as_it_was():
    yield
    moe_fused.disable()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The benchmark's task with two steps, over a model that was trained for two steps."""
    directory = tmp_path_factory.mktemp("base")
    size = dataclasses.replace(QUICK, steps=2)
    loss_parity.save_base(directory, size, loss_parity.corpus_of(reference_text(), size, 2, CPU))
    moe_fused.disable()
    return Task(directory, loss_parity.corpus_of(loss_parity.docstrings(20_000), size, 2, CPU), size, 2, CPU)


def run(*options: str):
    app = typer.Typer()
    app.command()(loss_parity.main)
    return CliRunner().invoke(app, list(options))


def rows(**losses: list[float]) -> list[LossRow]:
    """Rows of one run with these losses.

    An implementation without losses gets ``even`` ones; its held-out losses are the first and the last.
    """
    even = [2.0 - 0.01 * step for step in range(2 * WINDOW)]
    made = []
    for name, weights in WEIGHTS.items():
        curve = losses.get(name, even)
        held_out = {0: curve[0], len(curve): curve[-1]}
        sizes = {"layers": 2, "experts": 4, "hidden": 128}
        environment = dict.fromkeys(("gpu", "date", "torch", "triton", "transformers", "peft"), "")
        made.append(LossRow("loss_parity", **environment, **sizes, implementation=name, weights=weights, seconds=1.0,
                            held_out=held_out, losses=tuple(curve)))  # fmt: skip
    return made


# The text.


def test_text_is_real_and_the_same_each_time():
    text, held_out = loss_parity.docstrings(20_000)
    assert (text, held_out) == loss_parity.docstrings(20_000)
    assert 15_000 < len(text) + len(held_out) < 100_000
    assert 0.02 < len(held_out) / len(text) < 0.1
    assert "Return" in text


def test_what_is_held_out_is_nowhere_else():
    text, held_out = loss_parity.docstrings(20_000)
    reference = "".join(reference_text())
    paragraphs = [
        paragraph for paragraph in held_out.split("\n\n") if len(paragraph) > 2 * loss_parity.LEAST_CHARACTERS
    ]
    assert len(paragraphs) > 3
    assert all(paragraph not in text and paragraph not in reference for paragraph in paragraphs)


# The models.


def test_bitsandbytes_dequantizes_experts_one_by_one_to_the_same_weights(task):
    model = loss_parity.load(DEQUANTIZED, task.directory, loss_parity.setup_of(task.directory, CPU))
    (_, first), *others = packed_modules(model)
    assert len(others) == QUICK.num_layers - 1
    for name in projections_of(first):
        weights = get_packed(first, name)
        stack = dequantized(weights)
        assert torch.equal(stack.dequantize(), weights.dequantize())
        with pytest.raises(ValueError, match="an offset for each expert"):
            as_bitsandbytes(weights)


def test_all_train_the_same_adapters_on_the_same_batches(task):
    starts, batches, losses = {}, {}, {}
    for name in WEIGHTS:
        trial = dataclasses.replace(task, adapters=task.adapters)
        seen = batches[name] = []

        class Corpus(type(task.corpus)):
            def batch(self, *arguments, seen=seen):
                seen.append(super().batch(*arguments))
                return seen[-1]

        trial.corpus = Corpus(task.corpus.train, task.corpus.held_out)
        losses[name], held_out = trial.run(name)
        assert list(held_out) == [0, 1, 2]
        starts[name] = trial.adapters
        task.adapters = trial.adapters
    assert all(torch.equal(a, b) for a, b in zip(batches[OURS], batches[BF16], strict=True))
    assert not torch.equal(batches[OURS][0], batches[OURS][1])
    assert any(".experts." in name for name in starts[OURS])
    assert all(value.dtype == torch.bfloat16 for value in starts[OURS].values())
    for name, value in losses.items():
        assert value[0] == pytest.approx(losses[OURS][0], abs=0.02), name
    # The three implementations compute differently, so their first losses differ a little.
    assert len({curve[0] for curve in losses.values()}) == 3


def test_other_adapters_are_refused(task):
    other_task = dataclasses.replace(task, adapters={"lora_A": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="adapters must be the same for all, got"):
        other_task.run(BF16)


def test_experts_that_stay_dense_are_refused(tmp_path):
    odd = dataclasses.replace(QUICK, hidden_size=96, intermediate_size=1, steps=1)
    loss_parity.save_base(tmp_path, odd, loss_parity.corpus_of(reference_text(), odd, 1, CPU))
    with pytest.raises(RuntimeError, match="moe_fused must have experts in nf4 in all 2 layers"):
        loss_parity.load(OURS, tmp_path, loss_parity.setup_of(tmp_path, CPU))


def test_a_loss_that_is_not_finite_is_an_error(task, monkeypatch):
    monkeypatch.setattr(Task, "_held_out", lambda *_: math.nan)
    with pytest.raises(FloatingPointError, match="losses of transformers_bf16 must be finite"):
        task.run(BF16)


# What differs.


def test_smoothed_curves():
    losses = [float(step % 2) for step in range(4 * WINDOW)]
    means = loss_parity.smoothed(losses)
    assert len(means) == len(losses)
    assert means[:3] == [0, 0.5, pytest.approx(1 / 3)]
    assert all(mean == pytest.approx(0.5, abs=0.51 / WINDOW) for mean in means[WINDOW:])


def test_batches_that_are_hard_for_all_are_no_difference():
    a, b, _ = rows(moe_fused=[1.0, 9.0, 2.0], transformers_bf16=[1.5, 9.5, 2.5])
    assert loss_parity.differences(a, b) == pytest.approx([-0.5] * 3)
    assert loss_parity.distance(a, b) == pytest.approx(0.5)


@pytest.mark.parametrize("sign", [1, -1])
def test_curves_that_part_are_noticed(sign):
    even = list(rows()[0].losses)
    parted = [loss + sign * step * 4 * TOLERANCE / len(even) for step, loss in enumerate(even)]
    assert loss_parity.disagreements(rows()) == []
    assert loss_parity.disagreements(rows(dequantized=parted, moe_fused=parted)) == []
    (problem,) = loss_parity.disagreements(rows(moe_fused=parted))
    assert problem.startswith("losses of moe_fused and dequantized differ by 0.")
    # A difference whose sign changes at each step is rounding, not a trend.
    noisy = [loss + 2 * TOLERANCE * (-1) ** step for step, loss in enumerate(even)]
    noisy[0] = even[0]
    assert loss_parity.disagreements(rows(moe_fused=noisy)) == []


def test_other_weights_are_noticed_at_the_first_step():
    even = list(rows()[0].losses)
    other = [even[0] + 2 * loss_parity.FIRST_TOLERANCE, *even[1:]]
    (problem,) = loss_parity.disagreements(rows(dequantized=other))
    assert problem.startswith("first losses of moe_fused and dequantized differ by 0.")


def test_bf16_may_differ():
    better = [loss - 1 for loss in rows()[0].losses]
    made = rows(transformers_bf16=better)
    assert loss_parity.disagreements(made) == []
    assert loss_parity.quantization_cost(made).endswith("+1.0000 before training, +1.0000 after it")


def test_a_cost_that_grows_is_said():
    even = list(rows()[0].losses)
    line = loss_parity.quantization_cost(rows(transformers_bf16=[*even[:-1], even[-1] - 2 * TOLERANCE]))
    assert f"+0.0000 before training, {2 * TOLERANCE:+.4f} after it; more than {TOLERANCE} above what" in line


# The whole.


def test_measured_curves_are_the_same():
    """The committed run has the agreement that the documentation states."""
    measured = loss_parity.read(REPOSITORY / "benchmarks/results/loss-parity_h100-80gb-hbm3.json")
    assert {row.implementation: (row.weights, len(row.losses)) for row in measured} == {
        name: (weights, 500) for name, weights in WEIGHTS.items()
    }
    assert loss_parity.disagreements(measured) == []
    for a, b in itertools.combinations(measured, 2):
        assert max(map(abs, loss_parity.differences(a, b))) < 0.002
        assert abs(a.held_out[500] - b.held_out[500]) < 0.002


def test_whole_run(tmp_path):
    output = tmp_path / "new" / "rows.json"
    result = run(*SHORT, "--output", str(output))
    assert result.exit_code == 0, result.output
    written = json.loads(output.read_text(encoding="utf-8"))
    assert {row["implementation"]: row["weights"] for row in written} == WEIGHTS
    for row in written:
        assert row.keys() == {field.name for field in dataclasses.fields(LossRow)}
        assert (row["benchmark"], row["gpu"], row["layers"]) == ("loss_parity", "cpu", 2)
        assert len(row["losses"]) == 2
        assert list(row["held_out"]) == ["0", "1", "2"]
        assert all(2 < loss < 6.5 for loss in itertools.chain(row["losses"], row["held_out"].values()))
        assert f"{row['losses'][0]:.4f}" in result.stdout
    assert "4 bits against bf16, held-out loss: " in result.stdout
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.parent.iterdir()) == ["rows.json", "rows.png"]


def test_plain_torch_that_computes_something_else_is_a_failure(tmp_path, monkeypatch):
    right = experts_lora.composed
    monkeypatch.setattr(experts_lora, "composed", lambda *inputs: 30 * right(*inputs))
    output = tmp_path / "rows.json"
    result = run(*SHORT, "--output", str(output))
    assert result.exit_code == 1
    assert "Implementations disagree: first losses of moe_fused and dequantized differ" in result.stderr
    assert output.exists(), "what is wrong is to be seen"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "tpu"), "'tpu' is none of cuda, cpu"),
        (("--steps", "0"), "Invalid value for '--steps'"),
    ],
)
def test_wrong_options(options, message):
    result = run(*options)
    assert result.exit_code == 2
    assert message in unboxed(result.stderr)


def test_no_gpu_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run()
    assert result.exit_code == 2
    assert "`--device cpu --quick` smoke-tests" in result.stderr


def test_without_bitsandbytes(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    result = run("--quick", "--device", "cpu")
    assert result.exit_code == 2
    assert result.stderr == "Training in 4 bits needs bitsandbytes, not installed here\n"
