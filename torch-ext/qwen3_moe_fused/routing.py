"""``Routing``: which rows of the grouped GEMMs belong to which expert, as views into one buffer.

Every token goes to ``top_k`` experts, so T tokens make S = T·top_k *slots*, numbered ``t * top_k + k``. The grouped GEMMs
want the slots of one expert side by side, so a stable counting sort by expert gives each slot a *row*. Everything that the
kernels need to know about rows and slots lies in one int32 buffer, whose size depends on shapes alone: nothing here
synchronises with the host, and a replay under activation checkpointing allocates exactly the same.

An expert id outside [0, E) means "not mine" (expert parallelism sends E): such a slot gets no row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# The smallest tile height any launch configuration may use; it bounds the number of tiles, hence the buffer.
MIN_BLOCK_M = 16


def max_tiles(num_rows: int, num_experts: int, block_m: int = MIN_BLOCK_M) -> int:
    """An upper bound of the number of row tiles: each expert, and the rows of no expert, may end with a partial tile."""
    return num_rows // block_m + num_experts + 1


class Routing(NamedTuple):
    """Views into a routing buffer. Rows are the S routed rows sorted by expert; slots are their token order.

    Attributes:
        offsets: (E+1,) int32; the rows of expert e are ``offsets[e]:offsets[e+1]``. Rows from ``offsets[E]`` on belong to
            no expert.
        row_to_slot: (S,) int32, or (0,) when rows are slots (the caller sorted them). Undefined from ``offsets[E]`` on.
        slot_to_row: (S,) int32, -1 for a slot that belongs to no expert; (0,) when rows are slots.
        tile_expert: (max_tiles,) int32; expert of each row tile, E for a tile of rows of no expert, -1 for an unused tile.
        tile_row: (max_tiles,) int32; first row of each row tile.
        num_experts: E.
        top_k: slots per token.
        packed: the tiles are as high as grouped GEMMs over packed weights want them, rather than those over dense weights.
        prepared: room for what launches make of the tensors once (``stages.triton.operands.routing_tensors``).
    """

    offsets: Tensor
    row_to_slot: Tensor
    slot_to_row: Tensor
    tile_expert: Tensor
    tile_row: Tensor
    num_experts: int
    top_k: int
    packed: bool = False
    prepared: list[Any] = []  # noqa: RUF012 - from_buffer gives each its own

    @staticmethod
    def _sizes(num_rows: int, num_experts: int, sorted_rows: bool) -> list[int]:
        """Sizes of the views, each followed by the padding that lets the next start at 16 bytes."""
        mapped_rows = 0 if sorted_rows else num_rows
        sizes = (num_experts + 1, mapped_rows, max_tiles(num_rows, num_experts))
        offsets, rows, tiles = ((size, -size % 4) for size in sizes)
        return [*offsets, *rows, *rows, *tiles, *tiles]

    @classmethod
    def buffer_size(cls, num_rows: int, num_experts: int, sorted_rows: bool = False) -> int:
        """The number of int32 in a routing buffer; ``sorted_rows`` when the caller's rows are sorted by expert already."""
        return sum(cls._sizes(num_rows, num_experts, sorted_rows))

    @classmethod
    def new_buffer(
        cls, like: Tensor, num_rows: int, num_experts: int, sorted_rows: bool = False, zeroed: bool = False
    ) -> Tensor:
        """A new buffer on the device of ``like``; ``zeroed`` gives a value to the entries that nobody writes or reads."""
        size = cls.buffer_size(num_rows, num_experts, sorted_rows)
        return (like.new_zeros if zeroed else like.new_empty)(size, dtype=torch.int32)

    @classmethod
    def from_buffer(
        cls,
        buffer: Tensor,
        num_rows: int,
        num_experts: int,
        top_k: int,
        sorted_rows: bool = False,
        packed: bool = False,
    ) -> Routing:
        """The routing whose views lie in ``buffer``, which has ``buffer_size`` int32."""
        offsets, _, row_to_slot, _, slot_to_row, _, tile_expert, _, tile_row, _ = buffer.split_with_sizes(
            cls._sizes(num_rows, num_experts, sorted_rows)
        )
        return cls(offsets, row_to_slot, slot_to_row, tile_expert, tile_row, num_experts, top_k, packed, [])
