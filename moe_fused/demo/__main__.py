"""Entry point: whatever goes wrong ends with one line on stderr and a non-zero exit status."""

from __future__ import annotations

import sys

from .signals import Interrupted, raise_on_signals


def _one_line(error: Exception) -> str:
    """What went wrong, without line breaks: the system's own words for an OSError, a usage error's hint for an option."""
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
        # Imported late: importing torch takes seconds in which Ctrl-C must already be answered properly.
        from .cli import app

        app(standalone_mode=False)
    except Interrupted as interruption:
        print(f"error: interrupted by {interruption.name}, nothing was written", file=sys.stderr)
        return interruption.exit_code
    except Exception as error:
        if "--traceback" in sys.argv:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return int(getattr(error, "exit_code", 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
