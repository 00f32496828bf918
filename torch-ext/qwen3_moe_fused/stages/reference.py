"""The pipeline stages in plain torch: the oracle of the tests and the CPU implementation.

It has the same functions and arguments as ``stages.triton``. Weights are (E, N, K) views of any strides: out features
N, in features K. Everything is computed in the dtype of the inputs, so float64 in means float64 throughout. Stages loop
over the experts that have rows, which needs their counts on the host: free on a CPU, and why this is not the GPU path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..activations import Gate, apply_gate, apply_gate_backward

if TYPE_CHECKING:
    from ..routing import Routing
    from .stacks import PackedStack, Stack
    from .terms import LowRankTerm


def _experts(routing: Routing) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    offsets = routing.offsets.tolist()
    for expert in range(len(offsets) - 1):
        if offsets[expert] < offsets[expert + 1]:
            yield expert, slice(offsets[expert], offsets[expert + 1])


def _matrix(stack: Stack, expert: int, dtype: torch.dtype) -> Tensor:
    """(N, K) weights of ``expert``."""
    if isinstance(stack, Tensor):
        return stack[expert]
    matrix = torch.empty((1, *stack.format.shape[1:]), dtype=dtype, device=stack.device)
    dequantize(stack, expert, 1, matrix)
    return matrix[0].mT if stack.transposed else matrix[0]


def _slots(routing: Routing) -> Tensor:
    """(S,) int64 slot of each row; 0 for rows of no expert, whose entry in ``row_to_slot`` is undefined."""
    slots = routing.row_to_slot.long()
    slots[int(routing.offsets[-1]) :] = 0
    return slots


def _gather(x: Tensor, routing: Routing) -> Tensor:
    """(S, N) rows in expert order from (T, N) tokens."""
    return x[_slots(routing) // routing.top_k]


def route(top_k_index: Tensor, routing: Routing, dtype: torch.dtype) -> None:
    """Fills ``routing`` for the (T, top_k) expert ids."""
    num_experts = routing.num_experts
    ids = top_k_index.reshape(-1).long()
    mine = (ids >= 0) & (ids < num_experts)
    keys = torch.where(mine, ids, num_experts)
    order = torch.sort(keys, stable=True).indices
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    routing.offsets[0] = 0
    routing.offsets[1:] = counts.cumsum(0)
    routing.row_to_slot.copy_(order)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.numel(), device=order.device)
    routing.slot_to_row.copy_(torch.where(mine, rows, -1))
    routing.tile_expert.fill_(-1)
    routing.tile_row.zero_()


def route_sorted(m_sizes: Tensor, num_rows: int, routing: Routing, dtype: torch.dtype) -> None:
    """Fills ``routing`` for rows that are sorted by expert already, ``m_sizes`` (E,) of each."""
    offsets = m_sizes.long().cumsum(0)
    routing.offsets[0] = 0
    # Sizes that cannot be: no row belongs to an expert, as in the kernel.
    fits = bool((m_sizes >= 0).all()) and (m_sizes.numel() == 0 or int(offsets[-1]) <= num_rows)
    routing.offsets[1:] = offsets if fits else 0
    routing.tile_expert.fill_(-1)
    routing.tile_row.zero_()


def grouped_gemm(
    a: Tensor,
    weight: Stack,
    routing: Routing,
    num_rows: int,
    bias: Tensor | None,
    gather: bool,
    fill: float,
    term: LowRankTerm | None = None,
) -> Tensor:
    """out[row] = a[row or token of row] · weight[expert of row]ᵀ + bias[expert of row], and the term's product.

    Args:
        a: (num_rows, K), or (T, K) with ``gather``.
        weight: (E, N, K).
        bias: (E, N) or None.
        fill: value of the rows that belong to no expert.

    Returns:
        (num_rows, N).
    """
    if gather:
        a = _gather(a, routing)
    out = a.new_full((num_rows, weight.shape[1]), fill)
    for expert, rows in _experts(routing):
        torch.mm(a[rows], _matrix(weight, expert, a.dtype).mT, out=out[rows])
        if bias is not None:
            out[rows] += bias[expert]
        if term is not None:
            _extend(out[rows], term, expert, rows)
    return out


def _extend(out: Tensor, term: LowRankTerm, expert: int, rows: slice) -> None:
    """Adds left[rows] · right[expert]ᵀ to out; of separate factors each to its half of the columns."""
    left, right = term.left[rows], term.right[expert]
    if not term.separate:
        out += left @ right.mT
        return
    rank, half = right.shape[1], right.shape[0] // 2
    out[:, :half] += left[:, :rank] @ right[:half].mT
    out[:, half:] += left[:, rank:] @ right[half:].mT


def shrink(a: Tensor, weight: Tensor, routing: Routing, gather: bool, scale: float, out: Tensor) -> None:
    """out[row] = scale · a[row or token of row] · weight[expert of row]ᵀ; zeros for rows of no expert.

    Args:
        a: (S, K), or (T, K) with ``gather``.
        weight: (E, N, K), N small.
        out: (S, N) of any row stride, overwritten.
    """
    out.copy_(grouped_gemm(a, weight, routing, out.shape[0], None, gather, 0.0).mul_(scale))


def grouped_up(
    x: Tensor,
    weight: Stack,
    routing: Routing,
    num_rows: int,
    bias: Tensor | None,
    gate: Gate,
    save_gate_up: bool,
    term: LowRankTerm | None = None,
    save_h: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """h = gate(x[token of row] · weight[expert]ᵀ + bias[expert] + the term's product).

    Args:
        x: (T, H).
        weight: (E, 2·I or I, H), rows laid out as gate_up's columns.

    Returns:
        h (S, I) and gate_up (S, 2·I or I), None unless ``save_h``, ``save_gate_up``. Rows of no expert are zero.
    """
    gate_up = grouped_gemm(x, weight, routing, num_rows, bias, gather=True, fill=0.0, term=term)
    return apply_gate(gate_up, gate) if save_h else None, gate_up if save_gate_up else None


def combine(z: Tensor, routing: Routing, num_tokens: int, weights: Tensor | None) -> Tensor:
    """y[t] = Σ_k weights[t, k] · z[row of slot (t, k)], in slot order, accumulated in at least fp32.

    Args:
        z: (S, N).
        weights: (T, top_k), or None for ones.

    Returns:
        (T, N) in the dtype of z.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    rows = routing.slot_to_row.long().view(num_tokens, routing.top_k)
    y = torch.zeros((num_tokens, z.shape[1]), dtype=dtype, device=z.device)
    for k in range(routing.top_k):
        mine = rows[:, k, None] >= 0
        part = z[rows[:, k].clamp(min=0)].to(dtype)
        y += torch.where(mine, part if weights is None else part * weights[:, k, None].to(dtype), 0)
    return y.to(z.dtype)


def combine_backward(
    grad_y: Tensor, z: Tensor | None, routing: Routing, weights: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``combine``'s z (S, N) and, if z is given, weights (T, top_k); zero for rows of no expert."""
    slots = _slots(routing)
    grad_rows = grad_y[slots // routing.top_k]
    mine = torch.zeros(slots.shape[0], dtype=torch.bool, device=slots.device)
    mine[: int(routing.offsets[-1])] = True
    dtype = torch.promote_types(grad_y.dtype, torch.float32)
    scale = torch.where(mine, weights.reshape(-1)[slots].to(dtype), 0)[:, None]
    grad_z = torch.where(mine[:, None], grad_rows * scale, 0).to(grad_y.dtype)
    if z is None:
        return grad_z, None
    dots = (grad_rows.to(dtype) * torch.where(mine[:, None], z, 0).to(dtype)).sum(1)
    grad_weights = torch.zeros(weights.numel(), dtype=dtype, device=z.device)
    grad_weights[slots[mine]] = dots[mine]
    return grad_z, grad_weights.view_as(weights).to(weights.dtype)


def down_backward(
    grad_y: Tensor,
    weight: Stack,
    bias: Tensor | None,
    gate_up: Tensor,
    routing: Routing,
    top_k_weights: Tensor,
    gate: Gate,
    need_weighted_h: bool,
    term: LowRankTerm | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Back through combine, the down projection and the gate, without the down projection's output.

    With g = grad_y[token] · weight[expert] the gradient of h is w·g, and the routing weight's is rowsum(g·h), plus
    grad_y[token]·bias[expert] for a biased down projection. A term's product is added to g.

    Args:
        grad_y: (T, H).
        weight: (E, H, I) of the down projection; bias: (E, H) or None.
        gate_up: (S, 2·I or I) as the forward saved it.
        top_k_weights: (T, top_k).
        in_place: gate_up is overwritten with its gradient, and returned.

    Returns:
        grad_gate_up, like gate_up; w·h (S, I), None unless ``need_weighted_h``; grad_top_k_weights (T, top_k).
    """
    slots = _slots(routing)
    num_rows = gate_up.shape[0]
    grad_h = grouped_gemm(grad_y, weight.mT, routing, num_rows, None, gather=True, fill=0.0, term=term)
    h = apply_gate(gate_up, gate)
    dtype = torch.promote_types(h.dtype, torch.float32)
    dots = (grad_h.to(dtype) * h.to(dtype)).sum(1)
    grad_weights = torch.zeros(slots.shape[0], dtype=dtype, device=h.device)
    for expert, rows in _experts(routing):
        if bias is not None:
            dots[rows] += grad_y[slots[rows] // routing.top_k].to(dtype) @ bias[expert].to(dtype)
        grad_weights[slots[rows]] = dots[rows]
    w = top_k_weights.reshape(-1)[slots][:, None].to(dtype)
    grad_gate_up = apply_gate_backward(gate_up, (grad_h * w).to(h.dtype), gate)
    weighted_h = (h * w).to(h.dtype) if need_weighted_h else None
    if in_place:
        grad_gate_up = gate_up.copy_(grad_gate_up)
    return grad_gate_up, weighted_h, grad_weights.view_as(top_k_weights).to(top_k_weights.dtype)


def grouped_wgrad(
    a: Tensor,
    b: Tensor,
    routing: Routing,
    gather_a: bool,
    gather_b: bool,
    out: Tensor,
    weights: Tensor | None = None,
) -> None:
    """out[expert] = Σ over the expert's rows of (weights[slot]·) a[row]ᵀ · b[row]; zeros for an expert without rows.

    Args:
        a: (S, M), or (T, M) with ``gather_a``. b: (S, N), or (T, N) with ``gather_b``.
        out: (E, M, N) of any strides, overwritten.
        weights: (T, top_k) or None.
    """
    a = _gather(a, routing) if gather_a else a
    b = _gather(b, routing) if gather_b else b
    if weights is not None:
        scale = weights.reshape(-1)[_slots(routing)][:, None]
        b = (b * scale.to(torch.promote_types(b.dtype, torch.float32))).to(b.dtype)
    out.zero_()
    for expert, rows in _experts(routing):
        out[expert] = a[rows].mT @ b[rows]


def grouped_row_sum(a: Tensor, routing: Routing, weights: Tensor | None, gather: bool) -> Tensor:
    """(E, N) sums over each expert's rows of a[row], or of weights[slot]·a[token of row].

    Args:
        a: (S, N), or (T, N) with ``gather``.
        weights: (T, top_k) or None.
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    rows_of_a = _gather(a, routing) if gather else a
    if weights is not None:
        rows_of_a = rows_of_a.to(dtype) * weights.reshape(-1)[_slots(routing)][:, None].to(dtype)
    out = torch.zeros((routing.num_experts, a.shape[1]), dtype=dtype, device=a.device)
    for expert, rows in _experts(routing):
        out[expert] = rows_of_a[rows].to(dtype).sum(0)
    return out.to(a.dtype)


def dispatch(x: Tensor, routing: Routing, num_rows: int) -> Tensor:
    """(S, N) rows in expert order from x (T, N); rows of no expert are zero."""
    rows = _gather(x, routing)
    rows[int(routing.offsets[-1]) :] = 0
    return rows


def dequantize(stack: PackedStack, first: int, count: int, out: Tensor) -> None:
    """Experts ``first`` to ``first + count`` in the dtype of ``out``, rounded once from fp32; expert by expert.

    Args:
        stack: (E, out, in), as it is stored.
        out: (count, out, in) contiguous, overwritten.
    """
    weight_format, tensors = stack.format.weight_format, stack.tensors()
    values = weight_format.code(stack.device)
    # (256, 2): both weights of a byte.
    pairs = torch.stack((values.repeat_interleave(16), values.repeat(16)), dim=1)
    if not weight_format.high_nibble_first:
        pairs = pairs.flip(1)
    one = replace(stack.format, shape=(1, *stack.format.shape[1:]))
    for expert in range(count):
        parts = {name: value.narrow(0, first + expert, 1) for name, value in tensors.items()}
        blocks = pairs.index_select(0, parts["packed"].flatten().int()).view(-1, one.blocksize)
        out[expert].view(blocks.shape).copy_(blocks.mul_(weight_format.scales(one, parts).view(-1, 1)))


def few_slots(
    family: str,
    a: Tensor,
    ids: Tensor,
    stack: PackedStack,
    bias: Tensor | None,
    gate: Gate | None,
    top_k: int,
    out: Tensor,
) -> None:
    """A product of the rows of a few slots, whose experts need not be sorted.

    out[slot] = gate(a[slot // top_k] · stack[expert of slot]ᵀ + bias[expert]). Slots of other experts are left as they are.

    Args:
        family: "few_up_4bit" or "few_down_4bit", as which a launch is configured.
        a: (S // top_k, K). ids: S expert ids.
        stack: (E, 2·N or N, K). bias: (E, 2·N or N) or None.
        gate: None for a plain product.
        out: (S, N), overwritten.
    """
    for slot, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < stack.shape[0]:
            row = a[slot // top_k : slot // top_k + 1] @ _matrix(stack, expert, a.dtype).mT
            if bias is not None:
                row = row + bias[expert]
            out[slot] = row[0] if gate is None else apply_gate(row, gate)[0]


def few_rows_linear(
    x: Tensor, stacks: Sequence[PackedStack], biases: Sequence[Tensor | None], outs: Sequence[Tensor]
) -> None:
    """Products of a few rows with several 4-bit matrices.

    Args:
        x: (T, K).
        stacks: of one matrix each, (1, N, K); N may differ.
        biases: (N,) or None, of each.
        outs: (T, N) of each, contiguous, overwritten.
    """
    for stack, bias, out in zip(stacks, biases, outs, strict=True):
        out.copy_(torch.nn.functional.linear(x, _matrix(stack, 0, x.dtype), bias))


def use_gemv(num_tokens: int, top_k: int, up: Stack, down: Stack) -> bool:
    """Whether matrix-vector products, slot by slot, are faster than sorting; never here."""
    return False
