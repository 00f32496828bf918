"""The experts on ``triton_kernels``, the mixture-of-experts kernels (MIT) in the repository of Triton itself.

Its functions have changed with Triton's versions. This file calls the version that runs with Triton 3.6, whose main function
is ``matmul_ogs`` and which vllm 0.19.1 carries in ``vllm/third_party``. ``docs/benchmarks.md`` says how to install it.

``matmul_ogs`` multiplies rows that are sorted by expert. The up projection gathers its rows and applies the gate in its
epilogue, which wants gate and up columns in turns, so its weights are a copy in that order. The down projection weighs its
rows, scatters them and sums them by token. The package's own routing starts from logits and takes a power of two of experts
for each token. Here the router has chosen already, so torch sorts the slots and the package makes its tiles from the counts.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .runner import Forward

NAME = "triton_kernels"
GROUP = 32  # weights that share a scale in MXFP4
# What no other version has all of.
_NEEDED = {
    "matmul_ogs": "matmul_ogs",
    "numerics_details.mxfp": "downcast_to_mxfp_torch",
    "tensor": "make_ragged_tensor_metadata",
    "tensor_details.layout": "make_default_matmul_mxfp4_w_layout",
}


def unavailable(device: torch.device) -> str | None:
    """Why ``triton_kernels`` cannot compete on a device, or None."""
    if device.type != "cuda":
        return "it needs a GPU"
    if importlib.util.find_spec(NAME) is None:
        return "it is not installed"
    try:
        for module, name in _NEEDED.items():
            getattr(_library(module), name)
    except (ImportError, AttributeError) as error:
        # Another package has the same name on the package index, and other versions need another Triton.
        return f"the installed package is not the version that this benchmark calls: {error}"
    return None


def _library(module: str) -> Any:
    return importlib.import_module(f"{NAME}.{module}")


@dataclass(frozen=True)
class Mxfp4Stack:
    """A stack (E, out, in) of expert matrices in MXFP4.

    Attributes:
        blocks: two weights a byte, the first in its low half, (E, out, in / 2) uint8.
        scales: the exponents of groups of 32 weights plus 127, (E, out, in / 32) uint8.
    """

    blocks: Tensor
    scales: Tensor

    @classmethod
    def quantize(cls, weight: Tensor) -> Mxfp4Stack:
        """Quantizes ``weight`` (E, out, in) with the package's own function, which runs on any device."""
        blocks, scales = _library("numerics_details.mxfp").downcast_to_mxfp_torch(weight, torch.uint8, axis=-1)
        return cls(blocks, scales)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.blocks.shape[:-1], 2 * self.blocks.shape[-1]))

    def dequantize(self) -> Tensor:
        """The weights (E, out, in) in bf16, as Transformers dequantizes checkpoints of gpt-oss."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        groups = self.blocks.unflatten(-1, (-1, GROUP // 2))
        dense: Tensor = convert_moe_packed_tensors(groups, self.scales)
        return dense.mT.contiguous()  # Transformers has the in features before the out features


def interleaved(gate_up: Tensor) -> Tensor:
    """A copy of (E, 2·I, H) with rows of gate and of up in turns, where gate's came first."""
    return gate_up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous()


@dataclass(frozen=True)
class Routing:
    """Where rows that are sorted by expert come from.

    Attributes:
        counts: rows of each expert, (E,) int32.
        slot_of_row, row_of_slot: permutations of the T·K slots, int32, one the inverse of the other.
    """

    counts: Tensor
    slot_of_row: Tensor
    row_of_slot: Tensor

    @classmethod
    def of(cls, top_k_index: Tensor, num_experts: int) -> Routing:
        """Sorts the slots of ``top_k_index`` (T, K); never waits for the GPU."""
        expert_of_row, order = top_k_index.flatten().sort(stable=True)
        slot_of_row = order.int()
        row_of_slot = torch.empty_like(slot_of_row)
        row_of_slot[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
        bounds = torch.arange(num_experts + 1, device=order.device)
        return cls(torch.searchsorted(expert_of_row, bounds, out_int32=True).diff(), slot_of_row, row_of_slot)


def silu_gate() -> Any:
    """The epilogue of the up projection: silu(gate) · up of columns that alternate."""
    from .triton_gate import silu_and_multiply

    library = _library("matmul_ogs")
    specs = library.FnSpecs("silu_and_multiply", silu_and_multiply, (), reduction_n=2)
    return library.FusedActivation(specs, ())


def dense_operand(weight: Tensor) -> tuple[Tensor, Any]:
    """(weights, precision) of (E, out, in) as ``matmul_ogs`` takes them: (E, in, out), with contiguous in features."""
    return weight.mT, _library("matmul_ogs").PrecisionConfig()


def mxfp4_operand(stack: Mxfp4Stack) -> tuple[Any, Any]:
    """(weights, precision) of a stack, in the layouts that the package chooses for this GPU."""
    tensor, layout, library = _library("tensor"), _library("tensor_details.layout"), _library("matmul_ogs")
    value_layout, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    scale_layout, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
    blocks = tensor.wrap_torch_tensor(stack.blocks.mT, dtype=tensor.FP4)
    values = tensor.convert_layout(blocks, value_layout, **value_options)
    scales = tensor.convert_layout(tensor.wrap_torch_tensor(stack.scales.mT), scale_layout, **scale_options)
    return values, library.PrecisionConfig(weight_scale=scales)


def make_forward(gate_up: Sequence[Any], down: Sequence[Any], num_experts: int) -> Forward:
    """The experts over two pairs of (weights, precision), those of gate and up with columns in turns."""
    library, ragged, gate = _library("matmul_ogs"), _library("tensor"), silu_gate()

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routing = Routing.of(top_k_index, num_experts)
        slots, rows = routing.slot_of_row, routing.row_of_slot
        data = library.RoutingData(
            top_k_weights.flatten()[slots],
            routing.counts,
            num_experts,
            top_k_index.shape[1],
            ragged.make_ragged_tensor_metadata(routing.counts, len(slots)),
        )
        h = library.matmul_ogs(
            hidden_states,
            gate_up[0],
            None,
            data,
            gather_indx=library.GatherIndx(slots, rows),
            precision_config=gate_up[1],
            fused_activation=gate,
        )
        y: Tensor = library.matmul_ogs(
            h,
            down[0],
            None,
            data,
            scatter_indx=library.ScatterIndx(rows, slots),
            precision_config=down[1],
            gammas=data.gate_scal,
        )
        return y.view(hidden_states.shape)

    return forward


def dense_forward(gate_up: Tensor, down: Tensor) -> Forward:
    """The experts over bf16 weights (E, 2·I, H) and (E, H, I); those of gate and up are copied."""
    return make_forward(dense_operand(interleaved(gate_up)), dense_operand(down), len(down))


def mxfp4_forward(gate_up: Mxfp4Stack, down: Mxfp4Stack) -> Forward:
    """The experts over weights in MXFP4."""
    turned = Mxfp4Stack(interleaved(gate_up.blocks), interleaved(gate_up.scales))
    return make_forward(mxfp4_operand(turned), mxfp4_operand(down), len(down.blocks))
