"""Compares the kernel on small random experts with float64 in plain torch on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# The largest error, as a share of a result's norm. Half precision is off by 0.003 to 0.006 here, float32 by 3e-7.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.004, torch.float32: 1e-5}

TOKENS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 96, 8, 2, 128, 64


@dataclass(frozen=True)
class Case:
    """One comparison: the forward of ``tokens``, with or without the backward, over weights in a 4-bit format or dense."""

    name: str
    dtype: torch.dtype
    quant_type: str | None = None
    tokens: int = TOKENS
    backward: bool = True

    @property
    def packed(self) -> bool:
        return self.quant_type is not None


CASES = (
    Case("dense float32, forward and backward", torch.float32),
    Case("dense bfloat16, forward and backward", torch.bfloat16),
    Case("nf4 bfloat16, forward and backward", torch.bfloat16, "nf4"),
    Case("dense bfloat16, one token", torch.bfloat16, tokens=1, backward=False),
    Case("nf4 bfloat16, one token", torch.bfloat16, "nf4", tokens=1, backward=False),
    Case("mxfp4 bfloat16, forward and backward", torch.bfloat16, "mxfp4"),
    Case("nvfp4 bfloat16, forward and backward", torch.bfloat16, "nvfp4"),
)


@dataclass(frozen=True)
class Result:
    """The outcome of a case.

    Attributes:
        errors: for the output and each gradient, the norm of the difference as a share of the norm of the truth; nan if
            something is not finite.
        seconds: how long it took, including compilation.
    """

    case: Case
    errors: dict[str, float]
    seconds: float

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.case.dtype]

    @property
    def passed(self) -> bool:
        return all(error <= self.tolerance for error in self.errors.values())  # false for nan


def run(kernel: ModuleType, device: torch.device) -> Iterator[Result]:
    """Runs ``CASES`` with the kernel's ``moe_experts`` on ``device``, and yields each result as it comes."""
    for case in CASES:
        start = time.perf_counter()
        inputs, weights = _make(kernel, case)
        got = _results(kernel, case, [value.to(device) for value in inputs], [weight.to(device) for weight in weights])
        truth = _results(
            kernel,
            case,
            [value.double() if value.is_floating_point() else value for value in inputs],
            [_dense(weight).double() for weight in weights],
        )
        errors = {name: _error(value, truth[name]) for name, value in got.items()}
        yield Result(case, errors, time.perf_counter() - start)


def _make(kernel: ModuleType, case: Case) -> tuple[list[Tensor], list[Any]]:
    """Makes inputs (tokens, expert ids, routing weights, gradient of the output) and weights (gate_up, down) on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(case.dtype)

    routing, ids = torch.randn(case.tokens, EXPERTS, generator=generator).softmax(-1).topk(TOP_K)
    inputs = [normal(case.tokens, HIDDEN), ids, routing.to(case.dtype), normal(case.tokens, HIDDEN)]
    weights = [
        normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5),
        normal(EXPERTS, HIDDEN, INTERMEDIATE, scale=INTERMEDIATE**-0.5),
    ]
    if case.quant_type is None:
        return inputs, weights
    return inputs, [
        kernel.Packed4bitWeights.quantize(weight, quant_type=case.quant_type, projections=projections)
        for weight, projections in zip(weights, (2, 1), strict=True)
    ]


def _dense(weight: Any) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def _results(kernel: ModuleType, case: Case, inputs: list[Tensor], weights: list[Any]) -> dict[str, Tensor]:
    """Computes the output, and the gradients of everything that can have one with these weights."""
    x, ids, routing, grad = inputs
    if not case.backward:
        with torch.no_grad():
            return {"output": kernel.moe_experts(x, ids, routing, *weights)}
    x, routing = x.detach().requires_grad_(), routing.detach().requires_grad_()
    named = {"hidden_states": x, "top_k_weights": routing}
    if not case.packed:
        weights = [weight.detach().requires_grad_() for weight in weights]
        named |= dict(zip(("gate_up_proj", "down_proj"), weights, strict=True))
    y = kernel.moe_experts(x, ids, routing, *weights)
    gradients = torch.autograd.grad(y, list(named.values()), grad)
    return {"output": y.detach(), **{f"{name}.grad": value for name, value in zip(named, gradients, strict=True)}}


def _error(got: Tensor, truth: Tensor) -> float:
    return float((got.cpu().double() - truth).norm() / truth.norm())
