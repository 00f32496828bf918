"""The tables of ``docs/models.md`` about published models: the memory of a run, the cards that it fits, and what was run.

The numbers are the predictions of ``moe-fused finetune`` for the configs in ``benchmarks/models``, made on the meta device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.models import Published
    from benchmarks.rows import Row
    from moe_fused.finetune.plan import MemoryPlan
    from moe_fused.recurrent import Recurrent

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
BENCHMARK = "finetune_30b"
LENGTHS = (1024, 2048, 4096, 8192, 16384)
# Cards by their nominal GiB, and the share of them that a run may use: firmware, driver and screen take the rest.
CARDS = (16, 24, 32, 48, 80)
USABLE = 0.96
NO_LIMIT = 4096
NONE = "–"


# The package that the tables count on, wherever it has kernels for a model.
PACKAGE = "fla"


def _marked(model: Published) -> str:
    """The name of a model, with the marks of the footnotes on recurrent layers and on MXFP4."""
    return model.repository + "⁷" * bool(_recurrent(model)) + "⁸" * model.is_mxfp4


@functools.cache
def _recurrent(model: Published) -> tuple[Recurrent, ...]:
    from moe_fused.memory import skeleton
    from moe_fused.recurrent import recurrent_layers

    return recurrent_layers(skeleton(model.config()))


@functools.cache
def plans(model: Published, package: str | None = PACKAGE) -> dict[int, list[MemoryPlan]]:
    """The plans of finetune's default run on an NVIDIA GPU, by length; with CUDA graphs first, where there are any.

    Lengths beyond the model's positions are left out. The plans count on ``package`` alone among the packages that compute
    recurrent layers, whatever is installed here.
    """
    import torch

    from moe_fused.finetune.options import Options
    from moe_fused.finetune.plan import plans_of
    from moe_fused.finetune.resolve import set_up

    config = model.config()
    quantization: Any = "mxfp4" if model.is_mxfp4 else "auto"
    options = Options(
        model=model.repository, dataset="data", output="out", memory_limit=NO_LIMIT, quantization=quantization
    )
    setup = set_up(options, config, torch.device("cuda"))
    setup = dataclasses.replace(setup, packages=frozenset() if package is None else frozenset({package}))
    longest = config.get_text_config().max_position_embeddings
    return {
        length: list(
            plans_of(
                dataclasses.replace(setup, options=dataclasses.replace(options, sequence_length=length)),
                plain_text=False,
            )
        )
        for length in LENGTHS
        if length <= longest
    }


def _peaks(planned: dict[int, list[MemoryPlan]]) -> Iterable[str]:
    from moe_fused.memory import GIB

    for length in LENGTHS:
        yield f"{planned[length][0].prediction.total / GIB:.2f}" if length in planned else NONE


def memory_table(models: Sequence[Published]) -> str:
    """The predicted peaks by length, in GiB."""

    def cells(model: Published) -> Iterable[str]:
        yield _marked(model)
        yield f"{model.parameters} ({model.active})"
        yield from _peaks(plans(model))

    return table(["model", "billions of parameters (active)", *map(str, LENGTHS)], map(cells, models))


def recurrent_table(models: Sequence[Published]) -> str:
    """The predicted peaks in plain torch by length, in GiB, of models with recurrent layers, and what one layer keeps."""
    from moe_fused.memory import GIB, Workload

    def cells(model: Published) -> Iterable[str]:
        yield model.repository
        work = Workload()
        with_package = dataclasses.replace(work, packages=frozenset({PACKAGE}))
        for kind in _recurrent(model):
            yield f"{kind.layers} of {kind.mixer.title}"
            yield f"{kind.mixer.kept(work) / GIB:.2f}"
            has_kernels = kind.mixer.package == PACKAGE
            yield f"{kind.mixer.kept(with_package) / GIB:.2f}" if has_kernels else NONE
        yield from _peaks(plans(model, None))

    head = [
        "model",
        "recurrent layers",
        "kept by one, plain torch",
        "kept by one, with the package",
        *map(str, LENGTHS),
    ]
    return table(head, map(cells, filter(_recurrent, models)))


def cards_table(models: Sequence[Published]) -> str:
    """The longest sequences that fit cards of some sizes."""
    return table(
        ["model", *(f"{card} GB" for card in CARDS)],
        ([_marked(model), *(str(longest_on(model, card) or NONE) for card in CARDS)] for model in models),
    )


def longest_on(model: Published, card: int) -> int | None:
    """The longest of ``LENGTHS`` that fits a card of so many GiB, with CUDA graphs or without; None if none fits."""
    from moe_fused.memory import GIB

    fitting = [
        length
        for length, planned in plans(model).items()
        if min(plan.needed for plan in planned) <= USABLE * card * GIB
    ]
    return max(fitting, default=None)


def runs_table(models: Sequence[Published]) -> str:
    """The command for each model, and what of it was run."""
    rows = _rows()

    def cells(model: Published) -> Iterable[str]:
        yield model.repository + "⁸" * model.is_mxfp4
        yield f"`moe-fused finetune --model {model.repository} --dataset chats.jsonl --output my-adapter`"
        yield _run(model, rows)

    return table(["model", "command", "what was run"], map(cells, models))


def _rows() -> list[tuple[Path, Row]]:
    """The rows of whole models in ``benchmarks/results``, each with its file."""
    from benchmarks.rows import OURS, read_rows

    files = sorted(RESULTS.glob("finetune-*.json"))
    rows = [(file, row) for file in files for row in read_rows(file)]
    return [(file, row) for file, row in rows if (row.benchmark, row.implementation) == (BENCHMARK, OURS) and row.ms]


def _run(model: Published, rows: list[tuple[Path, Row]]) -> str:
    found: dict[tuple[Path, str], list[int]] = {}
    for file, row in rows:
        if row.layer == model.name:
            found.setdefault((file, row.gpu), []).append(row.tokens)
    runs = [
        f"full size on {gpu} with {', '.join(map(str, sorted(tokens)))} tokens "
        f"([rows](../{file.relative_to(REPOSITORY).as_posix()}))"
        for (file, gpu), tokens in found.items()
    ]
    return "; ".join([*runs, "a tiny model in the tests"])


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """Each table by the name of the comments that it stands between."""
    from benchmarks.models import MODELS

    return {
        "memory": memory_table(MODELS),
        "cards": cards_table(MODELS),
        "recurrent": recurrent_table(MODELS),
        "runs": runs_table(MODELS),
    }
