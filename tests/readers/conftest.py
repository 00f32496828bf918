"""Leaves the tests of readers out unless they are asked for by ``-m readers``, because they install packages."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "readers" in str(config.getoption("markexpr")):
        return
    left_out = [item for item in items if item.get_closest_marker("readers")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
