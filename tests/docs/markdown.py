"""The Markdown files of the repository, and what is in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.support import REPOSITORY

_OUTSIDE = {"build", "dist", "demo-output", "examples-output", "node_modules"}
_PARSER = MarkdownIt("commonmark").enable("table")


def _files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name in _OUTSIDE or path.is_symlink():
            continue
        if path.is_dir():
            yield from _files(path)
        elif path.suffix == ".md":
            yield path


FILES = list(_files(REPOSITORY))


def name(path: Path) -> str:
    """The name of a file in test ids and messages."""
    return path.relative_to(REPOSITORY).as_posix()


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        path, line: where the block begins.
        language: the word behind the opening fence.
    """

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name(self.path)}:{self.line}"


def _tokens(path: Path) -> Iterator[Token]:
    for token in _PARSER.parse(path.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def blocks(path: Path) -> list[Block]:
    return [
        Block(path, token.map[0] + 1 if token.map else 0, token.info.strip(), token.content)
        for token in _tokens(path)
        if token.type == "fence"
    ]


def spans(path: Path) -> list[str]:
    """The pieces of code within text."""
    return [token.content for token in _tokens(path) if token.type == "code_inline"]


def lone_spans(path: Path) -> list[str]:
    """The paragraphs that hold code and nothing else."""
    children = [token.children or [] for token in _PARSER.parse(path.read_text(encoding="utf-8"))]
    return [tokens[0].content for tokens in children if len(tokens) == 1 and tokens[0].type == "code_inline"]


def links(path: Path) -> list[str]:
    """The targets of links and images."""
    found = []
    for token in _tokens(path):
        target = token.attrGet("href") if token.type == "link_open" else token.attrGet("src")
        if token.type in ("link_open", "image") and isinstance(target, str):
            found.append(target)
    return found


def word_count(path: Path) -> int:
    """The number of words outside tables and blocks of code."""
    count, tables = 0, 0
    for token in _PARSER.parse(path.read_text(encoding="utf-8")):
        tables += (token.type == "table_open") - (token.type == "table_close")
        if token.type == "inline" and not tables:
            text = " ".join(child.content for child in token.children or ())
            count += len(re.findall(r"[^\s\W]\S*", text))
    return count


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    found: set[str] = set()
    tokens = _PARSER.parse(path.read_text(encoding="utf-8"))
    for heading, inline in pairwise(tokens):
        if heading.type != "heading_open":
            continue
        text = "".join(child.content for child in inline.children or ())
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number, unique = 0, slug
        while unique in found:
            number += 1
            unique = f"{slug}-{number}"
        found.add(unique)
    return found
