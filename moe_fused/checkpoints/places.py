"""Checks that files can be read and targets can be written, before torch is imported.

Only the standard library is needed here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .adapters.names import Layout

CONFIG, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "config.json", "adapter_config.json", "adapter_model.safetensors"
MODEL_LAYOUTS = ("per-expert", "fused", "original")
# The files in which Transformers' Trainer and accelerate save an optimizer's state.
OPTIMIZER_STATES = ("optimizer.pt", "optimizer.bin")


def read_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        ValueError: the file does not hold JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got a {type(content).__name__}")
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """Reads the ``config.json`` in ``directory``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a JSON object with a ``model_type``.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not the directory of a model")
    config = read_object(path)
    if "model_type" not in config:
        raise ValueError(f"{path} must be a JSON object with a model_type")
    return config


def check_apart(source: Path, target: Path) -> None:
    """Raises ValueError if the directories are the same, or one contains the other."""
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"source and target must be apart, got {source} and {target}")


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless ``target`` is free, or holds a model that may be overwritten."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a directory: choose another path")
    if not overwrite:
        raise FileExistsError(f"{target} exists: choose another path, or replace it with --overwrite")
    if not (target / CONFIG).is_file():
        raise FileExistsError(f"{target} exists and has no {CONFIG}, so that it is no model: choose another path")


def check_adapter_source(directory: Path, argument: str) -> None:
    """Raises FileNotFoundError unless ``directory``, given as ``argument``, holds an adapter in safetensors."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{argument} {directory} is not a directory")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            hint = ", only safetensors are read" if (directory / "adapter_model.bin").exists() else ""
            raise FileNotFoundError(f"{argument} {directory} has no {name}{hint}")


def check_adapter_replaceable(source: Path, target: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless ``target`` is free, or holds an adapter other than ``source`` that may be replaced."""
    result, origin = target.resolve(), source.resolve()
    if result == origin or result in origin.parents:
        raise FileExistsError(f"TARGET {target} is SOURCE or holds it: choose another path")
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"TARGET {target} exists: choose another path or give --overwrite")
    if not target.is_dir():
        raise FileExistsError(f"TARGET {target} exists and is not a directory: choose another path")
    content = sorted(target.iterdir())
    if content and not (target / ADAPTER_CONFIG).is_file():
        raise FileExistsError(f"TARGET {target} has no {ADAPTER_CONFIG}: --overwrite replaces adapters only")
    if inner := [path.name for path in content if path.is_dir()]:
        raise FileExistsError(f"TARGET {target} holds the directory {inner[0]}, which would be deleted: move it away")


def find_optimizer_state(source: Path) -> Path:
    """Returns the file with an optimizer's state in ``source``. Raises FileNotFoundError if there is none."""
    if not source.is_dir():
        raise FileNotFoundError(f"SOURCE {source} is not a directory")
    for name in OPTIMIZER_STATES:
        if (source / name).is_file():
            return source / name
    raise FileNotFoundError(f"SOURCE {source} has no {' or '.join(OPTIMIZER_STATES)}")


def check_state_replaceable(target: Path, overwrite: bool) -> None:
    """Raises FileExistsError unless the file ``target`` does not exist or may be replaced."""
    if target.exists() and not (overwrite and target.is_file()):
        hint = ": give --overwrite" if target.is_file() else " and is not a file"
        raise FileExistsError(f"TARGET has an {target.name}, {target}{hint}")


def check_optimizer(
    source: Path, target: Path, to: str | None, given: str | None, overwrite: bool
) -> tuple[Path, bool]:
    """Checks that the state of an optimizer can be converted.

    Args:
        to, given: layouts, as for ``plan_optimizer``.

    Returns:
        The file with the state in ``source``, and whether it belongs to an adapter.

    Raises:
        FileNotFoundError: a file or directory is missing.
        FileExistsError: ``target`` has a state already.
        ValueError: there is no such layout.
    """
    path = find_optimizer_state(source)
    check_state_replaceable(target / path.name, overwrite)
    of_adapter = (source / ADAPTER_CONFIG).is_file()
    if not of_adapter and not (source / CONFIG).is_file():
        raise FileNotFoundError(
            f"SOURCE {source} has neither {ADAPTER_CONFIG} nor {CONFIG}, so that it is not known what the state belongs to"
        )
    kind, names = ("an adapter", [layout.value for layout in Layout]) if of_adapter else ("a model", [*MODEL_LAYOUTS])
    for option, value in (("--from", given), ("--to", to)):
        if value not in (None, *names):
            raise ValueError(f"{option} {value} is no layout of {kind}, which are {', '.join(names)}")
    if of_adapter:
        if not (target / ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(
                f"TARGET {target} has no {ADAPTER_CONFIG}: first `moe-fused convert adapter SOURCE TARGET --scaling keep`"
            )
        return path, True
    if to is None:
        raise ValueError(f"--to must say how the run to be resumed has its experts: {', '.join(names)}")
    if not target.is_dir():
        raise FileNotFoundError(f"TARGET {target} is not a directory, it must be that of the model to be resumed")
    return path, False
