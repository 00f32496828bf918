"""Leaves the conversion of configs from Transformers 4 to PEFT while ``moe_fused`` is enabled."""

from __future__ import annotations

from collections.abc import Callable


def _untouched(original: Callable[..., None], attribute: str) -> Callable[..., None]:
    return original


def pytest_sessionstart() -> None:
    """Runs once the conftest of the tests has built the kernel."""
    from moe_fused.integrations.peft import files

    files.config_conversion = _untouched
