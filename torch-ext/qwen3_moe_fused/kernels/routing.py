"""The counting sort of slots by expert, stable and deterministic, and the map from row tiles to experts.

Two launches for many slots (``count_kernel`` then ``route_kernel``), one for few: a single program counts for itself.
A slot's rank among its block's earlier slots of the same expert comes from comparing all pairs of a sub-block. An inclusive
sum over a one-hot (slots, experts) matrix, which needs no pairs, took 21 µs for 256 slots on an H100, more than it saves.
"""

import triton
import triton.language as tl


@triton.jit
def load_ids(ids_ptr, slots, num_slots, NUM_EXPERTS: tl.constexpr):
    """(expert ids as int32, -1 for those not ours, whether the slot's expert is ours)."""
    in_range = slots < num_slots
    ids = tl.load(ids_ptr + slots, mask=in_range, other=0)
    mine = in_range & (ids >= 0) & (ids < NUM_EXPERTS)  # before the cast, which an id beyond int32 would wrap around in
    return tl.where(mine, ids.to(tl.int32), -1), mine


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
    unowned,  # first row of no expert
    num_rows,
    max_tiles,
    program,
    num_programs,
    num_experts,
    BLOCK_M: tl.constexpr,
    SUB_T: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Writes a program's share of the tiles: the experts' in order, then those of the rows of no expert, then unused."""
    experts = tl.arange(0, EXPERTS)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    firsts = tl.cumsum(tiles, axis=0) - tiles
    for t in range(program, tl.max(tiles, axis=0), num_programs):  # the t-th tile of every expert that has one
        tl.store(tile_expert_ptr + firsts + t, experts, mask=t < tiles)
        tl.store(tile_row_ptr + firsts + t, starts + t * BLOCK_M, mask=t < tiles)
    used = tl.sum(tiles, axis=0)
    for t in range(used + program * SUB_T, max_tiles, num_programs * SUB_T):
        tile = t + tl.arange(0, SUB_T)
        row = unowned + (tile - used) * BLOCK_M
        tl.store(tile_expert_ptr + tile, tl.where(row < num_rows, num_experts, -1), mask=tile < max_tiles)
        tl.store(tile_row_ptr + tile, row, mask=tile < max_tiles)


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "max_tiles"])
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
    write_tiles(
        tile_expert_ptr, tile_row_ptr, starts, counts, tl.sum(counts, axis=0), num_slots, max_tiles, block, num_blocks,
        NUM_EXPERTS, BLOCK_M, SUB_T, EXPERTS,
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
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SUB_T: tl.constexpr,
):
    """Offsets and tiles of sorted rows; sizes that cannot be give every row to no expert. Grid: (blocks,)."""
    experts = tl.arange(0, EXPERTS)
    sizes = tl.load(m_sizes_ptr + experts, mask=experts < NUM_EXPERTS, other=0).to(tl.int64)
    fits = (tl.sum(sizes, axis=0) <= num_rows) & (tl.min(sizes, axis=0) >= 0)
    counts = tl.where(fits, sizes, 0).to(tl.int32)
    starts = tl.cumsum(counts, axis=0) - counts
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + experts, starts, mask=experts < NUM_EXPERTS)
        tl.store(offsets_ptr + NUM_EXPERTS, tl.sum(counts, axis=0))
    write_tiles(
        tile_expert_ptr, tile_row_ptr, starts, counts, tl.sum(counts, axis=0), num_rows, max_tiles, tl.program_id(0),
        tl.num_programs(0), NUM_EXPERTS, BLOCK_M, SUB_T, EXPERTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "max_tiles"])
def split_kernel(
    offsets_ptr,  # (E+1,)
    parts_ptr,  # (parts, STRIDE) int32 out: offsets, tile_expert and tile_row of each part
    num_rows,
    max_tiles,  # of a part
    NUM_EXPERTS: tl.constexpr,
    COUNT: tl.constexpr,  # experts of a part, but the last
    STRIDE: tl.constexpr,
    TILE_EXPERT: tl.constexpr,  # places in a part
    TILE_ROW: tl.constexpr,
    EXPERTS: tl.constexpr,  # next power of two of COUNT
    BLOCK_M: tl.constexpr,
    SUB_T: tl.constexpr,
):
    """The routing of COUNT experts at a time; the last part has the rows of no expert. Grid: (blocks, parts)."""
    first = tl.program_id(1) * COUNT
    count = tl.minimum(NUM_EXPERTS - first, COUNT)
    parts_ptr += tl.program_id(1) * STRIDE
    experts = tl.arange(0, EXPERTS)
    starts = tl.load(offsets_ptr + first + experts, mask=experts < count, other=0)
    ends = tl.load(offsets_ptr + first + experts + 1, mask=experts < count, other=0)
    end = tl.load(offsets_ptr + first + count)
    if tl.program_id(0) == 0:
        tl.store(parts_ptr + experts, starts, mask=experts < count)
        tl.store(parts_ptr + count, end)
    unowned = tl.where(first + count == NUM_EXPERTS, end, num_rows)
    write_tiles(
        parts_ptr + TILE_EXPERT, parts_ptr + TILE_ROW, starts, ends - starts, unowned, num_rows, max_tiles,
        tl.program_id(0), tl.num_programs(0), count, BLOCK_M, SUB_T, EXPERTS,
    )  # fmt: skip
