"""4-bit weights: where they are decoded, and the launches of ``kernels.packed`` and ``kernels.packed_gemm``.

Few rows to an expert: grouped GEMMs decode what they multiply (``gemm``, ``up``), if the layout allows it. Many, and every
row tile would decode its expert again: then the dense kernels run over a workspace of at most ``WORKSPACE_BYTES`` into
which a part of the experts is decoded at a time (``dense_parts``), those without rows left out. ``tuning.decodes_in_gemm``
draws the line.
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
from ..kernels.packed_gemm import packed_gemm_kernel, packed_transposed_kernel
from ..kernels.routing import split_kernel
from ..plan import Plan
from ..quantization import as_floats, code, nested_code
from ..routing import max_tiles
from ..weights import PackedStack
from .operands import (
    cdiv,
    config_of,
    device_index,
    gate_constants,
    on_device,
    power_of_2,
    precision,
    tile_constants,
)

if TYPE_CHECKING:
    from ..quantization import Format4bit, Packed4bitWeights
    from ..routing import Routing
    from ..tuning import LaunchConfig
    from ..weights import Stack

WORKSPACE_BYTES = 256 * 2**20
# Bytes that a program of the dequantization decodes, tiles that one of the split writes.
DEQUANTIZE_BLOCK = 1024
SPLIT_TILES = 128


def storage_operands(weights: Packed4bitWeights) -> tuple[Tensor, ...]:
    """What kernels over packed weights read of them; pointers that they do not read are those of another."""
    if weights.nested_absmax is None or weights.nested_offset is None:
        absmax = nested_absmax = nested_offset = as_floats(weights.absmax)
    else:
        absmax = weights.absmax
        nested_absmax, nested_offset = as_floats(weights.nested_absmax), as_floats(weights.nested_offset)
    device = weights.device
    tables = nested_code(device), code(weights.format.quant_type, device)
    return weights.packed, absmax, nested_absmax, nested_offset, *tables


def storage_constants(format: Format4bit) -> dict[str, Any]:
    """How they find a weight's absmax."""
    return {
        "BLOCKSIZE": format.blocksize,
        "BLOCKS": format.blocks,
        "GROUPS": format.groups,
        "PROJECTIONS": format.projections,
        "DOUBLE_QUANT": format.double_quant,
    }


@functools.cache
def _dequantize_plan(format: Format4bit, skip: bool) -> Plan:
    _, rows, columns = format.shape
    constants = {"SIZE": rows * columns, **storage_constants(format), "SKIP": skip, "BLOCK": DEQUANTIZE_BLOCK}
    return Plan(dequantize_kernel, constants, fp_fusion=False)


def dequantize(weights: Packed4bitWeights, first: int, count: int, out: Tensor) -> None:
    """``reference.dequantize``."""
    _decode_experts(weights.packed, weights, first, count, out, None)


@on_device
def _decode_experts(
    packed: Tensor, weights: Packed4bitWeights, first: int, count: int, out: Tensor, offsets: Tensor | None
) -> None:
    """Experts ``first`` to ``first + count`` into ``out`` (count, rows, columns), only those with rows given ``offsets``."""
    _, rows, columns = weights.format.shape
    _dequantize_plan(weights.format, offsets is not None)(
        device_index(packed),
        (count * cdiv(rows * columns // 2, DEQUANTIZE_BLOCK), 1, 1),
        *storage_operands(weights),
        packed if offsets is None else offsets,
        out,
        first,
    )


class Part(NamedTuple):
    """Some experts, dense.

    Attributes:
        stack: (experts, N, K).
        routing: of their rows, in which they are numbered from 0.
        experts: their numbers in the whole stack.
    """

    stack: Tensor
    routing: Routing
    experts: slice


def experts_of_a_part(num_experts: int, expert_bytes: int) -> int:
    """How many experts are decoded at a time: what fits the workspace, in parts of nearly one size."""
    most = max(1, WORKSPACE_BYTES // expert_bytes)
    return cdiv(num_experts, cdiv(num_experts, most))


def dense_parts(weight: Stack, routing: Routing, num_rows: int, dtype: torch.dtype, block_m: int) -> Iterator[Part]:
    """The stack dense in ``dtype``, in parts: a dense one in a single part, packed weights in a workspace.

    A part's stack holds only until the next part is taken, and experts without rows hold anything.

    Args:
        num_rows: S. block_m: height of the row tiles.
    """
    if isinstance(weight, Tensor):
        yield Part(weight, routing, slice(None))
        return
    num_experts, rows, columns = weight.weights.format.shape
    packed = weight.weights.packed
    count = experts_of_a_part(num_experts, rows * columns * dtype.itemsize)
    views = _split(routing, num_rows, count, block_m) if count < num_experts else [routing]
    workspace = torch.empty((count, rows, columns), dtype=dtype, device=packed.device)
    for part, view in enumerate(views):
        first = part * count
        own = min(count, num_experts - first)
        stack = workspace[:own]
        _decode_experts(packed, weight.weights, first, own, stack, routing.offsets)
        yield Part(stack.mT if weight.transposed else stack, view, slice(first, first + own))


@functools.cache
def _split_plan(num_experts: int, count: int, sizes: tuple[int, int, int], block_m: int) -> Plan:
    offsets, tile_expert, stride = sizes
    constants = {
        "NUM_EXPERTS": num_experts,
        "COUNT": count,
        "STRIDE": stride,
        "TILE_EXPERT": offsets,
        "TILE_ROW": tile_expert,
        "EXPERTS": max(power_of_2(count), 2),
        "BLOCK_M": block_m,
        "SUB_T": SPLIT_TILES,
    }
    return Plan(split_kernel, constants)


def _split(routing: Routing, num_rows: int, count: int, block_m: int) -> list[Routing]:
    """The routing of ``count`` experts at a time."""
    num_experts = routing.num_experts
    parts, tiles = cdiv(num_experts, count), max_tiles(num_rows, count, block_m)
    # Each begins at 16 bytes, as kernels compiled for aligned pointers want it.
    offsets_size, tiles_size = cdiv(count + 1, 4) * 4, cdiv(tiles, 4) * 4
    stride = offsets_size + 2 * tiles_size
    buffer = torch.empty((parts, stride), dtype=torch.int32, device=routing.offsets.device)
    plan = _split_plan(num_experts, count, (offsets_size, offsets_size + tiles_size, stride), block_m)
    device = device_index(buffer)
    plan(device, (cdiv(tiles, SPLIT_TILES), parts, 1), routing.offsets, buffer, num_rows, tiles)
    views = []
    for part in range(parts):
        own = min(count, num_experts - part * count)
        offsets, tile_expert, tile_row = buffer[part].split((offsets_size, tiles_size, tiles_size))
        views.append(routing._replace(offsets=offsets[: own + 1], tile_expert=tile_expert, tile_row=tile_row))
    return views


def decodes(stack: PackedStack, num_rows: int, like: Tensor) -> bool:
    """Whether grouped GEMMs decode ``stack`` themselves: few rows, rows of whole 64s, 32-bit offsets in a matrix."""
    num_experts, rows, columns = stack.weights.format.shape
    target = tuning.target_of(like.device)
    return columns % 64 == 0 and rows * columns < 2**31 and tuning.decodes_in_gemm(num_rows, num_experts, target)


@functools.cache
def _gemm_plan(
    config: LaunchConfig,
    format: Format4bit,
    intermediate: int,
    gate: Gate | None,
    top_k: int,
    gather: bool,
    has_bias: bool,
    save_gate_up: bool,
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
        "SAVE_GATE_UP": save_gate_up,
        **storage_constants(format),
        "PRECISION": precision,
        **tile_constants(config),
    }
    return Plan(packed_gemm_kernel, constants, config.num_warps, config.num_stages, fp_fusion=False)


def up(
    x: Tensor, stack: PackedStack, routing: Routing, bias: Tensor | None, gate: Gate, h: Tensor, gate_up: Tensor | None
) -> None:
    """``reference.grouped_up`` into h and gate_up, decoding on the way."""
    config = config_of("up_4bit", h.shape[0], routing, x)
    _launch_gemm(config, x, stack, routing, bias, gate, True, 0.0, h, gate_up)


def gemm(
    a: Tensor, stack: PackedStack, routing: Routing, bias: Tensor | None, gather: bool, fill: float, out: Tensor
) -> None:
    """``reference.grouped_gemm`` into out, decoding on the way."""
    if not stack.transposed:
        config = config_of("gemm_4bit", out.shape[0], routing, a)
        _launch_gemm(config, a, stack, routing, bias, None, gather, fill, out, None)
        return
    if gather or bias is not None:
        raise AssertionError("a product with the transpose of packed weights neither gathers nor adds a bias")
    num_rows, n = out.shape
    config = config_of("transposed_4bit", num_rows, routing, a)
    if n % config.block_n:
        config = replace(config, block_n=64)
    _transposed_plan(config, stack.weights.format, precision(a.dtype))(
        device_index(a),
        (max_tiles(num_rows, routing.num_experts, config.block_m) * (n // config.block_n), 1, 1),
        a,
        *storage_operands(stack.weights),
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
    out: Tensor,
    gate_up: Tensor | None,
) -> None:
    num_rows, n = out.shape
    if a.shape[1] % config.block_k:
        config = replace(config, block_k=64)
    plan = _gemm_plan(
        config,
        stack.weights.format,
        n,
        gate,
        routing.top_k,
        gather,
        bias is not None,
        gate_up is not None,
        precision(a.dtype),
    )
    plan(
        device_index(a),
        (max_tiles(num_rows, routing.num_experts, config.block_m) * cdiv(n, config.block_n), 1, 1),
        a,
        *storage_operands(stack.weights),
        out if bias is None else bias.contiguous(),
        out,
        out if gate_up is None else gate_up,
        routing.offsets,
        routing.row_to_slot,
        routing.tile_expert,
        routing.tile_row,
        num_rows,
        fill,
    )


@functools.cache
def _transposed_plan(config: LaunchConfig, format: Format4bit, precision: str) -> Plan:
    num_experts, k, n = format.shape
    constants = {
        "NUM_EXPERTS": num_experts,
        "K": k,
        "N": n,
        **storage_constants(format),
        "PRECISION": precision,
        **tile_constants(config),
    }
    return Plan(packed_transposed_kernel, constants, config.num_warps, config.num_stages, fp_fusion=False)
