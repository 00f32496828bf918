"""What ``moe-fused finetune --show-rows`` shows of the sequences that packing makes of rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from moe_fused.finetune.data import Data, find, prepare
from moe_fused.finetune.options import Options
from moe_fused.finetune.render import IGNORED
from moe_fused.finetune.resolve import Batching
from moe_fused.finetune.show import COLUMNS, first_sequences, show_sequences

from .finetuning import assert_error, chats, finetune, save_model, save_tokenizer, write_jsonl
from .test_finetune_render import MARKED

LENGTH = 120


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    (tmp_path / "tokenizer").mkdir()
    save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def found(tokenizer: Any, directory: Path, rows: list[Any], **options: Any) -> tuple[tuple[Data, ...], Options]:
    path = write_jsonl(directory / "rows.jsonl", rows)
    asked = Options(model="m", dataset=str(path), **options)
    return find(asked, tokenizer), asked


def texts(lengths: list[int]) -> list[Any]:
    """Rows of text. The tokenizer adds a token at their end."""
    return [{"text": chr(ord("a") + i % 26) * (length - 1)} for i, length in enumerate(lengths)]


def test_rows_side_by_side(tokenizer: Any, tmp_path: Path) -> None:
    data, options = found(tokenizer, tmp_path, texts([130, 20, 60, 30]))
    lines = list(show_sequences(data, options, 2, Batching("bfd", LENGTH)))
    lines = [line.replace(f"{tmp_path}/", "") for line in lines]
    assert [re.sub(r"…\S*rows", "rows", line) for line in lines] == [
        "sequence 1: 1 row, 120 of 120 tokens (100 % full), 119 to learn from",
        "  packing bfd: positions begin at 0 with each row",
        "  at      0: rows.jsonl:1, 120 tokens, 10 cut off; learned 1-119",
        "",
        "sequence 2: 3 rows, 110 of 120 tokens (91 % full), 107 to learn from",
        "  packing bfd: positions begin at 0 with each row",
        "  at      0: rows.jsonl:3, 60 tokens; learned 1-59",
        "  at     60: rows.jsonl:4, 30 tokens; learned 1-29",
        "  at     90: rows.jsonl:2, 20 tokens; learned 1-19",
        "",
    ]


@pytest.mark.parametrize(
    ("packing", "expected"),
    [
        ("bfd_split", ["at 0: 1, tokens 1 to 120 of 130; learned 1-119", "at 0: 2, 20 tokens; learned 1-19",
                       "at 20: 1, tokens 121 to 130 of 130; learned 1-9"]),
        ("wrapped", ["at 0: 1, tokens 1 to 120 of 130; learned 1-119", "at 0: 1, tokens 121 to 130 of 130; learned 1-9",
                     "at 10: 2, 20 tokens; learned 10-29"]),
        ("none", ["at 0: 1, 120 tokens, 10 cut off; learned 1-119", "at 0: 2, 20 tokens; learned 1-19"]),
    ],
)  # fmt: skip
def test_other_packings(packing: str, expected: list[str], tokenizer: Any, tmp_path: Path) -> None:
    data, options = found(tokenizer, tmp_path, texts([130, 20]))
    lines = list(show_sequences(data, options, 9, Batching(packing, LENGTH)))
    shown = [re.sub(r" +(\d+): \S*rows.jsonl:", r" \1: ", line.strip()) for line in lines if line.startswith("  at ")]
    assert shown == expected


@pytest.mark.parametrize("packing", ["bfd", "bfd_split", "wrapped", "none"])
@pytest.mark.parametrize("share", [None, 0.25])
def test_sequences_are_those_of_the_run(packing: str, share: float | None, tokenizer: Any, tmp_path: Path) -> None:
    """For more rows than TRL packs at a time, some of them too long, and some left out."""
    rows = [*texts([2 + 37 * i % 150 for i in range(1300)]), "{"]
    given: dict[str, Any] = {"eval_share": share, "skip_bad_rows": share is not None}
    data, options = found(tokenizer, tmp_path, rows, **given)
    batching = Batching(packing, LENGTH)
    sequences, sizes, bad = first_sequences(data, options, batching, 1)
    assert len(bad) == (share is not None)  # without --eval-share, the first rows are enough
    if not share:
        data, options = found(tokenizer, tmp_path, rows[:-1])
    whole = prepare(data, options, batching, vocabulary=300).dataset
    assert len(sequences) == 1
    for name in whole.column_names:
        assert sequences[name] == whole[:1][name]
    for sequence in sequences:
        for token, row, place in zip(*(sequence[name] for name in ("input_ids", "row", "place")), strict=True):
            (only,) = data
            ids = only.renderer(only.renderer.parse(only.content(row))).ids
            assert token == ids[place]
            assert len(ids) == sizes[row]


def test_what_is_learned_from(tokenizer: Any, tmp_path: Path) -> None:
    """The ranges are the labels, with positions that begin anew with each row."""
    tokenizer.chat_template = MARKED
    turns = [{"role": role, "content": "ab"} for _ in range(40) for role in ("user", "assistant")]
    rows = [*chats(2), {"messages": turns}, {"messages": turns[:4]}]
    data, options = found(tokenizer, tmp_path, rows, assistant_only_loss=True)
    batching = Batching("bfd", 4096)
    lines = list(show_sequences(data, options, 1, batching))
    assert all(len(line) <= COLUMNS for line in lines)
    (sequence,) = first_sequences(data, options, batching, 1)[0]
    assert f"{sum(label != IGNORED for label in sequence['labels'])} to learn from" in lines[0]
    assert sum("and" in line and "more" in line for line in lines) == 1
    (short,) = (line for line in lines if "rows.jsonl:4" in line)
    (only,) = data
    tokens = only.renderer(only.renderer.parse(only.content(3)))
    learned: set[int] = set()
    for first, _, last in re.findall(r"(\d+)(-(\d+))?(?=,|$)", short.partition("learned ")[2]):
        learned |= set(range(int(first), int(last or first) + 1))
    assert learned == {i for i, label in enumerate(tokens.labels) if label != IGNORED}


def test_long_names_and_numbers_fit(tokenizer: Any, tmp_path: Path) -> None:
    directory = tmp_path / ("deep" * 20)
    directory.mkdir()
    data, options = found(tokenizer, directory, texts([200_000]))
    for packing in ("bfd", "bfd_split", "wrapped", "none"):
        lines = list(show_sequences(data, options, 3, Batching(packing, 65_536)))
        assert all(len(line) <= COLUMNS for line in lines), lines


def test_the_command_shows_them_without_colours(tmp_path: Path) -> None:
    arguments = ("--model", save_model(tmp_path / "model"), "--dataset", "rows.jsonl", "--sequence-length", str(LENGTH))
    write_jsonl(tmp_path / "rows.jsonl", chats(5))
    ended = finetune(*arguments, "--show-rows", "2", cwd=tmp_path)
    assert ended.status == 0, ended
    assert ended.stdout.index("rows.jsonl:2: 51 tokens") < ended.stdout.index("sequence 1: 2 rows, 102 of 120 tokens")
    assert ended.stdout.count("sequence ") == 2
    assert "\x1b" not in ended.stdout
    # A bad row that is not shown is no error here, but there are no sequences with it.
    write_jsonl(tmp_path / "rows.jsonl", [*chats(2), "{"])
    ended = finetune(*arguments, "--show-rows", "1", cwd=tmp_path)
    assert ended.status == 0, ended
    assert ended.stdout.splitlines()[-1].startswith("no sequences: rows.jsonl:3 is not JSON")
    # A run that divides its model needs several processes, and this does not.
    ended = finetune(*arguments, "--show-rows", "1", "--skip-bad-rows", "--shard", cwd=tmp_path)
    assert "sequence 1: 2 rows" in ended.stdout
    share = finetune(*arguments, "--show-rows", "1", "--skip-bad-rows", "--eval-share", "0.1", cwd=tmp_path)
    assert_error(share, "--eval-share 0.1 of 2 rows leaves none to evaluate on")
