"""Finds the checkpoints of a run, and checks whether the run can go on from them.

Only the last function needs torch.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from moe_fused.checkpoints.places import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_object
from moe_fused.staging import is_partial, remove_partial

CHECKPOINTS = "checkpoints"
DROP_BROKEN = "--drop-broken-checkpoints"
_STATE = "trainer_state.json"


def _step(checkpoint: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return None if match is None else int(match[1])


def checkpoint_of(output: Path, step: int) -> Path:
    """Returns where the run in ``output`` has its checkpoint of ``step``, if it has one."""
    return output / CHECKPOINTS / f"checkpoint-{step}"


def checkpoints_of(output: Path) -> list[Path]:
    """Lists the checkpoints of the run in ``output``, including damaged ones. The newest is the last."""
    directory = output / CHECKPOINTS
    found = {path: step for path in directory.glob("checkpoint-*") if (step := _step(path)) is not None}
    return sorted((path for path in found if path.is_dir()), key=lambda path: found[path])


def last_checkpoint(output: Path) -> Path | None:
    """Returns the newest checkpoint of the run in ``output``, and removes parts of one that a killed process left."""
    directory = output / CHECKPOINTS
    if directory.is_dir():
        for path in filter(is_partial, list(directory.iterdir())):
            remove_partial(path)
    found = checkpoints_of(output)
    return found[-1] if found else None


def _damage_of_json(path: Path) -> str | None:
    """Says how a JSON file of a checkpoint is damaged, or returns None."""
    try:
        content = read_object(path)
    except ValueError as error:
        return str(error).removeprefix(f"{path} ")
    step = _step(path.parent)
    if path.name == _STATE and content.get("global_step") != step:
        return f"belongs to step {content.get('global_step')}"
    return None


def _damage_of_safetensors(path: Path) -> str | None:
    """Says how a safetensors file is damaged, as far as its header and size tell, or returns None."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            return "is not a whole safetensors file"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            needed = 8 + length + max(ends)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "is not a whole safetensors file"
    return None if size == needed else f"has {size} bytes instead of {needed}"


def _damage_of_torch(path: Path) -> str | None:
    """Says how a file of ``torch.save`` is damaged, or returns None. It is an archive with a checksum for each part."""
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "is not a file of torch.save"
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return f"cannot be read: {error}"
    return None if bad is None else f"has a wrong checksum in {bad}"


# The files that Trainer needs to go on as if it had never stopped. It does not complain about missing ones.
_PARTS: dict[str, Callable[[Path], str | None]] = {
    _STATE: _damage_of_json,
    ADAPTER_CONFIG: _damage_of_json,
    ADAPTER_WEIGHTS: _damage_of_safetensors,
    "optimizer.pt": _damage_of_torch,
    "scheduler.pt": _damage_of_torch,
    "rng_state.pth": _damage_of_torch,  # that of the first process; others have rng_state_1.pth and so on
}


def problem_of(checkpoint: Path) -> str | None:
    """Says which files of ``checkpoint`` are missing or damaged. None if a run can go on from it."""
    missing = [name for name in _PARTS if not (checkpoint / name).is_file()]
    if missing:
        return f"lacks {', '.join(missing)}"
    for name, damage_of in _PARTS.items():
        if damage := damage_of(checkpoint / name):
            return f"is damaged: {name} {damage}"
    return None


def resumable(output: Path, *, drop_broken: bool = False, dry_run: bool = False) -> Path | None:
    """Finds the newest checkpoint that a run can go on from. It returns None if there is no checkpoint at all.

    Args:
        output: The directory of the run.
        drop_broken: Whether to remove newer checkpoints that are damaged.
        dry_run: Whether to keep them all the same.

    Raises:
        ValueError: The newest checkpoint is damaged, and ``drop_broken`` is false or no checkpoint before it is whole.
            The error says what is damaged, and which checkpoint is whole.
    """
    broken: list[tuple[Path, str]] = []
    whole = None
    for checkpoint in reversed(checkpoints_of(output)):
        problem = problem_of(checkpoint)
        if problem is None:
            whole = checkpoint
            break
        broken.append((checkpoint, problem))
    if not broken:
        return whole
    newest, problem = broken[0]
    if whole is None:
        raise ValueError(f"{newest} {problem}; no checkpoint before it is whole, start again with --overwrite")
    if not drop_broken:
        raise ValueError(
            f"{newest} {problem}; {whole.name} before it is whole, go on from there with: moe-fused finetune --resume "
            f"{DROP_BROKEN} --output {shlex.quote(str(output))}"
        )
    if not dry_run:
        for checkpoint, _ in broken:
            aside = checkpoint.with_name(f".{checkpoint.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint, aside)
            shutil.rmtree(aside, ignore_errors=True)
    return whole


def check_finite_adapter(checkpoint: Path) -> None:
    """Raises ValueError if a weight of the adapter in ``checkpoint`` is not a number, or infinite."""
    from safetensors import safe_open

    from moe_fused.checkpoints.finite import not_finite

    path = checkpoint / ADAPTER_WEIGHTS
    with safe_open(path, "pt") as file:
        names = list(not_finite((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118 - it is no mapping
    if names:
        raise ValueError(
            f"{path}: {names[0]} has values that are not finite; remove {checkpoint} to go on from the checkpoint before it"
        )
