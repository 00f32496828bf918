"""``moe_fused.kernelize`` no longer names the classes of experts: the patched Transformers has named them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from torch import nn

from moe_fused.integrations.kernelize import apply as integration

_named = integration._layer_name


@contextlib.contextmanager
def _layer_name(cls: type[nn.Module], name: str) -> Iterator[str]:
    if name != "MoeExperts":  # blocks and PEFT's layers are not under the experts interface
        with _named(cls, name) as given:
            yield given
    else:
        yield cls.kernel_layer_name


def pytest_configure(config: pytest.Config) -> None:
    integration._layer_name = _layer_name
