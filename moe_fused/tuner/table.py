"""Writes the table of configurations that the kernel finds through ``MOE_FUSED_CONFIGS``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_fused.staging import replace_file


def table_path(output: Path, name: str) -> Path:
    """Returns the path of a table called ``name``: ``output``, or a file in it if it is a directory or has no suffix.

    Raises:
        ValueError: ``output`` is a file that the kernel would not find.
    """
    if output.is_dir() or not output.suffix:
        return output / name
    if output.name != name:
        raise ValueError(f"--output must be a directory or end in {name}, by which the kernel finds it, got {output}")
    return output


class TableFile:
    """A table in a file that is complete at any time.

    Args:
        path: the file. Its entries stay, except for those that are added anew.
        tuning: the kernel's module ``tuning``.

    Attributes:
        entries: how many configurations were added. thresholds: how many thresholds were.

    Raises:
        ValueError: the file is there and is no table.
    """

    def __init__(self, path: Path, tuning: Any) -> None:
        self.path = path
        self.entries = 0
        self.thresholds = 0
        self._table: dict[str, Any] = tuning.read_table(path) if path.exists() else {}
        self._added: set[tuple[str, int, int]] = set()
        self._moved: set[tuple[str, ...]] = set()
        self._sections: tuple[str, ...] = tuning.SECTIONS
        self._kernels: tuple[str, ...] = (*tuning.KERNELS, *tuning.KERNELS_FEW)

    def add(self, kernel: str, itemsize: int, block_m: int, config: Any) -> None:
        """Writes the file with ``config`` in it."""
        self._table.setdefault(kernel, {}).setdefault(str(itemsize), {})[str(block_m)] = asdict(config)
        self._added.add((kernel, itemsize, block_m))
        self.entries = len(self._added)
        self._write()

    def add_threshold(self, place: tuple[str, ...], thresholds: Any) -> None:
        """Writes the file with one threshold in it.

        Args:
            place: its section, and the keys in that.
            thresholds: the kernel's ``Thresholds``, of which that one is written. All tile heights of a kind go together,
                because a height's limit is only valid beside those of the others.
        """
        section = place[0]
        if section in ("gemv_slots", "few_slots"):
            self._table[section] = getattr(thresholds, section)
        elif section == "dequantize_rows":
            self._table.setdefault(section, {})[place[1]] = thresholds.dequantize_rows[place[1]]
        else:
            limits = {str(height): rows for height, rows in getattr(thresholds, place[1]).items()}
            self._table.setdefault(section, {})[place[1]] = limits
        # The reason that was given for other numbers is none for these.
        self._table.get("why", {}).pop(section, None)
        self._moved.add(place)
        self.thresholds = len(self._moved)
        self._write()

    def _write(self) -> None:
        replace_file(self.path, self._text().encode())

    def _text(self) -> str:
        """As JSON, an entry a line, in the order of the sections, the kernels and the numbers."""
        parts = [self._section(section) for section in self._sections if self._table.get(section) not in (None, {})]
        kernels = [kernel for kernel in self._table if kernel not in self._sections]
        for kernel in sorted(kernels, key=self._kernels.index):
            sizes = []
            for size, buckets in sorted(self._table[kernel].items(), key=lambda item: int(item[0])):
                lines = [
                    f'      "{block_m}": {json.dumps(values)}'
                    for block_m, values in sorted(buckets.items(), key=lambda item: int(item[0]))
                ]
                sizes.append(f'    "{size}": {{\n' + ",\n".join(lines) + "\n    }")
            parts.append(f'  "{kernel}": {{\n' + ",\n".join(sizes) + "\n  }")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def _section(self, section: str) -> str:
        value = self._table[section]
        if section == "why":
            text = json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n  ")
        elif section == "buckets":
            lines = [f'    "{kind}": {json.dumps(limits)}' for kind, limits in sorted(value.items())]
            text = "{\n" + ",\n".join(lines) + "\n  }"
        else:
            text = json.dumps(value)
        return f'  "{section}": {text}'
