"""Several data sets in ``moe-fused finetune``: how they are named, joined and mixed, and what is said about each."""

from __future__ import annotations

import math
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from moe_fused.finetune.card import card
from moe_fused.finetune.data import find, prepare
from moe_fused.finetune.facts import Facts
from moe_fused.finetune.mixture import Part
from moe_fused.finetune.options import Options, read_yaml, to_yaml
from moe_fused.finetune.precheck import check_used, notes, precheck
from moe_fused.finetune.resolve import Batching, set_up

from .finetuning import (
    OPTIONS,
    assert_error,
    chats,
    checkpoints,
    evaluations,
    finetune,
    finetune_signalled,
    leftovers,
    losses,
    nothing_loads,
    save_model,
    write_jsonl,
)
from .models import QWEN3_MOE

DENSE = (*OPTIONS, "--quantization", "none")
TEXTS = [{"text": f"text {i}: {'ab' * (i % 7)}"} for i in range(10)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("mixture") / "model")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with three data sets of 30, 20 and 10 rows, each row of its own text."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", chats(30))
    write_jsonl(tmp_path / "b.jsonl", chats(50)[30:])
    write_jsonl(tmp_path / "t.jsonl", TEXTS)
    return tmp_path


def options_of(*datasets: Any, **more: Any) -> Options:
    return Options(model="m", dataset=list(datasets), output="o", **more)


# How data sets are named.


def test_one_form_for_all_ways_to_say_it(here: Path) -> None:
    """On the command line, as a string in YAML and as a mapping; a single name stays a string, as in older runs."""
    ways = [
        options_of("a.jsonl=0.7", "b.jsonl=0.3"),
        options_of({"dataset": "a.jsonl", "share": 0.7}, {"dataset": "b.jsonl", "share": 0.3}),
        options_of("a.jsonl=7e-1", {"dataset": "b.jsonl", "share": 0.3}),
    ]
    assert ways[0] == ways[1] == ways[2]
    assert ways[0].datasets == (Part("a.jsonl", 0.7), Part("b.jsonl", 0.3))
    assert options_of("a.jsonl", "b.jsonl").dataset == ["a.jsonl", "b.jsonl"]
    assert options_of("a.jsonl").dataset == Options(model="m", dataset="a.jsonl").dataset == "a.jsonl"
    for options in (*ways, options_of("a.jsonl", {"dataset": "org/b", "split": "x", "config": "y"})):
        (here / "run.yaml").write_text(to_yaml(options))
        assert Options(**read_yaml(here / "run.yaml")) == options


def test_a_path_with_an_equals_sign(here: Path) -> None:
    """It is one path if it exists, also beside shares; a run that goes on without the file does not take it apart."""
    for name in ("lr=0.5", "x=1.jsonl"):
        write_jsonl(here / name, chats(2))
        assert options_of(name).datasets == (Part(name),)
        assert options_of(f"{name}=0.5", "a.jsonl=2").datasets == (Part(name, 0.5), Part("a.jsonl", 2.0))
    both = options_of("lr=0.5", "a.jsonl")
    assert both.datasets == (Part("lr=0.5"), Part("a.jsonl"))
    (here / "run.yaml").write_text(to_yaml(both))
    (here / "lr=0.5").unlink()
    assert Options(**read_yaml(here / "run.yaml")).datasets == (Part("lr=0.5"), Part("a.jsonl"))
    with pytest.raises(FileNotFoundError, match=re.escape("--dataset none=1.jsonl is missing")):
        precheck(options_of("none=1.jsonl", "a.jsonl"))


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        (["a.jsonl=-1", "b.jsonl=2"], "--dataset a.jsonl=-1: a share must be a finite number above 0"),
        (["a.jsonl=0", "b.jsonl=0"], "--dataset a.jsonl=0: a share must be a finite number above 0"),
        (["a.jsonl=1", "b.jsonl=nan"], "--dataset b.jsonl=nan: a share must be a finite number above 0"),
        (["a.jsonl=1", "b.jsonl=inf"], "--dataset b.jsonl=inf: a share must be a finite number above 0"),
        (["a.jsonl=1e308", "b.jsonl=1e308"], "--dataset: the sum of the shares must be finite"),
        (["a.jsonl=1", "b.jsonl"], "--dataset b.jsonl has no share, but others do"),
        (["a.jsonl=1", "b.jsonl=0,5"], "--dataset b.jsonl=0,5: the share after = must be a number, got '0,5'"),
        (["a.jsonl=", "b.jsonl"], "--dataset a.jsonl=: the share after = must be a number, got ''"),
        (["a.jsonl=0.5"], "--dataset a.jsonl=0.5: there is no file of this name, and as a share it needs a second"),
        (["a.jsonl", "./a.jsonl"], "--dataset a.jsonl is given twice: a larger share"),
        (["org/x=1", "org/x=2"], "--dataset org/x is given twice"),
        (["a.jsonl", ""], "--dataset must name a file, a directory or a Hub id, got an empty value"),
    ],
)
def test_shares_that_cannot_be(datasets: list[str], words: str, here: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        options_of(*datasets)


def test_two_splits_of_a_data_set_are_two(here: Path) -> None:
    options = options_of("org/x", {"dataset": "org/x", "split": "more"})
    assert [part.name for part in options.datasets] == ["org/x", "org/x (split more)"]


@pytest.mark.parametrize(
    "value",
    ["[]", "3", "{share: 1}", "[a.jsonl, 3]", "[{dataset: a.jsonl, split: 1}]",
     "[{dataset: a.jsonl, share: much}]", "[{dataset: a.jsonl, share: true}]"],
)  # fmt: skip
def test_yaml_of_another_form(value: str, here: Path) -> None:
    (here / "run.yaml").write_text(f"dataset: {value}\n")
    with pytest.raises(ValueError, match=r"run\.yaml: dataset must be a string, or a list of strings and of mappings"):
        read_yaml(here / "run.yaml")


def test_an_unknown_key_of_a_data_set(here: Path) -> None:
    for key, hint in (("shares", ", the nearest is share"), ("spilt", ", the nearest is split"), ("zzz", ", got")):
        (here / "run.yaml").write_text(f"dataset: [a.jsonl, {{dataset: b.jsonl, {key}: 1}}]\n")
        with pytest.raises(ValueError, match=f"dataset, share, split, config: there is no key {key}{re.escape(hint)}"):
            read_yaml(here / "run.yaml")


def test_notes_and_missing_files(here: Path) -> None:
    (here / "m").mkdir()
    (here / "m" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    both = options_of("a.jsonl", "b.jsonl", split="x")
    with pytest.raises(
        ValueError, match=r"^--split has no effect: --dataset a\.jsonl is a file, b\.jsonl is a file; leave"
    ):
        check_used(both, {"split": "x"})
    assert list(notes(both)) == ["--split has no effect: --dataset a.jsonl is a file, b.jsonl is a file"]
    check_used(options_of("a.jsonl", "org/b", split="x"), {"split": "x"})
    own = options_of({"dataset": "a.jsonl", "split": "x"}, "org/b")
    with pytest.raises(ValueError, match=r"^--dataset: split x of a\.jsonl has no effect: a\.jsonl is a file"):
        check_used(own, {"dataset": own.dataset})
    all_own = options_of({"dataset": "org/a", "split": "x"}, split="y")
    with pytest.raises(ValueError, match=r"^--split has no effect: --dataset org/a has a split of its own"):
        check_used(all_own, {"split": "y"})
    with pytest.raises(FileNotFoundError, match=r"--dataset none\.jsonl is missing"):
        precheck(options_of("a.jsonl", "none.jsonl"))


def test_the_card_names_what_is_on_the_hub(here: Path) -> None:
    options = options_of("a.jsonl=1", "org/b=2", "org/c=3")
    text = card(set_up(options, QWEN3_MOE.build().config, torch.device("cpu")), Facts({}, {}, {}, {}))
    assert yaml.safe_load(text.split("---")[1])["datasets"] == ["org/b", "org/c"]


# How rows are mixed.


def prepared(tokenizer: Any, *datasets: Any, **more: Any) -> Any:
    """The data of a run without packing, so that each sequence is a row."""
    options = options_of(*datasets, **more)
    return prepare(find(options, tokenizer), options, Batching("none", 64), vocabulary=272)


def rows_of(tokenizer: Any, data: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids in data["input_ids"]]


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


def test_without_shares_rows_are_joined_in_order(here: Path, tokenizer: Any) -> None:
    a, b, both = (prepared(tokenizer, *names) for names in (["a.jsonl"], ["b.jsonl"], ["a.jsonl", "b.jsonl"]))
    assert both.dataset[:]["input_ids"] == a.dataset[:]["input_ids"] + b.dataset[:]["input_ids"]
    assert both.report.tokens == a.report.tokens + b.report.tokens
    assert both.report.parts == [
        f"a.jsonl: 30 rows, {a.report.tokens:,} tokens", f"b.jsonl: 20 rows, {b.report.tokens:,} tokens",
    ]  # fmt: skip
    assert both.digests == {"a.jsonl": a.fingerprint, "b.jsonl": b.fingerprint}
    assert a.report.parts == []
    assert a.digests == {}


def test_shares_say_how_often_rows_are_drawn(tmp_path: Path, tokenizer: Any) -> None:
    """Within four standard deviations, whatever the scale of the shares; the mix ends with the first data set."""
    count = 2000
    names = [str(write_jsonl(tmp_path / f"{k}.jsonl", [{"text": f"{k}{i}"} for i in range(count)])) for k in "xy"]
    mixed = rows_of(tokenizer, prepared(tokenizer, f"{names[0]}=0.8", f"{names[1]}=0.2", seed=1).dataset)
    x, y = (sum(row.startswith(k) for row in mixed) for k in "xy")
    assert x == count  # no row is left out of the one that ends first
    assert abs(y / (x + y) - 0.2) < 4 * math.sqrt(0.2 * 0.8 / (x + y))
    assert len(set(mixed)) == len(mixed)  # no row twice
    # The rows that are drawn are not the first ones of the file.
    assert max(int(row[1:].split("<")[0]) for row in mixed if row.startswith("y")) > 1000
    again = prepared(tokenizer, f"{names[0]}=8", f"{names[1]}=2", seed=1)
    assert rows_of(tokenizer, again.dataset) == mixed
    assert again.report.parts[1].startswith(f"{names[1]}: {y:,} of 2,000 rows, ")
    other = rows_of(tokenizer, prepared(tokenizer, f"{names[0]}=8", f"{names[1]}=2", seed=2).dataset)
    assert other != mixed


def test_a_share_so_small_that_no_row_is_drawn(here: Path, tokenizer: Any) -> None:
    mixed = prepared(tokenizer, "a.jsonl=1", "b.jsonl=1e-9")
    assert mixed.report.parts[1] == "b.jsonl: 0 of 20 rows, 0 tokens"
    assert mixed.report.rows == 30


def test_rows_set_aside_are_neither_mixed_nor_trained_on(here: Path, tokenizer: Any) -> None:
    """They are chosen among all rows by the seed, whatever the shares are."""
    everything = rows_of(tokenizer, prepared(tokenizer, "a.jsonl", "b.jsonl").dataset)
    joined = prepared(tokenizer, "a.jsonl", "b.jsonl", eval_share=0.2)
    held = rows_of(tokenizer, joined.evaluation.dataset)
    assert len(held) == 10
    assert sorted(rows_of(tokenizer, joined.dataset) + held) == sorted(everything)
    assert any(row in everything[:30] for row in held)
    assert any(row in everything[30:] for row in held)
    mixed = prepared(tokenizer, "a.jsonl=1", "b.jsonl=1", eval_share=0.2)
    assert rows_of(tokenizer, mixed.evaluation.dataset) == held
    assert not set(held) & set(rows_of(tokenizer, mixed.dataset))
    assert (
        rows_of(tokenizer, prepared(tokenizer, "a.jsonl", "b.jsonl", eval_share=0.2, seed=1).evaluation.dataset) != held
    )
    write_jsonl(here / "c.jsonl", chats(51)[50:])
    seed = next(seed for seed in range(99) if 30 in np.random.default_rng(seed).permutation(31)[:16])
    with pytest.raises(ValueError, match=r"^--eval-share 0\.5 leaves no row of --dataset c\.jsonl to train on$"):
        prepared(tokenizer, "a.jsonl", "c.jsonl", eval_share=0.5, seed=seed)


def test_bad_rows_of_all_data_sets_are_named(here: Path, tokenizer: Any) -> None:
    write_jsonl(here / "a.jsonl", [*chats(3), "{"])
    write_jsonl(here / "b.jsonl", [*TEXTS[:2], *chats(1)])
    with pytest.raises(
        ValueError, match=r"a\.jsonl:4 is not JSON .*; b\.jsonl:3 is a chat, but b\.jsonl:1 is plain text: .*; --skip"
    ):
        prepared(tokenizer, "a.jsonl", "b.jsonl")
    kept = prepared(tokenizer, "a.jsonl", "b.jsonl", skip_bad_rows=True)
    assert len(kept.report.left_out) == 2
    assert [part.split(",")[0] for part in kept.report.parts] == ["a.jsonl: 3 rows", "b.jsonl: 2 rows"]


@pytest.mark.parametrize("rows", [[], ["{"], [{"messages": []}]], ids=["no line", "not JSON", "no turn"])
def test_an_empty_data_set(rows: list[Any], here: Path, tokenizer: Any) -> None:
    write_jsonl(here / "b.jsonl", rows)
    with pytest.raises(ValueError, match=r"^--dataset b\.jsonl has no row to train on"):
        prepared(tokenizer, "a.jsonl", "b.jsonl", skip_bad_rows=True)


# The command.


def arguments(model: Path, *datasets: str) -> tuple[str | Path, ...]:
    return ("--model", model, *(word for name in datasets for word in ("--dataset", name)))


def test_a_joined_run_is_that_of_one_file(here: Path, model: Path) -> None:
    (here / "both.jsonl").write_text((here / "a.jsonl").read_text() + (here / "b.jsonl").read_text())
    several = finetune(*arguments(model, "a.jsonl", "b.jsonl"), *DENSE, "--output", "several", cwd=here)
    assert several.status == 0, several
    assert "data: a.jsonl: 30 rows, " in several.stderr
    assert "data: b.jsonl: 20 rows, " in several.stderr
    assert finetune(*arguments(model, "both.jsonl"), *DENSE, "--output", "one", cwd=here).status == 0
    assert losses(here / "several") == losses(here / "one")
    text = (here / "several" / "README.md").read_text()
    each = r"a\.jsonl: 30 rows, [\d,]+ tokens; b\.jsonl: 20 rows, [\d,]+ tokens"
    assert re.search(rf"\| trained on \| {each}; together: 50 rows, [\d,]+ tokens, [\d,]+ to learn from \|", text)
    assert "| trained on | both.jsonl: 50 rows, " in (here / "one" / "README.md").read_text()


@pytest.mark.slow  # four runs
def test_a_mixed_run_resumes_as_uninterrupted(here: Path, model: Path) -> None:
    """Also from chats and plain text. The file of options holds the shares, and a change of the second file is noticed."""
    run = (*arguments(model, "a.jsonl=3", "t.jsonl=1"), *DENSE)
    whole = finetune(*run, "--output", "whole", "--eval-share", "0.2", "--eval-steps", "4", cwd=here)
    assert whole.status == 0, whole
    assert re.search(r"data: t\.jsonl: \d of \d rows, ", whole.stderr), whole
    assert list(evaluations(here / "whole")) == [4, 8]
    assert read_yaml(here / "whole" / "finetune.yaml")["packing"] == "bfd_split"  # because there is plain text
    given = (*run, "--eval-share", "0.2", "--eval-steps", "4", "--output", "out")
    ended = finetune_signalled(signal.SIGTERM, 3, *given, cwd=here)
    assert ended.status == 128 + signal.SIGTERM, ended
    assert checkpoints(here / "out") == [2, 3]
    again = ("--resume", "--output", "out")
    before = (here / "t.jsonl").read_text()
    write_jsonl(here / "t.jsonl", TEXTS[1:])
    assert_error(
        finetune(*again, cwd=here, before=nothing_loads), "the rows of t.jsonl (sha256:", "--allow-changed-data"
    )
    (here / "t.jsonl").write_text(before)
    other = finetune(*again, *arguments(model, "a.jsonl=3", "t.jsonl=2"), cwd=here, before=nothing_loads)
    assert_error(other, "--dataset is a.jsonl=3, t.jsonl=1 in", "cannot become a.jsonl=3, t.jsonl=2")
    same = finetune(*again, *arguments(model, "a.jsonl=3.0", "t.jsonl=1"), cwd=here)
    assert same.status == 0, same
    assert losses(here / "out") == losses(here / "whole")
    assert evaluations(here / "out") == evaluations(here / "whole")
    ours, theirs = (load_file(here / name / "adapter_model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert not leftovers(here / "out")


def test_rows_of_each_data_set_are_shown(here: Path, model: Path) -> None:
    shown = finetune(*arguments(model, "a.jsonl", "t.jsonl"), "--show-rows", "2", cwd=here, before=nothing_loads)
    assert shown.status == 0, shown
    places = [line.split(": ")[0] for line in shown.stdout.splitlines() if " tokens, " in line]
    assert places == ["a.jsonl:1", "a.jsonl:2", "t.jsonl:1", "t.jsonl:2"]


def test_wrong_data_sets_on_the_command_line(here: Path, model: Path) -> None:
    for datasets, words in {
        ("a.jsonl=1", "b.jsonl=-2"): "--dataset b.jsonl=-2: a share must be",
        ("a.jsonl", "none.jsonl"): "--dataset none.jsonl is missing",
        ("a.jsonl", "x.pdf"): "--dataset must be a file with one of the endings",
    }.items():
        (here / "x.pdf").touch()
        ended = finetune(*arguments(model, *datasets), "--output", "out", cwd=here, before=nothing_loads)
        assert_error(ended, words)
        assert not (here / "out").exists()
    ended = finetune(
        *arguments(model, "t.jsonl", "a.jsonl"),
        "--assistant-only-loss",
        "--output",
        "out",
        cwd=here,
        before=nothing_loads,
    )
    assert_error(ended, "--assistant-only-loss is for chats, but a row of --dataset t.jsonl is plain text")
    filled = finetune("--init", "run.yaml", *arguments(model, "a.jsonl=2", "t.jsonl=1"), cwd=here)
    assert filled.status == 0, filled
    assert read_yaml(here / "run.yaml")["dataset"] == [
        {"dataset": "a.jsonl", "share": 2.0}, {"dataset": "t.jsonl", "share": 1.0},
    ]  # fmt: skip
