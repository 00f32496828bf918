"""Asks once whether the Hub can be reached, where libraries would try again and again and warn each time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from .words import said_by

# The modules that know whether the Hub is to be left alone, each with the name of the setting.
_OFFLINE = (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE"))


def _why_unreachable() -> str | None:
    """Why no answer comes from the Hub; None if one comes."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    session: Any = get_session()
    try:
        session.head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - whatever the client raises, no answer came
        return said_by(error)
    return None


@contextlib.contextmanager
def reached_once() -> Iterator[str | None]:
    """Lets libraries read their caches alone within the block if the Hub cannot be reached. They try five times otherwise.

    Yields:
        Why the Hub cannot be reached, or None if it can.
    """
    reason = _why_unreachable()
    if reason is None:
        yield None
        return
    settings = [(sys.modules[module], name) for module, name in _OFFLINE if module in sys.modules]
    before = [getattr(module, name) for module, name in settings]
    try:
        for module, name in settings:
            setattr(module, name, True)
        yield reason
    finally:
        for (module, name), value in zip(settings, before, strict=True):
            setattr(module, name, value)
