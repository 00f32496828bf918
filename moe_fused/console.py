"""Runs a command so that every error ends in one line on stderr and a non-zero exit status."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable

from .integrations.quantizer import bitsandbytes_cpu
from .launched import WORD, is_launched, rank
from .signals import Interrupted, check_interrupted, raise_on_signals

_INVALID = re.compile(r"Invalid value for '([^']+)'(?: / '[^']+')*: (.+)", re.DOTALL)
# What click and Pydantic say of a value, the one or the other by typer's version, and what an option must be then.
_NEEDS = [
    (re.compile(pattern), needed)
    for pattern, needed in (
        (r"Input should be a valid number|'(?P<value>.*)' is not a valid float", "a number"),
        (r"Input should be a valid integer|'(?P<value>.*)' is not a valid int", "a whole number"),
        (r"Input should be a valid boolean|'(?P<value>.*)' is not a valid bool", "true or false"),
        (r"(Value error, )?'(?P<value>.*)' is not one of (?P<limit>.+?)\.?$", "one of {}"),
        (r"Input should be greater than or equal to (?P<limit>\S+)|(?P<value>\S+) is not in the range x>=(?P<low>\S+)\.$",
         "at least {}"),
        (r"Input should be less than or equal to (?P<limit>\S+)|(?P<value>\S+) is not in the range x<=(?P<high>\S+)\.$",
         "at most {}"),
        (r"(?P<value>\S+) is not in the range (?P<limit>\S+)\.$", "in the range {}"),
    )
]  # fmt: skip


def _describe_usage(message: str, error: BaseException) -> str:
    """Describes a wrong use of the command line as the commands describe what they find themselves.

    Args:
        message: what click says.
    """
    if (invalid := _INVALID.fullmatch(message)) is None:
        return f"{message} (see --help)"
    name, reason = invalid.groups()
    if reason.startswith("must be "):
        return f"{name} {reason}"
    for pattern, needed in _NEEDS:
        if match := pattern.match(reason):
            found = {key: value for key, value in match.groupdict().items() if value is not None}
            errors = getattr(error.__cause__, "errors", None)  # Pydantic has the value beside the message
            value = errors()[0]["input"] if callable(errors) else found.pop("value")
            limit = next((found[key].replace("'", "") for key in ("limit", "low", "high") if key in found), "")
            return f"{name} must be {needed.format(limit)}, got {value}"
    return f"{message} (see --help)"


def _describe(error: BaseException) -> str:
    """Describes an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror + (f": {error.filename}" if error.filename else "")
    elif callable(
        format_message := getattr(error, "format_message", None)
    ):  # an error of click, from whichever copy typer uses
        message = _describe_usage(format_message(), error)
    elif isinstance(error, (LookupError, AttributeError, AssertionError, ArithmeticError)):
        # Their messages are not written for users. The message of a KeyError, for example, is only the key.
        message = f"unexpected {type(error).__name__}: {error} (--traceback shows where)"
    else:
        message = str(error) or type(error).__name__
    return " ".join(message.split())


def run(load: Callable[[], Callable[..., object]]) -> int:
    """Runs a typer application and returns the exit status.

    Args:
        load: imports the application. It is called here because importing takes seconds, and Ctrl-C must work meanwhile.
    """
    raise_on_signals()
    # This must come before a library imports bitsandbytes, which otherwise asks the Hub for a kernel and may warn.
    bitsandbytes_cpu.register()
    try:
        try:
            status = load()(standalone_mode=False)
        except Exception:
            check_interrupted()  # a library may have turned the interruption into one of its own errors
            raise
    except (Interrupted, Exception) as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # of click, as above; its message is the help
            print(error, file=sys.stderr)
            return 2
        status = int(getattr(error, "exit_code", 1))
        if WORD.is_ours(error):
            if "--traceback" in sys.argv:
                if not is_launched():
                    raise
                traceback.print_exception(error)
            print(f"error: {f'rank {rank()}: ' if rank() else ''}{_describe(error)}", file=sys.stderr)
        WORD.leave(status)
        return status
    return status if isinstance(status, int) else 0  # typer returns the status of typer.Exit as a value
