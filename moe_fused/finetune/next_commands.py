"""The commands that go on from an adapter, which a run prints at its end."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .usage import conversion, is_read_as_it_is, refusal

if TYPE_CHECKING:
    from .resolve import ModelSetup


def print_next(setup: ModelSetup) -> None:
    """Prints the commands that generate with the adapter of a run, convert it and merge it."""
    print(f"adapter: {setup.options.output}")
    print("next:")
    for command in _next_commands(setup):
        print(f"  {command}")


def push_command(directory: Path, repository: str, *, private: bool, checkpoints: bool = False) -> str:
    """Returns the command that uploads the adapter of ``directory``, or its checkpoints."""
    flags = " --private" * private + " --checkpoints" * checkpoints
    return f"moe-fused push {_word(str(directory))} {repository}{flags}"


def _next_commands(setup: ModelSetup) -> Iterator[str]:
    options = setup.options
    output, source = options.output.rstrip("/") or "/", options.model
    if not Path(source).is_dir() and options.revision != "main":
        # The other commands take the newest revision.
        kept = _free(f"{source.rpartition('/')[2]}-{options.revision.replace('/', '-')}")
        yield f"hf download {_word(source)} --revision {_word(options.revision)} --local-dir {_word(kept)}"
        source = kept
    base, in_4bit = source, ""
    if setup.quantize_to == "nf4":
        in_4bit = " --load-in-4bit"
    elif setup.quantize_to is not None:  # generate does not quantize to other formats
        base = _free(f"{Path(source).name}-{setup.quantize_to}")
        yield f"moe-fused quantize {_word(source)} {_word(base)} --format {setup.quantize_to}"
    yield f'moe-fused generate {_word(base)} --adapter {_word(output)}{in_4bit} --prompt "..."'
    if options.export != "per-expert" and refusal(setup) is None and not is_read_as_it_is(setup):
        yield conversion(setup, output, _free(f"{output}-per-expert"))
    merge = f"moe-fused merge {_word(source)} {_word(output)}"
    yield f"{merge} {_word(_free(f'{output}-merged'))}"
    if setup.is_4bit and setup.quantize_to is None:
        yield f"{merge} {_word(_free(f'{output}-merged-{setup.quant_type}'))} --keep-format"


def _free(path: str) -> str:
    """``path``, with a number behind it if something of that name exists."""
    number, result = 1, path
    while os.path.lexists(result):
        number += 1
        result = f"{path}-{number}"
    return result


def _word(argument: str) -> str:
    """``argument`` as a shell takes it for one word, and a command does not take it for an option."""
    return shlex.quote(f"./{argument}" if argument.startswith("-") else argument)
