"""What is timed on a GPU: each kernel over one layer, with as many tokens as its bucket is for.

A call is captured in a CUDA graph under each configuration and replayed, so that the host, which a configuration does
not concern, is out of the picture.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_fused import hub
from moe_fused.benchmark import harness
from moe_fused.benchmark.inputs import DTYPE, Inputs, random_weights
from moe_fused.benchmark.layers import Layer

# Rows per expert that stand for the last bucket, which has no end.
MANY_ROWS = 256
RANK = 16  # of the adapters
INPUT_SETS = 4
SECONDS = 0.05  # for one timing


class Workload:
    """One layer's weights on a GPU, and the calls of its kernels.

    Args:
        kernel: the kernel module.
        layer: the shapes.
        device: a CUDA or ROCm GPU.
    """

    def __init__(self, kernel: ModuleType, layer: Layer, device: torch.device) -> None:
        self.layer, self.device = layer, device
        self.tuning = hub.submodule(kernel, "tuning")
        self.target = self.tuning.target_of(device)
        self._kernel, self._launch = kernel, hub.submodule(kernel, "launch")
        self._plan, self._weights = hub.submodule(kernel, "plan"), hub.submodule(kernel, "weights")
        self._gate = hub.submodule(kernel, "activations").Gate()
        self._generator = torch.Generator(device).manual_seed(0)
        self._up, self._down = random_weights(layer, self._generator)
        self._packed: tuple[Any, Any] | None = None

    def kernels(self) -> list[str]:
        """The kernel families that this layer uses."""
        short = self.tuning.SHORT_K
        used = {"gemm_short" if k <= short else "gemm" for k in (self.layer.intermediate, 2 * self.layer.intermediate)}
        if self.layer.hidden % 64 == 0:  # what ``launch.packed.decodes`` asks of the up projection's in features
            used |= {"up_4bit", "transposed_4bit"}
        if self.layer.intermediate % 64 == 0:  # and of the down projection's
            used |= {"gemm_4bit", "down_backward_4bit"}
        optional = ("gemm", "gemm_short", *self.tuning.KERNELS_4BIT)
        return [name for name in self.tuning.KERNELS if name in used or name not in optional]

    def tokens(self, kernel: str, block_m: int) -> int:
        """How many give experts as many rows as the bucket ends at."""
        packed = kernel in self.tuning.KERNELS_4BIT
        rows = (self.tuning.PACKED_BUCKETS if packed else self.tuning.BUCKETS)[block_m]
        if rows is None:
            rows = self.tuning.decode_rows(kernel, self.target) if packed else MANY_ROWS
        return max(1, rows * self.layer.experts // self.layer.top_k)

    def measure(self, kernel: str, block_m: int) -> GraphMeasure:
        """Times ``kernel`` in bucket ``block_m``."""
        packed = kernel in self.tuning.KERNELS_4BIT
        tokens = self.tokens(kernel, block_m)
        calls = [self._call(kernel, tokens, packed) for _ in range(INPUT_SETS)]
        itemsize = DTYPE.itemsize

        def trying(config: Any) -> Any:
            return self.tuning.trying(kernel, block_m, itemsize, config)

        return GraphMeasure(lambda i: calls[i % INPUT_SETS](), trying, self._plan.compiling_only, self.device)

    def _stacks(self) -> tuple[Any, Any]:
        if self._packed is None:
            quantize, stack = self._kernel.Packed4bitWeights.quantize, self._weights.PackedStack
            self._packed = stack(quantize(self._up, projections=2)), stack(quantize(self._down))
        return self._packed

    def _call(self, kernel: str, tokens: int, packed: bool) -> Callable[[], dict[str, Tensor]]:
        """The products that ``kernel`` computes in a layer's step, on inputs of their own; gives their results."""
        layer, launch = self.layer, self._launch
        hidden, inner, experts = layer.hidden, layer.intermediate, layer.experts
        own = Inputs.random(layer, tokens, self._generator)
        x, weights = own.hidden_states.detach(), own.top_k_weights.detach()
        rows = tokens * layer.top_k
        routing_class = self._kernel.Routing
        buffer = routing_class.new_buffer(own.top_k_index, rows, experts)
        routing = routing_class.from_buffer(buffer, rows, experts, layer.top_k, packed=packed)
        launch.route(own.top_k_index, routing, DTYPE)
        up, down = self._stacks() if packed else (self._up, self._down)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self._generator, device=self.device, dtype=DTYPE)

        if kernel in ("up", "up_4bit"):

            def call() -> dict[str, Tensor]:
                h, gate_up = launch.grouped_up(x, up, routing, rows, None, self._gate, True)
                return {"h": h, "gate_up": gate_up}

        elif kernel in ("gemm", "gemm_short", "gemm_4bit", "transposed_4bit"):
            products = [("down", inner, down), ("up transposed", 2 * inner, up.mT)]
            if packed:
                chosen = products[:1] if kernel == "gemm_4bit" else products[1:]
            else:
                short = self.tuning.SHORT_K
                chosen = [product for product in products if (product[1] <= short) == (kernel == "gemm_short")]
            operands = [(name, normal(rows, features), weight) for name, features, weight in chosen]

            def call() -> dict[str, Tensor]:
                return {
                    name: launch.grouped_gemm(a, weight, routing, rows, None, False, 0.0)
                    for name, a, weight in operands
                }

        elif kernel in self.tuning.DOWN_BACKWARDS:
            gate_up = normal(rows, 2 * inner)

            def call() -> dict[str, Tensor]:
                names = ("grad_gate_up", "weighted_h", "grad_weights")
                results = launch.down_backward(x, down, None, gate_up, routing, weights, self._gate, True)
                return dict(zip(names, results, strict=True))

        elif kernel == "shrink":
            factors = normal(experts, RANK, hidden)

            def call() -> dict[str, Tensor]:
                out = x.new_empty((rows, RANK))
                launch.shrink(x, factors, routing, True, 1.0, out)
                return {"left": out}

        else:
            features = RANK if kernel == "gram_thin" else 2 * inner
            left = normal(rows, features)

            def call() -> dict[str, Tensor]:
                out = x.new_empty((experts, features, hidden))
                launch.grouped_gram(left, x, routing, False, True, out)
                return {"gradient": out}

        return call


class GraphMeasure:
    """Times a call under configurations, see ``search.Measure``.

    Args:
        call: of an input set, counted from 0; gives results by name.
        trying: a context manager in which launches use a configuration.
        compiling_only: one in which they only compile.
        device: of the call.
    """

    def __init__(
        self,
        call: harness.Call,
        trying: Callable[[Any], Any],
        compiling_only: Callable[[], Any],
        device: torch.device,
    ) -> None:
        self._call, self._trying, self._compiling_only, self._device = call, trying, compiling_only, device

    def prepare(self, configs: Sequence[Any]) -> None:
        """``search.Measure.prepare``: the compiler lets other threads run, and its assembler is a process of its own."""
        try:
            from triton import AsyncCompileMode
        except ImportError:  # before 3.5: each is compiled when it is timed
            return
        from triton.errors import TritonError

        workers = min(16, os.cpu_count() or 1)
        with (
            ThreadPoolExecutor(workers) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
            self._compiling_only(),
        ):
            for config in configs:
                # What does not compile is found again, and left out, when it is timed.
                with contextlib.suppress(RuntimeError, TritonError), self._trying(config):
                    self._call(0)

    def speedup(self, config: Any, over: Any) -> float | None:
        """``search.Measure.speedup``."""
        from triton.errors import TritonError

        incumbent, expected = self._graph(over)
        try:
            candidate, got = self._graph(config)
            candidate(0)
            incumbent(0)
            harness.compare("the candidate", got, expected)
        except (RuntimeError, TritonError):  # too many resources, or wrong
            return None
        clock = harness.clock_for(self._device)
        times = harness.time_interleaved({"candidate": candidate, "incumbent": incumbent}, clock, seconds=SECONDS)
        one, other = times["candidate"], times["incumbent"]
        return None if one is None or other is None else other.ms / one.ms

    def _graph(self, config: Any) -> tuple[harness.Call, dict[str, Tensor]]:
        with self._trying(config):
            replay, results = harness.graph_of(self._call, INPUT_SETS)
        return replay, results
