"""How messages write values and the errors of libraries. This module imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping


def as_yaml(value: object) -> str:
    """Writes a value as a YAML file has it: true and null instead of True and None. Strings have quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_yaml(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_yaml, value))}]"
    return repr(value)


def said_by(error: BaseException) -> str:
    """What an error of a library says, in one line and without its full stop, so that a sentence can go on behind it."""
    text = re.sub(r"^\[Errno \d+\] ", "", " ".join(str(error).split()))
    return text.rstrip(".") or type(error).__name__
