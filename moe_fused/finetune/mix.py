"""Sets rows aside for the evaluation, and joins or mixes the rows of several data sets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset


def set_aside(tables: Sequence[Dataset], count: int, seed: int) -> tuple[list[Dataset], list[Dataset]]:
    """Splits the rows of data sets into those to train on and ``count`` others, which the seed chooses among all rows.

    Returns:
        Both parts of each data set, with their rows in the order of the data set.
    """
    spans = _spans(tables)
    is_held = np.zeros(sum(map(len, tables)), dtype=bool)
    is_held[np.random.default_rng(seed).permutation(len(is_held))[:count]] = True
    # In the order of the file, so that packing puts neighbours together as it does without an evaluation.
    kept = [table.select(np.flatnonzero(~is_held[span])) for table, span in zip(tables, spans, strict=True)]
    held = [table.select(np.flatnonzero(is_held[span])) for table, span in zip(tables, spans, strict=True)]
    return kept, held


def mix(tables: Sequence[Dataset], shares: Sequence[float | None], seed: int) -> tuple[Dataset, list[Dataset]]:
    """Joins data sets in their order, or mixes them by their shares.

    With shares, the rows of each data set are shuffled, and each row of the mix comes from a data set that is drawn by
    the shares. No row is taken twice. The mix ends when the first data set has no row left. This is what
    ``interleave_datasets`` of the library ``datasets`` does by default.

    Args:
        tables: The data sets, which have the same columns.
        shares: The relative shares, all of them numbers or all None.
        seed: The seed of the shuffling and of the drawing.

    Returns:
        The rows of all data sets, and the rows that were taken from each of them.
    """
    from datasets import Dataset, concatenate_datasets, interleave_datasets

    weights = [share for share in shares if share is not None]
    joined = tables[0] if len(tables) == 1 else concatenate_datasets(list(tables))
    if not weights:
        return joined, list(tables)
    spans = _spans(tables)
    # The numbers of rows are mixed instead of the rows, to know afterwards where each row came from.
    numbers = [Dataset.from_dict({"number": np.arange(span.start, span.stop)}).shuffle(seed=seed) for span in spans]
    chances = [weight / sum(weights) for weight in weights]
    mixed = interleave_datasets(numbers, probabilities=chances, seed=seed, stopping_strategy="first_exhausted")
    order = np.asarray(mixed.with_format("numpy")[:]["number"])
    taken = [
        table.select(order[(order >= span.start) & (order < span.stop)] - span.start)
        for table, span in zip(tables, spans, strict=True)
    ]
    return joined.select(order), taken


def _spans(tables: Sequence[Dataset]) -> list[slice]:
    """Returns the places that the rows of each data set have among the rows of all."""
    ends = itertools.accumulate(map(len, tables), initial=0)
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]
