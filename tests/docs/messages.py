"""The messages that the code has, as patterns, for quotations of them to be looked up in."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from tests.support import REPOSITORY

VARIES = "…"
# Words of the message itself that a quotation must have: fewer would fit messages that it does not mean.
WORDS = 2
_SOURCES = ("moe_fused", "torch-ext/qwen3_moe_fused")


def _text(node: ast.AST) -> str | None:
    """A string with ``VARIES`` for each value in it; None of what is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or VARIES for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None and right is None else (left or VARIES) + (right or VARIES)
    return None


@functools.cache
def messages() -> frozenset[str]:
    """Every string of the sources but their docstrings."""
    found = set()
    for source in _SOURCES:
        for path in (REPOSITORY / source).rglob("*.py"):
            found |= _of(path)
    return frozenset(found)


def _of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    texts = {_text(node) for node in ast.walk(tree) if id(node) not in docstrings}
    return {text for text in texts if text}


def is_message(quotation: str) -> bool:
    """Whether the words between what varies stand in one message, in that order and with something varying between.

    Nothing is one that has fewer than ``WORDS`` words of its own.
    """
    parts = [part for part in quotation.split(VARIES) if part.strip()]
    if len(re.findall(r"\w{2,}", " ".join(parts))) < WORDS:
        return False
    for message in messages():
        place = 0
        for part in parts:
            found = message.find(part, place)
            # Between two parts something varies; nothing varies within one, for the message has VARIES there.
            if found < 0 or (place and VARIES not in message[place:found]):
                break
            place = found + len(part)
        else:
            return True
    return False
