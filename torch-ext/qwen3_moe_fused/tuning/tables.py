"""What holds for a target: the analytic defaults, with the tables of measurements laid over them.

A table is a JSON file named for a GPU (``sm_90.json``, ``gfx942.json``) or for a family (``hopper.json``). It holds only
what was measured, in sections that may each be missing:

    {"why": {...}, "gemv_slots": 64, "few_slots": 128, "dequantize_rows": {kernel: rows},
     "buckets": {"dense": {height: rows}, "packed": ...},
     kernel: {bytes per element: {height: fields of a LaunchConfig}}}

"why" is text for people: a string, or a list of strings, for each section. Tables are laid one over the other, entry by
entry: the family's table that ships with this package, then the GPU's, then those two in the directory that the environment
variable ``MOE_FUSED_CONFIGS`` names. An entry is one threshold, or one configuration, with the fields that it leaves out as
in the default. A family's configuration that is too large for one of its GPUs is cut down as the defaults are; in a GPU's
own table it is an error.

Nothing here is tuned on a first call; ``moe-fused tune`` writes tables.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .config import (
    BUCKETS,
    DEFAULT_THRESHOLDS,
    KERNELS,
    KERNELS_4BIT,
    KERNELS_FEW,
    LaunchConfig,
    Thresholds,
    bucket_of_few,
    check,
    check_bucket,
    default_config,
    fitted,
)
from .targets import Target, family_of

CONFIGS = Path(__file__).parent / "configs"
CONFIGS_VARIABLE = "MOE_FUSED_CONFIGS"

# The sections of a table that are not kernels, in the order in which they are written.
THRESHOLD_SECTIONS = ("gemv_slots", "few_slots", "dequantize_rows", "buckets")
SECTIONS = ("why", *THRESHOLD_SECTIONS)

Table = dict[str, Any]
"""A table as JSON has it."""


def table_name(arch: int | str) -> str:
    """The file name of a table for ``arch``."""
    return f"{f'sm_{arch}' if isinstance(arch, int) else arch}.json"


def table_paths(arch: int | str) -> list[Path]:
    """The tables for ``arch`` that exist, each laid over those before it.

    Raises:
        ValueError: ``MOE_FUSED_CONFIGS`` is no directory.
    """
    folders = [CONFIGS]
    if directory := os.environ.get(CONFIGS_VARIABLE):
        folders.append(Path(directory))
        if not folders[-1].is_dir():
            raise ValueError(
                f"{CONFIGS_VARIABLE} must be a directory with tables as {table_name(arch)}, got {directory}"
            )
    # An XPU has the name of its family.
    names = dict.fromkeys((table_name(family_of(arch).name), table_name(arch)))
    return [path for folder in folders for name in names if (path := folder / name).exists()]


class _Reader:
    """Checks the structure of one table, so that every error names the file and the entry."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fields = {field.name for field in fields(LaunchConfig)}

    @staticmethod
    def at(*place: str) -> str:
        """The name of an entry, for an error."""
        return "/".join(place) or "the table"

    def level(self, value: Any, *place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"{self._path}: {self.at(*place)} must be an object, got {json.dumps(value)}")
        return value

    def count(self, value: Any, *place: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(
                f"{self._path}: {self.at(*place)} must be a whole number of at least 0, got {json.dumps(value)}"
            )

    def known(self, name: str, names: tuple[str, ...], *place: str) -> None:
        if name not in names:
            raise ValueError(
                f"{self._path}: {self.at(*place, name)} is not known: {'/'.join(place)} has {', '.join(names)}"
            )

    def table(self, table: Any) -> None:
        for section, value in self.level(table).items():
            if section == "why":
                self._why(value)
            elif section in ("gemv_slots", "few_slots"):
                self.count(value, section)
            elif section == "dequantize_rows":
                for kernel, rows in self.level(value, section).items():
                    self.known(kernel, KERNELS_4BIT, section)
                    self.count(rows, section, kernel)
            elif section == "buckets":
                self._buckets(value)
            else:
                self._configurations(section, value)

    def _why(self, value: Any) -> None:
        for section, text in self.level(value, "why").items():
            lines = text if isinstance(text, list) else [text]
            if not all(isinstance(line, str) for line in lines):
                at = self.at("why", section)
                raise ValueError(f"{self._path}: {at} must be text or a list of texts, got {json.dumps(text)}")

    def _buckets(self, value: Any) -> None:
        for kind, limits in self.level(value, "buckets").items():
            self.known(kind, ("dense", "packed"), "buckets")
            for height, rows in self.level(limits, "buckets", kind).items():
                # The last bucket has no end.
                self.known(height, tuple(map(str, BUCKETS[:-1])), "buckets", kind)
                self.count(rows, "buckets", kind, height)

    def _configurations(self, kernel: str, by_size: Any) -> None:
        for size, by_bucket in self.level(by_size, kernel).items():
            for block_m, values in self.level(by_bucket, kernel, size).items():
                place = (kernel, size, block_m)
                known = kernel in (*KERNELS, *KERNELS_FEW) and size in ("2", "4") and block_m in map(str, BUCKETS)
                if not known or not set(self.level(values, *place)) <= self._fields:
                    raise ValueError(f"{self._path}: {self.at(*place)} does not describe a LaunchConfig: {values}")
                if not all(isinstance(value, int) for value in values.values()):
                    raise ValueError(
                        f"{self._path}: {self.at(*place)} must have whole numbers and booleans, got {values}"
                    )


def read_table(path: Path) -> Table:
    """The table in ``path``.

    Raises:
        ValueError: the file is not a table; says what is wrong with which entry.
        OSError: it cannot be read.
    """
    try:
        table: Table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    _Reader(path).table(table)
    return table


@dataclass(frozen=True)
class _Override:
    """One measured configuration: its file, whether that is a family's, and the fields."""

    path: Path
    of_family: bool
    values: dict[str, Any]


@functools.cache
def _tables(arch: int | str) -> tuple[tuple[Path, Table], ...]:
    """Each table for ``arch`` with its path, each laid over those before it."""
    return tuple((path, read_table(path)) for path in table_paths(arch))


@functools.cache
def _overrides(arch: int | str) -> dict[tuple[str, int, int], _Override]:
    """The measured configurations for ``arch``, by kernel, bucket and bytes per element."""
    own_name = table_name(arch)
    return {
        (kernel, int(block_m), int(size)): _Override(path, path.name != own_name, values)
        for path, table in _tables(arch)
        for kernel, by_size in table.items()
        if kernel not in SECTIONS
        for size, by_bucket in by_size.items()
        for block_m, values in by_bucket.items()
    }


@functools.cache
def _measured_thresholds(arch: int | str) -> Thresholds:
    """The default thresholds, with the measured ones for ``arch`` laid over them.

    Raises:
        ValueError: a table, laid over those before it, lets short tiles serve more rows than tall ones.
    """
    thresholds = DEFAULT_THRESHOLDS
    for path, table in _tables(arch):
        buckets = table.get("buckets", {})
        thresholds = Thresholds(
            dense={**thresholds.dense, **_by_height(buckets.get("dense", {}))},
            packed={**thresholds.packed, **_by_height(buckets.get("packed", {}))},
            dequantize_rows={**thresholds.dequantize_rows, **table.get("dequantize_rows", {})},
            gemv_slots=table.get("gemv_slots", thresholds.gemv_slots),
            few_slots=table.get("few_slots", thresholds.few_slots),
        )
        try:
            thresholds.check()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return thresholds


def _by_height(limits: dict[str, int]) -> dict[int, int]:
    return {int(height): rows for height, rows in limits.items()}


# What ``trying`` and ``trying_thresholds`` ask for.
_trial: dict[tuple[str, int, int], LaunchConfig] = {}
_trial_thresholds: list[Thresholds] = []


def thresholds_of(target: Target) -> Thresholds:
    """The thresholds that hold on ``target``.

    Raises:
        ValueError: a table is not valid; says which, and why.
    """
    return _trial_thresholds[-1] if _trial_thresholds else _measured_thresholds(target.arch)


@functools.lru_cache(maxsize=4096)  # every launch asks
def bucket(num_rows: int, num_experts: int, packed: bool, target: Target) -> int:
    """The height of the row tiles for S = num_rows routed rows over E = num_experts.

    Args:
        packed: the products are over packed weights.
    """
    thresholds = thresholds_of(target)
    experts = num_experts or 1
    for height, rows in (thresholds.packed if packed else thresholds.dense).items():
        if num_rows <= rows * experts:
            return height
    return BUCKETS[-1]


def dequantize_rows(kernel: str, target: Target) -> int:
    """Rows per expert up to which ``kernel`` of ``KERNELS_4BIT`` is launched."""
    if kernel not in KERNELS_4BIT:
        raise AssertionError(f"{kernel} dequantizes no packed weights")
    return thresholds_of(target).dequantize_rows[kernel]


def dequantizes_in_product(kernel: str, num_rows: int, num_experts: int, target: Target) -> bool:
    """Whether ``kernel`` dequantizes packed weights itself, for S = num_rows routed rows over E = num_experts."""
    return num_rows <= num_experts * dequantize_rows(kernel, target)


def gemv_slots(target: Target) -> int:
    """Slots (tokens times top_k) up to which the few-row path serves a call without gradients."""
    return thresholds_of(target).gemv_slots


def few_slots(target: Target) -> int:
    """Slots up to which tensor cores multiply packed weights without sorting, in a call without gradients."""
    return thresholds_of(target).few_slots


def few_config(kernel: str, count: int, target: Target, itemsize: int) -> LaunchConfig:
    """The configuration of a kernel of ``KERNELS_FEW`` for so many slots, or rows of "few_linear_4bit"."""
    return launch_config(kernel, bucket_of_few(count), target, itemsize)


@functools.cache
def launch_config(kernel: str, block_m: int, target: Target, itemsize: int) -> LaunchConfig:
    """The configuration of ``kernel`` in bucket ``block_m`` on ``target``, for elements of ``itemsize`` bytes.

    Raises:
        ValueError: a measured one is not valid; says which, and why.
    """
    key = (kernel, block_m, itemsize)
    if key in _trial:
        return _trial[key]
    config = default_config(kernel, block_m, target, itemsize)
    override = _overrides(target.arch).get(key)
    if override is None:
        check_bucket(kernel, block_m, config, itemsize)
        check(kernel, config, target, itemsize)
        return config
    config = replace(config, **override.values)
    try:
        check_bucket(kernel, block_m, config, itemsize)
        if override.of_family:
            config = fitted(kernel, config, target, itemsize)
        check(kernel, config, target, itemsize)
    except ValueError as error:
        raise ValueError(f"{override.path}: {kernel}/{itemsize}/{block_m}: {error}") from error
    return config


@contextlib.contextmanager
def trying(kernel: str, block_m: int, itemsize: int, config: LaunchConfig) -> Iterator[None]:
    """Launches of ``kernel`` in that bucket use ``config`` within the block; for those who measure. Blocks can be nested."""
    key = (kernel, block_m, itemsize)
    outer = _trial.get(key)
    _trial[key] = config
    launch_config.cache_clear()
    try:
        yield
    finally:
        if outer is None:
            del _trial[key]
        else:
            _trial[key] = outer
        launch_config.cache_clear()


@contextlib.contextmanager
def trying_thresholds(thresholds: Thresholds) -> Iterator[None]:
    """``thresholds`` hold on every target within the block, which costs next to nothing; for those who measure."""
    _trial_thresholds.append(thresholds)
    bucket.cache_clear()
    try:
        yield
    finally:
        _trial_thresholds.pop()
        bucket.cache_clear()


def forget_tables() -> None:
    """The tables are read again at the next question: for those who have changed them or ``MOE_FUSED_CONFIGS``."""
    for cached in (_tables, _overrides, _measured_thresholds, bucket, launch_config):
        cached.cache_clear()
