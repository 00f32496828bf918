"""The files that ``moe-fused bench --report`` and ``moe-fused tune --report`` write for others to read.

A report is a JSON object: what wrote it, the GPU and the versions, and rows of what was measured. It has no room for
anything else: no name of a machine, a user or a path, and not the name of a model that may be a path. ``check_report``
holds every report to that, so that a file can be attached to an issue as it is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_fused.benchmark.layers import LAYERS, PHASES, Ceilings, Layer
from moe_fused.quantized import QUANT_TYPES
from moe_fused.staging import replace_file

if TYPE_CHECKING:
    import torch

SCHEMA = 1
COMMANDS = ("bench", "tune")
OTHER_LAYER = "another"  # the name of a layer that is not in ``LAYERS``
GIB = 2**30

_Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    """Names of GPUs and versions, which have no slash, no @ and no line break: so no path, address or name of a user."""
    return isinstance(value, str) and re.fullmatch(r"[\w .,+():-]{1,80}", value) is not None


def _is_date(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number_or_none(value: Any) -> bool:
    return value is None or _is_number(value)


def _one_of(*choices: str) -> _Check:
    return lambda value: isinstance(value, str) and value in choices


def _is_config(value: Any) -> bool:
    """The fields of a launch configuration."""
    if not isinstance(value, dict):
        return False
    return all(_is_text(key) and (isinstance(item, bool) or _is_count(item)) for key, item in value.items())


_ENVIRONMENT: dict[str, _Check] = {
    "gpu": _is_text,
    "capability": _is_text,
    "memory_gib": _is_number,
    "multiprocessors": _is_count,
    "driver": _is_text,
    "runtime": _is_text,
    "torch": _is_text,
    "triton": _is_text,
    "moe_fused": _is_text,
    "date": _is_date,
}
_LAYER: dict[str, _Check] = {
    "name": _one_of(*LAYERS, OTHER_LAYER),
    "hidden": _is_count,
    "intermediate": _is_count,
    "experts": _is_count,
    "top_k": _is_count,
}
_CEILINGS: dict[str, _Check] = {"bytes_per_second": _is_number, "flops_per_second": _is_number}
_ROWS: dict[str, dict[str, _Check]] = {
    "bench": {
        "tokens": _is_count,
        "phase": _one_of(*PHASES),
        "implementation": _one_of("moe_fused", *(f"moe_fused, {form}" for form in QUANT_TYPES), "grouped_mm"),
        "ms": _is_number_or_none,
        "spread": _is_number_or_none,
        "peak_mib": _is_number_or_none,
    },
    "configuration": {
        "kernel": _is_text,
        "block_m": _is_count,
        "config": _is_config,
        "speedup": _is_number,
    },
    "threshold": {"threshold": _is_text, "size": _is_count, "before": _is_count, "speedup": _is_number},
}


def _fields(value: Any, wanted: Mapping[str, _Check], where: str) -> None:
    if not isinstance(value, dict) or set(value) != set(wanted):
        got = ", ".join(sorted(map(str, value))) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{where} of a report must be an object of {', '.join(wanted)}, got {got}")
    for key, check in wanted.items():
        if not check(value[key]):
            raise ValueError(f"{key} in {where} of a report is not of its kind, or longer or stranger than it may be")


def check_report(value: Any) -> None:
    """Checks that a report has all fields, each of its kind, and no others.

    Raises:
        ValueError: It has not; says where. The message does not repeat the value, which may be private.
    """
    is_object = isinstance(value, dict)
    command = value.get("command") if is_object else None
    if command not in COMMANDS:
        raise ValueError(f"a report must be an object whose command is one of {', '.join(COMMANDS)}")
    known = ["schema", "command", "environment", "layer", "rows", *(["ceilings"] if command == "bench" else [])]
    if set(value) != set(known):
        raise ValueError(f"a report of {command} must have {', '.join(known)}")
    if value["schema"] != SCHEMA:
        raise ValueError(f"schema of a report must be {SCHEMA}, got {value['schema']!r}")
    _fields(value["environment"], _ENVIRONMENT, "environment")
    _fields(value["layer"], _LAYER, "layer")
    if command == "bench":
        _fields(value["ceilings"], _CEILINGS, "ceilings")
    if not isinstance(value["rows"], list):
        raise ValueError("rows of a report must be a list")
    for index, row in enumerate(value["rows"]):
        form = "bench"
        if command == "tune":
            form = "threshold" if isinstance(row, dict) and "threshold" in row else "configuration"
        _fields(row, _ROWS[form], f"row {index}")


def read_report(path: Path) -> dict[str, Any]:
    """Returns the report in a file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not a report.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_report(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return value


def environment_of(device: torch.device) -> dict[str, Any]:
    """Returns the GPU and the versions that a report names. Text that a report may not have becomes "unknown"."""
    import torch

    from moe_fused import __version__
    from moe_fused.benchmark.harness import current_environment
    from moe_fused.diagnosis import driver_version

    known = current_environment(device)
    capability, memory, multiprocessors, driver = "none", 0.0, 0, "none"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            capability = str(properties.gcnArchName).partition(":")[0]
        else:
            capability = f"{properties.major}.{properties.minor}"
        memory, multiprocessors = round(properties.total_memory / GIB, 1), properties.multi_processor_count
        driver = driver_version() or "unknown"
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    found = {
        "gpu": known.gpu,
        "capability": capability,
        "memory_gib": memory,
        "multiprocessors": multiprocessors,
        "driver": driver,
        "runtime": runtime if torch.version.cuda or torch.version.hip else "none",
        "torch": known.torch,
        "triton": known.triton,
        "moe_fused": __version__,
        "date": known.date,
    }
    return {key: value if _ENVIRONMENT[key](value) else "unknown" for key, value in found.items()}


def new_report(
    command: str,
    device: torch.device,
    layer: Layer,
    rows: Sequence[Mapping[str, Any]],
    ceilings: Ceilings | None = None,
) -> dict[str, Any]:
    """Makes a report of what was measured on ``device``.

    Args:
        command: "bench" or "tune".
        device: The GPU, or a CPU.
        layer: What was timed. Its name is left out unless it is one of ``LAYERS``: it may be a path.
        rows: Rows as ``check_report`` wants them; milliseconds, MiB, and how many times as fast.
        ceilings: What the GPU's memory and products reach, of ``bench``.

    Raises:
        ValueError: The rows are not those of the command.
    """
    name = layer.name if LAYERS.get(layer.name) == layer else OTHER_LAYER
    value: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "environment": environment_of(device),
        "layer": {
            "name": name,
            "hidden": layer.hidden,
            "intermediate": layer.intermediate,
            "experts": layer.experts,
            "top_k": layer.top_k,
        },
        "rows": [dict(row) for row in rows],
    }
    if ceilings is not None:
        value["ceilings"] = asdict(ceilings)
    check_report(value)
    return value


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, a row on each line. The file is complete at any time.

    Raises:
        OSError: The file cannot be written.
    """
    head = {key: value for key, value in report.items() if key != "rows"}
    rows = ",\n    ".join(json.dumps(row) for row in report["rows"])
    text = json.dumps(head, indent=2).removesuffix("\n}")
    replace_file(path, f'{text},\n  "rows": [\n    {rows}\n  ]\n}}\n'.encode())
