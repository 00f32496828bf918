"""Entry point: whatever goes wrong ends with one line on stderr and a non-zero exit status."""

from __future__ import annotations

import sys

from .signals import Interrupted, check_interrupted, raise_on_signals


def _run() -> None:
    try:
        # Imported late: importing torch takes seconds in which Ctrl-C must already be answered properly.
        from .cli import app

        app(standalone_mode=False)
    except Exception:
        check_interrupted()  # a library may have turned the interruption into an error of its own
        raise


def _describe(error: BaseException) -> str:
    """What went wrong, without line breaks."""
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror + (f": {error.filename}" if error.filename else "")
    elif callable(format_message := getattr(error, "format_message", None)):  # click's, whichever copy typer uses
        message = f"{format_message()} (see --help)"
    else:
        message = str(error) or type(error).__name__
    return " ".join(message.split())


def main() -> int:
    raise_on_signals()
    try:
        _run()
    except (Interrupted, Exception) as error:
        if "--traceback" in sys.argv:
            raise
        print(f"error: {_describe(error)}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
