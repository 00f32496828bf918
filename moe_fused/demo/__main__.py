"""The entry point of the demo. Every error ends in one line on stderr and a non-zero exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from moe_fused import console


def _load() -> Callable[..., object]:
    from .cli import app

    return app


def main() -> int:
    return console.run(_load)


if __name__ == "__main__":
    sys.exit(main())
