"""What the row-tiled kernels share: where a tile's rows come from, and what happens to its sums."""

import triton
import triton.language as tl

from .activations import apply_gate


@triton.jit
def token_rows(routing, row, live, TOP_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """The tokens, of T, of the tile's rows; token 0 where a row does not count."""
    return tl.load(routing.row_to_slot + row + tl.arange(0, BLOCK_M), mask=live, other=0) // TOP_K


@triton.jit
def load_weight(
    w,  # "pointer": element pointers of this tile; "rows"/"columns": a descriptor
    first,  # descriptor: first row of this expert's matrix in the flattened stack
    n,
    k,
    offs_n,
    offs_k,
    N: tl.constexpr,
    K: tl.constexpr,
    WEIGHT: tl.constexpr,  # DenseLayout
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The (BLOCK_K, BLOCK_N) tile of dense weights at in-feature k, out-feature n."""
    if WEIGHT.MODE == "rows":  # (E·N, K), in features contiguous
        tile = w.load([first + n, k]).T
    elif WEIGHT.MODE == "columns":  # (E·K, N), out features contiguous
        tile = w.load([first + k, n])
    elif K % BLOCK_K == 0 and N % BLOCK_N == 0:
        tile = tl.load(w)
    else:
        tile = tl.load(w, mask=(offs_k[:, None] < K - k) & (offs_n[None, :] < N), other=0.0)
    return tile


@triton.jit
def fill_rows(
    out,
    row,
    num_rows,
    n,
    value,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Stores ``value`` in the (S, N) output's tile of rows of no expert that starts at ``row`` and column ``n``."""
    rows = row + tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    tile = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32) + value
    out_ptrs = out + rows.to(tl.int64)[:, None] * STRIDE + offs_n[None, :]
    tl.store(out_ptrs, tile.to(out.dtype.element_ty), mask=(rows < num_rows)[:, None] & (offs_n < N)[None, :])


@triton.jit
def fill_outputs(
    out,  # Outputs
    row,
    num_rows,
    n,
    value,  # of h; gate_up is zero
    GATE: tl.constexpr,  # GateLayout
    OUT: tl.constexpr,  # OutputLayout
    TILE: tl.constexpr,
):
    """Fills a tile of rows that belong to no expert."""
    if OUT.SAVE_H:
        fill_rows(out.h, row, num_rows, n, value, GATE.I, OUT.H_STRIDE, TILE.M, TILE.N)
    if OUT.SAVE_GATE_UP:
        if GATE.GATED and GATE.COLUMN_STRIDE == 1:
            up = out.gate_up + OUT.GATE_UP_OFFSET
            fill_rows(out.gate_up, row, num_rows, n, 0.0, GATE.I, OUT.GATE_UP_STRIDE, TILE.M, TILE.N)
            fill_rows(up, row, num_rows, n, 0.0, GATE.I, OUT.GATE_UP_STRIDE, TILE.M, TILE.N)
        else:
            fill_rows(out.gate_up, row, num_rows, n, 0.0, GATE.COLUMNS, OUT.GATE_UP_STRIDE, TILE.M, TILE.N)
            if GATE.GATED:
                n += GATE.I
                fill_rows(out.gate_up, row, num_rows, n, 0.0, GATE.COLUMNS, OUT.GATE_UP_STRIDE, TILE.M, TILE.N)


@triton.jit
def store_outputs(
    gate,  # (BLOCK_M, BLOCK_N) fp32
    up,  # the same; not read unless gated
    bias,  # (E, COLUMNS), read with HAS_BIAS
    out,  # Outputs
    expert,
    row,
    live,
    n,
    offs_n,  # n + arange(0, BLOCK_N)
    GATE: tl.constexpr,  # GateLayout
    OUT: tl.constexpr,  # OutputLayout
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The end of a product: adds the bias, applies the gate, and stores what is wanted before and after it."""
    in_n = offs_n < GATE.I
    columns = offs_n * GATE.COLUMN_STRIDE
    if HAS_BIAS:
        bias_ptrs = bias + expert * GATE.COLUMNS + columns
        gate += tl.load(bias_ptrs, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if GATE.GATED:
            up += tl.load(bias_ptrs + GATE.UP_OFFSET, mask=in_n, other=0.0).to(tl.float32)[None, :]
    mask = live[:, None] & in_n[None, :]
    # The tile's base is int64, offsets inside the tile are int32: this takes half the registers.
    row64 = row.to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    if OUT.SAVE_GATE_UP:
        # Columns clamped to the last would be written one by one: 1.4 ms at 4096 tokens over 4-bit weights, against 0.8
        # without saving.
        saved = out.gate_up + row64 * OUT.GATE_UP_STRIDE + offs_m[:, None] * OUT.GATE_UP_STRIDE
        dtype: tl.constexpr = out.gate_up.dtype.element_ty
        if GATE.GATED and GATE.COLUMN_STRIDE == 2:
            # The columns of both lie side by side; apart, each would be written two bytes at a time.
            both = tl.reshape(tl.join(gate.to(dtype), up.to(dtype)), (BLOCK_M, 2 * BLOCK_N))
            offs_both = 2 * n + tl.arange(0, 2 * BLOCK_N)
            tl.store(saved + offs_both[None, :], both, mask=live[:, None] & (offs_both < GATE.COLUMNS)[None, :])
        else:
            saved += columns[None, :]
            tl.store(saved, gate.to(dtype), mask=mask)
            if GATE.GATED:
                tl.store(saved + OUT.GATE_UP_OFFSET, up.to(dtype), mask=mask)
    if OUT.SAVE_H:
        if GATE.ACTIVATION != "none":
            gate = apply_gate(gate, up, GATE)
        h = out.h + row64 * OUT.H_STRIDE + offs_m[:, None] * OUT.H_STRIDE + offs_n[None, :]
        tl.store(h, gate.to(out.h.dtype.element_ty), mask=mask)
