"""Lifts the upper limits in ``moe_fused.hub``, in every process of an environment that ``scripts/newest.py`` made.

That script copies this file into the environment's packages. A ``.pth`` file beside it calls ``begin`` whenever Python
starts there. ``moe_fused`` cannot be imported at that moment, so this file imports the standard library only.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE = "moe_fused.hub"


def lift(hub: Any) -> None:
    """Replaces the tables of versions in ``hub`` by tables without the limits that begin with "<"."""
    hub.REQUIRED = {name: lower(asked) for name, asked in hub.REQUIRED.items()}
    hub.OPTIONAL = {name: (lower(asked), use) for name, (asked, use) in hub.OPTIONAL.items()}


def lower(asked: str) -> str:
    return ",".join(part for part in asked.split(",") if not part.strip().startswith("<"))


class _Finder(MetaPathFinder):
    """Finds ``moe_fused.hub`` where others find it, and lifts its limits once it is executed."""

    _asking_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE or self._asking_others:
            return None
        self._asking_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking_others = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_lift(module: ModuleType) -> None:
            execute(module)
            lift(module)

        spec.loader.exec_module = execute_and_lift  # type: ignore[method-assign]
        return spec


def begin() -> None:
    """Begins to wait for the import of ``moe_fused.hub``."""
    sys.meta_path.insert(0, _Finder())
