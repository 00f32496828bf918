"""TRL's batches as ``attention`` and CUDA graphs take them: all of one shape, with the boundaries of packed documents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]

# The share of tokens that are no padding from which on all sequences are made equally long: padding costs what tokens do.
FULL = 0.85
# What else TRL says of where documents lie, for attention and convolutions of other kinds.
_OTHERS = ("cu_seq_lens_k", "max_length_k", "seq_idx")


def lengths_of(dataset: Any) -> list[int]:
    """Tokens of each sequence of a data set of TRL's, without making Python's numbers of the tokens."""
    lengths: list[int] = pc.list_value_length(dataset.data.column("input_ids")).to_pylist()
    return lengths


def is_full(lengths: Sequence[int]) -> bool:
    """Whether filling all sequences up to the longest adds little to them."""
    return sum(lengths) >= FULL * len(lengths) * max(lengths)


def _fill(batch: dict[str, Any], padding: int, rows: int, columns: int) -> None:
    """Adds rows and columns of padding, from which nothing is learned."""
    values = {"input_ids": padding, "labels": -100, "attention_mask": 0}
    for name, value in values.items():
        batch[name] = functional.pad(batch[name], (0, columns, 0, rows), value=value)


@dataclass(frozen=True)
class Sequences:
    """Batches of sequences side by side, filled up to ``shape``, (B, T).

    Attributes:
        collate: TRL's collator.
        padding: the id of tokens that fill up.
    """

    collate: Collate
    shape: tuple[int, int]
    padding: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        have = batch["input_ids"].shape
        _fill(batch, self.padding, self.shape[0] - have[0], self.shape[1] - have[1])
        return batch


@dataclass(frozen=True)
class Documents:
    """Batches of packed documents, one row of tokens, with boundaries that are of one shape whatever their number.

    Attributes:
        collate: TRL's collator of batches without padding.
        most: documents of a batch, at most.
        longest: tokens of the longest document of all, or of what fills a batch up.
        tokens: to fill batches up to; None leaves them as they are.
        padding: the id of tokens that do so.
    """

    collate: Collate
    most: int
    longest: int
    tokens: int | None
    padding: int

    @classmethod
    def of(
        cls, collate: Collate, lengths: Sequence[Sequence[int]], batch_size: int, tokens: int | None, padding: int
    ) -> Documents:
        """For packed sequences with documents of these ``lengths``, of which ``batch_size`` make a batch."""
        most, longest = batch_size * max(map(len, lengths)), max(itertools.chain.from_iterable(lengths))
        if tokens is not None:
            longest = max(longest, tokens - min(map(sum, lengths)))
        return cls(collate, most, longest, tokens, padding)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        for name in _OTHERS:
            batch.pop(name, None)
        boundaries: Tensor = batch.pop("cu_seq_lens_q")
        del batch["max_length_q"]
        total = batch["input_ids"].shape[1]
        filled = total if self.tokens is None else self.tokens
        if self.tokens is not None:
            # Attention does not look at the mask; TRL counts tokens by it.
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            _fill(batch, self.padding, 0, filled - total)
            padding = torch.arange(filled - total)[None]
            batch["position_ids"] = torch.cat([batch["position_ids"], padding], dim=1)
        if self.most == 1:
            # One document and what comes after it, which it does not see: causal attention is all it takes.
            return batch
        # What fills up is a document of its own, as those that are missing are, of no tokens.
        boundaries = functional.pad(boundaries, (0, self.most + 2 - len(boundaries)), value=filled)
        batch["cu_seq_lens_q"], batch["max_length_q"] = boundaries, self.longest
        return batch
