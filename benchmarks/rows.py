"""Benchmark rows: what every benchmark of the project writes, and the files that hold the rows.

A file is a JSON list of objects with the keys of ``Row``; ``details`` is left out where it is empty. All rows of one *point*
(the same benchmark, GPU, layer, tokens, phase and LoRA rank) come from one run, so a ratio between two of them is a ratio
under the same clocks. ``merge`` therefore replaces a point as a whole and never single implementations of it. How the
weights are stored is not part of a point, because the implementations of a point may differ in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

from moe_fused.benchmark.harness import Environment
from moe_fused.staging import replace_file

OURS = "moe_fused"
EAGER = "moe_fused_eager"  # the implementation name of our rows of a run without CUDA graphs
ROOFLINE = "roofline"  # the implementation name of the rows that hold the least time the hardware allows
_FORMER_NAMES = {"floor": ROOFLINE}  # in files that were written before the name changed

# What the implementations of the fine-tuning benchmark are called where readers have not seen their definitions.
FINETUNING_LABELS = {
    OURS: "moe-fused",
    EAGER: "moe-fused without CUDA graphs",
    "composed": "bitsandbytes + torch._grouped_mm",
    "peft": "PEFT on bf16 experts",
}

# For each benchmark, the implementations that others are compared with. Where there is room for one, it is the first.
BASELINES: dict[str, tuple[str, ...]] = {
    "experts": ("grouped_mm",),
    "experts_4bit": ("composed", "dequantize_first", "moe_fused_bf16"),
    "finetune_30b": ("composed",),
    "finetune_methods": ("sft", "dpo"),
    "finetune_gpus": ("one_gpu",),
    "experts_lora": ("composed", "peft", "attention_only", "moe_fused_bf16"),
    "experts_formats": ("moe_fused", "composed_mxfp4", "composed_nvfp4"),
}

Point = tuple[str, str, str, int, str, int]


@dataclass(frozen=True)
class Row:
    """One measurement.

    ``ms`` is None where the implementation ran out of memory or could not run; ``tflops`` then is None too.
    ``peak_mib`` is memory allocated on top of inputs and weights, of whole models with them, None where it was not
    measured. ``lora_rank`` is 0 without LoRA. Rows of the implementation ``roofline`` are not timed: they hold the larger of
    the compulsory bytes and operations at the ceilings that the same run measured. ``details`` are further numbers, which
    the benchmark explains.
    """

    benchmark: str
    gpu: str
    date: str
    torch: str
    triton: str
    layer: str
    tokens: int
    implementation: str
    phase: str
    weights: str
    lora_rank: int
    ms: float | None
    tflops: float | None
    peak_mib: float | None
    details: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def point(self) -> Point:
        """What was measured, without the implementation. Rows of the same point can be compared."""
        return (self.benchmark, self.gpu, self.layer, self.tokens, self.phase, self.lora_rank)


def new_row(
    environment: Environment,
    *,
    benchmark: str,
    layer: str,
    tokens: int,
    implementation: str,
    phase: str,
    weights: str,
    ms: float | None,
    flops: float,
    peak_mib: float | None = None,
    lora_rank: int = 0,
) -> Row:
    """Makes the row of a run in ``environment``. Its TFLOP/s are ``flops`` operations divided by ``ms``."""
    return Row(
        benchmark=benchmark,
        **asdict(environment),
        layer=layer,
        tokens=tokens,
        implementation=implementation,
        phase=phase,
        weights=weights,
        lora_rank=lora_rank,
        ms=None if ms is None else round(ms, 5),
        tflops=None if not ms else round(flops / ms / 1e9, 3),
        peak_mib=None if peak_mib is None else round(peak_mib, 2),
    )


DETAILS = "details"
KEYS = tuple(column.name for column in fields(Row) if column.name != DETAILS)
_NUMBERS_OR_NULL = ("ms", "tflops", "peak_mib")
_INTEGERS = ("tokens", "lora_rank")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def row_from_json(value: Any) -> Row:
    """Returns the row that a JSON object holds.

    Raises:
        ValueError: the value is not an object with exactly the keys of ``Row``, or one of its values has the wrong type.
    """
    if not isinstance(value, dict) or set(value) - {DETAILS} != set(KEYS):
        got = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"a benchmark row must be an object with the keys {', '.join(KEYS)}, got {got}")
    for key, item in value.items():
        if key in _NUMBERS_OR_NULL:
            fits, needed = item is None or _is_number(item), "a number or null"
        elif key == DETAILS:
            fits = isinstance(item, dict) and all(map(_is_number, item.values()))
            needed = "an object of numbers"
        elif key in _INTEGERS:
            fits, needed = isinstance(item, int) and not isinstance(item, bool), "an integer"
        else:
            fits, needed = isinstance(item, str), "a string"
        if not fits:
            raise ValueError(f"{key} of a benchmark row must be {needed}, got {item!r}")
    name = value["implementation"]
    return Row(**{**value, "implementation": _FORMER_NAMES.get(name, name)})


def read_rows(path: Path) -> list[Row]:
    """Returns the rows in the file at ``path``.

    Raises:
        ValueError: the file is not a JSON list of rows.
        OSError: the file cannot be read.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, list):
            raise ValueError(f"a list of rows is needed, got {type(values).__name__}")
        return [row_from_json(value) for value in values]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_rows(path: Path, rows: Iterable[DataclassInstance]) -> None:
    """Writes ``rows`` as a JSON list with one row on each line, so that a new measurement gives a readable diff."""
    lines = ",\n".join(
        json.dumps({key: value for key, value in asdict(row).items() if key != DETAILS or value}) for row in rows
    )
    replace_file(path, f"[\n{lines}\n]\n".encode())


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Replaces every point of ``old`` that ``new`` measured by the rows of ``new``. The rows come back in a fixed order."""
    measured = {row.point for row in new}
    rows = [row for row in old if row.point not in measured] + list(new)
    # A stable sort: implementations keep the order in which the benchmark lists them.
    return sorted(rows, key=lambda row: (row.benchmark, row.gpu, row.layer, row.lora_rank, row.phase, row.tokens))


def baselines_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """Returns the implementations that others in ``rows`` are compared with, the most important one first.

    Raises:
        ValueError: the rows are of several benchmarks, or of one that has no baselines.
    """
    names = list(dict.fromkeys(row.benchmark for row in rows))
    if len(names) != 1 or names[0] not in BASELINES:
        raise ValueError(f"rows must be of one benchmark of {', '.join(BASELINES)}, got {', '.join(names) or 'none'}")
    return BASELINES[names[0]]


def weights_of(rows: Sequence[Row]) -> str:
    """Returns how weights are stored in ``rows``: by our implementation, because another may store its weights otherwise."""
    return next((row for row in rows if row.implementation == OURS), rows[0]).weights


def slug(gpu: str) -> str:
    """Turns a GPU's name into a part of a file name: ``NVIDIA H100 80GB HBM3`` becomes ``h100-80gb-hbm3``."""
    words = "".join(c if c.isalnum() else " " for c in gpu.lower()).split()
    return "-".join(word for word in words if word not in ("nvidia", "amd")) or "unknown"
