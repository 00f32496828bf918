"""The command ``push``, which uploads what ``finetune`` has written. This module imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_fused.commands.options import Traceback, require

from .output import check_unused
from .upload import check_adapter, check_checkpoints, check_repository, check_upload, upload_adapter, upload_checkpoints


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Directory that moe-fused finetune wrote.")],
    repository: Annotated[str, typer.Argument(metavar="ID", help="Repository on the Hub, as org/name.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    checkpoints: Annotated[
        bool,
        typer.Option(
            "--checkpoints", help="Upload the checkpoints, to the branch checkpoints, instead of the adapter."
        ),
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Upload the adapter of a run to the Hub, or its checkpoints. Files that the Hub already has are not sent."""
    del traceback  # console.run, which prints errors, reads it from the command line
    require("push", "huggingface_hub", extra="train")
    if not directory.is_dir():
        raise FileNotFoundError(f"DIRECTORY {directory} {'is not a directory' if directory.exists() else 'is missing'}")
    check = check_checkpoints if checkpoints else check_adapter
    check(directory)
    check_unused(directory)
    check_repository("ID", repository)
    check_upload("ID", repository, private=private)
    upload = upload_checkpoints if checkpoints else upload_adapter
    print(f"uploaded {upload(directory, repository, private=private)}")
