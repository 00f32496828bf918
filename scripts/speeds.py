"""Writes what ``moe-fused finetune`` knows about the time of a step and of attention: ``python scripts/speeds.py``.

``moe_fused/finetune/speeds/`` gets a file for each GPU with rows of the benchmark ``finetune_30b``, because a wheel has no
benchmarks. ``moe_fused.finetune.duration`` reads these files. ``moe_fused/finetune/attention_speeds/`` gets one for each GPU
with rows of the benchmark ``attention``, which ``moe_fused.finetune.varlen`` reads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
SPEEDS = REPOSITORY / "moe_fused" / "finetune" / "speeds"
ATTENTION_SPEEDS = REPOSITORY / "moe_fused" / "finetune" / "attention_speeds"
# What in a config decides how much a step computes.
_CONFIG = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers",
)  # fmt: skip


def speeds(results: Path) -> dict[str, str]:
    """Makes the files from the rows in the directory ``results``.

    Returns:
        The text of each file, by its name.
    """
    sys.path.insert(0, str(REPOSITORY))
    from benchmarks.finetune_30b import NAME, QWEN3_30B
    from benchmarks.rows import OURS, read_rows, slug
    from benchmarks.training import Recipe

    config: Any = QWEN3_30B.config()
    files = {}
    for path in sorted(results.glob(f"{NAME.replace('_', '-')}_*.json")):
        rows = [row for row in read_rows(path) if row.implementation == OURS and row.ms is not None]
        rows = sorted((row for row in rows if row.layer == QWEN3_30B.name), key=lambda row: row.tokens)
        if len(rows) < 3:  # too few for a curve
            continue
        entry = {
            "gpu": rows[0].gpu,
            "model": "Qwen3-30B-A3B",
            "config": {name: getattr(config, name) for name in _CONFIG},
            "weights": rows[0].weights,
            "attention_rank": Recipe().attention_rank,
            "expert_rank": rows[0].lora_rank,
            "tokens": [row.tokens for row in rows],
            "ms": [row.ms for row in rows],
            "optimizer_ms": [row.details["optimizer_ms"] for row in rows],
            "attention_ms": [row.details["attention_ms"] for row in rows],
        }
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in entry.items())
        files[f"{slug(rows[0].gpu)}.json"] = f"[{{\n{lines}\n}}]\n"
    return files


def attention_speeds(results: Path) -> dict[str, str]:
    """Makes the files of attention over documents from the rows in the directory ``results``.

    What counts is a layer that is computed again in the backward pass, within CUDA graphs: forward, then forward and
    backward.

    Returns:
        The text of each file, by its name.
    """
    sys.path.insert(0, str(REPOSITORY))
    from benchmarks.attention import NAME, PACKED
    from benchmarks.rows import read_rows, slug
    from moe_fused.finetune.attention import KERNELS
    from moe_fused.finetune.varlen import TORCH

    files = {}
    for path in sorted(results.glob(f"{NAME}_*.json")):
        rows = [row for row in read_rows(path) if row.implementation in KERNELS and row.ms and row.details["graph"]]
        found = {(row.implementation, row.phase, row.tokens): row for row in rows}
        tokens = sorted({row.tokens for row in rows})
        ms = {}
        for name in KERNELS:
            pairs = [[found.get((name, phase, count)) for phase in (PACKED, f"{PACKED}_forward")] for count in tokens]
            if pairs and all(row is not None for pair in pairs for row in pair):
                ms[name] = [round(sum(row.ms for row in pair), 5) for pair in pairs]  # type: ignore[union-attr, misc]
        if TORCH not in ms:
            continue
        entry = {
            "gpu": rows[0].gpu,
            "capability": [int(rows[0].details["capability"]), round(10 * rows[0].details["capability"] % 10)],
            "torch": ".".join(rows[0].torch.split(".")[:2]),
            "features": int(rows[0].details["features"]),
            "tokens": tokens,
            "ms": ms,
        }
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in entry.items())
        files[f"{slug(rows[0].gpu)}.json"] = f"{{\n{lines}\n}}\n"
    return files


def main() -> None:
    """Writes the files."""
    for directory, files in ((SPEEDS, speeds(RESULTS)), (ATTENTION_SPEEDS, attention_speeds(RESULTS))):
        for name, text in files.items():
            directory.mkdir(exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")
            print(f"wrote {directory / name}")


if __name__ == "__main__":
    main()
