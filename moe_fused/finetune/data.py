"""The rows to train on. Each is checked before anything is loaded, and what is wrong with one is said with its place.

A row is one of these, and a data set has one kind of them:

    {"messages": [{"role": "user", "content": "…"}, …]}          a chat; "conversations" with from and value as well
    {"prompt": …, "completion": …}                               two strings, or two lists of messages
    {"text": "…"}                                                plain text
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["chat", "completion", "text"]
Row = dict[str, Any]

_READERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_JSON = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".md", ".text")
# Bad rows that are named one by one.
_NAMED = 5


@dataclass
class Rows:
    """Rows that can be trained on.

    Attributes:
        kind: of all of them.
        rows: with the fields that belong to the kind and no others.
        skipped: what was wrong with those that were left out, with their places.
        plain_file: whether they are the text of a file without rows.
    """

    kind: Kind
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    plain_file: bool = False

    def dataset(self) -> Dataset:
        from datasets import Dataset

        # from_list takes the columns of the first row for those of all.
        names = dict.fromkeys(name for row in self.rows for name in row)
        return Dataset.from_dict({name: [row.get(name) for row in self.rows] for name in names})


class BadRow(ValueError):
    """A row that cannot be trained on; says why."""


def load_rows(
    dataset: str, *, config: str | None = None, split: str = "train", text_field: str = "text", skip_bad: bool = False
) -> Rows:
    """The rows of a file or of a data set on the Hub.

    Args:
        dataset: path of a file, or Hub id.
        config, split: of the data set on the Hub.
        text_field: the field with plain text.
        skip_bad: leave bad rows out.

    Raises:
        FileNotFoundError: no such file, and no such data set on the Hub.
        ValueError: a row that cannot be trained on, with its file and line; nothing but such rows; a kind of file that
            is not known.
    """
    path = Path(dataset)
    if path.suffix in _TEXT and path.is_file():
        return _plain(path)
    source = _json_lines(path) if path.suffix in _JSON and path.is_file() else _with_datasets(dataset, config, split)
    return _check_all(source, dataset, text_field, skip_bad)


def _plain(path: Path) -> Rows:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return Rows("text", [{"text": text}], plain_file=True)


def _json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """The place and content of each row; content is a BadRow where the line is not JSON."""
    if path.suffix == ".json":  # a list, unless it is lines under another name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if isinstance(content, list):
            yield from ((f"{path}: row {i}", row) for i, row in enumerate(content, 1))
            return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                yield place, json.loads(line.strip())
            except UnicodeDecodeError:
                yield place, BadRow("is not UTF-8")
            except ValueError as error:
                yield place, BadRow(f"is not JSON ({error})")


def _with_datasets(dataset: str, config: str | None, split: str) -> Iterator[tuple[str, object]]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    path = Path(dataset)
    if path.is_file():
        if path.suffix not in _READERS:
            known = ", ".join((*_JSON, *_TEXT, *_READERS))
            raise ValueError(f"--dataset must be a file with one of the endings {known}, or a Hub id, got {dataset}")
        rows = datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
    elif path.suffix in (*_JSON, *_TEXT, *_READERS) or path.is_absolute() or dataset.startswith("."):
        raise FileNotFoundError(f"--dataset {dataset} is missing")
    else:
        try:
            rows = datasets.load_dataset(dataset, config, split=split)
        except (datasets.exceptions.DatasetNotFoundError, HfHubHTTPError, HFValidationError, ConnectionError) as error:
            raise FileNotFoundError(
                f"--dataset {dataset}: no such file, and not to be had from the Hub: {error}"
            ) from None
    for number, row in enumerate(rows, 1):
        yield f"{dataset}: row {number}", row


def _check_all(source: Iterable[tuple[str, object]], dataset: str, text_field: str, skip_bad: bool) -> Rows:
    result: Rows | None = None
    bad: list[str] = []
    first = ""
    for place, content in source:
        checked = _checked(content, text_field)
        if isinstance(checked, BadRow):
            bad.append(f"{place} {checked}")
            continue
        kind, row = checked
        if result is None:
            result, first = Rows(kind), place
        if kind != result.kind:
            bad.append(f"{place} is {kind}, but {first} is {result.kind}")
        elif result.rows and is_text(row) != is_text(result.rows[0]):
            forms = ("messages", "text") if is_text(result.rows[0]) else ("text", "messages")
            bad.append(f"{place} has a prompt of {forms[0]}, but {first} one of {forms[1]}")
        else:
            result.rows.append(row)
    if bad and not skip_bad:
        more = f"; {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise ValueError("; ".join(bad[:_NAMED]) + more + "; --skip-bad-rows leaves out what is bad")
    if result is None:
        raise ValueError(f"{dataset} has no row to train on" + (f": {bad[0]}" if bad else ""))
    result.skipped = bad
    return result


def is_text(row: Row) -> bool:
    """Whether a row with a prompt has it as text, not as messages."""
    return isinstance(row.get("prompt", ""), str)


def _checked(content: object, text_field: str) -> tuple[Kind, Row] | BadRow:
    try:
        return _check(content, text_field)
    except BadRow as error:
        return error


def _check(content: object, text_field: str) -> tuple[Kind, Row]:
    """The kind of a row, and the row with what belongs to its kind; raises BadRow."""
    if isinstance(content, BadRow):
        raise content
    if not isinstance(content, Mapping):
        raise BadRow(f"must be an object, is a {type(content).__name__}")
    if (messages := content.get("messages")) is not None:
        extra = {name: content[name] for name in ("tools", "chat_template_kwargs") if content.get(name)}
        return "chat", {"messages": _messages("messages", messages, "role", "content"), **extra}
    if (turns := content.get("conversations")) is not None:
        openai = isinstance(turns, list) and any(isinstance(turn, Mapping) and "role" in turn for turn in turns)
        keys = ("role", "content") if openai else ("from", "value")
        return "chat", {"conversations": _messages("conversations", turns, *keys)}
    if "prompt" in content or "completion" in content:
        return "completion", _completion(content)
    if text_field in content:
        return "text", {"text": _string(text_field, content[text_field])}
    raise BadRow(
        f"lacks messages, conversations, prompt and completion, and {text_field}, it has {', '.join(content) or 'nothing'}"
    )


def _completion(content: Mapping[str, Any]) -> Row:
    for name in ("prompt", "completion"):
        if content.get(name) is None:
            raise BadRow(f"lacks {name}")
    prompt, completion = content["prompt"], content["completion"]
    if isinstance(prompt, str) != isinstance(completion, str):
        raise BadRow("must have strings or lists of messages as prompt and completion, has one of each")
    read: Callable[[str, Any], Any] = _string if isinstance(prompt, str) else _chat
    return {"prompt": read("prompt", prompt), "completion": read("completion", completion)}


def _chat(name: str, messages: object) -> list[Row]:
    return _messages(name, messages, "role", "content")


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRow(f"must have a string as {name}, has {type(value).__name__}")
    if not value.strip():
        raise BadRow(f"has an empty {name}")
    return value


def _messages(name: str, messages: object, role: str, content: str) -> list[Row]:
    if not isinstance(messages, list):
        raise BadRow(f"must have a list as {name}, has {type(messages).__name__}")
    if not messages:
        raise BadRow(f"has empty {name}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadRow(f"must have objects in {name}, {name}[{i}] is a {type(message).__name__}")
        if not isinstance(message.get(role), str):
            raise BadRow(f"lacks {role} in {name}[{i}]")
        if not isinstance(message.get(content), str) and not message.get("tool_calls"):
            raise BadRow(f"lacks {content} in {name}[{i}]")
    return messages
