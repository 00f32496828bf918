"""What ``moe-fused finetune`` refuses at once and by name: options without an effect, names of nothing, and wrong forms."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from moe_fused.finetune import hub, precheck
from moe_fused.finetune.formats import BadRow, parse_preference
from moe_fused.finetune.options import Options, flag
from moe_fused.finetune.output import check_output
from moe_fused.finetune.precheck import check_used
from moe_fused.finetune.rows import read_rows
from moe_fused.finetune.words import as_yaml, said_by

from .finetuning import OPTIONS, assert_error, chats, finetune, nothing_loads, save_model, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and a data set."""
    path = tmp_path_factory.mktemp("refusals")
    save_model(path / "model")
    write_jsonl(path / "chat.jsonl", chats())
    return path


def arguments(place: Path, *options: str) -> tuple[Any, ...]:
    return ("--model", place / "model", "--dataset", place / "chat.jsonl", *OPTIONS, "--output", "out", *options)


# Options that have an effect only beside others.


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"eval_split": "x"}, "there is no --eval-dataset"),
        ({"eval_split": "x", "eval_dataset": "chat.jsonl"}, "--eval-dataset chat.jsonl is a file"),
        ({"eval_split": "x", "eval_share": 0.1}, "there is no --eval-dataset"),
        ({"split": "x"}, "--dataset chat.jsonl is a file"),
        ({"dataset_config": "x"}, "--dataset chat.jsonl is a file"),
        ({"split": "x", "dataset": "saved"}, "--dataset saved is a single data set of save_to_disk"),
        ({"dataset_config": "x", "dataset": "dict"}, "--dataset dict is the output of save_to_disk"),
        ({"shared_expert_alpha": 2.0}, "--shared-expert-rank is 0"),
        ({"attention_modules": ["q_proj"], "attention_rank": 0}, "--attention-rank is 0"),
        ({"attention_alpha": 2.0, "attention_rank": 0}, "--attention-rank is 0"),
        ({"expert_alpha": 2.0, "expert_rank": 0}, "--expert-rank is 0"),
        ({"text_field": "x", "method": "dpo"}, "--method dpo does not learn from plain text"),
        ({"private": True}, "there is no --push-to-hub"),
        ({"revision": "x"}, "--model model is a directory"),
        ({"quantization": "none"}, "--model model is in 4 bits already, as nf4"),
        ({"quantization": "fp4"}, "--model model is in 4 bits already, as nf4"),
        ({"warmup": 0.1, "scheduler": "constant"}, "--scheduler constant has no warm-up"),
    ],
)
def test_an_option_without_effect(
    given: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "chat.jsonl", chats(1))
    for directory, file in (("saved", "state.json"), ("dict", "dataset_dict.json"), ("model", "config.json")):
        (tmp_path / directory).mkdir()
        config = {"model_type": "qwen3_moe", "quantization_config": {"bnb_4bit_quant_type": "nf4"}}
        (tmp_path / directory / file).write_text(json.dumps(config))
    options = Options(**{"model": "model", "dataset": "chat.jsonl", "output": "o", **given})
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"^{flag(name)} has no effect: {reason}.*; leave it out$"):
        check_used(options, given)
    check_used(options, {})  # as it was when a run began
    assert any(f"{flag(name)} has no effect" in note for note in precheck.notes(options))


def test_an_option_without_effect_on_the_command_line(place: Path, tmp_path: Path) -> None:
    for given in (("--eval-split", "x"), ("--private",), ("--shared-expert-alpha", "3")):
        ended = finetune(*arguments(place, *given), cwd=tmp_path, before=nothing_loads)
        assert_error(ended, f"error: {given[0]} has no effect: ")
    assert not (tmp_path / "out").exists()


def test_the_field_of_texts_that_are_not_there(place: Path, tmp_path: Path) -> None:
    """Only the rows tell that the option has no effect."""
    ended = finetune(*arguments(place, "--text-field", "body", "--dry-run"), cwd=tmp_path)
    assert ended.status == 0, ended
    assert "note: --text-field body has no effect: no row is plain text" in ended.stderr


def test_init_beside_switches_of_runs(tmp_path: Path) -> None:
    for given in (("--dry-run",), ("--overwrite",), ("--show-rows", "1")):
        ended = finetune("--init", "run.yaml", *given, cwd=tmp_path)
        assert_error(ended, f"--init and {given[0]} exclude each other")
    assert finetune("--init", "run.yaml", cwd=tmp_path).status == 0
    assert_error(finetune("--init", "run.yaml", cwd=tmp_path), "exists: give another name, or remove the file first")


# Names.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chats.jsnl", ["is missing", ".jsonl", "did you mean .jsonl?"]),
        ("chats.jsonl.bz2", ["is missing"]),
        ("chats.data", ["is missing", "no file or directory", ".jsonl"]),
        ("org/chats.jsnol", ["is missing", "did you mean .jsonl?"]),
        ("here/chats.foo", ["is missing", "no file or directory"]),
        ("my chats", ["is missing", "no file or directory"]),
        ("~/chats", ["is missing"]),
        ("a/b/c", ["is missing"]),
        ("/chats", ["is missing"]),
        ("a.jsonl,b.jsonl", ["repeat the option for each data set"]),
    ],
)
def test_a_name_of_no_data_set(name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises((FileNotFoundError, ValueError)) as raised:
        precheck._check_dataset("--dataset", name)
    assert str(raised.value).startswith(f"--dataset {name} ")
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("name", ["squad", "org/chats", "org/chats-v1.5", "org/chats.v2", "HuggingFaceH4/no_robots"])
def test_a_name_that_the_hub_may_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    precheck._check_dataset("--dataset", name)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One question is asked, and nothing is tried again."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_why_unreachable", lambda: "nobody answers")
    began = time.monotonic()
    with pytest.raises(FileNotFoundError) as raised:
        read_rows("org/thing")
    assert str(raised.value) == (
        "--dataset org/thing is not a file, is not in the cache, and the Hub cannot be reached: nobody answers"
    )
    assert time.monotonic() - began < 5
    assert "Retry" not in capfd.readouterr().err
    assert not constants.HF_HUB_OFFLINE


def test_who_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub._why_unreachable() == "Connection refused"


def test_names_of_modules(place: Path, tmp_path: Path) -> None:
    for option in ("attention_modules", "modules_to_save"):
        with pytest.raises(
            ValueError, match=f"{flag(option)} 'q_proj,v_proj' is no name .*: repeat the option for each"
        ):
            Options(model="m", dataset="d", output="o", **{option: ["q_proj,v_proj"]})
    ended = finetune(*arguments(place, "--attention-modules", "qproj"), cwd=tmp_path, before=nothing_loads)
    assert_error(ended, "has no linear layer qproj, it has", "q_proj")
    assert "lm_head" not in ended.stderr
    ended = finetune(*arguments(place, "--attention-modules", "lm_head"), cwd=tmp_path, before=nothing_loads)
    assert_error(ended, "--attention-modules lm_head: the head", "--modules-to-save lm_head trains the head in full")


# Places.


def test_a_directory_without_weights(place: Path, tmp_path: Path) -> None:
    """A dry run needs config and tokenizer alone, also beside the index of weights that are elsewhere."""
    model = shutil.copytree(place / "model", tmp_path / "model")
    (model / "model.safetensors").unlink()
    given = ("--model", model, "--dataset", place / "chat.jsonl", *OPTIONS, "--output", "out")
    for index in (False, True):
        if index:
            content = {
                "metadata": {"total_size": 1},
                "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"},
            }
            (model / "model.safetensors.index.json").write_text(json.dumps(content))
        ended = finetune(*given, "--dry-run", cwd=tmp_path)
        assert ended.status == 0, ended
        assert f"note: --model {model} has no weights" in ended.stderr
        assert_error(finetune(*given, cwd=tmp_path, before=nothing_loads), f"--model {model}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x" * 300, "chat.jsonl/out", "/proc/out"])
def test_an_output_that_cannot_be_created(name: str, place: Path) -> None:
    for more in ((), ("--dry-run",)):
        ended = finetune(*arguments(place, *more)[:-1], "--dry-run", "--output", name, cwd=place, before=nothing_loads)
        assert_error(ended, f"--output {name}")
        assert "data:" not in ended.stderr


def test_looking_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "out", False, False)
    assert os.listdir(tmp_path) == []


# Words.


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": 5, "rejected": "b"}, "must have a string or a list of messages as chosen, but has the number 5"),
        ({"chosen": "b", "rejected": True}, "as rejected, but has the truth value true"),
        (
            {"chosen": "a", "rejected": "b"},
            "needs a prompt: the texts of chosen and rejected have no beginning in common",
        ),
        (
            {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
            "needs a prompt: chosen and rejected have no first message in common",
        ),
    ],
)
def test_a_preference_of_another_form(row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRow, match=words):
        parse_preference(row, True)


def test_values_are_written_as_in_yaml() -> None:
    assert as_yaml({"a": [True, None], "b": "c", "d": 1.5}) == "{a: [true, null], b: 'c', d: 1.5}"
    assert said_by(ValueError("Two lines\n end here.")) == "Two lines end here"
    assert said_by(ValueError()) == "ValueError"


def test_a_share_that_draws_nothing(place: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rare.jsonl", chats(3))
    both = ("--dataset", f"{place / 'chat.jsonl'}=1", "--dataset", "rare.jsonl=0.000001")
    ended = finetune("--model", place / "model", *both, *OPTIONS, "--output", "out", "--dry-run", cwd=tmp_path)
    assert ended.status == 0, ended
    assert "note: no row of rare.jsonl is used: with the share 1e-06, none was drawn" in ended.stderr
