"""Every patch of ``docs/upstream`` has a text and a row in the table, and the other way round."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .harness import BITSANDBYTES, PEFT, TRANSFORMERS, UPSTREAM, sections

LIBRARIES = {library.name: library for library in (TRANSFORMERS, PEFT, BITSANDBYTES)}
PATCHES = sorted(UPSTREAM.glob("*/*.patch"))


def test_table_lists_every_patch() -> None:
    rows = re.findall(r"^\| .*$", (UPSTREAM / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[1:]
    listed = [re.findall(r"\(([\w-]+/[\w-]+)\.(md|patch)\)", row) for row in rows]
    assert all(len(row) == 2 and row[0][0] == row[1][0] for row in listed)
    assert sorted(row[0][0] for row in listed) == [f"{path.parent.name}/{path.stem}" for path in PATCHES]


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_text_belongs_to_its_patch(path: Path) -> None:
    library = LIBRARIES[path.parent.name]
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert library.version in text
    assert f"]({path.name})" in text
    tests = [name for name, _ in sections(path) if name.startswith("tests/")]
    assert [name for name in tests if f"`{name}`" not in text] == []
