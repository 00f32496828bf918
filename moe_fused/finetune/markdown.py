"""Markdown of values that users have chosen, which may hold any characters."""

from __future__ import annotations

import re
from collections.abc import Mapping


def code(text: str) -> str:
    """``text`` as code within a line, with its line breaks as spaces."""
    line = " ".join(text.split())
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def fenced(language: str, text: str) -> str:
    """``text`` as a block of code."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(content: Mapping[str, str]) -> str:
    """A table of two columns without headings. All characters stand for themselves."""
    rows = (f"| {_cell(name)} | {_cell(value)} |" for name, value in content.items())
    return "\n".join(("| | |", "|---|---|", *rows))


def _cell(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace("://", ":&#47;/")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
