"""Packed weights for the tests: cases of ``moe_experts`` over them, and ways to force where they are dequantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.kernel.cases import ExpertsCase, Inputs, make_inputs, run_experts
from tests.kernel.machine import DTYPES as ALL_DTYPES
from tests.kernel.machine import HAS_TRITON, kernel, module

Packed4bitWeights = kernel.Packed4bitWeights
reference, tuning = module("stages.reference"), module("tuning")
if HAS_TRITON:
    # Where the kernels that dequantize are bound, and parts of a workspace are dequantized.
    LAUNCHES = {
        "gemm": (module("stages.triton.packed_gemm"), "_gemm_kernel"),
        "transposed": (module("stages.triton.packed_gemm"), "_transposed_kernel"),
        "down backward": (module("stages.triton.packed_down_backward"), "_kernel"),
        "part": (module("stages.triton.dequantize"), "dequantize_runs"),
    }
    workspace_of = LAUNCHES["part"][0]

# Packed weights stand for none of float64.
DTYPES = tuple(dtype for dtype in ALL_DTYPES if dtype != torch.float64)

# Bytes of a workspace for all weights of any test, and for as few features at a time as there can be, which is 16.
ALL, ONE = 2**40, 1


@contextmanager
def decoding(in_gemm: bool, workspace: int = ALL) -> Iterator[list[str]]:
    """Forces where packed weights are dequantized; gives the launches of it from now on.

    "gemm", "transposed", "up" and "down backward" dequantize inside a product, "part" is some of the features dequantized
    for a dense one.
    """
    if not HAS_TRITON:
        yield []
        return
    taken: list[str] = []
    asked: list[str] = []

    def dequantizes_in_product(kernel: str, *_: Any) -> bool:
        asked.append(kernel)
        return in_gemm

    def noting(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            # A gate is among the arguments of an up projection's kernel.
            up = name == "gemm" and any(isinstance(arg, module("activations").Gate) for arg in args)
            taken.append("up" if up else name)
            if name != "part":  # the rule was asked about the kernel that is launched
                assert asked[-1] == f"{taken[-1].replace(' ', '_')}_4bit"
            return function(*args)

        return call

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(tuning, "dequantizes_in_product", dequantizes_in_product))
        stack.enter_context(mock.patch.object(workspace_of, "WORKSPACE_BYTES", workspace))
        for name, (launcher, function) in LAUNCHES.items():
            noted = noting(name, getattr(launcher, function))
            stack.enter_context(mock.patch.object(launcher, function, noted))
        yield taken


@dataclass(frozen=True)
class PackedCase(ExpertsCase):
    """One call of ``moe_experts`` over packed weights; as ``ExpertsCase``, and

    Attributes:
        quant_type, blocksize, double_quant: of both projections.
        projections: of the up projection.
        dense: projections that are not packed.
        takes: launches that dequantize in forward and backward, where all weights fit the workspace.
        height: of the row tiles, in cases that are there for it.
    """

    tokens: int = 5
    experts: int = 3
    hidden: int = 64
    intermediate: int = 64
    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    projections: int = 1
    dense: tuple[str, ...] = ()
    takes: tuple[str, ...] = ("up", "gemm", "down backward", "transposed")
    height: int | None = None


@dataclass
class PackedInputs:
    """The tensors of a case, and its packed weights by argument name.

    Attributes:
        inputs: what the packed weights dequantize to stands among them, frozen.
    """

    inputs: Inputs
    packed: dict[str, Any]

    def trained(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.inputs.tensors.items() if name not in self.packed}

    def arguments(self) -> Inputs:
        """What ``run_experts`` takes to call the kernel with packed weights."""
        return replace(self.inputs, tensors={**self.inputs.tensors, **self.packed})


def dequantized(weights: Any) -> Tensor:
    """What plain torch makes of packed weights, which ``test_quantization`` checks against bitsandbytes."""
    out = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    reference.dequantize(as_stack(weights), 0, weights.shape[0], out)
    return out


def as_stack(weights: Any, transposed: bool = False) -> Any:
    """Packed weights as the stages take them."""
    return module("weights").stack_of(*module("weights").operands(weights), transposed)


def make_packed_inputs(case: PackedCase, dtype: torch.dtype) -> PackedInputs:
    """The tensors of ``make_inputs`` with weights quantized."""
    inputs = make_inputs(case, dtype)
    packed = {}
    for name, projections in (("gate_up_proj", case.projections), ("down_proj", 1)):
        if name in case.dense:
            continue
        packed[name] = Packed4bitWeights.quantize(
            inputs.tensors[name],
            quant_type=case.quant_type,
            blocksize=case.blocksize,
            double_quant=case.double_quant,
            projections=projections,
        )
        inputs.tensors[name] = dequantized(packed[name])
    return PackedInputs(inputs, packed)


def run_packed(case: PackedCase, inputs: PackedInputs, **options: Any) -> Tensor:
    """``moe_experts`` over packed weights; ``options`` override the case's."""
    return run_experts(case, inputs.arguments(), **options)


def packed_gradients(
    case: PackedCase, inputs: PackedInputs, run: Callable[..., Tensor] = run_packed, **options: Any
) -> dict[str, Tensor]:
    """y and the gradients of all tensors that are not packed, by name."""
    y = run(case, inputs, **options)
    y.backward(inputs.inputs.grad)
    return {"y": y.detach()} | {f"gradient of {name}": value.grad for name, value in inputs.trained().items()}
