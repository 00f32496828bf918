"""What TRL's collator makes of documents that were packed side by side, as ``attention`` and CUDA graphs take it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# What else TRL says of where documents lie, for attention and convolutions of other kinds.
_OTHERS = ("cu_seq_lens_k", "max_length_k", "seq_idx")


@dataclass(frozen=True)
class Documents:
    """Boundaries of documents in batches of any number of them, as tensors and numbers that are of one shape for all.

    Attributes:
        collate: TRL's collator of batches without padding, which are one row.
        most: documents of a batch, at most.
        longest: tokens of the longest document of all.
        tokens: to fill batches up to; None leaves them as they are.
        padding: the id of tokens that do so.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    most: int
    longest: int
    tokens: int | None
    padding: int

    @classmethod
    def of(
        cls,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        lengths: Sequence[Sequence[int]],
        batch_size: int,
        tokens: int | None,
        padding: int,
    ) -> Documents:
        """For packed sequences with documents of these ``lengths``, of which ``batch_size`` make a batch."""
        most = batch_size * max(map(len, lengths))
        return cls(collate, most, max(itertools.chain.from_iterable(lengths)), tokens, padding)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        for name in _OTHERS:
            batch.pop(name, None)
        boundaries: Tensor = batch.pop("cu_seq_lens_q")
        del batch["max_length_q"]
        total = batch["input_ids"].shape[1]
        filled = total if self.tokens is None else self.tokens
        if missing := filled - total:
            batch["input_ids"] = functional.pad(batch["input_ids"], (0, missing), value=self.padding)
            batch["labels"] = functional.pad(batch["labels"], (0, missing), value=-100)
        # Padding is documents like others, none longer than they are: attention looks no further than that.
        starts = torch.arange(total, filled, self.longest, dtype=boundaries.dtype)
        boundaries = torch.cat([boundaries[:-1], starts, boundaries.new_tensor([filled])])
        if missing:
            place = torch.arange(missing)
            batch["position_ids"] = torch.cat([batch["position_ids"], (place % self.longest)[None]], dim=1)
        if self.most == 1:
            # One document and what comes after it, which it does not see: causal attention is all it takes.
            return batch
        room = self.most + (0 if self.tokens is None else -(-self.tokens // self.longest))
        batch["cu_seq_lens_q"] = functional.pad(boundaries, (0, room + 1 - len(boundaries)), value=filled)
        batch["max_length_q"] = self.longest
        return batch
