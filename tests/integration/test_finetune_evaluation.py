"""Evaluation in ``moe-fused finetune``: what is evaluated and when, which adapter is written, and when a run ends early."""

from __future__ import annotations

import json
import math
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import moe_fused
from moe_fused.finetune.options import Options

from .finetuning import (
    Run,
    assert_error,
    chats,
    checkpoints,
    evaluations,
    finetune,
    finetune_signalled,
    leftovers,
    losses,
    records,
    write_jsonl,
)

# Rows of other lengths than those that are trained on, so that sequences hold different numbers of tokens.
OTHERS = [
    {"messages": [{"role": "user", "content": "?" * i}, {"role": "assistant", "content": f"{i} " * i}]}
    for i in range(1, 12)
]


def say(losses: list[float]) -> None:
    """Evaluations have these losses, one after the other. This runs in the process of the command."""
    from moe_fused.finetune.trainer import Finetuner

    evaluate = Finetuner.evaluation_loop

    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = evaluate(self, *args, **kwargs)
        output.metrics["eval_loss"] = losses[(self.state.global_step - 1) // 2]
        return output

    Finetuner.evaluation_loop = evaluation_loop  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with an evaluation every other step, on rows of a file of their own."""
    directory = tmp_path_factory.mktemp("evaluated")
    other = write_jsonl(directory / "other.jsonl", OTHERS)
    return Run(directory, "--eval-dataset", str(other), "--eval-steps", "2", "--quantization", "none")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def same(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# What is evaluated.


def test_the_loss_is_that_of_all_tokens(whole: Run) -> None:
    """By hand: each row by itself, without packing, the mean over all tokens after the first of a row."""
    found = evaluations(whole.directory / "out")
    assert list(found) == [2, 4, 6, 8]
    for record in records(whole.directory / "out", "eval_loss"):
        assert record["perplexity"] == pytest.approx(math.exp(record["eval_loss"]))
        assert record["eval_tokens_per_second"] > 0
    tokenizer = AutoTokenizer.from_pretrained(whole.directory / "model")
    moe_fused.enable()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            whole.directory / "model", dtype=torch.float32, experts_implementation="moe_fused"
        )
        model = PeftModel.from_pretrained(model, whole.directory / "out").eval()
        total, count = 0.0, 0
        for row in OTHERS:
            ids = tokenizer.apply_chat_template(row["messages"], return_tensors="pt", return_dict=True)["input_ids"]
            ids = ids[:, :64]
            with torch.no_grad():
                total += float(cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    finally:
        moe_fused.disable()
    assert found[8] == pytest.approx(total / count, rel=1e-5)
    text = (whole.directory / "out" / "README.md").read_text()
    assert f"loss {found[8]:.4f}, perplexity {math.exp(found[8]):.2f}, of the adapter of step 8" in text


def test_training_is_as_without_an_evaluation(whole: Run, tmp_path: Path) -> None:
    plain = tuple(
        argument
        for argument, before in zip(whole.arguments, ("", *whole.arguments), strict=False)
        if not str(argument).startswith("--eval") and not str(before).startswith("--eval")
    )
    assert finetune(*plain, "--output", "out", cwd=tmp_path).status == 0
    assert losses(tmp_path / "out") == whole.losses
    assert not records(tmp_path / "out", "eval_loss")
    assert same(tmp_path / "out", whole.directory / "out")


def test_a_share_of_the_rows(whole: Run, tmp_path: Path) -> None:
    """The seed chooses the rows; what is evaluated is not trained on."""
    seeds = {}
    for seed in ("3", "4"):
        ended = finetune(
            "--model", whole.directory / "model", "--dataset", whole.directory / "chat.jsonl", "--eval-share", "0.25",
            "--max-steps", "2", "--sequence-length", "64", "--gradient-accumulation", "1", "--seed", seed,
            "--output", f"out-{seed}", cwd=tmp_path,
        )  # fmt: skip
        assert ended.status == 0, ended
        assert "data: 18 rows" in ended.stderr
        assert "evaluation: 6 rows" in ended.stderr
        assert list(evaluations(tmp_path / f"out-{seed}")) == [2]  # the last step, though it is none of --save-steps
        seeds[seed] = evaluations(tmp_path / f"out-{seed}")[2]
    assert seeds["3"] != seeds["4"]


# Which adapter is written, and when a run ends.


def test_the_best_adapter_is_written(whole: Run, tmp_path: Path) -> None:
    """It is kept although others are pruned, and a run that is resumed afterwards writes it as well."""
    arguments = (*whole.arguments, "--keep-best", "--keep-checkpoints", "1", "--save-steps", "3", "--output", "out")
    ended = finetune(*arguments, cwd=tmp_path, before=partial(say, [3.0, 1.0, 2.0, 4.0]))
    assert ended.status == 0, ended
    output = tmp_path / "out"
    assert checkpoints(output) == [4, 8]
    assert same(output, output / "checkpoints" / "checkpoint-4")
    assert not same(output, output / "checkpoints" / "checkpoint-8")
    assert "of the adapter of step 4" in (output / "README.md").read_text()
    assert "the adapter is that of step 4, whose evaluation had the lowest loss" in ended.stderr
    (output / "adapter_config.json").unlink()
    resumed = finetune("--resume", "--output", "out", cwd=tmp_path)
    assert resumed.status == 0, resumed
    assert same(output, output / "checkpoints" / "checkpoint-4")
    # Without that checkpoint there is no best adapter, and nothing else is written for it.
    (output / "adapter_config.json").unlink()
    (output / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors").rename(tmp_path / "away")
    assert_error(finetune("--resume", "--output", "out", cwd=tmp_path), "checkpoint-4")
    assert not (output / "adapter_config.json").exists()


def test_a_run_ends_early(whole: Run, tmp_path: Path) -> None:
    arguments = (*whole.arguments, "--early-stopping", "2", "--save-steps", "100", "--output", "out")
    ended = finetune(*arguments, cwd=tmp_path, before=partial(say, [1.0, 2.0, 1.5, 0.5]))
    assert ended.status == 0, ended
    output = tmp_path / "out"
    assert list(losses(output)) == list(range(1, 7))
    assert "ended early after step 6 of 8: the last 2 evaluations had no lower loss" in ended.stderr
    assert checkpoints(output) == [6]
    assert same(output, output / "checkpoints" / "checkpoint-6")
    assert not leftovers(output)
    # It has ended. With more patience it goes on.
    (output / "adapter_config.json").unlink()
    assert finetune("--resume", "--output", "out", cwd=tmp_path).status == 0
    assert list(losses(output)) == list(range(1, 7))
    longer = finetune("--resume", "--output", "out", "--early-stopping", "3", cwd=tmp_path)
    assert longer.status == 0, longer
    assert losses(output) == whole.losses


def test_a_resumed_run_is_as_an_uninterrupted_one(whole: Run, tmp_path: Path) -> None:
    arguments = (*whole.arguments, "--early-stopping", "3", "--keep-best", "--output", "out")
    assert finetune_signalled(signal.SIGINT, 5, *arguments, cwd=tmp_path).status == 128 + signal.SIGINT
    resumed = finetune("--resume", "--output", "out", cwd=tmp_path)
    assert resumed.status == 0, resumed
    whole.assert_as_uninterrupted(tmp_path / "out")
    assert evaluations(tmp_path / "out") == evaluations(whole.directory / "out")


def test_an_evaluation_that_is_not_finite(whole: Run, tmp_path: Path) -> None:
    ended = finetune(*whole.arguments, "--output", "out", cwd=tmp_path, before=_break_the_evaluation)
    assert_error(ended, "the loss of the evaluation after step 2 is nan", "--learning-rate")


def _break_the_evaluation() -> None:
    from moe_fused.finetune.evaluation import TokenMean

    TokenMean.value = lambda self: float("nan")  # type: ignore[method-assign]


# What is refused, before a model is loaded.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eval_share": 0.0}, "--eval-share must be above 0 and below 1, got 0.0"),
        ({"eval_share": -0.5}, "--eval-share must be above 0 and below 1, got -0.5"),
        ({"eval_share": 1.0}, "--eval-share must be above 0 and below 1, got 1.0"),
        ({"eval_dataset": ""}, "--eval-dataset must name a file"),
        ({"eval_share": 0.5, "eval_dataset": "e.jsonl"}, "--eval-dataset and --eval-share exclude each other"),
        ({"eval_steps": 3}, "--eval-steps needs an evaluation"),
        ({"keep_best": True}, "--keep-best needs an evaluation"),
        ({"early_stopping": 2}, "--early-stopping needs an evaluation"),
        ({"early_stopping": 0, "eval_share": 0.5}, "--early-stopping must be at least 1, got 0"),
        ({"eval_steps": 0, "eval_share": 0.5}, "--eval-steps must be at least 1, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Options(**options)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, ["--eval-dataset eval.jsonl is missing"]),
        ([], ["--eval-dataset eval.jsonl has no row to evaluate on"]),
        ([{"messages": []}], ["eval.jsonl:1"]),
        (["{"], ["eval.jsonl:1"]),
        ([*chats(1), {"text": "plain"}], ["eval.jsonl:2", "--skip-bad-rows"]),
    ],
    ids=["missing", "empty", "without turns", "not JSON", "of two kinds"],
)
def test_bad_rows(rows: list[Any] | None, words: list[str], whole: Run, tmp_path: Path) -> None:
    if rows is not None:
        write_jsonl(tmp_path / "eval.jsonl", rows)
    ended = finetune(
        "--model", whole.directory / "model", "--dataset", whole.directory / "chat.jsonl", "--output", "out",
        "--eval-dataset", "eval.jsonl", cwd=tmp_path,
    )  # fmt: skip
    assert_error(ended, *words)
    assert "--dataset eval" not in ended.stderr.replace("--eval-dataset", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("share", "left"), [("0.01", "evaluate on"), ("0.99", "train on")])
def test_an_empty_side_of_the_split(share: str, left: str, whole: Run, tmp_path: Path) -> None:
    ended = finetune(
        "--model", whole.directory / "model", "--dataset", whole.directory / "chat.jsonl", "--output", "out",
        "--eval-share", share, cwd=tmp_path,
    )  # fmt: skip
    assert_error(ended, f"--eval-share {share} of 24 rows leaves none to {left}")
    assert not (tmp_path / "out").exists()


def test_a_directory_without_the_split(whole: Run, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows" / "train.jsonl", OTHERS)
    arguments = ("--model", whole.directory / "model", "--dataset", whole.directory / "chat.jsonl", "--output", "out")
    assert_error(finetune(*arguments, "--eval-dataset", "rows", cwd=tmp_path), "--eval-dataset rows", "--eval-split")
    assert (
        finetune(*arguments, "--eval-dataset", "rows", "--eval-split", "train", "--dry-run", cwd=tmp_path).status == 0
    )


def test_evaluation_rows_that_changed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "eval.jsonl", OTHERS)
    run = Run(tmp_path, "--eval-dataset", "eval.jsonl", "--eval-steps", "4")
    write_jsonl(tmp_path / "eval.jsonl", OTHERS[1:])
    again = ("--resume", "--output", run.directory / "out", "--max-steps", "10")
    assert_error(finetune(*again, cwd=tmp_path), "the evaluation rows (sha256:", "--allow-changed-data")
    assert finetune(*again, "--allow-changed-data", cwd=tmp_path).status == 0


def test_the_log_is_json(whole: Run) -> None:
    for line in (whole.directory / "out" / "log.jsonl").read_text().splitlines():
        assert "eval_loss" in json.loads(line) or "loss" in json.loads(line)


# What is said about when there is an evaluation.


def test_more_steps_between_evaluations_than_the_run_has(whole: Run, tmp_path: Path) -> None:
    only = "the only evaluation is that after the last step"
    for steps, note in (
        ("8", None),
        ("9", f"note: --eval-steps is 9 and the run has 8 steps: {only}"),
        (None, f"note: --eval-steps is 50, as --save-steps, and the run has 8 steps: {only}"),
    ):
        given = [str(argument) for argument in whole.arguments]
        given[given.index("--save-steps") + 1] = "50"
        place = given.index("--eval-steps")
        given[place : place + 2] = [] if steps is None else ["--eval-steps", steps]
        ended = finetune(*given, "--output", "out", "--dry-run", cwd=tmp_path)
        assert ended.status == 0, ended
        notes = [line for line in ended.stderr.splitlines() if "evaluation is" in line]
        assert notes == [note] * (note is not None)


def test_other_steps_on_resuming(whole: Run, tmp_path: Path) -> None:
    shutil.copytree(whole.directory / "out", tmp_path / "out")
    changed = ("--eval-steps", "3", "--save-steps", "4", "--log-steps", "2", "--max-steps", "13")
    resumed = finetune("--resume", "--output", "out", *changed, cwd=tmp_path)
    assert resumed.status == 0, resumed
    assert list(evaluations(tmp_path / "out")) == [2, 4, 6, 8, 9, 12, 13]
    assert list(losses(tmp_path / "out")) == [*range(1, 9), 10, 12]
    assert checkpoints(tmp_path / "out") == [12, 13]
    assert "trainer_state" not in resumed.stderr
    assert "does not exist anymore" not in resumed.stderr
