"""Rows to train on: what is read, what is refused, and where it says that the bad one is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_fused.finetune.data import load_rows

datasets = pytest.importorskip("datasets")

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
TEXT = {"text": "Some text."}


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row, kind",
    [
        (CHAT, "chat"),
        ({"messages": CHAT["messages"], "tools": [{"name": "look"}]}, "chat"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "chat"),
        ({"conversations": CHAT["messages"]}, "chat"),
        ({"prompt": "1 + 1 =", "completion": " 2"}, "completion"),
        ({"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}, "completion"),
        (TEXT, "text"),
    ],
    ids=str,
)
def test_kinds_of_rows(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    read = load_rows(lines(tmp_path / "rows.jsonl", {**row, "id": 7}, "", row))
    assert (read.kind, read.rows, read.skipped) == (kind, [row, row], [])
    assert read.dataset()[1] == row


def test_fields_that_the_first_row_lacks(tmp_path: Path) -> None:
    with_tools = {**CHAT, "tools": [{"name": "look"}]}
    rows = load_rows(lines(tmp_path / "rows.jsonl", CHAT, with_tools)).dataset()
    assert rows[1]["tools"] == with_tools["tools"]
    assert rows[0]["tools"] is None


def test_prompts_of_two_forms(tmp_path: Path) -> None:
    of_messages = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    path = lines(tmp_path / "rows.jsonl", {"prompt": "1 + 1 =", "completion": " 2"}, of_messages)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 has a prompt of messages, but .*rows\.jsonl:1 one of text"):
        load_rows(path)


def test_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([CHAT, CHAT]))
    assert load_rows(str(tmp_path / "list.json")).rows == [CHAT, CHAT]
    assert load_rows(lines(tmp_path / "lines.json", CHAT)).rows == [CHAT]
    (tmp_path / "book.txt").write_text("Once\n\nupon a time")
    assert load_rows(str(tmp_path / "book.txt")).rows == [{"text": "Once\n\nupon a time"}]
    datasets.Dataset.from_list([TEXT, TEXT]).to_parquet(tmp_path / "rows.parquet")
    assert load_rows(str(tmp_path / "rows.parquet")).rows == [TEXT, TEXT]
    assert load_rows(lines(tmp_path / "rows.jsonl", {"body": "words"}), text_field="body").rows == [{"text": "words"}]


@pytest.mark.parametrize(
    "bad, words",
    [
        ("{", "is not JSON"),
        ('"words"', "must be an object, is a str"),
        ({}, "lacks messages, conversations, prompt and completion, and text, it has nothing"),
        ({"txt": "x"}, "it has txt"),
        ({"text": " \n"}, "has an empty text"),
        ({"text": 3}, "must have a string as text, has int"),
        ({"messages": []}, "has empty messages"),
        ({"messages": "Hi"}, "must have a list as messages, has str"),
        ({"messages": ["Hi"]}, "messages[0] is a str"),
        ({"messages": [{"role": "user"}]}, "lacks content in messages[0]"),
        ({"messages": [CHAT["messages"][0], {"content": "Hello"}]}, "lacks role in messages[1]"),
        ({"conversations": [{"from": "human"}]}, "lacks value in conversations[0]"),
        ({"conversations": [3]}, "conversations[0] is a int"),
        ({"prompt": "1 + 1 ="}, "lacks completion"),
        ({"prompt": "1 + 1 =", "completion": ""}, "has an empty completion"),
        ({"prompt": "Hi", "completion": CHAT["messages"]}, "has one of each"),
        (TEXT, "is text, but"),
    ],
    ids=str,
)
def test_a_bad_row_is_named(bad: object, words: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", CHAT, "", bad, CHAT)
    with pytest.raises(ValueError, match=r"rows\.jsonl:3 ") as caught:
        load_rows(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    read = load_rows(path, skip_bad=True)
    assert read.rows == [CHAT, CHAT]
    (skipped,) = read.skipped
    assert f"rows.jsonl:3 {words}" in skipped or words in skipped


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(TEXT).encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is not UTF-8"):
        load_rows(str(tmp_path / "rows.jsonl"))
    (tmp_path / "book.txt").write_bytes(b"Once \xff")
    with pytest.raises(ValueError, match=r"book\.txt must be UTF-8: .* at byte 5"):
        load_rows(str(tmp_path / "book.txt"))


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", CHAT, *["{"] * 9)
    with pytest.raises(ValueError, match=r"rows.jsonl:6 .*; 4 more; --skip-bad-rows") as caught:
        load_rows(path)
    assert "rows.jsonl:7" not in str(caught.value)
    with pytest.raises(ValueError, match=r"has no row to train on: .*none\.jsonl:1 is not JSON"):
        load_rows(lines(tmp_path / "none.jsonl", "{"), skip_bad=True)


def test_places_in_other_files(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([CHAT, {}]))
    with pytest.raises(ValueError, match=r"list\.json: row 2 lacks"):
        load_rows(str(tmp_path / "list.json"))
    datasets.Dataset.from_list([TEXT, {"text": ""}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet: row 2 has an empty text"):
        load_rows(str(tmp_path / "rows.parquet"))


def test_what_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"--dataset \./rows\.parquet is missing"):
        load_rows("./rows.parquet")
    with pytest.raises(
        FileNotFoundError, match=r"--dataset nobody/nothing: no such file, and not to be had from the Hub"
    ):
        load_rows("nobody/nothing")  # tests are offline
