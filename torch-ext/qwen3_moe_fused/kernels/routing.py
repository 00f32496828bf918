"""The counting sort of slots by expert, stable and deterministic, and the map from row tiles to experts.

Two launches for many slots (``count_kernel`` then ``route_kernel``), one for few: a single program counts for itself.
A slot's rank among its block's earlier slots of the same expert comes from comparing all pairs of a sub-block. An inclusive
sum over a one-hot (slots, experts) matrix, which needs no pairs, took 21 µs for 256 slots on an H100, more than it saves.
"""

import triton
import triton.language as tl


@triton.jit
def load_ids(ids_ptr, slots, num_slots, NUM_EXPERTS: tl.constexpr):
    """(expert ids as int32, whether the slot's expert is one of ours)."""
    ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=-1).to(tl.int32)
    return ids, (ids >= 0) & (ids < NUM_EXPERTS)


@triton.jit(do_not_specialize=["num_slots"])
def count_kernel(
    ids_ptr,  # (S,) expert ids, any integer dtype
    counts_ptr,  # (blocks, EXPERTS) int32 out
    num_slots,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EXPERTS: tl.constexpr,  # next power of two of E
):
    """Counts each block's slots by expert. Grid: (blocks,)."""
    block = tl.program_id(0)
    ids, mine = load_ids(ids_ptr, block * BLOCK_S + tl.arange(0, BLOCK_S), num_slots, NUM_EXPERTS)
    tl.store(counts_ptr + block * EXPERTS + tl.arange(0, EXPERTS), tl.histogram(ids, EXPERTS, mask=mine))


@triton.jit
def write_tiles(
    tile_expert_ptr,
    tile_row_ptr,
    starts,  # (EXPERTS,) first row of each expert
    counts,  # (EXPERTS,)
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    first,
    last,
    max_tiles,
    BLOCK_M: tl.constexpr,
    SUB_T: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Writes tiles first…last: the experts' in order, then those of the rows of no expert, then unused ones."""
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, axis=0)
    used = tl.sum(tiles, axis=0)
    assigned = tl.sum(counts, axis=0)
    experts = tl.arange(0, EXPERTS)
    for t in range(first, last, SUB_T):
        tile = t + tl.arange(0, SUB_T)
        expert = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        mine = expert[:, None] == experts[None, :]
        row = tl.sum(tl.where(mine, (starts - (ends - tiles) * BLOCK_M)[None, :], 0), axis=1) + tile * BLOCK_M
        orphan_row = assigned + (tile - used) * BLOCK_M
        orphan = (tile >= used) & (orphan_row < num_rows)
        expert = tl.where(tile < used, expert, tl.where(orphan, NUM_EXPERTS, -1))
        tl.store(tile_expert_ptr + tile, expert, mask=tile < max_tiles)
        tl.store(tile_row_ptr + tile, tl.where(tile < used, row, orphan_row), mask=tile < max_tiles)


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "max_tiles", "tiles_per_block"])
def route_kernel(
    ids_ptr,  # (S,) expert ids, any integer dtype
    counts_ptr,  # (blocks, EXPERTS) int32, not read by a single block
    offsets_ptr,  # (E+1,) out
    row_to_slot_ptr,  # (S,) out
    slot_to_row_ptr,  # (S,) out
    tile_expert_ptr,  # (max_tiles,) out
    tile_row_ptr,  # (max_tiles,) out
    num_slots,
    num_blocks,
    max_tiles,
    tiles_per_block,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SUB_S: tl.constexpr,  # slots compared pairwise
    SUB_B: tl.constexpr,  # blocks whose counts are read at a time
    SUB_T: tl.constexpr,  # tiles written at a time
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Gives every slot its row and writes its share of the tiles. Grid: (blocks,)."""
    block = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), dtype=tl.int32)
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    if SINGLE:
        all_ids, all_mine = load_ids(ids_ptr, tl.arange(0, BLOCK_S), num_slots, NUM_EXPERTS)
        counts += tl.histogram(all_ids, EXPERTS, mask=all_mine)
    else:
        for b in range(0, num_blocks, SUB_B):
            blocks = b + tl.arange(0, SUB_B)
            part = tl.load(
                counts_ptr + blocks[:, None] * EXPERTS + experts[None, :], mask=(blocks < num_blocks)[:, None], other=0
            )
            counts += tl.sum(part, axis=0)
            before += tl.sum(tl.where((blocks < block)[:, None], part, 0), axis=0)
    starts = tl.cumsum(counts, axis=0) - counts
    if block == 0:
        tl.store(offsets_ptr + experts, starts, mask=experts < NUM_EXPERTS)
        tl.store(offsets_ptr + NUM_EXPERTS, tl.sum(counts, axis=0))
    first = block * tiles_per_block
    write_tiles(
        tile_expert_ptr, tile_row_ptr, starts, counts, num_slots, NUM_EXPERTS, first, first + tiles_per_block,
        max_tiles, BLOCK_M, SUB_T, EXPERTS,
    )  # fmt: skip
    next_row = starts + before
    order = tl.arange(0, SUB_S)
    for s in range(0, BLOCK_S, SUB_S):
        slots = block * BLOCK_S + s + order
        ids, mine = load_ids(ids_ptr, slots, num_slots, NUM_EXPERTS)
        earlier = (ids[:, None] == ids[None, :]) & (order[:, None] > order[None, :])
        rank = tl.sum(earlier.to(tl.int32), axis=1)
        row = tl.gather(next_row, tl.where(mine, ids, 0), axis=0) + rank
        next_row += tl.histogram(ids, EXPERTS, mask=mine)
        tl.store(slot_to_row_ptr + slots, tl.where(mine, row, -1), mask=slots < num_slots)
        tl.store(row_to_slot_ptr + row, slots, mask=mine)


@triton.jit(do_not_specialize=["num_rows", "max_tiles"])
def route_sorted_kernel(
    m_sizes_ptr,  # (E,) any integer dtype
    offsets_ptr,  # (E+1,) out
    tile_expert_ptr,  # (max_tiles,) out
    tile_row_ptr,  # (max_tiles,) out
    num_rows,
    max_tiles,
    NUM_EXPERTS: tl.constexpr,
    STRIDE_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SUB_T: tl.constexpr,
):
    """Offsets and tiles of rows that are sorted already. Sizes that cannot be give every row to no expert. Grid: (blocks,)."""
    block = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    sizes = tl.load(m_sizes_ptr + experts * STRIDE_M, mask=experts < NUM_EXPERTS, other=0).to(tl.int64)
    fits = (tl.sum(sizes, axis=0) <= num_rows) & (tl.min(sizes, axis=0) >= 0)
    counts = tl.where(fits, sizes, 0).to(tl.int32)
    starts = tl.cumsum(counts, axis=0) - counts
    if block == 0:
        tl.store(offsets_ptr + experts, starts, mask=experts < NUM_EXPERTS)
        tl.store(offsets_ptr + NUM_EXPERTS, tl.sum(counts, axis=0))
    first = block * SUB_T
    write_tiles(
        tile_expert_ptr, tile_row_ptr, starts, counts, num_rows, NUM_EXPERTS, first, first + SUB_T, max_tiles,
        BLOCK_M, SUB_T, EXPERTS,
    )  # fmt: skip
