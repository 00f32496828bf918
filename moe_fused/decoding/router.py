"""The router of a mixture of experts in two launches, in the place of a model's own while a decoding step is recorded.

A router of Transformers launches the product for the logits, a softmax, a selection, a sort, a sum, a division and casts.
Here one kernel multiplies and one chooses. The first has so many programs that all multiprocessors read a part of the
weight, and divides the features among them, too. A token's choice needs the logits of all experts, so it waits for all
programs: a launch in a graph does this in the time that an atomic counter and the reads after it would take.

Which rule a router has is found by what it computes, not by its name. For this test it gets other weights, with which all
logits of a token are distinct multiples of 1/16, which no dtype rounds. No two experts are then equally likely, and any two
rules give different results. Routers that choose among groups of experts, or whose ``forward`` takes more than the tokens,
stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.func import functional_call

from .alike import alike, kind_of, random_values

__all__ = ["Rule", "route", "routers"]

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SCORES = ("softmax", "sigmoid")
# The most experts, whose numbers no dtype rounds, and the most of them for a token.
MOST_EXPERTS, MOST_CHOSEN = 512, 32
# How many tokens a rule is tested with. Logits of the test are multiples of 1 / FRACTION.
TESTED, FRACTION = 16, 16
# How many features a program multiplies at a time, and among how many programs the features are divided.
BLOCK, PARTS = 128, 8
BLOCK_ROWS, BLOCK_EXPERTS = 16, 16


@dataclass(frozen=True)
class Rule:
    """How a router makes weights of logits.

    Attributes:
        scores: "softmax" over all experts, or "sigmoid".
        top_k: How many experts a token has.
        is_normalized: Whether the weights of a token are divided by their sum. With a softmax, this is the softmax over the
            chosen experts.
        factor: The number by which the weights are multiplied at the end.
        product: The dtype that logits are rounded to.
        logits, weights: Their dtypes.
    """

    scores: str
    top_k: int
    is_normalized: bool
    factor: float
    product: torch.dtype
    logits: torch.dtype
    weights: torch.dtype


def route(
    rule: Rule, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, correction: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits (T, experts), the weights (T, top k) and the indices (T, top k) int64 of the chosen experts.

    The product is summed in fp32 and rounded once. The largest weight comes first, and of equal ones that with the lowest
    index. ``torch.topk`` promises no order among equal ones.

    Args:
        rule: What it does with the logits.
        hidden: (T, features), in fp32, fp16 or bf16.
        weight: (experts, features), likewise. Its dtype may be another one.
        bias: (experts,), is added to the logits.
        correction: (experts,), is added to the scores by which experts are chosen, and is not in the weights.
    """
    from . import router_device as device_code

    (rows, size), experts = hidden.shape, len(weight)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    parts = min(PARTS, -(-size // BLOCK))
    products = hidden.new_empty(parts, rows, experts, dtype=torch.float32)
    logits = hidden.new_empty(rows, experts, dtype=rule.logits)
    weights = hidden.new_empty(rows, rule.top_k, dtype=rule.weights)
    indices = hidden.new_empty(rows, rule.top_k, dtype=torch.int64)
    is_exact = torch.float32 in (hidden.dtype, weight.dtype)
    device_code.products_kernel[(-(-experts // BLOCK_EXPERTS), parts, -(-rows // BLOCK_ROWS))](
        hidden, weight, products, hidden.stride(0), weight.stride(0), rows, size,
        EXPERTS=experts, PARTS=parts, STEPS=-(-size // (BLOCK * parts)), BLOCK_ROWS=BLOCK_ROWS, BLOCK_EXPERTS=BLOCK_EXPERTS,
        BLOCK=BLOCK, PRECISION="ieee" if is_exact else "tf32", num_warps=2, num_stages=3,
    )  # fmt: skip
    device_code.choose_kernel[(rows,)](
        products, bias, correction, logits, weights, indices, rows, rule.factor,
        EXPERTS=experts, TOP_K=rule.top_k, PARTS=parts, SCORES=rule.scores, IS_NORMALIZED=rule.is_normalized,
        ROUNDED=DTYPES[rule.product], HAS_BIAS=bias is not None, HAS_CORRECTION=correction is not None,
        BLOCK_EXPERTS=triton.next_power_of_2(experts), BLOCK_TOP_K=triton.next_power_of_2(rule.top_k), num_warps=1,
    )  # fmt: skip
    return logits, weights, indices


def routers(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yields the routers of a model that ``route`` computes, each with a function to take the place of its ``forward``."""
    found: dict[tuple[Any, ...], _Found | None] = {}
    dtype = next(each.dtype for each in model.parameters() if each.is_floating_point())
    for module in model.modules():
        names = _tensor_names(module)
        if names is None or "forward" in vars(module):
            continue
        kind = kind_of(module)
        if kind not in found:
            found[kind] = _found(module, names, dtype)
        router = found[kind]
        if router is not None:
            yield module, functools.partial(_forward, module, type(module).forward, router)


@dataclass(frozen=True)
class _Names:
    """The names of a router's tensors. Those that it does not have are empty."""

    weight: str
    bias: str
    correction: str


@dataclass(frozen=True)
class _Found:
    """What is known of a router.

    Attributes:
        rule, names: Its rule, and the names of its tensors.
        hidden: The dtype of its input.
        flattens: Whether it takes tokens in more than two dimensions.
    """

    rule: Rule
    names: _Names
    hidden: torch.dtype
    flattens: bool


def _tensor_names(module: nn.Module) -> _Names | None:
    """The names of a module's tensors if it looks like a router: a matrix, and vectors with known names."""
    top_k = getattr(module, "top_k", None)
    if not isinstance(top_k, int):
        return None
    named: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    matrices = [name for name, value in named.items() if name.rpartition(".")[2] == "weight" and value.dim() == 2]
    corrections = [name for name in named if name.rpartition(".")[2] == "e_score_correction_bias"]
    if len(matrices) != 1 or len(corrections) > 1:
        return None
    (weight,) = matrices
    bias = weight.removesuffix("weight") + "bias"
    names = _Names(weight, bias if bias in named else "", corrections[0] if corrections else "")
    matrix, others = named[weight], named.keys() - {names.weight, names.bias, names.correction}
    vectors = [named[name] for name in (names.bias, names.correction) if name]
    fits = (
        not others
        and matrix.dtype in DTYPES
        and matrix.stride(1) == 1
        and all(value.numel() == len(matrix) and value.is_contiguous() for value in vectors)
        and 0 < top_k <= min(len(matrix), MOST_CHOSEN)
        and len(matrix) <= MOST_EXPERTS
    )
    return names if fits else None


def _found(module: nn.Module, names: _Names, dtype: torch.dtype) -> _Found | None:
    """Finds the rule of a router whose tokens have a dtype, or returns None if ``route`` has no such rule."""
    weight = module.get_parameter(names.weight)
    experts, count = len(weight), min(TESTED, weight.shape[1])
    orders = [torch.randperm(experts, generator=torch.Generator().manual_seed(row)) for row in range(count)]
    logits = ((torch.stack(orders) - experts // 2) / FRACTION).to(weight.device)
    hidden = torch.eye(count, weight.shape[1], device=weight.device, dtype=dtype)
    exact = torch.zeros_like(weight)
    exact[:, :count] = logits.t().to(weight.dtype)
    replaced = {names.weight: exact}
    if names.bias:
        replaced[names.bias] = torch.zeros_like(module.get_parameter(names.bias))

    def called(hidden: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = functional_call(module, replaced, (hidden,))
        return found

    def theirs(hidden: Tensor) -> tuple[Tensor, ...]:
        return _in_order(called(hidden))

    try:
        with torch.no_grad():
            want = called(hidden)
        shapes, dtypes = [each.shape for each in want], [each.dtype for each in want]
    except Exception:  # noqa: BLE001  another function than it looked like
        return None
    chosen = count, int(module.top_k)  # type: ignore[arg-type]
    if shapes != [(count, experts), chosen, chosen] or dtypes[2] is not torch.int64:
        return None
    flattens = alike(theirs, lambda hidden: theirs(hidden[None]), hidden)
    correction = _tensor(module, names.correction)
    factor = float(getattr(module, "routed_scaling_factor", None) or 1.0)
    values = random_values((count, weight.shape[1]), hidden)
    for scores, is_normalized in itertools.product(SCORES, (False, True)):
        rule = Rule(scores, chosen[1], is_normalized, factor, dtypes[0], dtypes[0], dtypes[1])
        if not alike(theirs, functools.partial(_planned, rule, logits, correction), hidden):
            continue
        for product in dict.fromkeys((dtypes[0], weight.dtype, dtype)):
            rule = dataclasses.replace(rule, product=product)
            found = _Found(rule, names, dtype, flattens)
            ours = functools.partial(_routed, rule, exact, correction)
            mine = functools.partial(_forward, module, type(module).forward, found)
            if alike(theirs, ours, hidden) and alike(_logits(module), _logits(mine), values):
                return found
    return None


def _planned(rule: Rule, logits: Tensor, correction: Tensor | None, hidden: Tensor) -> tuple[Tensor, ...]:
    del hidden
    return _in_order(plain(rule, logits, correction))


def _routed(rule: Rule, weight: Tensor, correction: Tensor | None, hidden: Tensor) -> tuple[Tensor, ...]:
    return _in_order(route(rule, hidden, weight, None, correction))


def _logits(router: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda values: router(values)[0]


def plain(rule: Rule, logits: Tensor, correction: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what ``route`` makes of logits (T, experts), by torch's functions."""
    logits = logits.to(rule.product).float()
    scores = logits.softmax(-1) if rule.scores == "softmax" else logits.sigmoid()
    keys = scores if correction is None else scores + correction.flatten().float()
    indices = keys.topk(rule.top_k, dim=-1).indices
    weights = scores.gather(-1, indices)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if rule.is_normalized else weights
    return logits.to(rule.logits), (weights * rule.factor).to(rule.weights), indices


def _in_order(found: Any) -> tuple[Tensor, ...]:
    """Sorts a token's experts by their index, because some routers leave them in any order."""
    logits, weights, indices = found
    order = indices.argsort(-1)
    return logits, weights.gather(-1, order), indices.gather(-1, order)


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    """A tensor of a module by its name, as it is now: adapters may be added to a weight while a layer runs."""
    owner, _, last = name.rpartition(".")
    found: Tensor | None = getattr(module.get_submodule(owner), last) if name else None
    return found


def _forward(module: nn.Module, before: Any, router: _Found, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Routes tokens as a router does that was found to be ``route``."""
    weight = _tensor(module, router.names.weight)
    if (
        args
        or kwargs
        or weight is None
        or not (hidden.dim() == 2 or router.flattens)
        or hidden.dtype is not router.hidden
        or weight.dtype not in DTYPES
        or weight.stride(1) != 1
    ):
        return before(module, hidden, *args, **kwargs)
    bias, correction = (_tensor(module, name) for name in (router.names.bias, router.names.correction))
    return route(router.rule, hidden.reshape(-1, hidden.shape[-1]), weight, bias, correction)
