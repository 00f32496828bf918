"""4-bit weights: where they are decoded, and the launches of ``kernels.packed*`` but for ``packed_decode``.

Few rows to an expert: grouped GEMMs decode what they multiply (``gemm``, ``up``, ``down_backward``), if the layout allows
it. Many, and every row tile would decode its expert again: then the dense kernels run over a workspace of at most
``WORKSPACE_BYTES`` into which some features of all experts with rows are decoded at a time (``dense_parts``).
``tuning.decodes_in_gemm`` draws the line.

Decoding first costs what it writes: at 4096 tokens of a Qwen3-30B-A3B layer on an H100 the up projection takes 0.85 ms,
dense 0.50. Lost there: the row tiles of an expert decoding their weights together into
a ring that stays in the L2, each behind a counter (1.09 ms; 2.2 against 1.76 at 16384); parts on two streams, the one
decoding while the other multiplies (0.83, and 1.80 at 16384: the products want the same memory).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import tuning
from ..activations import Gate
from ..kernels.packed import dequantize_kernel
from ..kernels.packed_down_backward import packed_down_backward_kernel
from ..kernels.packed_gemm import packed_gemm_kernel, packed_transposed_kernel
from ..plan import Plan, View
from ..quantization import as_floats, code, nested_code
from ..routing import max_tiles
from ..weights import PackedStack
from . import low_rank
from .operands import (
    cdiv,
    config_of,
    gate_constants,
    precision,
    tile_constants,
)

if TYPE_CHECKING:
    from ..lora import Extension
    from ..quantization import Format4bit, Packed4bitWeights
    from ..routing import Routing
    from ..tuning import LaunchConfig
    from ..weights import Stack

WORKSPACE_BYTES = 256 * 2**20
# Bytes that a program of the dequantization decodes.
DEQUANTIZE_BLOCK = 1024


def storage_operands(weights: Packed4bitWeights) -> tuple[Tensor | View, ...]:
    """What kernels over packed weights read of them; pointers that they do not read are those of another."""
    absmax: Tensor | View
    if weights.nested_absmax is None or weights.nested_offset is None:
        absmax = nested_absmax = nested_offset = _floats(weights.absmax)
    else:
        absmax = weights.absmax
        nested_absmax, nested_offset = _floats(weights.nested_absmax), _floats(weights.nested_offset)
    device = weights.device
    tables = nested_code(device), code(weights.format.quant_type, device)
    return weights.packed, absmax, nested_absmax, nested_offset, *tables


def _floats(values: Tensor) -> Tensor | View:
    """``as_floats``, without torch's view."""
    return as_floats(values) if values.storage_offset() % 4 else View(values, 0, torch.float32)


def storage_constants(format: Format4bit) -> dict[str, Any]:
    """How they find a weight's absmax."""
    return {
        "BLOCKSIZE": format.blocksize,
        "BLOCKS": format.blocks,
        "GROUPS": format.groups,
        "PROJECTIONS": format.projections,
        "DOUBLE_QUANT": format.double_quant,
    }


def ptx(format: Format4bit, like: Tensor) -> str:
    """The quant type for kernels that compute in the dtype and on the device of ``like`` to decode in PTX, or ""."""
    nvidia = like.device.type != "cpu" and tuning.target_of(like.device).backend == "cuda"
    return format.quant_type if nvidia and like.itemsize == 2 else ""


class Runs(NamedTuple):
    """Which bytes of an expert are decoded: groups of runs, as many as it takes.

    Attributes:
        total: bytes in all. size: of a run.
        per_group: runs of a group. start: first byte. stride, group_stride: from a run, or group, to the next.
    """

    total: int
    size: int
    per_group: int = 1
    start: int = 0
    stride: int = 0
    group_stride: int = 0


@functools.cache
def _dequantize_plan(format: Format4bit, runs: Runs, skip: bool) -> Plan:
    _, rows, columns = format.shape
    constants = {
        "SIZE": rows * columns,
        "OUT": runs.total,
        "RUN": runs.size,
        "RUNS": runs.per_group,
        "START": runs.start,
        "RUN_STRIDE": runs.stride,
        "GROUP_STRIDE": runs.group_stride,
        **storage_constants(format),
        "SKIP": skip,
        "BLOCK": DEQUANTIZE_BLOCK,
    }
    return Plan(dequantize_kernel, constants, fp_fusion=False)


def dequantize(weights: Packed4bitWeights, first: int, count: int, out: Tensor) -> None:
    """``reference.dequantize``."""
    size = weights.packed.shape[1]
    _decode(weights.packed, weights, Runs(size, size), first, count, out, None)


def _decode(
    packed: Tensor,
    weights: Packed4bitWeights,
    runs: Runs,
    first: int,
    count: int,
    out: Tensor,
    offsets: Tensor | None,
) -> None:
    """``runs`` of experts ``first`` to ``first + count`` into ``out``; only of those with rows, given ``offsets``."""
    _dequantize_plan(weights.format, runs, offsets is not None)(
        packed.device,
        (count * cdiv(runs.total, DEQUANTIZE_BLOCK), 1, 1),
        *storage_operands(weights),
        packed if offsets is None else offsets,
        out,
        first,
    )


class Part(NamedTuple):
    """Some out features of all experts, dense. Of gated up projections a feature has a gate and an up row.

    Attributes:
        stack: (E, N, K).
        config: to launch with.
        first, width: its features.
    """

    stack: Tensor
    config: LaunchConfig
    first: int
    width: int

    def columns(self, values: Tensor, gate: Gate | None = None) -> Tensor | View:
        """Rows of features (…, N of the whole) from this part's first feature on."""
        start = self.offset(gate)
        return View(values, start, values.dtype) if start else values

    def offset(self, gate: Gate | None = None) -> int:
        """The first of this part's rows in the whole stack."""
        return self.first * (2 if gate is not None and gate.interleaved else 1)

    def bias(self, bias: Tensor, gate: Gate | None = None) -> Tensor:
        """(E, N) of the whole bias, contiguous."""
        if self.stack.shape[1] == bias.shape[1]:
            return bias.contiguous()
        rows = _rows_of(self.first, self.width, bias.shape[1], gate)
        return torch.cat([bias[:, start : start + size] for start, size in rows], dim=1)


def _rows_of(first: int, width: int, rows: int, gate: Gate | None) -> list[tuple[int, int]]:
    """(first, number) of the stack's rows that make up ``width`` features from ``first`` on, of ``rows`` in all."""
    if gate is None or not gate.gated:
        return [(first, width)]
    if gate.interleaved:
        return [(2 * first, 2 * width)]
    if 2 * width == rows:
        return [(0, rows)]  # which begin and end with a byte, as the halves of an odd number of features do not
    return [(first, width), (rows // 2 + first, width)]


def dense_parts(
    weight: Stack, routing: Routing, dtype: torch.dtype, config: LaunchConfig, gate: Gate | None = None
) -> Iterator[Part]:
    """The stack dense in ``dtype``, in parts: a dense one in a single part, packed weights in a workspace.

    By features, not by experts: so every part has all row tiles, and no program of a part is idle. A part's stack holds
    only until the next part is taken, and experts without rows hold anything.

    Args:
        gate: of an up projection.
    """
    num_experts, n, k = weight.shape
    features = n if gate is None else gate.intermediate(n)
    if isinstance(weight, Tensor):
        yield Part(weight, config, 0, features)
        return
    width, config = _part_width(features, num_experts * (n // features) * k * dtype.itemsize, config, WORKSPACE_BYTES)
    if weight.transposed and features % 2:
        width = features  # a byte has weights of two rows
    stack: Tensor | None = None
    for first in range(0, features, width):
        own = min(width, features - first)
        size, runs = _runs(first, own, n, k, gate, weight.transposed)
        shape = (num_experts, k, size) if weight.transposed else (num_experts, size, k)
        if stack is None:
            stack = torch.empty(shape, dtype=dtype, device=weight.weights.device)
        elif stack.shape != shape:  # the last part, in the same memory
            stack = stack.as_strided(shape, (size * k, shape[2], 1))
        _decode(weight.weights.packed, weight.weights, runs, 0, num_experts, stack, routing.offsets)
        yield Part(stack.mT if weight.transposed else stack, config, first, own)


def part_tiles(weight: Stack, dtype: torch.dtype, config: LaunchConfig) -> int:
    """The width of the column tiles with which ``dense_parts`` without a gate launches."""
    if isinstance(weight, Tensor):
        return config.block_n
    num_experts, features, k = weight.shape
    return _part_width(features, num_experts * k * dtype.itemsize, config, WORKSPACE_BYTES)[1].block_n


@functools.cache
def _part_width(
    features: int, feature_bytes: int, config: LaunchConfig, workspace_bytes: int
) -> tuple[int, LaunchConfig]:
    """How many features fit the workspace, in parts of nearly one size, and ``config`` with column tiles that fit them."""
    most = max(1, workspace_bytes // feature_bytes)
    if most >= features:
        return features, config
    block_n = min(config.block_n, max(16, 1 << (most.bit_length() - 1)))
    most = max(block_n, most // block_n * block_n)
    width = cdiv(cdiv(features, cdiv(features, most)), block_n) * block_n
    return width, replace(config, block_n=block_n, slices=min(config.slices, block_n // 16))


@functools.cache
def _runs(first: int, width: int, n: int, k: int, gate: Gate | None, transposed: bool) -> tuple[int, Runs]:
    """How many rows of an (n, k) matrix ``width`` features from ``first`` on are, and their bytes.

    The matrix is stored as it is, or (k, n) if ``transposed``.
    """
    rows = _rows_of(first, width, n, gate)
    (start, number), *others = rows
    stride = others[0][0] - start if others else 0
    size = len(rows) * number
    if transposed:
        # A run for each stored row and segment of columns.
        return size, Runs(size * k // 2, number // 2, len(rows), start // 2, stride // 2, n // 2)
    return size, Runs(size * k // 2, number * k // 2, len(rows), start * k // 2, stride * k // 2)


def decodes(kernel: str, stack: PackedStack, num_rows: int, like: Tensor) -> bool:
    """Whether ``kernel`` takes ``stack`` as it is: few rows, rows of whole 64s, 32-bit offsets in a matrix, whole words.

    A part of a larger tensor may start at any byte.
    """
    num_experts, rows, columns = stack.weights.format.shape
    if columns % 64 or rows * columns >= 2**31 or stack.weights.packed.data_ptr() % 4:
        return False
    return tuning.decodes_in_gemm(kernel, num_rows, num_experts, tuning.target_of(like.device))


@functools.cache
def _gemm_plan(
    config: LaunchConfig,
    format: Format4bit,
    intermediate: int,
    gate: Gate | None,
    top_k: int,
    gather: bool,
    has_bias: bool,
    extension: tuple[int, ...],
    save_out: bool,
    save_gate_up: bool,
    ptx: str,
    precision: str,
) -> Plan:
    num_experts, _, k = format.shape
    epilogue = gate_constants(gate or Gate("none", gated=False), intermediate)
    constants = {
        "NUM_EXPERTS": num_experts,
        "K": k,
        "N": epilogue.pop("I"),
        **epilogue,
        "TOP_K": top_k,
        "GATHER": gather,
        "HAS_BIAS": has_bias,
        "LOW_RANK": extension,
        "SAVE_OUT": save_out,
        "SAVE_GATE_UP": save_gate_up,
        **storage_constants(format),
        "PTX": ptx,
        "PRECISION": precision,
        **tile_constants(config),
    }
    return Plan(packed_gemm_kernel, constants, config.num_warps, config.num_stages, fp_fusion=False)


def up(
    x: Tensor,
    stack: PackedStack,
    routing: Routing,
    bias: Tensor | None,
    gate: Gate,
    h: Tensor | None,
    gate_up: Tensor | None,
    extension: Extension | None,
) -> None:
    """``reference.grouped_up`` into h and gate_up, decoding on the way."""
    num_rows, n = routing.row_to_slot.shape[0], gate.intermediate(stack.shape[1])
    config = config_of("up_4bit", num_rows, routing, x)
    _launch_gemm(config, x, stack, routing, bias, gate, True, 0.0, (num_rows, n), h, gate_up, extension)


def gemm(
    a: Tensor,
    stack: PackedStack,
    routing: Routing,
    bias: Tensor | None,
    gather: bool,
    fill: float,
    out: Tensor,
    extension: Extension | None,
) -> None:
    """``reference.grouped_gemm`` into out, decoding on the way."""
    num_rows, n = out.shape
    if not stack.transposed:
        config = config_of("gemm_4bit", num_rows, routing, a)
        _launch_gemm(config, a, stack, routing, bias, None, gather, fill, (num_rows, n), out, None, extension)
        return
    if gather or bias is not None:
        raise AssertionError("a product with the transpose of packed weights neither gathers nor adds a bias")
    config = config_of("transposed_4bit", num_rows, routing, a)
    if n % config.block_n:
        config = replace(config, block_n=64)
    extra = low_rank.constants(extension)
    _transposed_plan(config, stack.weights.format, extra, ptx(stack.weights.format, a), precision(a.dtype))(
        a.device,
        (max_tiles(num_rows, routing.num_experts, config.block_m) * (n // config.block_n), 1, 1),
        a,
        *storage_operands(stack.weights),
        *low_rank.operands(extension, a),
        out,
        routing.offsets,
        routing.tile_expert,
        routing.tile_row,
        num_rows,
        fill,
    )


def _launch_gemm(
    config: LaunchConfig,
    a: Tensor,
    stack: PackedStack,
    routing: Routing,
    bias: Tensor | None,
    gate: Gate | None,
    gather: bool,
    fill: float,
    shape: tuple[int, int],
    out: Tensor | None,
    gate_up: Tensor | None,
    extension: Extension | None,
) -> None:
    """Into out, of ``shape``, and gate_up, where they are wanted."""
    num_rows, n = shape
    k = a.shape[1]
    if k % config.block_k:
        config = replace(config, block_k=64)
    if extension is not None and extension.separate and config.block_m >= 128:
        # Gate and up apart, each with a product of its own: 54 registers too many for four warps.
        config = replace(config, num_warps=max(8, config.num_warps))
    plan = _gemm_plan(
        config,
        stack.weights.format,
        n,
        gate,
        routing.top_k,
        gather,
        bias is not None,
        low_rank.constants(extension),
        out is not None,
        gate_up is not None,
        ptx(stack.weights.format, a),
        precision(a.dtype),
    )
    plan(
        a.device,
        (max_tiles(num_rows, routing.num_experts, config.block_m) * cdiv(n, config.block_n), 1, 1),
        a,
        *storage_operands(stack.weights),
        a if bias is None else bias.contiguous(),
        *low_rank.operands(extension, a),
        a if out is None else out,
        a if gate_up is None else gate_up,
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
        num_rows,
        fill,
    )


@functools.cache
def _transposed_plan(
    config: LaunchConfig, format: Format4bit, extension: tuple[int, ...], ptx: str, precision: str
) -> Plan:
    num_experts, k, n = format.shape
    constants = {
        "NUM_EXPERTS": num_experts,
        "K": k,
        "N": n,
        "LOW_RANK": extension,
        **storage_constants(format),
        "PTX": ptx,
        "PRECISION": precision,
        **tile_constants(config),
    }
    return Plan(packed_transposed_kernel, constants, config.num_warps, config.num_stages, fp_fusion=False)


@functools.cache
def _down_backward_plan(
    config: LaunchConfig,
    format: Format4bit,
    top_k: int,
    gate: Gate,
    num_parts: int,
    extension: tuple[int, ...],
    save_weighted_h: bool,
    in_place: bool,
    ptx: str,
    precision: str,
) -> Plan:
    num_experts, hidden, intermediate = format.shape
    constants = {
        "NUM_EXPERTS": num_experts,
        "H": hidden,
        **gate_constants(gate, intermediate),
        "TOP_K": top_k,
        "PARTS": num_parts,
        "LOW_RANK": extension,
        "SAVE_WEIGHTED_H": save_weighted_h,
        "IN_PLACE": in_place,
        **storage_constants(format),
        "PTX": ptx,
        "PRECISION": precision,
        **tile_constants(config),
        "SLICES": config.slices,
    }
    return Plan(packed_down_backward_kernel, constants, config.num_warps, config.num_stages, fp_fusion=False)


def down_backward_config(num_rows: int, routing: Routing, grad_y: Tensor, intermediate: int) -> LaunchConfig:
    """Of ``down_backward``, for the column tiles that ``intermediate`` is a multiple of."""
    config = config_of("down_backward_4bit", num_rows, routing, grad_y)
    return replace(config, block_n=64, slices=min(config.slices, 4)) if intermediate % config.block_n else config


def down_backward(
    config: LaunchConfig,
    grad_y: Tensor,
    weight: PackedStack,
    gate_up: Tensor,
    routing: Routing,
    top_k_weights: Tensor,
    gate: Gate,
    grad_gate_up: Tensor,
    weighted_h: Tensor | None,
    dots: Tensor,
    extension: Extension | None,
) -> None:
    """``reference.down_backward`` into grad_gate_up and weighted_h, decoding on the way.

    Args:
        config: of ``down_backward_config``.
        weight: (E, H, I), stored like that.
        dots: (S, parts), of which a column tile each is written.
    """
    format = weight.weights.format
    plan = _down_backward_plan(
        config,
        format,
        routing.top_k,
        gate,
        dots.shape[1],
        low_rank.constants(extension),
        weighted_h is not None,
        grad_gate_up is gate_up,
        ptx(format, grad_y),
        precision(grad_y.dtype),
    )
    plan(
        grad_y.device,
        (max_tiles(gate_up.shape[0], routing.num_experts, config.block_m) * (format.shape[2] // config.block_n), 1, 1),
        grad_y,
        *storage_operands(weight.weights),
        *low_rank.operands(extension, grad_y),
        gate_up,
        top_k_weights,
        grad_gate_up,
        grad_gate_up if weighted_h is None else weighted_h,
        dots,
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
    )
