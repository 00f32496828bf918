"""The environment variables that turn on what no GPU has run yet: their values, and what a run says of them."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest

from moe_fused.finetune import variables

RUN: dict[str, Any] = {
    "device": "cuda", "optimizer": "paged_adamw_8bit", "linear_rank": 16, "dropout": 0.0, "sharded": False
}  # fmt: skip


@pytest.mark.parametrize("name", variables.ALL)
def test_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that looks as if it turned the variable on is no silent off."""
    for value, on in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(name, value)
        variables.check_variables({name: value})
        assert variables.is_on(name) == on
    monkeypatch.delenv(name)
    variables.check_variables({})
    assert not variables.is_on(name)
    for value in ("true", "yes", "on", "2", " 1"):
        with pytest.raises(ValueError, match=f"the variable {name} must be 1 or 0, got '{value}'"):
            variables.check_variables({name: value})


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        (variables.ADAMW, {}, "one kernel makes the steps of 8-bit AdamW, which no GPU has run yet"),
        (variables.ADAMW, {"optimizer": "adamw_8bit"}, "one kernel makes the steps of 8-bit AdamW"),
        (
            variables.ADAMW,
            {"optimizer": "adamw_torch"},
            "has no effect: the optimizer is adamw_torch, not adamw_8bit or",
        ),
        (variables.ADAMW, {"device": "cpu"}, "has no effect: it needs a GPU"),
        (variables.QKV, {}, "computed in fewer passes than by PEFT, which no GPU has run yet"),
        (variables.QKV, {"device": "cpu"}, "computed in fewer passes than by PEFT"),
        (variables.QKV, {"dropout": 0.1}, "has no effect: PEFT computes layers with --lora-dropout"),
        (variables.QKV, {"sharded": True}, "has no effect: PEFT computes the layers of a run with --shard"),
        (variables.QKV, {"linear_rank": 0}, "has no effect: no linear layer has an adapter"),
    ],
)
def test_a_run_says_what_a_variable_does(
    name: str, changed: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in variables.ALL:
        monkeypatch.delenv(each, raising=False)
    assert not list(variables.lines(**RUN))
    monkeypatch.setenv(name, "1")
    (line,) = variables.lines(**RUN | changed)
    assert line.startswith(f"note: {name}=1")
    assert words in line


def _set(value: str) -> None:
    os.environ[variables.QKV] = value


def test_the_command(tmp_path: Path) -> None:
    """A wrong value ends it, and of a right one it says what it does."""
    from .finetuning import assert_error, chats, finetune, save_model, write_jsonl

    model, rows = save_model(tmp_path / "model"), write_jsonl(tmp_path / "rows.jsonl", chats(4))
    options = ("--model", model, "--dataset", rows, "--output", "out", "--dry-run")
    wrong = finetune(*options, cwd=tmp_path, before=functools.partial(_set, "yes"))
    assert_error(wrong, "the variable MOE_FUSED_QKV must be 1 or 0, got 'yes'")
    right = finetune(*options, cwd=tmp_path, before=functools.partial(_set, "1"))
    assert right.status == 0
    assert "note: MOE_FUSED_QKV=1: linear layers with adapters are computed in fewer passes" in right.stderr
