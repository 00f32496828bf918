"""The benchmarks that the Kernels hub runs, and ``kernels benchmark .`` in a checkout.

They time one layer of Qwen3-30B-A3B in bf16: the experts with dense weights, with NF4 weights and with LoRA adapters on NF4
weights, and one grouped linear layer. The reference is a loop over the experts in plain torch, which dequantizes 4-bit
weights first. The runner stops unless our result and the reference agree; for ``training`` the result is the gradient of the
input, and the other gradients are compared here. On a CPU, where the kernel itself is plain torch, the layer is a small one.

The hub copies this file alone, so it imports torch and kernels only. The other benchmarks of this folder compare with
other libraries and measure with CUDA graphs; ``make bench`` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernels.benchmark import Benchmark
from torch import Tensor
from torch.nn import functional

DTYPE = torch.bfloat16
# The largest difference of a gradient that the runner does not see, relative to the gradient's largest value.
RELATIVE_TOLERANCE = 2.0**-5


@dataclass(frozen=True)
class Shape:
    """A layer: experts, how many of them a token has, hidden and intermediate size, rank of adapters, tokens of a step."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    rank: int
    tokens: int


QWEN3_30B = Shape(experts=128, top_k=8, hidden=2048, intermediate=768, rank=16, tokens=4096)
ON_CPU = Shape(experts=8, top_k=2, hidden=128, intermediate=64, rank=4, tokens=64)
GENERATED = 8  # tokens of a step of generation
# The runner's tolerance is absolute, 0.01. Results so small stay below 1, where bf16 rounds to 0.004 or finer.
SMALL = 0.4


def project(x: Tensor, weight: Tensor, lora: Any, expert: int) -> Tensor:
    """``x`` (n, in) times the matrix of an expert, and the product with its adapter, if there is one."""
    y = x @ weight[expert].T
    return y if lora is None else y + lora.scaling * (x @ lora.a[expert].T) @ lora.b[expert].T


def agree(ours: Tensor, reference: Tensor) -> bool:
    """Whether the largest difference is small beside the largest value."""
    difference = (ours.float() - reference.float()).abs().max()
    return bool(difference <= RELATIVE_TOLERANCE * reference.float().abs().max())


class Workloads:
    """A forward for many tokens, one for a step of generation, and a training step, of a layer that a subclass defines."""

    seed: int | None = 0
    device: str
    kernel: Any
    out: Tensor
    shape: Shape
    leaves: list[Tensor]

    def set_up(self, tokens: int) -> None:
        """Makes weights and inputs: ``leaves`` are what gradients are computed of, the input first."""
        raise NotImplementedError

    def ours(self) -> Tensor:
        raise NotImplementedError

    def reference(self) -> Tensor:
        raise NotImplementedError

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device=self.device, dtype=DTYPE) * scale

    def _set_up(self, tokens: int | None = None) -> None:
        self.shape = ON_CPU if self.device == "cpu" else QWEN3_30B
        self.set_up(tokens or self.shape.tokens)
        with torch.no_grad():
            self.out = torch.empty_like(self.ours())
        self.grad = self.normal(*self.out.shape, scale=SMALL)
        self.others_agree: bool | None = None

    def setup_forward(self) -> None:
        self._set_up()

    def setup_generation(self) -> None:
        self._set_up(GENERATED)

    def setup_training(self) -> None:
        self._set_up()
        for leaf in self.leaves:
            leaf.requires_grad_()

    def benchmark_forward(self) -> None:
        with torch.no_grad():
            self.out = self.ours()

    benchmark_generation = benchmark_forward

    def verify_forward(self) -> Tensor:
        with torch.no_grad():
            return self.reference()

    verify_generation = verify_forward

    def benchmark_training(self) -> None:
        self.out, *self.others = torch.autograd.grad(self.ours(), self.leaves, self.grad)

    def verify_training(self) -> Tensor:
        out, *others = torch.autograd.grad(self.reference(), self.leaves, self.grad)
        if self.others_agree is None:  # once: the runner times this function
            wrong = [i for i, (ours, reference) in enumerate(zip(self.others, others)) if not agree(ours, reference)]  # noqa: B905
            if wrong:
                raise RuntimeError(f"Verification failed for gradients {wrong} of the weights")
            self.others_agree = True
        return out


class Experts(Workloads):
    """``moe_experts``: the whole expert MLP, with dense weights that are trained."""

    def set_up(self, tokens: int) -> None:
        shape = self.shape
        self.x = self.normal(tokens, shape.hidden)
        scores = torch.randn(tokens, shape.experts, device=self.device).softmax(-1)
        weights, self.index = scores.topk(shape.top_k, dim=-1)
        self.top_k_weights = weights / weights.sum(-1, keepdim=True)
        self.gate_up = self.normal(shape.experts, 2 * shape.intermediate, shape.hidden, scale=shape.hidden**-0.5)
        self.down = self.normal(shape.experts, shape.hidden, shape.intermediate, scale=SMALL * shape.intermediate**-0.5)
        self.adapters: dict[str, Any] = {}
        self.leaves = [self.x, self.top_k_weights, self.gate_up, self.down]

    def weights(self) -> tuple[Any, Any]:
        """The two stacks as the kernel takes them."""
        return self.gate_up, self.down

    def dense(self) -> tuple[Tensor, Tensor]:
        """The two stacks as plain torch takes them."""
        return self.gate_up, self.down

    def ours(self) -> Tensor:
        y: Tensor = self.kernel.moe_experts(self.x, self.index, self.top_k_weights, *self.weights(), **self.adapters)
        return y

    def reference(self) -> Tensor:
        gate_up, down = self.dense()
        y = torch.zeros_like(self.x, dtype=torch.float32)
        for expert in range(self.shape.experts):
            token, choice = (self.index == expert).nonzero(as_tuple=True)
            columns = project(self.x[token], gate_up, self.adapters.get("gate_up_lora"), expert)
            gate, up = columns.chunk(2, dim=-1)
            z = project(functional.silu(gate) * up, down, self.adapters.get("down_lora"), expert)
            y.index_add_(0, token, z * self.top_k_weights[token, choice, None])
        return y.to(DTYPE)


class PackedExperts(Experts):
    """``moe_experts`` with NF4 weights, which are frozen."""

    def set_up(self, tokens: int) -> None:
        super().set_up(tokens)
        quantize = self.kernel.Packed4bitWeights.quantize
        self.packed = quantize(self.gate_up, projections=2), quantize(self.down)
        self.leaves = [self.x, self.top_k_weights]
        del self.gate_up, self.down

    def weights(self) -> tuple[Any, Any]:
        return self.packed

    def dense(self) -> tuple[Tensor, Tensor]:
        gate_up, down = self.packed
        return gate_up.dequantize(), down.dequantize()


class LoraExperts(PackedExperts):
    """``moe_experts`` with LoRA adapters on NF4 weights; the adapters are trained."""

    def set_up(self, tokens: int) -> None:
        super().set_up(tokens)
        shape = self.shape
        for name, inputs, outputs, scale in (
            ("gate_up_lora", shape.hidden, 2 * shape.intermediate, 1.0),
            ("down_lora", shape.intermediate, shape.hidden, SMALL),
        ):
            a = self.normal(shape.experts, shape.rank, inputs, scale=inputs**-0.5)
            b = self.normal(shape.experts, outputs, shape.rank, scale=scale * shape.rank**-0.5)
            # An adapter adds half as much as the weights give, so that an error in it cannot hide in the tolerance.
            self.adapters[name] = self.kernel.LoraWeights(a, b, scaling=0.5)
            self.leaves += [a, b]


class Linear(Workloads):
    """``moe_fused_linear``: one grouped linear layer over rows that are sorted by expert, with a weight that is trained."""

    def set_up(self, tokens: int) -> None:
        shape = self.shape
        rows = tokens * shape.top_k
        self.x = self.normal(rows, shape.hidden)
        expert_of_row = torch.randint(shape.experts, (rows,), device=self.device)
        self.sizes = expert_of_row.bincount(minlength=shape.experts)
        self.weight = self.normal(shape.experts, shape.intermediate, shape.hidden, scale=SMALL / 2 * shape.hidden**-0.5)
        self.leaves = [self.x, self.weight]

    def weights(self) -> Any:
        """The stack as the kernel takes it."""
        return self.weight

    def dense(self) -> Tensor:
        """The stack as plain torch takes it."""
        return self.weight

    def ours(self) -> Tensor:
        y: Tensor = self.kernel.moe_fused_linear(self.x, self.weights(), self.sizes)
        return y

    def reference(self) -> Tensor:
        weight = self.dense()
        parts = self.x.split(self.sizes.tolist())
        return torch.cat([project(part, weight, None, expert) for expert, part in enumerate(parts)])


class PackedLinear(Linear):
    """``moe_fused_linear`` with an NF4 weight, which is frozen."""

    def set_up(self, tokens: int) -> None:
        super().set_up(tokens)
        self.packed = self.kernel.Packed4bitWeights.quantize(self.weight)
        self.leaves = [self.x]
        del self.weight

    def weights(self) -> Any:
        return self.packed

    def dense(self) -> Tensor:
        weight: Tensor = self.packed.dequantize()
        return weight


# The runner takes every subclass of Benchmark that is defined here, and stops at one without workloads. That is why the
# classes above are none.
class MoeExperts(Experts, Benchmark):
    """Dense bf16 experts."""


class MoeExperts4bit(PackedExperts, Benchmark):
    """NF4 experts."""


class MoeExpertsLora(LoraExperts, Benchmark):
    """LoRA adapters on NF4 experts."""


class MoeFusedLinear(Linear, Benchmark):
    """A dense bf16 grouped linear layer."""


class MoeFusedLinear4bit(PackedLinear, Benchmark):
    """An NF4 grouped linear layer."""
