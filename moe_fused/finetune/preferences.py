"""Turns rows of preferences into the columns that TRL's DPOTrainer and KTOTrainer train on.

Both trainers would tokenize the rows themselves, after the model is loaded, and drop rows silently whose prompt fills a
sequence. Here the tokens come from ``render``, as for supervised training, and such rows have been refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


def for_trl(tokens: Dataset, seed: int | None = None) -> Dataset:
    """Returns rows in the columns of TRL's trainers.

    Args:
        tokens: The rows that can be used: ``input_ids`` (the prompt and an answer), ``first`` (the length of the prompt),
            and either ``rejected_ids`` (the other answer) or ``wanted``.
        seed: If given, rows are put in a random order.
    """
    if seed is not None:
        tokens = tokens.select(np.random.default_rng(seed).permutation(len(tokens)))
    arrow = tokens.with_format("arrow")
    found: Dataset = arrow.map(_columns, batched=True, remove_columns=arrow.column_names, desc="Splitting prompts off")
    return found.with_format(None)


def prompt_lengths(dataset: Any) -> np.ndarray:
    """Returns the number of tokens of each prompt."""
    return _lengths(dataset, "prompt_ids")


def whole_lengths(dataset: Any) -> np.ndarray:
    """Returns the number of tokens of each prompt with each of its answers, (answers to a prompt, rows)."""
    answers = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in dataset.column_names]
    return np.stack([prompt_lengths(dataset) + _lengths(dataset, name) for name in answers])


def lengths_of(dataset: Any, most: int) -> list[int]:
    """Returns the number of tokens of each sequence that the rows of a data set become, at most ``most``."""
    lengths: list[int] = np.minimum(whole_lengths(dataset), most).T.flatten().tolist()
    return lengths


def _columns(table: pa.Table) -> pa.Table:
    import pyarrow as pa

    ids, begins = table["input_ids"].combine_chunks(), table["first"].to_numpy()
    offsets, values = ids.offsets.to_numpy(), ids.flatten()
    offsets = offsets - offsets[0]
    prompts, answers = (
        _parts(values, offsets[:-1], offsets[:-1] + begins),
        _parts(values, offsets[:-1] + begins, offsets[1:]),
    )
    if "wanted" in table.column_names:
        return pa.table({"prompt_ids": prompts, "completion_ids": answers, "label": table["wanted"]})
    return pa.table({"prompt_ids": prompts, "chosen_ids": answers, "rejected_ids": table["rejected_ids"]})


def _parts(values: pa.Array, begins: np.ndarray, ends: np.ndarray) -> pa.Array:
    """Returns the list of ``values[begin:end]`` for each pair of a begin and an end. The pairs are in order."""
    import pyarrow as pa

    sizes = ends - begins
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    places = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], sizes)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.take(pa.array(places)))


def _lengths(dataset: Any, name: str) -> np.ndarray:
    import pyarrow.compute as pc

    # `data` is the whole table, also of a selection of its rows.
    table = dataset.select_columns([name]).with_format("arrow")[:]
    return np.asarray(pc.list_value_length(table[name]).to_numpy(), dtype=np.int64)
