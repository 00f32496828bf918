"""Reads files of text as rows: .jsonl, .json, .csv, .tsv and .txt, also compressed.

Each row keeps its line. A row that can be read becomes a JSON text, as it was written. A line that is not a row becomes
an item with a problem, and reading goes on after it.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from .formats import FIELDS

JSON_LINES = (".jsonl", ".ndjson")
TEXT = (".txt", ".md", ".text")
SEPARATED = {".csv": ",", ".tsv": "\t"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".xz": "xz"}
# The endings of files that this module reads.
ENDINGS = (*JSON_LINES, ".json", *TEXT, *SEPARATED)

# The number of a row, counted from 1, its JSON text or None, and its problem or None.
Item = tuple[int, str | None, str | None]

# Byte order marks of UTF-8 and UTF-16, and white space in either of them.
_BEFORE_CONTENT = b"\xef\xbb\xbf\xff\xfe\x00 \t\r\n"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def endings_of(path: Path) -> tuple[str, str | None]:
    """Returns the ending that says what is in a file, in lower case, and the name of its compression or None."""
    ending = path.suffix.lower()
    if ending in COMPRESSED:
        return Path(path.stem).suffix.lower(), COMPRESSED[ending]
    return ending, None


@dataclass(frozen=True)
class TextFile:
    """A file of rows.

    Attributes:
        path: The path of the file.
        name: The name of the file in errors.
        ending: The ending of the file, without that of its compression. It is one of ``ENDINGS``.
        compression: The name of the compression, or None.
        alone: Whether the file is the whole data set. A file of plain text is then one row. If it is one of several
            files in a directory, each of its lines is a row, and a string in a JSON list is a row of text. The library
            ``datasets`` reads directories in this way.
    """

    path: Path
    name: str
    ending: str
    compression: str | None
    alone: bool

    @classmethod
    def at(cls, path: Path, name: str, *, alone: bool) -> TextFile:
        """Describes the file at ``path`` by its endings."""
        return cls(path, name, *endings_of(path), alone)

    @property
    def unit(self) -> str | None:
        """The text between the name of the file and the number of a row. It is None if the whole file is one row."""
        if self.ending in TEXT:
            return None if self.alone else ":"
        return ": row " if self.ending == ".json" and self._is_list() else ":"

    def _is_list(self) -> bool:
        with self._open() as file:
            return file.read(4096).lstrip(_BEFORE_CONTENT).startswith(b"[")

    def _open(self) -> IO[bytes]:
        if self.compression is None:
            return self.path.open("rb")
        if self.compression == "xz":
            return lzma.open(self.path, "rb")
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(self.path), compression=self.compression))

    def items(self) -> Iterator[Item]:
        """Yields the rows of the file.

        Raises:
            ValueError: The file as a whole is damaged, or its content is not what its ending says.
        """
        try:
            with self._open() as file:
                yield from self._reader()(self.name, file)
        except (OSError, EOFError, lzma.LZMAError) as error:
            if self.compression is None:
                raise
            raise ValueError(
                f"{self.name} cannot be unpacked as {self.compression}; it may be cut off or damaged: {error}"
            ) from None

    def _reader(self) -> Callable[[str, IO[bytes]], Iterator[Item]]:
        if self.ending in TEXT:
            return _whole_text if self.alone else _lines_of_text
        if self.ending in SEPARATED:
            return _comma_separated if self.ending == ".csv" else _tab_separated
        if self.ending in JSON_LINES:
            return _json_lines
        return _json if self.alone else _json_with_texts


def _decoded(name: str, content: bytes) -> str:
    """Decodes ``content`` and removes a byte order mark.

    Raises:
        ValueError: The content is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    encoding = "utf-16" if content.startswith(_UTF_16) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8: {error.reason} at byte {error.start}") from None


def _check_not_utf_16(name: str, begin: bytes) -> None:
    """Raises ValueError if the first bytes of a file are the byte order mark of UTF-16."""
    if begin.startswith(_UTF_16):
        raise ValueError(f"{name} must be UTF-8, but begins with the byte order mark of UTF-16")


# --- plain text


def _whole_text(name: str, file: IO[bytes]) -> Iterator[Item]:
    """Yields a file of plain text as a single row."""
    text = _decoded(name, file.read())
    if not text.strip():
        raise ValueError(f"{name} is empty")
    # Line breaks as Path.read_text reads them.
    yield 1, json.dumps({"text": text.replace("\r\n", "\n").replace("\r", "\n")}), None


def _lines_of_text(name: str, file: IO[bytes]) -> Iterator[Item]:
    """Yields each line of a file of plain text as a row."""
    for number, line in enumerate(_text(name, file, newline=None), 1):
        if _is_utf_8(line):
            yield number, json.dumps({"text": line.removesuffix("\n")}), None
        else:
            yield number, None, "is not UTF-8"


def _text(name: str, file: IO[bytes], newline: str | None) -> io.TextIOWrapper:
    """Opens a file as UTF-8 without a byte order mark. Bytes that are not UTF-8 become code points of surrogates."""
    buffered = io.BufferedReader(file)  # type: ignore[type-var]  # files have the type IO[bytes], which is no RawIOBase
    _check_not_utf_16(name, buffered.peek(2)[:2])
    return io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _is_utf_8(text: str) -> bool:
    return not any("\udc80" <= letter <= "\udcff" for letter in text)


# --- JSON


def _json_lines(name: str, file: IO[bytes]) -> Iterator[Item]:
    """Yields each line of a file as a row. It ignores empty lines."""
    for number, line in enumerate(file, 1):
        if number == 1:
            _check_not_utf_16(name, line)
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            yield number, None, "is not UTF-8"
            continue
        if text:
            yield number, text, None


def _json(name: str, file: IO[bytes]) -> Iterator[Item]:
    """Yields the rows of a file that holds a list of rows, a single row, or a row on each line."""
    content = file.read()
    lines = not content.lstrip(_BEFORE_CONTENT).startswith(b"[")
    try:
        rows = json.loads(_decoded(name, content))
    except (ValueError, RecursionError) as error:
        if lines:
            yield from _json_lines(name, io.BytesIO(content))
            return
        raise ValueError(str(error) if name in str(error) else f"{name} is not JSON ({error})") from None
    if isinstance(rows, dict):
        inside = next((key for key, value in rows.items() if _is_rows(value)), None)
        if inside is not None and not _is_row(rows):
            raise ValueError(
                f"{name} must be a list of rows, but is an object with its rows in {inside}: jq '.{inside}' extracts them"
            )
        rows = [rows]
    if not isinstance(rows, list):
        raise ValueError(f"{name} must be a list of objects, but is a {type(rows).__name__}")
    yield from ((number, json.dumps(row), None) for number, row in enumerate(rows, 1))


def _json_with_texts(name: str, file: IO[bytes]) -> Iterator[Item]:
    """Yields the rows of a JSON file. A string becomes a row of plain text."""
    for number, row, problem in _json(name, file):
        is_string = row is not None and row.startswith('"')
        yield number, json.dumps({"text": json.loads(row)}) if row and is_string else row, problem


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and _is_row(value[0])


def _is_row(value: object) -> bool:
    return isinstance(value, dict) and not FIELDS.isdisjoint(value)


# --- tables of text


def _comma_separated(name: str, file: IO[bytes]) -> Iterator[Item]:
    return _separated(name, file, ",")


def _tab_separated(name: str, file: IO[bytes]) -> Iterator[Item]:
    return _separated(name, file, "\t")


def _separated(name: str, file: IO[bytes], delimiter: str) -> Iterator[Item]:
    """Yields the rows of a table of text, each with the line on which it begins."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # Without strict, a quote that is never closed would take the rest of the file as its field, without an error.
    lines = csv.reader(_text(name, file, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        number = lines.line_num + 1
        try:
            values = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, None, f"is not a row of a table ({error})"
            continue
        if columns is None:
            columns = values
            _check_columns(f"{name}:{number}", columns, delimiter)
        elif not all(map(_is_utf_8, values)):
            yield number, None, "is not UTF-8"
        elif values and len(values) == len(columns):
            yield number, json.dumps(dict(zip(columns, values, strict=True))), None
        elif values:
            yield number, None, f"has {len(values)} fields, but the first line names {len(columns)}"


def _check_columns(where: str, columns: list[str], delimiter: str) -> None:
    """Raises ValueError if the first line of a table, at ``where``, cannot be the names of its columns."""
    if len(columns) == 1 and (other := next((letter for letter in ";\t|" if letter in columns[0]), None)):
        raise ValueError(f"{where}: fields must be separated by {delimiter!r}, not by {other!r}")
    if len(set(columns)) < len(columns):
        raise ValueError(f"{where}: two columns have the same name, there are {', '.join(columns)}")
