"""The tables of ``docs/several-gpus.md`` about models on several GPUs: what fits, what is moved, and how fast it would be.

Memory is the prediction of ``moe-fused finetune``. Times are simulated (see ``benchmarks/simulate_gpus.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from scripts.models_tables import LENGTHS, NONE, table

if TYPE_CHECKING:
    from benchmarks.rows import Row
    from benchmarks.simulate_gpus import Simulated

MODELS = ("qwen3-30b-a3b", "gpt-oss-120b", "glm-4.5-air", "qwen3-235b-a22b")
# Numbers of GPUs and their GiB.
SETUPS = ((1, 24), (2, 24), (4, 24), (8, 24), (8, 32), (4, 48), (8, 48), (2, 80))
# Models and numbers of GPUs of which the table of bytes says what is moved.
MOVED = (("qwen3-30b-a3b", 2), ("qwen3-30b-a3b", 4), ("gpt-oss-120b", 8), ("glm-4.5-air", 8), ("qwen3-235b-a22b", 8))
# Models, numbers of GPUs, and whether they share the weights, of the table of simulated steps.
STEPS = (
    ("qwen3-30b-a3b", 1, False),
    ("qwen3-30b-a3b", 2, False),
    ("qwen3-30b-a3b", 2, True),
    ("qwen3-30b-a3b", 4, False),
    ("qwen3-30b-a3b", 4, True),
    ("gpt-oss-120b", 4, True),
    ("gpt-oss-120b", 8, True),
    ("glm-4.5-air", 4, True),
    ("glm-4.5-air", 8, True),
    ("qwen3-235b-a22b", 8, False),
    ("qwen3-235b-a22b", 8, True),
)
TOKENS = (1024, 4096)
CARD, LINK, FAST_LINK = "RTX 4090", "PCIe 4 x16", "NVLink 4"


def fits_table(models: Sequence[str] = MODELS) -> str:
    """The longest sequences that fit some GPUs; sharded where a single GPU cannot hold the model."""
    return table(
        ["model", *(f"{gpus} × {gib} GB" for gpus, gib in SETUPS)],
        ([_title(model), *(_longest(model, gpus, gib) for gpus, gib in SETUPS)] for model in models),
    )


def _title(model: str) -> str:
    from benchmarks.models import BY_NAME

    return BY_NAME[model].title


def _longest(model: str, gpus: int, gib: int) -> str:
    """The longest sequence, and how the GPUs hold the weights: whole if that allows as long ones."""
    fitting = {sharded: _longest_of(model, gpus, gib, sharded=sharded) for sharded in (False, True)[: 1 + (gpus > 1)]}
    whole, shared = fitting[False], fitting.get(True, 0)
    if not max(whole, shared):
        return NONE
    return f"{whole}" if whole >= shared else f"{shared} sharded" + (f", {whole} replicated" if whole else "")


def _longest_of(model: str, gpus: int, gib: int, *, sharded: bool) -> int:
    from benchmarks.simulate_gpus import USABLE, needed
    from moe_fused.memory import GIB

    return max((length for length in LENGTHS if needed(model, gpus, length, sharded) <= USABLE * gib * GIB), default=0)


def moved_table(rows: Sequence[tuple[str, int]] = MOVED) -> str:
    """What each GPU of a sharded model receives for a batch, and how long that and computing take."""
    from benchmarks.simulate_gpus import GPU_BY_NAME, LINK_BY_NAME, hidden_from, sizes_by_name, traffic
    from moe_fused.memory import Workload

    def cells(model: str, gpus: int) -> Iterable[str]:
        received = traffic(sizes_by_name(model), Workload(processes=gpus)).total
        yield from (_title(model), str(gpus), f"{received / 1e9:.0f}")
        yield from (f"{received / tokens / 1e6:.1f}" for tokens in TOKENS)
        yield from (f"{received / LINK_BY_NAME[link].bandwidth:.2f}" for link in (LINK, FAST_LINK))
        for gpu, link in ((CARD, LINK), ("H200", FAST_LINK)):
            yield str(hidden_from(model, GPU_BY_NAME[gpu], LINK_BY_NAME[link], gpus) or NONE)

    head = ["model", "GPUs", "GB per batch", *(f"MB per token, batch of {tokens}" for tokens in TOKENS)]
    head += [f"s over {link}" for link in (LINK, FAST_LINK)]
    head += [f"tokens per batch that hide it on {gpu} and {link}" for gpu, link in ((CARD, LINK), ("H200", FAST_LINK))]
    return table(head, (cells(model, gpus) for model, gpus in rows))


def steps_table(rows: Sequence[tuple[str, int, bool]] = STEPS) -> str:
    """The memory of each GPU and the simulated tokens per second of all of them, for rows of which some run fits."""
    from benchmarks.simulate_gpus import GPU_BY_NAME, LINK_BY_NAME, simulate
    from moe_fused.memory import GIB

    gpu, link = GPU_BY_NAME[CARD], LINK_BY_NAME[LINK]

    def cells(model: str, steps: Sequence[Simulated]) -> Iterable[str]:
        yield from (_title(model), str(steps[0].gpus), "sharded" if steps[0].sharded else "whole")
        yield from (f"{step.needed / GIB:.2f}" for step in steps)
        yield from (f"{step.tokens_per_second:.0f}" if step.needed <= gpu.usable else NONE for step in steps)

    simulated = (
        (model, [simulate(model, gpu, link, gpus, tokens, sharded=sharded) for tokens in TOKENS])
        for model, gpus, sharded in rows
    )
    fitting = ((model, steps) for model, steps in simulated if any(step.needed <= gpu.usable for step in steps))
    head = ["model", "GPUs", "weights", *(f"GiB per GPU, {tokens} tokens" for tokens in TOKENS)]
    head += [f"tokens/s, {tokens} tokens" for tokens in TOKENS]
    return table(head, (cells(*row) for row in fitting))


def measured_table() -> str:
    """The measured steps of several GPUs, beside what the plan and the simulation say of them."""
    from benchmarks.finetune_gpus import ONE, SHARDED, job_of
    from benchmarks.simulate_gpus import measured_steps
    from moe_fused.memory import MIB

    forms = {ONE: "one GPU", SHARDED: "sharded"}
    steps = list(measured_steps())
    alone = {(row.layer, row.phase): row for row, *_ in steps if row.implementation == ONE}

    def cells(row: Row, allocated: int, seconds: float) -> Iterable[str]:
        details, one = row.details, alone.get((row.layer, row.phase))
        assert row.ms is not None
        assert row.peak_mib is not None
        job, _ = job_of(row)
        yield _title(job.model) + (f", {job.layers} layers" if job.layers else "")
        yield from (
            f"{details['gpus']:.0f}",
            forms.get(row.implementation, "replicated"),
            f"{details['accumulation']:.0f}",
        )
        yield from (f"{row.ms:.0f}", f"{1e3 * seconds:.0f} ({1e3 * seconds / row.ms - 1:+.0%})")
        yield f"{details['tokens_per_second']:.0f}"
        yield f"{details['tokens_per_second'] / one.details['tokens_per_second']:.2f}" if one else NONE
        yield f"{details['weights_mib'] / 1024:.2f}"
        yield from (
            f"{row.peak_mib / 1024:.2f}",
            f"{allocated / MIB / 1024:.2f} ({allocated / MIB / row.peak_mib - 1:+.1%})",
        )

    head = [
        "model",
        "GPUs",
        "form",
        "batches",
        "ms",
        "simulated ms",
        "tokens/s",
        "× one GPU",
        "weights, GiB",
        "peak, GiB",
    ]
    return table([*head, "plan, GiB"], (cells(*step) for step in steps))


def cost_table() -> str:
    """The measured steps beside what the cost model gives, with all rows and without the row itself."""
    from benchmarks.step_cost import fit, fitted, measured_rows

    rows = measured_rows()

    def cells(index: int) -> Iterable[str]:
        row = rows[index]
        assert row.ms is not None
        yield from (_title(row.layer), str(row.tokens), f"{row.ms:.0f}")
        for cost in (fitted(), fit(rows[:index] + rows[index + 1 :])):
            ms = 1e3 * cost.step_seconds(row.layer, row.tokens)
            yield f"{ms:.0f} ({ms / row.ms - 1:+.0%})"

    head = ["model", "tokens", "measured ms", "cost model", "fitted without this row"]
    return table(head, (cells(index) for index in range(len(rows))))


def gpus_table() -> str:
    """The GPUs of the simulation, and what is assumed of them."""
    from benchmarks.simulate_gpus import GPUS

    return table(
        ["GPU", "GB", "bf16 TFLOP/s", "memory, GB/s", "source"],
        (
            [
                gpu.name,
                str(gpu.gib),
                f"{gpu.ceilings.flops_per_second / 1e12:.0f}",
                f"{gpu.ceilings.bytes_per_second / 1e9:.0f}",
                "measured" if gpu.is_measured else "published",
            ]
            for gpu in GPUS
        ),
    )


def tables() -> dict[str, str]:
    """Each table by the name of the comments that it stands between."""
    return {
        "fits": fits_table(),
        "moved": moved_table(),
        "steps": steps_table(),
        "measured": measured_table(),
        "cost": cost_table(),
        "ceilings": gpus_table(),
    }
