"""Names rows that cannot be trained on, and says what is wrong with them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from .mixture import Part
from .rows import Purpose

# The number of bad rows that are named: in an error, and in the report of a run that leaves them out.
NAMED, NAMED_LEFT_OUT = 5, 20


class Bad(str):
    """A row that cannot be trained on: its place, and its problem as a predicate.

    Attributes:
        place: The place of the row.
        problem: What is wrong with it.
    """

    place: str
    problem: str

    @staticmethod
    def of(place: str, problem: str) -> Bad:
        """Makes the text of both."""
        made = Bad(f"{place} {problem}")
        made.place, made.problem = place, problem
        return made


class RefusedRows(ValueError):
    """Some rows cannot be trained on, and the options do not leave them out.

    Attributes:
        rows: What is wrong with them, without advice.
    """

    def __init__(self, named: Sequence[Bad]) -> None:
        super().__init__(refusal(named))
        self.rows = _several(named)


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _several(named: Sequence[Bad]) -> str:
    """Names rows and their problems, each problem once."""
    places: dict[str, list[str]] = {}
    for bad in named:
        places.setdefault(bad.problem, []).append(bad.place)
    said, left = [], len(named)
    for problem, having in itertools.islice(places.items(), NAMED):
        said.append(f"{having[0]} {problem}" if len(having) == 1 else f"each of {_places(having)} {problem}")
        left -= len(having)
    return "; ".join(said) + (f"; {left:,} more" if left else "")


def _places(places: Sequence[str]) -> str:
    """Names places, as ``rows.jsonl:1-80`` or ``rows.jsonl:1, 4, 9 and 77 more``."""
    spans: list[tuple[str, int, int]] = []
    for place in places:
        name, number = re.fullmatch(r"(.*?)(\d*)", place, re.DOTALL).groups()  # type: ignore[union-attr]  # it matches all
        last = spans[-1] if spans else None
        if number and last is not None and last[0] == name and last[2] + 1 == int(number):
            spans[-1] = (name, last[1], int(number))
        else:
            spans.append((name, int(number or 0), int(number or 0)))
    said: list[str] = []
    named, before = 0, None
    for name, first, last_one in spans[:NAMED]:
        number = "" if not first else str(first) if first == last_one else f"{first}-{last_one}"
        said.append(number if name == before and number else f"{name}{number}")
        named += last_one - first + 1
        before = name
    more = f" and {len(places) - named:,} more" if named < len(places) else ""
    return ", ".join(said) + more


def refusal(named: Sequence[Bad]) -> str:
    """Makes the text of the error about bad rows that are not left out."""
    return _several(named) + "; --skip-bad-rows leaves such rows out"


def no_rows(part: Part, purpose: Purpose, named: Sequence[Bad]) -> str:
    return purpose.lacks_rows(part.name) + (f": {_several(named)}" if named else "")
