"""The table that ``MOE_FUSED_CONFIGS`` names the directory of."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_fused.staging import replace_file


def table_path(output: Path, name: str) -> Path:
    """Where a table called ``name`` goes: ``output`` itself, or in it if it is a directory or has no suffix.

    Raises:
        ValueError: a file that the kernel would not find.
    """
    if output.is_dir() or not output.suffix:
        return output / name
    if output.name != name:
        raise ValueError(f"--output must be a directory or end in {name}, by which the kernel finds it, got {output}")
    return output


class TableFile:
    """A table that is whole at any time.

    Args:
        path: its file; what is there stays but for what is added.
        tuning: the kernel's module of that name.

    Raises:
        ValueError: what is there is no table.
    """

    def __init__(self, path: Path, tuning: Any) -> None:
        self.path = path
        self.entries = 0  # added
        self._table: dict[str, dict[str, dict[str, dict[str, Any]]]] = tuning.read_table(path) if path.exists() else {}
        self._added: set[tuple[str, int, int]] = set()
        self._kernels: tuple[str, ...] = tuning.KERNELS

    def add(self, kernel: str, itemsize: int, block_m: int, config: Any) -> None:
        """Writes the file with ``config`` in it."""
        self._table.setdefault(kernel, {}).setdefault(str(itemsize), {})[str(block_m)] = asdict(config)
        self._added.add((kernel, itemsize, block_m))
        self.entries = len(self._added)
        replace_file(self.path, self._text().encode())

    def _text(self) -> str:
        """As JSON, an entry a line, in the order of the kernels and of the numbers."""
        kernels = []
        for kernel in sorted(self._table, key=self._kernels.index):
            sizes = []
            for size, buckets in sorted(self._table[kernel].items(), key=lambda item: int(item[0])):
                lines = [
                    f'      "{block_m}": {json.dumps(values)}'
                    for block_m, values in sorted(buckets.items(), key=lambda item: int(item[0]))
                ]
                sizes.append(f'    "{size}": {{\n' + ",\n".join(lines) + "\n    }")
            kernels.append(f'  "{kernel}": {{\n' + ",\n".join(sizes) + "\n  }")
        return "{\n" + ",\n".join(kernels) + "\n}\n"
