"""The entry point of the command ``moe-fused``, also run by ``python -m moe_fused``."""

from __future__ import annotations

import sys
from collections.abc import Callable

from moe_fused import console


def _load() -> Callable[..., object]:
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        raise RuntimeError(
            f"moe-fused needs {error.name}, which is not installed: pip install 'moe-fused[cli]'"
        ) from error
    return app


def main() -> int:
    return console.run(_load)


if __name__ == "__main__":
    sys.exit(main())
