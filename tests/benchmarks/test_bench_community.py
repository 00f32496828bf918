"""The reports of users, and the schema that holds them to what may be in them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_fused.benchmark.layers import LAYERS, Ceilings, Layer
from moe_fused.reports import check_report, new_report, read_report, write_report

COMMUNITY = Path(__file__).resolve().parents[2] / "benchmarks" / "community"
ROW = {"tokens": 4096, "phase": "forward", "implementation": "moe_fused", "ms": 1.5, "spread": 0.01, "peak_mib": None}
FOUND = {"kernel": "up", "block_m": 16, "config": {"block_n": 64, "descriptor": False}, "speedup": 1.1}
MOVED = {"threshold": "gemv_slots", "size": 9, "before": 8, "speedup": 1.2}


def report(command: str = "bench") -> dict[str, Any]:
    rows = [ROW] if command == "bench" else [FOUND, MOVED]
    ceilings = Ceilings(1e12, 1e14) if command == "bench" else None
    return new_report(command, torch.device("cpu"), LAYERS["qwen3-30b-a3b"], rows, ceilings)


def check_directory(directory: Path) -> int:
    """Checks every file of a directory but its README; returns their number.

    Raises:
        ValueError: A file is no report, or is not named after its command.
    """
    files = [path for path in sorted(directory.iterdir()) if path.name != "README.md"]
    for path in files:
        command = read_report(path)["command"]
        if not path.name.startswith(f"{command}_") or path.suffix != ".json":
            raise ValueError(f"{path.name} must be called {command}_GPU.json")
    return len(files)


def test_community_reports_are_reports() -> None:
    check_directory(COMMUNITY)


def test_a_file_that_is_no_report_is_found(tmp_path: Path) -> None:
    write_report(tmp_path / "bench_rtx-4090.json", report())
    write_report(tmp_path / "tune_rtx-4090.json", report("tune"))
    assert check_directory(tmp_path) == 2
    write_report(tmp_path / "tune_l4.json", report())
    with pytest.raises(ValueError, match=r"tune_l4\.json must be called bench_GPU\.json"):
        check_directory(tmp_path)
    (tmp_path / "tune_l4.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tune_l4\.json: a report must be an object"):
        check_directory(tmp_path)


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_a_report_is_read_as_it_was_written(command: str, tmp_path: Path) -> None:
    written = report(command)
    write_report(tmp_path / "r.json", written)
    assert read_report(tmp_path / "r.json") == written
    assert len((tmp_path / "r.json").read_text().splitlines()) > len(written["rows"]) + 10, "a row on each line"


def changed(place: tuple[Any, ...], value: Any) -> Callable[[], Any]:
    def change() -> Any:
        found = copy.deepcopy(report("tune" if place[:2] == ("rows", 1) else "bench"))
        inner: Any = found
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        return found

    return change


@pytest.mark.parametrize(
    "place, value",
    [
        (("host",), "desk"),
        (("schema",), 2),
        (("command",), "doctor"),
        (("rows",), {}),
        (("environment", "host"), "desk"),
        (("environment", "gpu"), "/home/somebody/gpu"),
        (("environment", "driver"), "somebody@desk"),
        (("environment", "driver"), "C:\\Users\\somebody"),
        (("environment", "date"), "yesterday"),
        (("environment", "memory_gib"), float("nan")),
        (("layer", "name"), "home"),
        (("layer", "hidden"), "2048"),
        (("ceilings",), None),
        (("rows", 0, "phase"), "backward"),
        (("rows", 0, "implementation"), "/home/somebody/moe"),
        (("rows", 0, "ms"), "1.5"),
        (("rows", 0, "ms"), -1.0),
        (("rows", 0, "note"), "mine"),
        (("rows", 1, "threshold"), "/home"),
    ],
    ids=str,
)
def test_what_a_report_may_not_have(place: tuple[Any, ...], value: Any) -> None:
    value = changed(place, value)()
    with pytest.raises(ValueError, match="report") as caught:
        check_report(value)
    assert "somebody" not in str(caught.value), "an error may be attached to an issue as well"


def test_the_path_of_a_model_is_left_out() -> None:
    layer = Layer("/home/somebody/model", hidden=64, intermediate=32, experts=4, top_k=2)
    found = new_report("bench", torch.device("cpu"), layer, [ROW], Ceilings(1.0, 1.0))
    assert found["layer"]["name"] == "another"
    assert "somebody" not in json.dumps(found)


def test_versions_of_an_unusual_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's own build of torch may have anything in its version."""
    monkeypatch.setattr(torch, "__version__", "2.11.0+git/home/somebody")
    assert report()["environment"]["torch"] == "unknown"
