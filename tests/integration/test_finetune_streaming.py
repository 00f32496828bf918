"""``moe-fused finetune --streaming``: rows that are read, checked and packed while the run trains."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moe_fused.finetune import data, stream
from moe_fused.finetune.batches import Documents
from moe_fused.finetune.data import find, prepare
from moe_fused.finetune.options import Options
from moe_fused.finetune.precheck import notes
from moe_fused.finetune.resolve import Batching
from moe_fused.finetune.rows import Rows, read_rows, stream_rows
from moe_fused.finetune.stream import BadRows, Streamed, most_documents, prepare_stream

from .finetuning import (
    assert_error,
    chats,
    checkpoints,
    finetune,
    finetune_signalled,
    leftovers,
    losses,
    nothing_loads,
    save_model,
    write_jsonl,
)

BLOCK = 6


def small_blocks() -> None:
    """Blocks have few rows. This also runs in the process of a command."""
    data.BLOCK = stream.BLOCK = BLOCK


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("streaming") / "model")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a data set of 15 rows of different lengths, and small blocks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "BLOCK", BLOCK)
    monkeypatch.setattr(stream, "BLOCK", BLOCK)
    write_jsonl(tmp_path / "a.jsonl", texts(15))
    return tmp_path


def texts(count: int, letter: str = "a") -> list[Any]:
    return [{"text": f"{letter}{i}" + "." * (7 * i % 13)} for i in range(count)]


def options_of(*datasets: str, **more: Any) -> Options:
    return Options(model="m", dataset=list(datasets), output="o", streaming=True, max_steps=9, **more)


def streamed(tokenizer: Any, options: Options, batching: Batching, said: list[str] | None = None) -> Streamed:
    say = [].append if said is None else said.append
    return prepare_stream(find(options, tokenizer), options, batching, say, vocabulary=272)


def whole(tokenizer: Any, options: Options, batching: Batching) -> Any:
    options = dataclasses.replace(options, streaming=False)
    return prepare(find(options, tokenizer), options, batching, vocabulary=272)


def take(found: Streamed, count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(found.dataset, count))


def as_rows(table: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in table]


# What rows become.


@pytest.mark.parametrize("packing", ["bfd", "bfd_split", "wrapped", "none"])
def test_a_block_becomes_what_the_whole_data_set_would(packing: str, here: Path, tokenizer: Any) -> None:
    """One block that has all rows, again and again."""
    data.BLOCK = stream.BLOCK = 100
    batching, options = Batching(packing, 16), options_of("a.jsonl")
    expected, found = whole(tokenizer, options, batching), streamed(tokenizer, options, batching)
    rows = as_rows(expected.dataset)
    most = most_documents(batching)
    assert all(len(row.get("seq_lengths", [])) <= most for row in rows)  # so that none is cut
    assert take(found, 2 * len(rows)) == rows + rows
    assert found.first == [len(row["input_ids"]) for row in rows]
    assert found.fingerprint == expected.fingerprint


def test_rows_are_packed_by_blocks(here: Path, tokenizer: Any) -> None:
    """Nothing is lost or made twice in a pass, and every way through the stream is the same."""
    batching, options = Batching("bfd_split", 16), options_of("a.jsonl")
    found = streamed(tokenizer, options, batching)
    rows = as_rows(whole(tokenizer, options, Batching("none", 64)).dataset)
    expected = []
    for begin in range(0, len(rows), BLOCK):
        block = Dataset.from_list(rows[begin : begin + BLOCK]).select_columns(["input_ids", "labels"])
        expected += as_rows(data.fit(block, batching))
    assert take(found, len(expected) + 2) == expected + expected[:2]
    assert take(found, 30) == take(found, 30)
    tokens = sorted(token for row in expected for token in row["input_ids"])
    assert tokens == sorted(token for row in rows for token in row["input_ids"])


def test_several_data_sets(here: Path, tokenizer: Any) -> None:
    write_jsonl(here / "b.jsonl", texts(9, "b"))
    batching = Batching("none", 64)

    def firsts(found: Streamed, count: int) -> str:
        return "".join(tokenizer.decode(row["input_ids"])[0] for row in take(found, count))

    joined = streamed(tokenizer, options_of("a.jsonl", "b.jsonl"), batching)
    assert firsts(joined, 30) == "a" * 15 + "b" * 9 + "a" * 6
    mixed = [
        firsts(streamed(tokenizer, options_of("a.jsonl=1", "b.jsonl=1", seed=seed), batching), 24) for seed in (0, 0, 1)
    ]
    assert mixed[0] == mixed[1] != mixed[2]
    assert mixed[0][:15].count("b") > 2
    assert list(joined.digests) == ["a.jsonl", "b.jsonl"]
    assert [line.split(", ")[0] for line in joined.used] == ["a.jsonl: 15 rows", "b.jsonl: 9 rows"]


def test_every_kind_of_file(here: Path, tokenizer: Any) -> None:
    """Blocks have the rows, and the places, that reading everything gives."""
    rows = [
        {"messages": [{"role": "user", "content": "x" * i}, {"role": "assistant", "content": "y"}]} for i in range(15)
    ]
    rows[4]["messages"][0]["name"] = "n"  # a key that only one row has
    Dataset.from_list(rows).to_parquet(here / "a.parquet")
    Dataset.from_list(rows).save_to_disk(here / "saved")
    (here / "many").mkdir()
    write_jsonl(here / "many" / "train.jsonl", [*rows[:9], "{"])
    (here / "tables").mkdir()
    shutil.copy(here / "a.parquet", here / "tables" / "train.parquet")
    with gzip.open(here / "a.jsonl.gz", "wt") as file:
        file.write("\n\n".join(map(json.dumps, rows)))

    def contents(found: Rows) -> list[tuple[str, Any]]:
        items = enumerate(found.contents(found.table[:]))
        return [
            (found.place(i), content() if "{" not in str(getattr(content, "text", " ")) else content.text)
            for i, content in items
        ]

    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "saved", "many", "tables"):
        expected = contents(read_rows(name))
        blocks = list(stream_rows(name, BLOCK))
        assert max(len(block) for block in blocks) == BLOCK
        found = [row for block in blocks for row in contents(block)]
        assert [content for _, content in found] == [content for _, content in expected], name
        if name != "tables":  # whose rows are numbered through
            assert [place for place, _ in found] == [place for place, _ in expected]


def test_rows_that_are_bad(here: Path, tokenizer: Any) -> None:
    write_jsonl(here / "a.jsonl", [*texts(13), "{", *texts(3)])
    batching = Batching("none", 64)
    found = streamed(tokenizer, options_of("a.jsonl"), batching)
    with pytest.raises(BadRows, match=r"^a\.jsonl:14 is not JSON"):
        take(found, 40)
    assert len(take(found, 12)) == 12
    said: list[str] = []
    found = streamed(tokenizer, options_of("a.jsonl", skip_bad_rows=True), batching, said)
    assert len(take(found, 40)) == 40
    assert [line.split(" (")[0] for line in said] == ["left out: a.jsonl:14 is not JSON"]  # once, in two passes
    tokens = whole(tokenizer, options_of("a.jsonl", skip_bad_rows=True), batching).report.tokens
    assert list(found.ending()) == [
        f"read: a.jsonl: 16 rows, {tokens} tokens, 1 row left out"
    ]  # two passes, counted once
    assert any("rows cut, which lose" in line for line in _ending_of(tokenizer, Batching("bfd", 10)))
    assert not any("cut" in line for line in _ending_of(tokenizer, Batching("bfd_split", 10)))
    write_jsonl(here / "a.jsonl", [*chats(2), *texts(2)])
    with pytest.raises(ValueError, match=r"^each of a\.jsonl:3-4 is plain text, but a\.jsonl:1 is a chat"):
        streamed(tokenizer, options_of("a.jsonl"), batching)
    write_jsonl(here / "a.jsonl", [*texts(7), {"messages": []}, *chats(1)])
    with pytest.raises(BadRows, match=r"a\.jsonl:8 .*; a\.jsonl:9 is a chat, but a\.jsonl:1 is plain text"):
        take(streamed(tokenizer, options_of("a.jsonl"), batching), 40)


def _ending_of(tokenizer: Any, batching: Batching) -> list[str]:
    found = streamed(tokenizer, options_of("a.jsonl", skip_bad_rows=True), batching)
    take(found, 9)
    return list(found.ending())


# Batches of one shape.


def test_boundaries_have_few_sizes(here: Path, tokenizer: Any) -> None:
    """Rows so short that a sequence would hold very many of them are in several sequences."""
    write_jsonl(here / "a.jsonl", [{"text": ""}, *({"text": "a" * (i % 3)} for i in range(40)), {"text": "a" * 60}])
    data.BLOCK = stream.BLOCK = 100
    batching = Batching("bfd", 64, batch_size=2)
    found = streamed(tokenizer, options_of("a.jsonl", skip_bad_rows=True), batching)
    rows = take(found, 20)
    assert any(len(row["seq_lengths"]) == most_documents(batching) for row in rows)
    assert any(len(row["seq_lengths"]) == 1 for row in rows)
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) for row in rows)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    collator = Documents(collate, most=None, longest=64, tokens=128, padding=0)
    sizes = set()
    for pair in itertools.pairwise(rows):
        batch = collator([{"input_ids": row["input_ids"], "seq_lengths": row["seq_lengths"]} for row in pair])
        boundaries = batch["cu_seq_lens_q"]
        lengths = [size for row in pair for size in row["seq_lengths"]]
        assert boundaries[: len(lengths) + 1].tolist() == [0, *itertools.accumulate(lengths)]
        assert boundaries[-1] == batch["input_ids"].shape[1] == 128
        assert 0 <= boundaries.diff().min() <= boundaries.diff().max() <= batch["max_length_q"] == 64
        sizes.add(len(boundaries) - 1)
        assert len(boundaries) - 1 < 2 * (len(lengths) + 2)  # two documents of padding at most
    assert len(sizes) > 1
    assert all(size & (size - 1) == 0 for size in sizes)


# Options.


def test_what_cannot_be_with_streaming(here: Path) -> None:
    with pytest.raises(ValueError, match=r"^--streaming needs --max-steps"):
        Options(model="m", dataset="a.jsonl", streaming=True)
    with pytest.raises(ValueError, match=r"^--eval-share is not possible with --streaming"):
        options_of("a.jsonl", eval_share=0.1)
    assert list(notes(options_of("a.jsonl", epochs=2))) == ["--epochs has no effect: the run ends after --max-steps 9"]


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("a.jsonl", [], "--dataset a.jsonl has no row to train on"),
        ("a.jsonl", ["{"], "--dataset a.jsonl has no row to train on: a.jsonl:1 is not JSON"),
        ("a.jsonl", [*texts(2), "{"], "a.jsonl:3 is not JSON"),
        ("none.jsonl", [], "--dataset none.jsonl is missing"),
        ("a.pdf", [], "--dataset must be a file with one of the endings"),
        ("a.parquet", ["no table"], "--dataset a.parquet"),
    ],
)
def test_errors_before_the_model_is_loaded(name: str, rows: list[Any], words: str, here: Path, model: Path) -> None:
    if name != "none.jsonl":
        write_jsonl(here / name, rows)
    ended = finetune(
        "--model", model, "--dataset", name, "--streaming", "--max-steps", "2", "--output", "out", cwd=here,
        before=nothing_loads,
    )  # fmt: skip
    assert_error(ended, words)
    assert not (here / "out").exists()


def test_rows_are_shown(here: Path, model: Path) -> None:
    write_jsonl(here / "a.jsonl", [*texts(8), "{"])  # the bad row is not read

    ended = finetune(
        "--model", model, "--dataset", "a.jsonl", "--streaming", "--max-steps", "2", "--show-rows", "2", cwd=here,
        before=small_blocks,
    )  # fmt: skip
    assert ended.status == 0, ended
    assert [line.split(": ")[0] for line in ended.stdout.splitlines() if " tokens, " in line] == [
        "a.jsonl:1",
        "a.jsonl:2",
    ]


# Runs.


def run_options(model: Path, steps: int = 6, accumulation: int = 2) -> tuple[str | Path, ...]:
    return (
        "--model", model, "--dataset", "a.jsonl", "--streaming", "--max-steps", str(steps), "--sequence-length", "32",
        "--gradient-accumulation", str(accumulation), "--save-steps", "2", "--learning-rate", "0.01",
        "--lora-dropout", "0.1", "--quantization", "none",
    )  # fmt: skip


def assert_same(first: Path, second: Path) -> None:
    assert losses(first) == losses(second)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.slow  # three runs
def test_a_run_ends_at_a_bad_row_and_goes_on_when_it_is_mended(here: Path, model: Path) -> None:
    """With a checkpoint of the last whole step, whatever --save-steps is. The run is then as if the row had been good."""
    good = (here / "a.jsonl").read_text()
    expected = finetune(*run_options(model), "--output", "whole", cwd=here, before=small_blocks)
    assert expected.status == 0, expected
    assert "data: a.jsonl; rows are read and checked as they come, the first 6 are checked now" in expected.stderr
    (here / "a.jsonl").write_text(good.replace('"a13', '"a13\\ud800'))
    ended = finetune(*run_options(model), "--output", "out", cwd=here, before=small_blocks)
    step = checkpoints(here / "out")[-1]
    words = (
        "mend what is wrong there and go on, or begin again with --overwrite and --skip-bad-rows",
        "--resume --output out",
    )
    assert_error(ended, f"stopped after step {step}: a.jsonl:14 has half of a surrogate pair", *words)
    refused = finetune("--resume", "--output", "out", "--skip-bad-rows", cwd=here, before=small_blocks)
    assert_error(refused, "--skip-bad-rows is false in", "and cannot become true while the run goes on")
    assert max(losses(here / "out")) == step < 6
    (here / "a.jsonl").write_text(good)
    again = finetune("--resume", "--output", "out", cwd=here, before=small_blocks)
    assert again.status == 0, again
    assert_same(here / "out", here / "whole")
    assert not leftovers(here / "out")


@pytest.mark.slow  # three runs
def test_an_interrupted_run_goes_on_as_uninterrupted(here: Path, model: Path) -> None:
    """Also in the second pass over the data, and with rows that are left out. Other first rows are noticed."""
    write_jsonl(here / "a.jsonl", [*texts(8), "{", *texts(4, "b")])
    given = (*run_options(model, steps=16, accumulation=1), "--skip-bad-rows", "--packing", "none")
    expected = finetune(*given, "--output", "whole", cwd=here, before=small_blocks)
    assert expected.status == 0, expected
    assert expected.stderr.count("left out: a.jsonl:9 is not JSON") == 1
    assert "read: a.jsonl: 12 rows, " in expected.stderr
    ended = finetune_signalled(
        signal.SIGTERM, 14, *given, "--output", "out", cwd=here
    )  # with large blocks, without packing
    assert ended.status == 128 + signal.SIGTERM, ended
    before = (here / "a.jsonl").read_text()
    (here / "a.jsonl").write_text(before.replace("a0", "c0"))
    changed = finetune("--resume", "--output", "out", cwd=here, before=nothing_loads)
    assert_error(changed, "the rows (sha256:", "--allow-changed-data")
    (here / "a.jsonl").write_text(before)
    again = finetune("--resume", "--output", "out", cwd=here)
    assert again.status == 0, again
    assert_same(here / "out", here / "whole")
