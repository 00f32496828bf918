"""Cases of ``moe_experts`` and the formulas they are held against, written as plainly as possible: a loop over experts.

Nothing here shares code with the kernel's own reference, which is under test as well.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.kernel.machine import DEVICE, DTYPES, INTERPRETED, kernel, name_of

# How the ids of the experts are chosen; E experts, ids (T, K).
INDEX: dict[str, Callable[[torch.Generator, int, int, int], Tensor]] = {
    "random": lambda rng, tokens, top_k, experts: (
        torch.stack([torch.randperm(experts, generator=rng)[:top_k] for _ in range(tokens)])
        if tokens
        else torch.zeros((0, top_k), dtype=torch.int64)
    ),
    "repeated": lambda rng, tokens, top_k, experts: torch.randint(experts, (tokens, 1), generator=rng).repeat(1, top_k),
    "one": lambda rng, tokens, top_k, experts: torch.full((tokens, top_k), experts - 2 if experts > 1 else 0),
    "few": lambda rng, tokens, top_k, experts: torch.randint(0, 2, (tokens, top_k), generator=rng) * (experts - 1),
    # E means "held elsewhere".
    "partly mine": lambda rng, tokens, top_k, experts: torch.randint(0, experts + 1, (tokens, top_k), generator=rng),
    "not mine": lambda rng, tokens, top_k, experts: torch.full((tokens, top_k), experts),
    "out of range": lambda rng, tokens, top_k, experts: torch.randint(-3, experts + 9, (tokens, top_k), generator=rng),
}


@dataclass(frozen=True)
class ExpertsCase:
    """One call of ``moe_experts``.

    Attributes:
        id: readable name. why: what it would catch.
        index: a key of ``INDEX``.
        strided: arguments that are handed over as views which are not contiguous.
        zero_weights: all routing weights are zero.
        routing_dtype: of top_k_weights; None: that of the rest.
        half: also in fp16 where the interpreter, which is slow, runs the kernels.
    """

    id: str
    why: str
    tokens: int = 9
    top_k: int = 2
    experts: int = 5
    hidden: int = 24
    intermediate: int = 20
    index: str = "random"
    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    strided: tuple[str, ...] = ()
    zero_weights: bool = False
    index_dtype: torch.dtype = torch.int64
    routing_dtype: torch.dtype | None = None
    half: bool = False

    @property
    def columns(self) -> int:
        return self.intermediate * (2 if self.gated else 1)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``moe_experts`` that are not tensors."""
        names = ("activation", "gated", "interleaved", "transposed")
        return {name: getattr(self, name) for name in names}


def in_every_dtype(cases: list[ExpertsCase]) -> pytest.MarkDecorator:
    """Parametrizes a test by ``case`` and ``dtype``."""
    parameters = [
        pytest.param(case, dtype, id=f"{case.id}-{name_of(dtype)}")
        for case in cases
        for dtype in DTYPES
        if case.half or not (INTERPRETED and dtype == torch.float16)
    ]
    return pytest.mark.parametrize("case, dtype", parameters)


@dataclass
class Inputs:
    """The tensors of a case; ``tensors`` are leaves by argument name."""

    index: Tensor
    tensors: dict[str, Tensor]
    grad: Tensor = field(repr=False)

    def to(self, dtype: torch.dtype) -> Inputs:
        """Leaves of their own with the same values, in ``dtype``."""
        leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in self.tensors.items()}
        return Inputs(self.index, leaves, self.grad.to(dtype))

    def copy(self) -> Inputs:
        """Leaves of their own with the same values and strides."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.tensors.items()}
        return Inputs(self.index, leaves, self.grad)


def seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def with_gaps(value: Tensor) -> Tensor:
    """``value`` as a view in which no dimension is contiguous: swapped, with unusable elements between the others."""
    last = value.dim() - 1
    poison = float("nan") if value.is_floating_point() else -7
    wide = torch.full((*value.shape[:-2], 3 * value.shape[-1], 2 * value.shape[-2]), poison)
    view = wide.to(value)[..., ::3, 1::2].transpose(last, last - 1)
    return view.copy_(value)


def make_inputs(case: ExpertsCase, dtype: torch.dtype) -> Inputs:
    """Random tensors of ``case``, the same on every machine."""
    rng = seeded(case.id)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64) * scale

    E, H, I, C = case.experts, case.hidden, case.intermediate, case.columns  # noqa: E741
    values = {
        "hidden_states": normal(case.tokens, H),
        "top_k_weights": torch.rand((case.tokens, case.top_k), generator=rng, dtype=torch.float64),
        "gate_up_proj": normal(E, *((H, C) if case.transposed else (C, H)), scale=H**-0.5),
        "down_proj": normal(E, *((I, H) if case.transposed else (H, I)), scale=I**-0.5),
    }
    if case.zero_weights:
        values["top_k_weights"].zero_()
    if case.bias:
        values |= {"gate_up_bias": normal(E, C), "down_bias": normal(E, H)}
    index = INDEX[case.index](rng, case.tokens, case.top_k, E).to(DEVICE, case.index_dtype)
    grad = normal(case.tokens, H).to(DEVICE, dtype)
    tensors = {}
    for name, value in values.items():
        wanted = case.routing_dtype if case.routing_dtype and name == "top_k_weights" else dtype
        tensor = value.to(DEVICE, wanted)
        tensors[name] = (with_gaps(tensor) if name in case.strided else tensor).requires_grad_()
    if "top_k_index" in case.strided:
        index = with_gaps(index)
    if "grad" in case.strided:
        grad = with_gaps(grad)
    return Inputs(index, tensors, grad)


PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x) ** 2,
}


def plain_gate(gate_up: Tensor, case: ExpertsCase) -> Tensor:
    """h from the up projection's output, for every activation and layout."""
    if not case.gated:
        return PLAIN_ACTIVATIONS[case.activation](gate_up)
    gate, up = (gate_up[:, 0::2], gate_up[:, 1::2]) if case.interleaved else gate_up.chunk(2, dim=1)
    if case.activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return PLAIN_ACTIVATIONS[case.activation](gate) * up


def run_experts(case: ExpertsCase, inputs: Inputs, **options: Any) -> Tensor:
    """``moe_experts`` on ``inputs``; ``options`` override the case's."""
    t = dict(inputs.tensors)
    x, weights, up, down = (t.pop(n) for n in ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj"))
    return kernel.moe_experts(x, inputs.index, weights, up, down, **t, **{**case.options(), **options})


def plain_experts(case: ExpertsCase, inputs: Inputs) -> Tensor:
    """The experts one after the other, in the dtype of the inputs; ids outside [0, E) contribute nothing."""
    t = inputs.tensors
    x = t["hidden_states"]
    y = torch.zeros_like(x)
    for expert in range(case.experts):
        token, slot = (inputs.index == expert).nonzero(as_tuple=True)
        up, down = t["gate_up_proj"][expert], t["down_proj"][expert]
        up, down = (up.T, down.T) if case.transposed else (up, down)
        gate_up = x[token] @ up.T
        if case.bias:
            gate_up = gate_up + t["gate_up_bias"][expert]
        z = plain_gate(gate_up, case) @ down.T
        if case.bias:
            z = z + t["down_bias"][expert]
        y = y.index_add(0, token, (z * t["top_k_weights"][token, slot, None]).to(y.dtype))
    return y


def gradients(y: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """y and the gradient of every tensor of ``inputs``, by name."""
    y.backward(inputs.grad)
    return {"y": y.detach()} | {f"gradient of {name}": value.grad for name, value in inputs.tensors.items()}
