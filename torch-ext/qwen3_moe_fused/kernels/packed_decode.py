"""A few slots over 4-bit weights: the kernels of ``decode`` with the bytes decoded on the way.

Even and odd in features are two products, as in small tiles of ``packed_gemm``; weights are rounded to the compute dtype
before they are multiplied, so a slot's result does not depend on the path it took.
"""

import triton
import triton.language as tl

from .common import apply_gate
from .packed import block_scale, decode, elements, load_code


@triton.jit
def _products(
    x_even,  # (BLOCK_K/2,) fp32, zero beyond the last in feature
    x_odd,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    nested_code_ptr,
    code,
    expert,
    features,  # (BLOCK_N,) out features
    k,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """(BLOCK_N, BLOCK_K/2): the products of each feature's weights from in feature k on with x, in pairs."""
    OF: tl.constexpr = 8 if PTX != "" else 2  # weights an element
    element = k // OF + tl.arange(0, BLOCK_K // OF)
    packed_ptrs = (
        elements(packed_ptr, PTX) + expert * (N * K // OF) + (features * (K // OF))[:, None] + element[None, :]
    )
    packed = tl.load(packed_ptrs, mask=(element < K // OF)[None, :], other=0)
    starts = tl.minimum(k + 64 * tl.arange(0, BLOCK_K // 64), K - 64)
    block = ((features * K)[:, None] + starts[None, :]) // BLOCKSIZE
    scale = block_scale(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, block, BLOCKS, GROUPS, PROJECTIONS,
        DOUBLE_QUANT,
    )  # fmt: skip
    even, odd = decode(code, packed, scale, dtype, BLOCK_N, BLOCK_K // OF, BLOCK_K // 64, PTX)
    return even.to(tl.float32) * x_even[None, :] + odd.to(tl.float32) * x_odd[None, :]


@triton.jit
def _pairs(x_ptr, k, K: tl.constexpr, BLOCK_K: tl.constexpr, keep):
    """x[k + 2j] and x[k + 2j + 1], fp32, zero past the last and where not ``keep``."""
    offs = k + 2 * tl.arange(0, BLOCK_K // 2)
    mask = (offs < K) & keep
    return (
        tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32),
        tl.load(x_ptr + offs + 1, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def packed_decode_up_kernel(
    x_ptr,  # (T, H)
    ids_ptr,  # (S,) expert ids, any integer dtype
    packed_ptr,  # (E, COLUMNS·H/2) uint8
    absmax_ptr,  # (E, PROJECTIONS·BLOCKS) uint8 with DOUBLE_QUANT, else fp32
    nested_absmax_ptr,  # (E, PROJECTIONS·GROUPS) fp32
    nested_offset_ptr,  # (E, PROJECTIONS) fp32
    nested_code_ptr,  # (256,) fp32
    code_ptr,  # (16,) fp32
    bias_ptr,  # (E, COLUMNS)
    h_ptr,  # (S, I) out
    NUM_EXPERTS: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    COLUMNS: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    UP_OFFSET: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[slot] = gate(w[expert] · x[token] + bias[expert]). Grid: (S, ⌈I / BLOCK_N⌉)."""
    slot = tl.program_id(0)
    expert = tl.load(ids_ptr + slot).to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
    if (expert < 0) | (expert >= NUM_EXPERTS):
        return
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.minimum(offs_n, I - 1) * COLUMN_STRIDE
    code = load_code(code_ptr, PTX)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_ptr += (slot // TOP_K).to(tl.int64) * H
    gate = tl.zeros((BLOCK_N, BLOCK_K // 2), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K // 2), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        x_even, x_odd = _pairs(x_ptr, k, H, BLOCK_K, True)
        gate += _products(
            x_even, x_odd, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, code, expert,
            columns, k, H, COLUMNS, BLOCKSIZE, BLOCKS, GROUPS, PROJECTIONS, DOUBLE_QUANT, PTX, BLOCK_N, BLOCK_K, dtype,
        )  # fmt: skip
        if GATED:
            up += _products(
                x_even, x_odd, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, code,
                expert, columns + UP_OFFSET, k, H, COLUMNS, BLOCKSIZE, BLOCKS, GROUPS, PROJECTIONS, DOUBLE_QUANT,
                PTX, BLOCK_N, BLOCK_K, dtype,
            )  # fmt: skip
    g = tl.sum(gate, axis=1)
    u = tl.sum(up, axis=1)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert * COLUMNS + columns
        g += tl.load(bias_ptrs).to(tl.float32)
        if GATED:
            u += tl.load(bias_ptrs + UP_OFFSET).to(tl.float32)
    h = apply_gate(g, u, ALPHA, LIMIT, ACTIVATION, GATED)
    tl.store(h_ptr + slot * I + offs_n, h.to(h_ptr.dtype.element_ty), mask=offs_n < I)


@triton.jit
def packed_decode_down_kernel(
    h_ptr,  # (S, I)
    ids_ptr,  # (S,) expert ids, any integer dtype
    weights_ptr,  # (S,)
    packed_ptr,  # (E, H·I/2) uint8
    absmax_ptr,  # (E, PROJECTIONS·BLOCKS) uint8 with DOUBLE_QUANT, else fp32
    nested_absmax_ptr,  # (E, PROJECTIONS·GROUPS) fp32
    nested_offset_ptr,  # (E, PROJECTIONS) fp32
    nested_code_ptr,  # (256,) fp32
    code_ptr,  # (16,) fp32
    bias_ptr,  # (E, H)
    y_ptr,  # (T, H) out
    NUM_EXPERTS: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    PROJECTIONS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[t] = Σ_k weights[t, k] · (w[expert] · h[slot] + bias[expert]), in slot order. Grid: (T, ⌈H / BLOCK_N⌉)."""
    token = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.minimum(offs_n, H - 1)
    code = load_code(code_ptr, PTX)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_K // 2), dtype=tl.float32)
    biases = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for slot_of_token in tl.range(0, TOP_K, loop_unroll_factor=2):
        slot = token * TOP_K + slot_of_token
        expert = tl.load(ids_ptr + slot).to(tl.int64)  # int64: E·out·in passes 2³¹ in real models
        mine = (expert >= 0) & (expert < NUM_EXPERTS)
        expert = tl.where(mine, expert, 0)
        weight = tl.load(weights_ptr + slot, mask=mine, other=0.0).to(tl.float32)
        part = tl.zeros((BLOCK_N, BLOCK_K // 2), dtype=tl.float32)
        for k in tl.static_range(0, I, BLOCK_K):
            h_even, h_odd = _pairs(h_ptr + slot * I, k, I, BLOCK_K, mine)
            part += _products(
                h_even, h_odd, packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, code,
                expert, features, k, I, H, BLOCKSIZE, BLOCKS, GROUPS, PROJECTIONS, DOUBLE_QUANT, PTX, BLOCK_N, BLOCK_K,
                dtype,
            )  # fmt: skip
        acc += tl.where(mine, part * weight, 0.0)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert * H + features).to(tl.float32)
            biases += tl.where(mine, bias * weight, 0.0)
    y = tl.sum(acc, axis=1) + biases
    tl.store(y_ptr + token.to(tl.int64) * H + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < H)
