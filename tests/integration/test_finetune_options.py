"""The options of ``moe-fused finetune`` as its help and ``--init`` show them, and the trackers of ``--report-to``."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from typer.testing import CliRunner

from moe_fused.cli import app
from moe_fused.finetune import precheck
from moe_fused.finetune.options import (
    DEFAULTS,
    GROUPS,
    HELP,
    MAPPINGS,
    TYPES,
    Options,
    described_in_file,
    flag,
    read_yaml,
    template,
)
from moe_fused.finetune.trackers import keep_local

from .finetuning import Run, assert_error, finetune, losses, records


def test_groups_have_every_option_once() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(DEFAULTS)


def test_help_shows_what_most_runs_need_first() -> None:
    shown = CliRunner().invoke(app, ["finetune", "--help"], terminal_width=100).output
    headings = re.findall(r"^(\w[\w ]*):$", shown, re.MULTILINE)
    assert headings == ["Most used", "Running", *list(GROUPS)[1:]]
    sections = dict(zip(headings, re.split(r"^\w[\w ]*:$", shown, flags=re.MULTILINE)[1:], strict=True))
    for group, names in GROUPS.items():
        expected = [flag(name) for name in names if name not in MAPPINGS]
        assert re.findall(r"^  (--[\w-]+)", sections[group], re.MULTILINE) == expected
    assert "--resume" in sections["Running"]
    assert len(GROUPS["Most used"]) <= 10
    assert len(sections["Most used"].splitlines()) <= 40  # a screen


# --init


def test_init_writes_every_option_with_its_default(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    ended = CliRunner().invoke(app, ["finetune", "--init", str(path)])
    assert ended.exit_code == 0, ended.output
    assert read_yaml(path) == {"model": "", "dataset": "", "output": ""}  # all others are comments
    path.write_text(re.sub(r"^#(\w+:)", r"\1", path.read_text(), flags=re.MULTILINE))
    assert read_yaml(path) == DEFAULTS
    assert_error(finetune("--init", "other.yaml", "--epochs", "0", cwd=tmp_path), "--epochs must be above 0, got 0")
    assert_error(finetune("--init", "other.yaml", "--resume", cwd=tmp_path), "exclude each other")
    assert not (tmp_path / "other.yaml").exists()
    given = ("--model", "m/m", "--epochs", "2", "--set", "lora.use_rslora=true", "--eval-share", "0.1")
    filled = finetune("--init", "filled.yaml", *given, cwd=tmp_path)
    assert "fill in dataset, output, then" in filled.stdout, filled
    expected = {
        "model": "m/m",
        "dataset": "",
        "output": "",
        "epochs": 2.0,
        "lora": {"use_rslora": True},
        "eval_share": 0.1,
    }
    assert read_yaml(tmp_path / "filled.yaml") == expected
    words = " ".join(re.sub(r"^#", "", path.read_text(), flags=re.MULTILINE).split())
    for name in HELP:
        assert " ".join(described_in_file(name).split()) in words, name


def test_init_shows_what_yaml_has(tmp_path: Path) -> None:
    """Choices, lists and mappings, and nothing that only the command line has."""
    text = template({})
    assert not re.search(r"--[a-z]|[Rr]epeat the option|A=0\.7", text.partition("\n\n")[2])
    words = " ".join(re.sub(r"^#", "", text, flags=re.MULTILINE).split())
    for name, kind in TYPES.items():
        if get_origin(kind) is Literal:
            assert f"Choices: {', '.join(get_args(kind))}. Default:" in words, name
    examples = {name: described.example for name, described in HELP.items() if described.example}
    assert {"dataset", *MAPPINGS} <= examples.keys()
    path = tmp_path / "run.yaml"
    for name, example in examples.items():
        commented = "".join(f"# {line}\n" for line in example.splitlines())
        assert f"# For example:\n{commented}" in text
        path.write_text(example)
        assert read_yaml(path).keys() == {name}


def test_init_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: mine\n")
    assert_error(finetune("--init", "run.yaml", cwd=tmp_path), "--init run.yaml exists")
    assert (tmp_path / "run.yaml").read_text() == "model: mine\n"
    assert_error(finetune("--init", "no/run.yaml", cwd=tmp_path), "there is no directory no")


def test_what_init_wrote_lacks_the_required_options(tmp_path: Path) -> None:
    assert finetune("--init", "run.yaml", cwd=tmp_path).status == 0
    assert_error(finetune("--config", "run.yaml", cwd=tmp_path), "--model is missing")


# --config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: a\nepochs: 1\n# a remark\nepochs: 2\n", "epochs stands in line 2 and again in line 4"),
        ("expert-rank: 4\nexpert_rank: 8\n", "expert_rank stands in line 1 and again in line 2"),
        ("trainer:\n  adam_beta1: 0.5\n  adam_beta1: 0.6\n", "adam_beta1 stands in line 2 and again in line 3"),
        ("lora: {use_rslora: true, use_rslora: false}\n", "use_rslora stands in line 1 and again in line 1"),
    ],
)
def test_a_key_that_stands_there_twice(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert_error(finetune("--config", "run.yaml", cwd=tmp_path), f"run.yaml: {words}: keep one of them")


def test_a_key_in_two_mappings_is_two_keys(tmp_path: Path) -> None:
    text = (
        "trainer: &both\n  {lr_scheduler_kwargs: {a: 1}, data_seed: 1}\nlora: {lr_scheduler_kwargs: {a: 1}}\nseed: 1\n"
    )
    (tmp_path / "run.yaml").write_text(text)
    assert read_yaml(tmp_path / "run.yaml")["trainer"] == {"lr_scheduler_kwargs": {"a": 1}, "data_seed": 1}
    (tmp_path / "run.yaml").write_text("trainer: &loop {a: *loop}\n")  # it ends
    assert set(read_yaml(tmp_path / "run.yaml")) == {"trainer"}


# --report-to


def test_tensorboard_gets_the_numbers_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    run = Run(tmp_path, "--report-to", "tensorboard", "--eval-share", "0.25", "--eval-steps", "4")
    found = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    found.Reload()

    def scalars(name: str) -> dict[int, float]:
        return {event.step: event.value for event in found.Scalars(name)}

    assert scalars("train/loss") == pytest.approx(run.losses)
    for name, key in (("train/tokens_per_second", "tokens_per_second"), ("train/learning_rate", "learning_rate")):
        expected = {record["step"]: record[key] for record in records(tmp_path / "out", key)}
        assert scalars(name) == pytest.approx(expected)
    expected = {record["step"]: record["perplexity"] for record in records(tmp_path / "out", "eval_loss")}
    assert scalars("eval/perplexity") == pytest.approx(expected)
    # Starting over removes what the run before has written.
    again = finetune(*run.arguments, "--overwrite", "--report-to", "none", "--output", "out", cwd=tmp_path)
    assert again.status == 0, again
    assert losses(tmp_path / "out") == run.losses
    assert not (tmp_path / "out" / "tensorboard").exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == tracker else find(name, *rest))
    options = Options(model="m/m", dataset="d", output=str(tmp_path / "out"), report_to=tracker)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"--report-to {tracker}: {tracker} is not installed: pip install {tracker}"):
        precheck.precheck(options)


def test_an_unknown_tracker(tmp_path: Path) -> None:
    ended = finetune("--model", "m", "--dataset", "d", "--output", "o", "--report-to", "papertrail", cwd=tmp_path)
    assert_error(ended, "papertrail", "tensorboard", status=2)


@pytest.mark.parametrize(
    ("tracker", "name"),
    [
        ("tensorboard", "TENSORBOARD_LOGGING_DIR"),
        ("wandb", "WANDB_MODE"),
        ("mlflow", "MLFLOW_TRACKING_URI"),
        ("trackio", "TRACKIO_DIR"),
    ],
)
def test_trackers_send_nothing_unless_told(
    tracker: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {name: "the user's own"})
    keep_local(tracker, tmp_path)
    assert os.environ[name] == "the user's own"
    monkeypatch.setattr(os, "environ", {})
    keep_local(tracker, tmp_path)
    value = os.environ[name]
    assert value == "offline" or str(tmp_path) in value
