"""The tables of ``docs/gpus.md``: what is predicted for GPUs that nobody here has, and how good the predictions are.

They come from ``benchmarks/results/compiled.json``, which ``python -m benchmarks.compiled`` renews, and from the data sheets
in ``benchmarks/gpus.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from scripts.models_tables import NONE, table

TOKENS = (512, 4096, 16384)
RANK = 16
# The letters that say what limits a kernel.
LETTERS = {
    "memory": "M", "cache": "L", "tensor cores": "T", "issue": "I", "shared memory": "S", "waiting": "W",
}  # fmt: skip
# The products of a step in the order of the tables. What is left are launches that only move memory, and adapters.
NAMES = ("up", "down", "back through down", "back through up", "grad of down", "grad of up")
REST, ADAPTERS = "routing and combining", "products of the adapters"
FAMILIES = (
    "up", "gemm", "gemm_short", "down_backward", "wgrad", "shrink", "wgrad_thin",
    "up_4bit", "gemm_4bit", "transposed_4bit", "down_backward_4bit",
)  # fmt: skip


def cards_table() -> str:
    """The GPUs, and what their data sheets say of them."""
    from benchmarks.gpus import BY_NAME

    return table(
        ["GPU", "compiled for", "GB", "memory, GB/s", "bf16 TFLOP/s", "multiprocessors", "clock, MHz"],
        (
            [
                card.name,
                f"sm_{card.arch}" if isinstance(card.arch, int) else str(card.arch),
                str(card.gib),
                f"{card.ceilings.bytes_per_second / 1e9:.0f}",
                f"{card.ceilings.flops_per_second / 1e12:g}",
                str(card.multiprocessors),
                f"{card.clock / 1e6:.0f}",
            ]
            for card in BY_NAME.values()
        ),
    )


def _group(name: str, family: str) -> str:
    """The row of a table in which a launch counts."""
    product = name.removeprefix("dequantize, ")
    if product in NAMES:
        return product
    return ADAPTERS if family in ("shrink", "wgrad_thin") else REST


def times_table(weights: str) -> str:
    """The predicted milliseconds of a step's kernels, and their bounds."""
    from benchmarks.gpus import CARDS
    from benchmarks.predict import NF4, QWEN3, Predictor
    from moe_fused.benchmark.layers import FORWARD_BACKWARD

    layer = replace(QWEN3, lora_rank=RANK if weights == NF4 else 0)
    predictors = [Predictor(card) for card in CARDS]

    def cells(tokens: int) -> Iterable[list[str]]:
        columns: list[dict[str, list[Any]]] = []
        for predictor in predictors:
            groups: dict[str, list[Any]] = {}
            for launch in predictor.launches(layer, tokens, FORWARD_BACKWARD, weights):
                groups.setdefault(_group(launch.name, launch.family), []).append(predictor.predict(launch))
            columns.append(groups)
        names = [name for name in (*NAMES, ADAPTERS, REST) if name in columns[0]]
        for name in names:
            yield [str(tokens), name, *(_cell(groups[name]) for groups in columns)]
        totals = (sum(each.seconds for group in groups.values() for each in group) for groups in columns)
        yield [str(tokens), "**all**", *(f"**{_ms(total)}**" for total in totals)]

    rows = (row for tokens in TOKENS for row in cells(tokens))
    return table(["tokens", "kernel", *(card.name for card in CARDS)], rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds < 1e-2 else f"{1e3 * seconds:.1f}"


def _cell(predictions: list[Any]) -> str:
    """The time of some launches together, with the bound of the longest."""
    longest = max(predictions, key=lambda each: each.seconds)
    return f"{_ms(sum(each.seconds for each in predictions))} {LETTERS[longest.bound]}"


def programs_table() -> str:
    """Programs a multiprocessor and bytes of spills of every configuration in use, without and with an adapter."""
    import json

    from benchmarks.compiled import ADAPTED, HEIGHTS, PLAIN, fields_of, key_of, read_facts
    from benchmarks.gpus import CARDS
    from benchmarks.predict import Predictor

    facts = {key_of(each): each for each in read_facts()}
    archs = list(dict.fromkeys(card.arch for card in CARDS))
    tuning = Predictor(CARDS[0]).tuning

    def cell(arch: Any, family: str, height: int) -> str:
        config = json.dumps(fields_of(tuning.launch_config(family, height, tuning.TARGETS[arch], 2)), sort_keys=True)
        forms = [adapted for adapted, stages in ((False, PLAIN), (True, ADAPTED)) if family in stages]
        found = [facts[str(arch), family, height, adapted, config] for adapted in forms]
        programs = "/".join(dict.fromkeys(str(each.programs) for each in found))
        spills = max(each.spills for each in found)
        return programs + (f", {spills} B" if spills else "")

    head = ["kernel", "rows of a tile", *(f"sm_{arch}" if isinstance(arch, int) else str(arch) for arch in archs)]
    rows = (
        [family, str(height), *(cell(arch, family, height) for arch in archs)]
        for family in FAMILIES
        for height in HEIGHTS
    )
    return table(head, rows)


def accepted_table() -> str:
    """The launches that spill or are alone on a multiprocessor, and why."""
    from tests.kernel.accepted import ACCEPTED

    def gpu(arch: Any) -> str:
        return f"sm_{arch}" if isinstance(arch, int) else str(arch)

    return table(
        ["GPUs", "stages", "rows of a tile", "programs", "spills, bytes", "why"],
        (
            [
                ", ".join(map(gpu, each.archs)),
                ", ".join(stage.strip(" ,") for stage in each.stages),
                str(each.height),
                str(each.programs),
                str(each.spills),
                each.why,
            ]
            for each in ACCEPTED
        ),
    )


def errors_table() -> str:
    """How far predictions are off, by what was fitted and by what is predicted."""
    from benchmarks.predict import KINDS, fit, kind_of, measured, ratios

    def cells(fitted: str, card: str) -> Iterable[list[str]]:
        found = ratios(card, fit([fitted]))
        kinds = [kind_of(each) for each in measured(card)]
        for kind in (*KINDS, "all"):
            errors = sorted(abs(ratio - 1) for ratio, of in zip(found, kinds, strict=True) if kind in (of, "all"))
            if errors:
                median, worst = statistics.median(errors), errors[-1]
                ninth = errors[min(len(errors) - 1, round(0.9 * len(errors)))]
                yield [fitted, card, kind, str(len(errors)), f"{median:.1%}", f"{ninth:.0%}", f"{worst:.0%}"]

    rows = (row for pair in (("H200", "H100"), ("H100", "H200"), ("H200", "H200")) for row in cells(*pair))
    return table(["fitted to", "predicted", "what", "times", "median error", "90 % are within", "worst"], rows)


def orders_table() -> str:
    """The measured alternatives of configurations on an H100, and what is predicted of their order."""
    from benchmarks import orders
    from benchmarks.compiled import key_of, read_facts
    from benchmarks.gpus import BY_NAME
    from benchmarks.predict import Predictor

    facts = {key_of(each): each for each in read_facts()}
    tuning = Predictor(BY_NAME[orders.CARD]).tuning
    rows = [
        [each.family, str(each.height), str(each.tokens), each.what, f"{each.ratio:.2f}",
         f"{orders.predicted_ratio(each, facts):.2f}"]
        for each in orders.measured(tuning)
        if each.ratio is not None
    ]  # fmt: skip
    rows += [
        [each.family, str(each.height), str(each.tokens), f"the default: {each.what}", "more than 1",
         f"{orders.predicted_ratio(each, facts):.2f}"]
        for each in orders.shipped(tuning)
    ]  # fmt: skip
    return table(["kernel", "rows of a tile", "tokens", "what is slower", "measured", "predicted"], rows)


def ways_table() -> str:
    """How often the order of two ways of computing the same is predicted right."""
    from benchmarks.predict import constants, order_of_ways

    rows = []
    for card in ("H100", "H200"):
        for least in (0.0, 0.05, 0.2):
            right, compared = order_of_ways(card, constants(), least)
            rows.append([card, f"{least:.0%}" if least else NONE, str(compared), f"{right} ({right / compared:.0%})"])
    return table(["GPU", "measured to differ by at least", "pairs", "predicted in the right order"], rows)


def tables() -> dict[str, str]:
    """Each table by the name of the comments that it stands between."""
    from benchmarks.predict import BF16, NF4

    return {
        "cards": cards_table(),
        "bf16": times_table(BF16),
        "nf4": times_table(NF4),
        "programs": programs_table(),
        "accepted": accepted_table(),
        "errors": errors_table(),
        "ways": ways_table(),
        "orders": orders_table(),
    }
