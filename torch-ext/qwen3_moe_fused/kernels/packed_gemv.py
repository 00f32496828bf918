"""A few slots over 4-bit weights: the kernels of ``gemv`` that dequantize bytes on the way.

Even and odd in features are two products, as in small tiles of ``packed_gemm``. Weights are rounded to the compute dtype
before they are multiplied, so a slot's result does not depend on the path it took.
"""

import triton
import triton.language as tl

from .activations import apply_gate
from .dequantize import elements, load_code, spread


@triton.jit
def _products(
    x_even,  # (BLOCK_K/2,) fp32, zero beyond the last in feature
    x_odd,
    w,  # PackedTensors of a stack (E, N, K)
    code,
    expert,
    features,  # (BLOCK_N,) out features
    k,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """(BLOCK_N, BLOCK_K/2): the products of each feature's weights from in feature k on with x, in pairs."""
    OF: tl.constexpr = FORMAT.PER_ELEMENT
    element = k // OF + tl.arange(0, BLOCK_K // OF)
    packed_ptrs = (
        elements(w.packed, FORMAT) + expert * (N * K // OF) + (features * (K // OF))[:, None] + element[None, :]
    )
    packed = tl.load(packed_ptrs, mask=(element < K // OF)[None, :], other=0)
    starts = tl.minimum(k + FORMAT.RUN * tl.arange(0, BLOCK_K // FORMAT.RUN), K - FORMAT.RUN)
    block = ((features * K)[:, None] + starts[None, :]) // FORMAT.BLOCK
    scale = FORMAT.block_scale(w.scales, expert, block, None, FORMAT)
    wide = spread(scale, BLOCK_K // OF)
    even, odd = FORMAT.pair(code, packed, wide, dtype, FORMAT)
    return even.to(tl.float32) * x_even[None, :] + odd.to(tl.float32) * x_odd[None, :]


@triton.jit
def _pairs(x, k, K: tl.constexpr, BLOCK_K: tl.constexpr, keep):
    """x[k + 2j] and x[k + 2j + 1], fp32, zero past the last and where not ``keep``."""
    offs = k + 2 * tl.arange(0, BLOCK_K // 2)
    mask = (offs < K) & keep
    return (
        tl.load(x + offs, mask=mask, other=0.0).to(tl.float32),
        tl.load(x + offs + 1, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def packed_gemv_up_kernel(
    x,  # (T, H)
    ids,  # (S,) expert ids, any integer dtype
    w,  # PackedTensors of a stack (E, COLUMNS, H)
    bias,  # (E, COLUMNS)
    h,  # (S, I) out
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    FORMAT: tl.constexpr,  # FormatCode
    GATE: tl.constexpr,  # GateLayout
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[slot] = gate(w[expert] · x[token] + bias[expert]). Grid: (S, ⌈I / BLOCK_N⌉)."""
    slot = tl.program_id(0)
    expert = tl.load(ids + slot).to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.minimum(offs_n, GATE.I - 1) * GATE.COLUMN_STRIDE
    code = load_code(w.code, FORMAT)
    dtype: tl.constexpr = x.dtype.element_ty
    x_row = x + (slot // TOP_K).to(tl.int64) * H
    gate = tl.zeros((BLOCK_N, BLOCK_K // 2), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K // 2), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        x_even, x_odd = _pairs(x_row, k, H, BLOCK_K, True)
        gate += _products(
            x_even, x_odd, w, code, expert, columns, k, GATE.COLUMNS, H, FORMAT, BLOCK_N, BLOCK_K, dtype
        )  # fmt: skip
        if GATE.GATED:
            ups = columns + GATE.UP_OFFSET
            up += _products(x_even, x_odd, w, code, expert, ups, k, GATE.COLUMNS, H, FORMAT, BLOCK_N, BLOCK_K, dtype)
    g = tl.sum(gate, axis=1)
    u = tl.sum(up, axis=1)
    if HAS_BIAS:
        bias_ptrs = bias + expert * GATE.COLUMNS + columns
        g += tl.load(bias_ptrs).to(tl.float32)
        if GATE.GATED:
            u += tl.load(bias_ptrs + GATE.UP_OFFSET).to(tl.float32)
    result = apply_gate(g, u, GATE)
    tl.store(h + slot * GATE.I + offs_n, result.to(h.dtype.element_ty), mask=offs_n < GATE.I)


@triton.jit
def packed_gemv_down_kernel(
    h,  # (S, I)
    ids,  # (S,) expert ids, any integer dtype
    weights,  # (S,)
    w,  # PackedTensors of a stack (E, H, I)
    bias,  # (E, H)
    y,  # (T, H) out
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    FORMAT: tl.constexpr,  # FormatCode
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[t] = Σ_k weights[t, k] · (w[expert] · h[slot] + bias[expert]), in slot order. Grid: (T, ⌈H / BLOCK_N⌉)."""
    token = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.minimum(offs_n, H - 1)
    code = load_code(w.code, FORMAT)
    dtype: tl.constexpr = h.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_K // 2), dtype=tl.float32)
    biases = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for slot_of_token in tl.range(0, TOP_K, loop_unroll_factor=2):
        slot = token * TOP_K + slot_of_token
        expert = tl.load(ids + slot).to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
        mine = (expert >= 0) & (expert < NUM_EXPERTS)
        expert = tl.where(mine, expert, 0)
        weight = tl.load(weights + slot, mask=mine, other=0.0).to(tl.float32)
        part = tl.zeros((BLOCK_N, BLOCK_K // 2), dtype=tl.float32)
        for k in tl.static_range(0, I, BLOCK_K):
            h_even, h_odd = _pairs(h + slot * I, k, I, BLOCK_K, mine)
            part += _products(h_even, h_odd, w, code, expert, features, k, H, I, FORMAT, BLOCK_N, BLOCK_K, dtype)
        acc += tl.where(mine, part * weight, 0.0)
        if HAS_BIAS:
            bias_values = tl.load(bias + expert * H + features).to(tl.float32)
            biases += tl.where(mine, bias_values * weight, 0.0)
    result = tl.sum(acc, axis=1) + biases
    tl.store(y + token.to(tl.int64) * H + offs_n, result.to(y.dtype.element_ty), mask=offs_n < H)
