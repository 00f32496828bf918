"""Brings TRL's batches into one shape, with boundaries of documents, as ``attention`` and CUDA graphs need it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]

# All sequences are made equally long if at least this share of the tokens is not padding. Padding costs as much as
# tokens.
FULL = 0.85
# The entry of a batch with the places where its documents begin and end, as attention takes them.
BOUNDARIES = "cu_seq_lens_q"
# Further entries of TRL's batches that describe documents, for other kinds of attention and for convolutions.
_OTHERS = ("cu_seq_lens_k", "max_length_k", "seq_idx")


def lengths_of(dataset: Any) -> list[int]:
    """Returns the number of tokens of each sequence in a data set of TRL, without reading the tokens."""
    lengths: list[int] = pc.list_value_length(dataset.data.column("input_ids")).to_pylist()
    return lengths


def is_full(lengths: Sequence[int]) -> bool:
    """Whether filling up all sequences to the longest adds little padding."""
    return sum(lengths) >= FULL * len(lengths) * max(lengths)


def _fill(batch: dict[str, Any], padding: int, rows: int, columns: int, prefix: str = "") -> None:
    """Adds rows and columns of padding to what a batch has under names with ``prefix``. Nothing is learned from padding."""
    values = {"input_ids": padding, "labels": -100, "attention_mask": 0, "completion_mask": 0}
    for name, value in values.items():
        if (tensor := batch.get(prefix + name)) is not None:
            batch[prefix + name] = functional.pad(tensor, (0, columns, 0, rows), value=value)


@dataclass(frozen=True)
class Answers:
    """Collates answers to prompts, all filled up to one length.

    Attributes:
        collate: The collator of TRL's DPOTrainer or KTOTrainer.
        length: The number of tokens of each sequence.
        padding: The token of padding.
    """

    collate: Collate
    length: int
    padding: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        for prefix in ("", "KL_"):
            if (tokens := batch.get(f"{prefix}input_ids")) is not None:
                _fill(batch, self.padding, 0, self.length - tokens.shape[1], prefix)
        return batch


@dataclass(frozen=True)
class Sequences:
    """Collates whole sequences into batches of one shape.

    Attributes:
        collate: TRL's collator.
        shape: The shape to which batches are filled up, (B, T).
        padding: The token of padding.
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
    """Collates packed documents into batches with one row of tokens, and boundaries of few shapes.

    Boundaries are filled up by documents without tokens. These are not free: attention on a GPU starts blocks of threads
    for each document and for its backward pass keeps 128 rows for each, in fp32.

    Attributes:
        collate: TRL's collator for batches without padding.
        most: The largest number of documents in a batch, for which all boundaries have room. If it is None, as for a
            stream, the boundaries of a batch have room for as many documents as the next power of two.
        longest: The number of tokens of the longest document. Padding becomes documents that are no longer.
        tokens: The number of tokens to which batches are filled up. None leaves batches as they are.
        padding: The token of padding.
    """

    collate: Collate
    most: int | None
    longest: int
    tokens: int | None
    padding: int

    @classmethod
    def of(
        cls, collate: Collate, lengths: Sequence[Sequence[int]], batch_size: int, tokens: int | None, padding: int
    ) -> Documents:
        """Makes the collator for sequences of packed documents.

        Args:
            collate: TRL's collator for batches without padding.
            lengths: The numbers of tokens of the documents in each sequence.
            batch_size: The number of sequences in a batch.
            tokens: The number of tokens to which batches are filled up, or None.
            padding: The token of padding.
        """
        most, longest = batch_size * max(map(len, lengths)), max(itertools.chain.from_iterable(lengths))
        if tokens is not None:
            longest = max(longest, tokens - min(map(sum, lengths)))
        return cls(collate, most, longest, tokens, padding)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        for name in _OTHERS:
            batch.pop(name, None)
        boundaries: Tensor = batch.pop(BOUNDARIES)
        del batch["max_length_q"]
        total = batch["input_ids"].shape[1]
        filled = total if self.tokens is None else self.tokens
        if self.tokens is not None:
            # Attention ignores this mask, but TRL counts tokens with it.
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            _fill(batch, self.padding, 0, filled - total)
            padding = torch.arange(filled - total)[None]
            batch["position_ids"] = torch.cat([batch["position_ids"], padding], dim=1)
        if self.most == 1:
            # A single document needs no boundaries: causal attention does not reach the padding after it.
            return batch
        # Padding becomes documents of its own. Batches with fewer documents get documents without tokens.
        ends = [*range(total + self.longest, filled, self.longest), filled]
        boundaries = torch.cat([boundaries, boundaries.new_tensor(ends)])
        documents = _power_of_two(len(boundaries) - 1) if self.most is None else self.most + 1
        batch[BOUNDARIES], batch["max_length_q"] = boundaries, self.longest
        return with_room(batch, documents + 1)


def _power_of_two(number: int) -> int:
    """Returns the smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def entries_of(batch: Mapping[str, Any]) -> int:
    """Returns the number of entries of a batch's boundaries, 0 if it has none."""
    boundaries = batch.get(BOUNDARIES)
    return 0 if boundaries is None else len(boundaries)


def with_room(batch: dict[str, Any], entries: int) -> dict[str, Any]:
    """Returns the batch with at least this many entries of its boundaries, if it has any. Its last one is repeated."""
    missing = entries - entries_of(batch)
    if missing <= 0 or BOUNDARIES not in batch:
        return batch
    boundaries = batch[BOUNDARIES]
    return {**batch, BOUNDARIES: torch.cat([boundaries, boundaries[-1:].expand(missing)])}
