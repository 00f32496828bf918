"""Rows to train on: what is read, what it becomes, what is refused, and where it says that the bad one is."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

import datasets

from moe_fused.finetune.formats import BadRow, Row, parse_row
from moe_fused.finetune.rows import Rows, read_rows

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CHAT = {"messages": TURNS}
SPOKEN = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
TEXT = {"text": "words"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}


def lines(path: Path, *rows: object) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def contents(rows: Rows) -> list[object]:
    """What stands in each row; a BadRow where it cannot be read."""
    return [_content(content) for content in rows.contents(rows.table[:])]


def _content(content: Callable[[], object]) -> object:
    try:
        return content()
    except BadRow as error:
        return error


def read(path: object, **options: Any) -> list[object]:
    return contents(read_rows(str(path), **options))


def parse(content: object, has_template: bool = True, text_field: str = "text") -> Row:
    return parse_row(content, text_field, has_template)


# --- what a row becomes


@pytest.mark.parametrize(
    "content",
    [
        CHAT,
        SPOKEN,
        {"messages": SPOKEN["conversations"]},
        {"conversations": TURNS},
        {"messages": json.dumps(TURNS)},
        {"conversations": [{"from": "User", "value": "Hi", "weight": None}, {"from": "ChatGPT", "value": "Hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]}, TURNS[1]]},
        {"messages": [{"role": "user", "content": ["H", "i"], "name": None}, TURNS[1]], "tools": [], "system": ""},
        {"messages": TURNS, "chat_template_kwargs": None, "tools": None, "id": 7},
    ],
    ids=str,
)
def test_chats_in_all_their_forms(content: dict[str, Any]) -> None:
    row = parse(content)
    assert (row.kind, row.messages, row.tools, row.template_kwargs) == ("chat", TURNS, None, {})


def test_speakers_of_functions() -> None:
    turns = [
        {"from": "human", "value": "Weather in Rome?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "sunny"},
        {"from": "tool", "value": {"sky": "blue"}},
        {"from": "narrator", "value": "Then"},
        {"from": "gpt", "value": "Sunny."},
    ]
    row = parse({"conversations": turns, "system": "Be brief.", "tools": json.dumps([TOOL])})
    assert row.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": '{"sky": "blue"}'},
        {"role": "narrator", "content": "Then"},
        {"role": "assistant", "content": "Sunny."},
    ]
    assert row.tools == [TOOL]


def test_functions_as_they_were_called_before() -> None:
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
        {"role": "function", "name": "weather", "content": "sunny"},
    ]
    row = parse({"messages": turns, "functions": [TOOL["function"]]})
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    assert row.messages[1:] == [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "sunny"},
    ]
    assert row.tools == [TOOL]


@pytest.mark.parametrize("beside", [{"prompt": TURNS[:1], "completion": TURNS[1:]}, CHAT, SPOKEN], ids=str)
def test_what_stands_beside_a_chat(beside: dict[str, Any]) -> None:
    extra = {"system": "Be brief.", "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    row = parse({**beside, **extra})
    assert row.turns == [{"role": "system", "content": "Be brief."}, *TURNS]
    assert (row.tools, row.template_kwargs) == ([TOOL], {"enable_thinking": False})
    assert len(row.weights) == 3
    same = parse({**beside, "system": "Be brief."})
    assert parse({"messages": same.turns, "system": "Be brief."}).messages == same.turns


def test_weights_of_turns() -> None:
    turns = [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[0], {**TURNS[1], "train": True}, {**TURNS[1], "loss": False}]
    row = parse({"messages": turns})
    assert row.weights == [None, False, None, True, False]
    assert row.messages == [TURNS[0], TURNS[1], TURNS[0], TURNS[1], TURNS[1]]  # no template is to see them


@pytest.mark.parametrize(
    "content, prompt, completion",
    [
        ({"instruction": "Translate.", "input": "cat", "output": "chat"}, "Translate.\n\ncat", "chat"),
        ({"instruction": "Say hi.", "input": "", "output": "Hi."}, "Say hi.", "Hi."),
        ({"instruction": "", "input": "cat", "output": "chat"}, "cat", "chat"),
        ({"instruction": "Who?", "context": "Ann sang.", "response": "Ann"}, "Who?\n\nAnn sang.", "Ann"),
        ({"question": "1 + 1?", "answer": "2"}, "1 + 1?", "2"),
        ({"query": "1 + 1?", "response": "2"}, "1 + 1?", "2"),
        ({"input": "1 + 1?", "output": "2"}, "1 + 1?", "2"),
    ],
    ids=str,
)
def test_questions_and_answers(content: dict[str, str], prompt: str, completion: str) -> None:
    row = parse(content)
    assert row.kind == "completion"
    assert row.prompt == [{"role": "user", "content": prompt}]
    assert row.completion == [{"role": "assistant", "content": completion}]
    row = parse(content, has_template=False)
    assert (row.prompt, row.completion) == (prompt + "\n", completion)


def test_questions_with_what_came_before() -> None:
    row = parse({"system_prompt": "Be brief.", "instruction": "And 2?", "output": "4", "history": [["1 + 1?", "2"]]})
    assert [(turn["role"], turn["content"]) for turn in row.turns] == [
        ("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "And 2?"), ("assistant", "4"),
    ]  # fmt: skip
    assert len(row.weights) == len(row.turns)


def test_prompts_and_completions() -> None:
    for content in ({"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "1 + 1 =", "response": " 2"}):
        row = parse(content)
        assert (row.kind, row.form, row.prompt, row.completion) == ("completion", "completion of text", "1 + 1 =", " 2")
    row = parse({"prompt": TURNS[:1], "response": TURNS[1:]})
    assert (row.form, row.turns) == ("completion of messages", TURNS)


def test_plain_text_comes_before_questions() -> None:
    """As in data sets that have their rows in two forms."""
    assert parse({"instruction": "a", "output": "b", "text": "all of it"}).text == "all of it"
    assert parse({"body": "words", "text": None}, text_field="body") == Row("text", text="words")


@pytest.mark.parametrize(
    "bad, words",
    [
        ("words", "must be an object, but is a string"),
        ({}, "needs messages, conversations, prompt and completion, or text, but has nothing"),
        ({"txt": "x"}, "but has txt: rename"),
        ({"text": " \n"}, "has an empty text"),
        ({"text": None}, "has an empty text"),
        ({"text": 3}, "must have a string as text, but has the number 3"),
        ({"messages": []}, "has empty messages"),
        ({"messages": "Hi"}, "must have a list as messages, but has a string"),
        ({"messages": str(TURNS)}, "has messages that are not JSON"),
        ({"messages": ["Hi"]}, "messages[0] is a string"),
        ({"messages": [{"role": "user"}]}, "lacks content in messages[0]"),
        ({"messages": [TURNS[0], {"content": "Hello"}]}, "lacks role in messages[1]"),
        ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": ""}]}, "has no text in messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "a string as content in messages[0], but has the number 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]}, "a part of the type image"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "only text can be trained on"),
        ({**CHAT, "images": ["x.png"]}, "has images, but only text can be trained on"),
        ({"conversations": [{"from": "human"}]}, "lacks value in conversations[0]"),
        ({"conversations": [3]}, "conversations[0] is the number 3"),
        ({"conversations": [{"from": "function_call", "value": "look it up"}]}, "calls in conversations[0]"),
        ({"conversations": [{"from": "function_call", "value": "[1]"}]}, "objects with name and arguments"),
        ({"prompt": "1 + 1 ="}, "lacks completion"),
        ({"prompt": "1 + 1 =", "completion": ""}, "has an empty completion"),
        ({"prompt": "Hi", "completion": TURNS}, "has one of each"),
        ({"prompt": TURNS[:1], "completion": [{"role": "assistant", "content": ""}]}, "has an empty completion"),
        ({"prompt": "Hi", "completion": "Hello", "tools": [TOOL]}, "has tools beside a prompt of text"),
        ({"prompt": "Hi", "completion": "Hello", "system": "Be brief."}, "has system beside a prompt of text"),
        ({"messages": [{"role": "system", "content": "a"}], "system": "b"}, "another one as system"),
        ({**CHAT, "system": 3}, "must have a string as system, but has the number 3"),
        ({**CHAT, "tools": "weather"}, "must have a list as tools, but has a string"),
        ({**CHAT, "tools": ["weather"]}, "tools[0] is a string"),
        ({**CHAT, "chat_template_kwargs": [1]}, "must have an object as chat_template_kwargs, but has a list"),
        ({**CHAT, "weight": 0.5}, "has the weight 0.5, but rows have no weights"),
        ({"prompt": "Hi", "completion": "Hello", "label": False}, "has the label false"),
        ({"prompt": "Hi", "completion": "Hello", "label": "False"}, "has the label false"),
        ({"messages": [{**TURNS[0], "weight": 0.5}]}, "has the weight 0.5 in messages[0], which must be 0 or 1"),
        ({"messages": [{**TURNS[0], "weight": 1, "train": False}]}, "weight and train in messages[0], which say different"),
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}, "is a preference (chosen, rejected)"),
        ({"instruction": "Say hi."}, "has instruction, but no answer to it: output, response"),
        ({"instruction": "", "output": "Hi."}, "has an empty instruction"),
        ({"question": "1 + 1?", "answer": 2}, "must have a string as answer, but has the number 2"),
        ({"question": ["a"], "answer": "b"}, "must have a string as question, but has a list"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "pairs of strings in history"),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_row_says_why(bad: object, words: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse(bad)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_system_message_that_nothing_shows() -> None:
    with pytest.raises(BadRow, match="has system beside a prompt of text"):
        parse({"question": "a", "answer": "b", "system": "Be brief."}, has_template=False)


# --- files


def test_each_row_as_it_was_written(tmp_path: Path) -> None:
    """No key of another row, whatever types the rows have; null stays null."""
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"n": 1}}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"n": None}}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "n=1"}}]}]},
        {**CHAT, "chat_template_kwargs": {"enable_thinking": False}},
    ]
    assert read(lines(tmp_path / "rows.jsonl", *rows)) == rows
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert read(tmp_path / "rows.json") == rows


def test_keys_that_a_table_adds(tmp_path: Path) -> None:
    """Tables have every key in every row; those that a row was written without are gone again."""
    with_thought = [TURNS[0], {**TURNS[1], "thinking": "hm"}]
    tools = [{"name": "f", "parameters": {"n": {"type": "integer"}}}]
    table = datasets.Dataset.from_list([{"messages": TURNS, "tools": None}, {"messages": with_thought, "tools": tools}])
    table.to_parquet(tmp_path / "rows.parquet")
    first, second = read(tmp_path / "rows.parquet")
    assert first == {"messages": TURNS, "tools": None}
    assert second == {"messages": with_thought, "tools": tools}
    rows = [{"messages": [{**CALL, "role": "assistant"}]}, {"messages": [{"role": "assistant", "function": None}]}]
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").save_to_disk(tmp_path / "mixed")
    assert [parse_calls(row) for row in read(tmp_path / "mixed")] == [CALL["function"], None]


def parse_calls(row: Any) -> object:
    return row["messages"][0].get("function")


def test_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "list.JSON").write_text(json.dumps([CHAT, CHAT]))
    assert read(tmp_path / "list.JSON") == [CHAT, CHAT]
    (tmp_path / "one.json").write_text(json.dumps(CHAT, indent=1))
    assert read(tmp_path / "one.json") == [CHAT]
    assert read(lines(tmp_path / "lines.json", CHAT)) == [CHAT]
    assert read(lines(tmp_path / "ROWS.JSONL", CHAT, "", TEXT)) == [CHAT, TEXT]
    (tmp_path / "book.TXT").write_text("\ufeffOnce\r\n\nupon a time")
    assert read(tmp_path / "book.TXT") == [{"text": "Once\n\nupon a time"}]
    table = datasets.Dataset.from_list([{**TEXT, "id": 1}, {**TEXT, "id": 2}])
    table.to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [TEXT, TEXT]
    assert read(lines(tmp_path / "rows.jsonl", {"body": "words"})) == [{"body": "words"}]


@pytest.mark.parametrize("mark, encoding", [("\ufeff", "utf-8"), ("\ufeff", "utf-16-le"), ("\ufeff", "utf-16-be")])
def test_byte_order_marks(mark: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes((mark + json.dumps([TEXT, {"text": "ü"}])).encode(encoding))
    rows = read_rows(str(tmp_path / "rows.json"))
    assert contents(rows) == [TEXT, {"text": "ü"}]
    assert rows.place(1).endswith("rows.json: row 2")
    (tmp_path / "rows.jsonl").write_bytes((mark + json.dumps(TEXT)).encode(encoding))
    (tmp_path / "rows.csv").write_bytes((mark + "text\nwords\n").encode(encoding))
    if encoding == "utf-8":
        assert read(tmp_path / "rows.jsonl") == read(tmp_path / "rows.csv") == [TEXT]
    else:
        for name in ("rows.jsonl", "rows.csv"):
            with pytest.raises(ValueError, match="must be UTF-8, but begins with the byte order mark of UTF-16"):
                read(tmp_path / name)


@pytest.mark.parametrize("name, separator", [("rows.csv", ";"), ("rows.csv", "\t"), ("rows.tsv", "|")])
def test_a_table_with_another_separator(name: str, separator: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f"prompt{separator}completion\na{separator}b\n")
    with pytest.raises(ValueError, match=rf"{name}:1: fields must be separated by .*, not by "):
        read(tmp_path / name)


def _zstd(content: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


COMPRESSIONS = [
    ("gz", gzip.compress),
    ("GZ", gzip.compress),
    ("bz2", bz2.compress),
    ("xz", lzma.compress),
    ("zst", _zstd),
]


@pytest.mark.parametrize("ending, compress", COMPRESSIONS)
def test_compressed_files(ending: str, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    many = [{"text": f"words {i} {hash(str(i))}"} for i in range(3000)]
    whole = compress("\n".join(map(json.dumps, many)).encode())
    (tmp_path / f"rows.jsonl.{ending}").write_bytes(whole)
    assert read(tmp_path / f"rows.jsonl.{ending}") == many
    (tmp_path / f"rows.json.{ending}").write_bytes(compress(json.dumps(many[:2]).encode()))
    assert read_rows(str(tmp_path / f"rows.json.{ending}")).place(1).endswith(": row 2")
    (tmp_path / f"book.txt.{ending}").write_bytes(compress(b"Once"))
    assert read(tmp_path / f"book.txt.{ending}") == [{"text": "Once"}]
    (tmp_path / f"cut.jsonl.{ending}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jsonl\..* cannot be unpacked as .*; it may be cut off or damaged"):
        read(tmp_path / f"cut.jsonl.{ending}")
    (tmp_path / f"no.jsonl.{ending}").write_bytes(b"{}" * 99)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        read(tmp_path / f"no.jsonl.{ending}")
    (tmp_path / f"rows.parquet.{ending}").write_bytes(whole)
    with pytest.raises(ValueError, match=r"a compressed file must be one of \.jsonl"):
        read(tmp_path / f"rows.parquet.{ending}")


@pytest.mark.parametrize("ending, delimiter", [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_tables_of_text(ending: str, delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerows([["messages", "tools"], [json.dumps(TURNS), ""], [json.dumps(TURNS), json.dumps([TOOL])]])
        table.writerows([["{", ""], ["a\nb", ""], ["x"]])
    rows = read_rows(str(path))
    first, second, third, _, last = contents(rows)
    assert parse(first) == parse(CHAT)
    assert parse(second) == parse({**CHAT, "tools": [TOOL]})
    with pytest.raises(BadRow, match="has messages that are not JSON"):
        parse(third)
    assert str(last) == "has 1 fields, but the first line names 2"
    assert [rows.place(i).rpartition(".")[2] for i in range(5)] == [f"{ending}:{n}" for n in (2, 3, 4, 5, 7)]


def test_words_of_tables_stay_words(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\n1 + 1?,2\nNothing?,null\nEmpty?,NA\n")
    assert [parse(row).completion[0]["content"] for row in read(tmp_path / "rows.csv")] == ["2", "null", "NA"]  # type: ignore[index]


def test_tables_of_text_that_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b'text\n"a"b\nc\n\xff\n"never closed\nmore\n')
    rows = read_rows(str(tmp_path / "rows.csv"))
    problems = [(rows.place(i)[-2:], str(content)) for i, content in enumerate(contents(rows))]
    assert problems[1] == (":3", "{'text': 'c'}")
    assert problems[0][0] == ":2"
    assert "is not a row of a table" in problems[0][1]
    assert problems[2] == (":4", "is not UTF-8")
    assert problems[3][0] == ":5"
    assert "unexpected end of data" in problems[3][1]
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    with pytest.raises(ValueError, match="two columns have the same name"):
        read(tmp_path / "twice.csv")


def test_directories(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([TEXT, TEXT])
    table.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == [TEXT, TEXT]
    splits = datasets.DatasetDict({"train": table, "test": table.select([0])})
    splits.save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "splits", split="test") == [TEXT]
    with pytest.raises(ValueError, match=r"--split: .*splits has no validation, but has train, test"):
        read(tmp_path / "splits", split="validation")
    (tmp_path / "files").mkdir()
    lines(tmp_path / "files" / "train.jsonl", CHAT)
    assert read(tmp_path / "files") == [CHAT]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"--dataset .*empty has no file that can be read"):
        read(tmp_path / "empty")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a data set of save_to_disk"):
        read(tmp_path / "saved")


def test_rows_of_a_directory_are_named_by_file_and_line(tmp_path: Path) -> None:
    """Files in directories below it are read, too. Each row stays as it was written."""
    directory = tmp_path / "files"
    (directory / "more").mkdir(parents=True)
    lines(directory / "a.jsonl", CHAT, {**CHAT, "tools": [TOOL]})
    lines(directory / "b.jsonl", CHAT, "", "{", {"id": "2020-01-01 00:00:00"})
    lines(directory / "more" / "c.jsonl", {"messages": 3})
    (directory / "more" / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps(CHAT).encode()))
    (directory / "more" / "e.json").write_text(json.dumps([TEXT, "words"]))
    rows = read_rows(str(directory))
    places = [str(Path(rows.place(i)).relative_to(directory)) for i in range(len(rows))]
    assert places == [
        "a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:3", "b.jsonl:4", "more/c.jsonl:1", "more/d.jsonl.gz:1",
        "more/e.json: row 1", "more/e.json: row 2",
    ]  # fmt: skip
    found = contents(rows)
    assert str(found.pop(3)).startswith("is not JSON (")
    assert found == [
        CHAT, {**CHAT, "tools": [TOOL]}, CHAT, {"id": "2020-01-01 00:00:00"}, {"messages": 3}, CHAT, TEXT, {"text": "words"}
    ]  # fmt: skip


def test_a_directory_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    lines(tmp_path / "real" / "a.jsonl", TEXT, TEXT)
    monkeypatch.chdir(tmp_path)
    assert read_rows("link").place(1) == "link/a.jsonl:2"


@pytest.mark.parametrize("ending, delimiter", [("csv", ","), ("tsv", "\t")])
def test_tables_of_text_in_a_directory(ending: str, delimiter: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{ending}").write_text(delimiter.join(("question", "answer")) + "\n" + delimiter.join("12") + "\n")
    (tmp_path / f"b.{ending}").write_text(f'answer{delimiter}question\n3{delimiter}"4\n"\nnull{delimiter}6\n7\n')
    rows = read_rows(str(tmp_path))
    *found, last = contents(rows)
    assert [parse(row).completion[0]["content"] for row in found] == ["2", "3", "null"]  # type: ignore[index]
    assert found[1] == {"question": "4\n", "answer": "3"}
    assert str(last) == "has 1 fields, but the first line names 2"
    assert [Path(rows.place(i)).name for i in range(4)] == [
        f"a.{ending}:2", f"b.{ending}:2", f"b.{ending}:4", f"b.{ending}:5"
    ]  # fmt: skip


def test_texts_in_a_directory(tmp_path: Path) -> None:
    """Each line is a row, as ``datasets`` reads such files. A file that is given by itself is one row."""
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("\ufeffthree\r\n\nfour\u2028 five")
    rows = read_rows(str(tmp_path))
    assert contents(rows) == [{"text": text} for text in ("one", "two", "three", "", "four\u2028 five")]
    assert [Path(rows.place(i)).name for i in range(5)] == ["a.txt:1", "a.txt:2", "b.txt:1", "b.txt:2", "b.txt:3"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_in_a_directory(kind: str, tmp_path: Path) -> None:
    table = datasets.Dataset.from_list([TEXT, TEXT])
    for name, count in (("a", 2), ("b", 1), ("c", 2)):
        part = table.select(range(count))
        if kind == "parquet":
            part.to_parquet(tmp_path / f"{name}.parquet")
        else:
            part.save_to_disk(tmp_path / "saved")
            (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / f"{name}.arrow")
            shutil.rmtree(tmp_path / "saved")
    rows = read_rows(str(tmp_path))
    assert contents(rows) == [TEXT] * 5
    assert [Path(rows.place(i)).name for i in range(5)] == [
        f"{name}.{kind}: row {number}" for name, number in (("a", 1), ("a", 2), ("b", 1), ("c", 1), ("c", 2))
    ]


def test_splits_of_a_directory(tmp_path: Path) -> None:
    """By the names of its files. A part of a split has no file to name, so that its rows are counted."""
    lines(tmp_path / "train.jsonl", TEXT, TEXT, TEXT)
    lines(tmp_path / "test.jsonl", TEXT)
    assert read_rows(str(tmp_path)).place(2) == f"{tmp_path}/train.jsonl:3"
    assert read_rows(str(tmp_path), split="test").place(0) == f"{tmp_path}/test.jsonl:1"
    assert read_rows(str(tmp_path), split="train[1:]").place(0) == f"{tmp_path}: row 1"
    with pytest.raises(ValueError, match=r'--dataset .*: Unknown split "validation"'):
        read(tmp_path, split="validation")


def test_a_directory_whose_card_says_how_files_are_read(tmp_path: Path) -> None:
    card = (
        "---\nconfigs:\n- config_name: a\n  data_files: a.csv\n  sep: ';'\n- config_name: b\n  data_files: b.csv\n---\n"
    )
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "a.csv").write_text("prompt;text\na;words\n")
    (tmp_path / "b.csv").write_text("prompt,text\nb,words\n")
    assert read(tmp_path, config="a") == [{"prompt": "a", "text": "words"}]
    rows = read_rows(str(tmp_path), config="b")
    assert contents(rows) == [{"prompt": "b", "text": "words"}]
    assert rows.place(0) == f"{tmp_path}/b.csv:2"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("b.jsonl", b"\xff\xfe{", r"b\.jsonl must be UTF-8, but begins with the byte order mark of UTF-16"),
        ("b.json", b'[{"text": 1},', r"b\.json is not JSON"),
        ("b.jsonl.gz", b"no archive", r"b\.jsonl\.gz cannot be unpacked as gzip"),
        ("b.parquet", b"PAR1", r"--dataset .* cannot be read: "),
    ],
)
def test_a_file_of_a_directory_that_cannot_be_read(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        datasets.Dataset.from_list([TEXT]).to_parquet(tmp_path / "a.parquet")
    else:
        lines(tmp_path / "a.jsonl", TEXT)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_directory_of_files_without_rows(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=f"{tmp_path} has no row to train on"):
        read(tmp_path)
    lines(tmp_path / "b.jsonl", TEXT)  # one that has rows is enough
    assert read(tmp_path) == [TEXT]


def test_pictures_are_not_looked_at(tmp_path: Path) -> None:
    """Decoding them takes packages and time, for a row that is refused."""
    features = datasets.Features({"text": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    rows = [{"text": "a", "images": []}, {"text": "b", "images": [{"bytes": b"no picture", "path": None}]}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    first, second = read(tmp_path / "rows.parquet")
    assert parse(first).text == "a"
    with pytest.raises(BadRow, match="has images, but only text can be trained on"):
        parse(second)


# --- places


def test_lines_that_are_not_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(
        json.dumps(TEXT).encode() + b'\n{"text": "\xff"}\n\n{\n' + b"[" * 100000 + b"\n"
    )
    rows = read_rows(str(tmp_path / "rows.jsonl"))
    first, *others = map(str, contents(rows))
    assert first == str(TEXT)
    assert [rows.place(i).rpartition(":")[2] for i in range(4)] == ["1", "2", "4", "5"]
    assert others[0] == "is not UTF-8"
    assert others[1].startswith("is not JSON (")
    assert others[2].startswith("is not JSON (")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("book.txt", b"Once \xff", r"book\.txt must be UTF-8: .* at byte 5"),
        ("book.txt", b" \n", r"book\.txt is empty"),
        ("rows.jsonl", b"\n\n", r"rows\.jsonl has no row to train on"),
        ("rows.json", b"[]", r"rows\.json has no row to train on"),
        ("rows.csv", b"text\n", r"rows\.csv has no row to train on"),
        ("rows.json", b'[{"text": "a"},\n', r"rows\.json is not JSON \(.*line 2"),
        ("rows.json", b'["\xff"]', r"rows\.json must be UTF-8"),
        ("rows.json", b"3", r"rows\.json must be a list of objects, but is a int"),
        ("rows.json", b'{"data": [{"text": "a"}]}', r"an object with its rows in data: jq '\.data' extracts them"),
        ("rows.parquet", b"PAR1", r"rows\.parquet cannot be read as parquet"),
        ("rows.xlsx", b"", r"--dataset must be a file with one of the endings .*: save the sheet as \.csv"),
        ("rows.zip", b"", "unpack it and name the file inside"),
        ("rows.docx", b"", r"save its text as \.txt"),
        ("rows.pkl", b"", "to_parquet or to_json"),
        ("rows", b"", r"endings \.jsonl, .*, a directory or a Hub id"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_table_of_other_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"a": 1, "b": 2}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet needs messages, .*, but has a, b: rename"):
        read(tmp_path / "rows.parquet")


def test_a_file_that_changes_in_place_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}')
    before = path.stat()
    assert read(path) == [{"text": "one"}]
    path.write_text('{"text": "two"}')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(path) == [{"text": "two"}]


def test_what_is_not_there() -> None:
    for name in ("./rows.parquet", "./rows.jsonl.gz", "rows.TSV"):
        with pytest.raises(FileNotFoundError, match=f"--dataset {name} is missing"):
            read(name)
    with pytest.raises(
        FileNotFoundError,
        match=r"--dataset nobody/nothing is not a file, is not in the cache, and the Hub cannot be reached",
    ):
        read("nobody/nothing")  # tests are offline
