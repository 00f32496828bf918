"""The data sets that ``--dataset`` names, with the share that each has in what a run trains on.

This module imports nothing heavy.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# The value of the option ``dataset``: a data set, or a list of them. The items are strings, as on the command line, or
# mappings of the fields of ``Part``.
Datasets = str | list[str | dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """A data set of a run.

    Attributes:
        dataset: A path or a Hub id.
        share: How often rows of this data set are drawn, relative to the shares of the others. None if no data set has
            a share.
        split: The split of this data set; None for that of ``--split``.
        config: The configuration of this data set; None for that of ``--dataset-config``.
    """

    dataset: str
    share: float | None = None
    split: str | None = None
    config: str | None = None

    @property
    def name(self) -> str:
        """The data set, with its own configuration and split if it has them."""
        own = [f"{what} {value}" for what, value in (("config", self.config), ("split", self.split)) if value]
        return f"{self.dataset} ({', '.join(own)})" if own else self.dataset

    def __str__(self) -> str:
        return self.name if self.share is None else f"{self.name}={str(self.share).removesuffix('.0')}"

    def written(self) -> str | dict[str, Any]:
        """Returns the item of a list of data sets that ``part_of`` reads back, wherever files lie by then."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return self.dataset if len(given) == 1 and "=" not in self.dataset else given


def part_of(item: str | Mapping[str, Any]) -> Part:
    """Reads a data set from an item of ``--dataset``: ``NAME``, ``NAME=SHARE`` or a mapping.

    A path that contains ``=`` is a path if it exists.

    Raises:
        ValueError: What follows the last ``=`` is no number, and what is before it is a path that exists.
    """
    if not isinstance(item, str):
        share = item.get("share")
        return Part(**{**item, "share": None if share is None else float(share)})
    name, _, number = item.rpartition("=")
    if not name or Path(item).exists():
        return Part(item)
    try:
        return Part(name, float(number))
    except ValueError:
        if not Path(name).exists():
            return Part(item)
        raise ValueError(f"--dataset {item}: the share after = must be a number, got {number!r}") from None


def parts_of(value: Datasets) -> tuple[Part, ...]:
    """Reads the data sets that the option ``dataset`` names."""
    return tuple(map(part_of, [value] if isinstance(value, str) else value))


def written(parts: Sequence[Part]) -> Datasets:
    """Returns the value of the option ``dataset`` that stands for ``parts``. A single name stays a string."""
    if len(parts) == 1 and parts[0] == Part(parts[0].dataset):
        return parts[0].dataset
    return [part.written() for part in parts]


def check_form(value: object) -> Datasets:
    """Checks that a value from a YAML file has the form of the option ``dataset``, and returns it.

    Raises:
        ValueError: The value has another form. The message is only what is needed.
    """
    items: list[Any] = value if isinstance(value, list) else [value]
    for key in (key for item in items if isinstance(item, dict) for key in item):
        if key not in _FIELDS:
            near = difflib.get_close_matches(str(key), _FIELDS, n=1, cutoff=0.4)
            hint = f", the nearest is {near[0]}" if near else ""
            raise ValueError(f"made of data sets with {', '.join(_FIELDS)}: there is no key {key}{hint}")
    if not items or not all(isinstance(item, str) or _is_mapping_of_part(item) for item in items):
        raise ValueError("a string, or a list of strings and of mappings with dataset, share, split and config")
    return value if isinstance(value, str) else items


_FIELDS = tuple(field.name for field in fields(Part))


def _is_mapping_of_part(item: object) -> bool:
    if not isinstance(item, dict):
        return False
    texts = {name: value for name, value in item.items() if name != "share"}
    share = item.get("share")
    return (
        "dataset" in item
        and all(isinstance(value, str) and value for value in texts.values())
        and (share is None or (isinstance(share, (int, float)) and not isinstance(share, bool)))
    )


def check_parts(parts: Sequence[Part]) -> None:
    """Raises ValueError if data sets have shares that cannot be, or if one of them is there twice."""
    for part in parts:
        if part.share is not None and not (math.isfinite(part.share) and part.share > 0):
            raise ValueError(
                f"--dataset {part}: a share must be a finite number above 0; to leave a data set out, do not name it"
            )
    shares = [part.share for part in parts if part.share is not None]
    if shares and len(parts) == 1:
        raise ValueError(
            f"--dataset {parts[0]}: there is no file of this name, and as a share it needs a second --dataset"
        )
    if 0 < len(shares) < len(parts):
        without = next(part for part in parts if part.share is None)
        raise ValueError(f"--dataset {without} has no share, but others do: give each a share (NAME=SHARE) or none")
    if not math.isfinite(sum(shares)):
        raise ValueError("--dataset: the sum of the shares must be finite")
    if len(parts) > 1 and not all(part.dataset for part in parts):
        raise ValueError("--dataset must name a file, a directory or a Hub id, got an empty value")
    counts = Counter((_place(part.dataset), part.split, part.config) for part in parts)
    twice = next((part for part in parts if counts[_place(part.dataset), part.split, part.config] > 1), None)
    if twice is not None:
        raise ValueError(f"--dataset {twice.name} is given twice: a larger share makes its rows more frequent")


def _place(dataset: str) -> str:
    path = Path(dataset)
    return str(path.resolve()) if dataset and path.exists() else dataset
