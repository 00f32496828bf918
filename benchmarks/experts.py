"""Times the experts of a mixture-of-experts layer: ours against those of Transformers, on the same weights and inputs.

    python -m benchmarks.experts            everything, within 6 minutes on an H100 (`make bench`)
    python -m benchmarks.experts --quick    three sizes of one layer, writes nothing

Every implementation is one that Transformers' own ``Qwen3MoeExperts`` dispatches to, called through that module as a
model calls it: ``grouped_mm`` (its default), ``batched_mm``, ``eager``, and the kernel's ``moe_experts``, registered
beside them. ``forward`` runs without gradients; ``forward_backward`` gives the gradients of the tokens, the routing
weights and both weights, freshly allocated; ``forward_cuda_graph`` replays a graph of forwards, which takes the CPU out
of the picture.

Where it is installed, ``triton_kernels`` competes in the forward: Triton's own mixture-of-experts kernels, over the same
weights and called as ``triton_experts.py`` says.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import typer
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_fused.benchmark.harness import Call
from moe_fused.benchmark.inputs import DTYPE, Inputs, random_weights
from moe_fused.benchmark.layers import DEFAULT_LAYERS, FORWARD, FORWARD_BACKWARD, FORWARD_CUDA_GRAPH, Layer

from . import runner, triton_experts
from .rows import OURS
from .runner import Benchmark, Contenders, Implementation, MakeCall, forward_call

# Our implementation's name in Transformers' table: not "moe_fused", which is the integration's to register.
REGISTERED_NAME = "moe_fused_benchmark"


def register_kernel(kernel: ModuleType) -> None:
    """Lets Transformers' experts dispatch to ``kernel.moe_experts``: all implementations take the same way in."""

    def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y: Tensor = kernel.moe_experts(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)
        return y

    ALL_EXPERTS_FUNCTIONS.register(REGISTERED_NAME, experts_forward)


def make_experts(layer: Layer, names: Sequence[str], generator: torch.Generator) -> dict[str, Qwen3MoeExperts]:
    """Transformers' experts by implementation name, all over the same two random weights."""
    weights = [nn.Parameter(weight) for weight in random_weights(layer, generator)]
    return {name: experts_module(layer, REGISTERED_NAME if name == OURS else name, *weights) for name in names}


def experts_module(layer: Layer, implementation: str, gate_up: nn.Parameter, down: nn.Parameter) -> Qwen3MoeExperts:
    """Transformers' experts over these very parameters."""
    config = Qwen3MoeConfig(
        hidden_size=layer.hidden,
        moe_intermediate_size=layer.intermediate,
        num_experts=layer.experts,
        num_experts_per_tok=layer.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = gate_up, down
    return module


def make_call(module: Qwen3MoeExperts, inputs: Sequence[Inputs], phase: str) -> Call:
    """``call(i)``: one pass over input set ``i`` modulo their number; returns the results by name."""
    weights = (module.gate_up_proj, module.down_proj)

    def forward_backward(i: int) -> dict[str, Tensor]:
        input_set = inputs[i % len(inputs)]
        y = module(input_set.hidden_states, input_set.top_k_index, input_set.top_k_weights)
        x, w, up, down = torch.autograd.grad(
            y, (input_set.hidden_states, input_set.top_k_weights, *weights), input_set.grad_output
        )
        return {"output": y, "hidden_states.grad": x, "top_k_weights.grad": w, "gate_up.grad": up, "down.grad": down}

    return forward_backward if phase == FORWARD_BACKWARD else forward_call(module, inputs)


def setup(names: Sequence[str]) -> runner.Prepare:
    """Loads the kernel, if it is among ``names``."""
    if OURS in names:
        register_kernel(runner.load_kernel())

    def prepare(layer: Layer, generator: torch.Generator) -> Contenders:
        experts = make_experts(layer, names, generator)
        calls: dict[str, MakeCall] = {name: functools.partial(make_call, module) for name, module in experts.items()}
        if (weights := experts.get(triton_experts.NAME)) is not None:
            stacks = (weights.gate_up_proj.detach(), weights.down_proj.detach())
            forward = triton_experts.dense_forward(*stacks)
            calls[triton_experts.NAME] = lambda inputs, _phase: forward_call(forward, inputs)
        return Contenders(calls, weight_bytes=DTYPE.itemsize)

    return prepare


BENCHMARK = Benchmark(
    name="experts",
    about="Times MoE experts against those of Transformers and writes rows and a plot under benchmarks/results.",
    implementations=(
        Implementation(OURS),
        Implementation("grouped_mm"),
        # Copies the weights of every routed row: 2.4 GB at 32 tokens of Qwen3-30B-A3B.
        Implementation("batched_mm", most_tokens=64),
        # A Python loop over experts that waits for the GPU in each.
        Implementation("eager", most_tokens=512, capturable=False),
        Implementation(triton_experts.NAME, forward_only=True, unavailable=triton_experts.unavailable),
    ),
    setup=setup,
    layers=DEFAULT_LAYERS,
    tokens=(1, 8, 32, 128, 512, 2048, 4096, 16384),
    quick_tokens=(1, 512, 4096),
    phases=(FORWARD, FORWARD_BACKWARD, FORWARD_CUDA_GRAPH),
)
main = runner.command(BENCHMARK)


if __name__ == "__main__":
    typer.run(main)
