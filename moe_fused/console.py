"""How our commands end: whatever goes wrong is one line on stderr and a non-zero exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .signals import Interrupted, check_interrupted, raise_on_signals


def _describe(error: BaseException) -> str:
    """What went wrong, without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror + (f": {error.filename}" if error.filename else "")
    elif callable(format_message := getattr(error, "format_message", None)):  # click's, whichever copy typer uses
        message = f"{format_message()} (see --help)"
    else:
        message = str(error) or type(error).__name__
    return " ".join(message.split())


def run(load: Callable[[], Callable[..., object]]) -> int:
    """Runs a typer application and returns the exit status.

    Args:
        load: imports the application: importing may take seconds in which Ctrl-C must already be answered properly.
    """
    raise_on_signals()
    try:
        try:
            status = load()(standalone_mode=False)
        except Exception:
            check_interrupted()  # a library may have turned the interruption into an error of its own
            raise
    except (Interrupted, Exception) as error:
        if "--traceback" in sys.argv:
            raise
        print(f"error: {_describe(error)}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    return status if isinstance(status, int) else 0  # of typer.Exit, which comes back as a value
