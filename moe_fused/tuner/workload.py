"""Times each kernel on one layer, with as many tokens as its bucket is meant for.

A call is captured in a CUDA graph under each configuration and replayed, so that the host, which a configuration does
not concern, is out of the picture. What is timed for a threshold stands in ``thresholds``.
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

# Rows per expert for the last bucket, which has no upper end.
MANY_ROWS = 256
RANK = 16  # rank of the adapters
# The most rows of linear layers of few rows, and those that an expert may have on average in products of few slots.
LINEAR_ROWS, ROWS_OF_FEW = 64, 8
INPUT_SETS = 4
SECONDS = 0.05  # duration of one timing

Results = dict[str, Tensor]
Products = Callable[[Any], Results]
"""Products of a layer's step as a function of its routing."""


class Workload:
    """One layer's weights on a GPU, and the calls of its kernels.

    Args:
        kernel: the kernel module.
        layer: the shapes of the layer.
        device: a CUDA or ROCm GPU.
    """

    def __init__(self, kernel: ModuleType, layer: Layer, device: torch.device) -> None:
        self.layer, self.device, self.kernel = layer, device, kernel
        self.tuning = hub.submodule(kernel, "tuning")
        self.target = self.tuning.target_of(device)
        self._launch = hub.submodule(kernel, "stages.triton")
        self._plan = hub.submodule(kernel, "stages.triton.bound_kernel")
        self._weights = hub.submodule(kernel, "weights")
        self._gate = hub.submodule(kernel, "activations").Gate()
        self._generator = torch.Generator(device).manual_seed(0)
        self.up, self.down = random_weights(layer, self._generator)
        self._packed: tuple[Any, Any] | None = None
        self._attention: list[Any] = []

    def kernels(self) -> list[str]:
        """The kernel families that this layer uses."""
        tuning = self.tuning
        inner = self.layer.intermediate
        used = {"gemm_short" if features <= tuning.SHORT_K else "gemm" for features in (inner, 2 * inner)}
        # The kernels over packed weights take rows of whole units: the up projection's in features, and the down's.
        if self.layer.hidden % tuning.ROW_UNIT == 0:
            used |= {"up_4bit", "transposed_4bit"}
        if inner % tuning.ROW_UNIT == 0:
            used |= {"gemm_4bit", "down_backward_4bit"}
        optional = ("gemm", "gemm_short", *tuning.KERNELS_4BIT)
        found = [name for name in tuning.KERNELS if name in used or name not in optional]
        if {"up_4bit", "gemm_4bit"} <= used and self.target.backend == "cuda":
            found += tuning.KERNELS_FEW
        return found

    def heights(self, kernel: str) -> list[int]:
        """The tile heights whose bucket has rows for ``kernel``, under the thresholds in use.

        Those of few rows are numbers of slots, or of rows for "few_linear_4bit".
        """
        if kernel in self.tuning.KERNELS_FEW:
            return list(self._few_tokens(kernel))
        thresholds = self.tuning.thresholds_of(self.target)
        packed = kernel in self.tuning.KERNELS_4BIT
        limits = thresholds.packed if packed else thresholds.dense
        end = thresholds.dequantize_rows[kernel] if packed else None
        found, served = [], 0
        for height in self.tuning.BUCKETS:
            limit = limits.get(height)
            if (limit is None or limit > served) and (end is None or end > served):
                found.append(height)
            served = limit or served
        return found

    def tokens(self, kernel: str, block_m: int) -> int:
        """How many tokens give experts as many rows as the bucket ends at."""
        if kernel in self.tuning.KERNELS_FEW:
            return self._few_tokens(kernel)[block_m]
        thresholds = self.tuning.thresholds_of(self.target)
        if kernel in self.tuning.KERNELS_4BIT:
            end = thresholds.dequantize_rows[kernel]
            rows = min(thresholds.packed.get(block_m, end), end)
        else:
            rows = thresholds.dense.get(block_m, max(MANY_ROWS, 2 * max(thresholds.dense.values())))
        return self.tokens_of_rows(rows)

    def _few_tokens(self, kernel: str) -> dict[int, int]:
        """The most tokens of each bucket of a kernel of few rows that is used at all."""
        tuning, layer = self.tuning, self.layer
        most, of_token = LINEAR_ROWS, 1
        if kernel != "few_linear_4bit":
            slots = tuning.few_slots(self.target) or tuning.FEW_SLOTS
            most, of_token = min(slots, ROWS_OF_FEW * layer.experts), layer.top_k
        found, served = {}, 0
        for bucket in tuning.BUCKETS:
            last = most if bucket == tuning.BUCKETS[-1] else min(bucket, most)
            if last // of_token > served // of_token:
                found[bucket] = last // of_token
            served = last
        return found

    def tokens_of_rows(self, rows: int) -> int:
        """The number of tokens that give experts ``rows`` rows each, or a little fewer."""
        return max(1, rows * self.layer.experts // self.layer.top_k)

    def measure(self, kernel: str, block_m: int) -> GraphMeasure:
        """Times ``kernel`` in bucket ``block_m``."""
        calls = self.calls(kernel, self.tokens(kernel, block_m))
        itemsize = DTYPE.itemsize

        def trying(config: Any) -> Any:
            return self.tuning.trying(kernel, block_m, itemsize, config)

        return self.measure_calls(calls, trying)

    def measure_calls(self, calls: Sequence[Callable[[], Results]], trying: Callable[[Any], Any]) -> GraphMeasure:
        """Times ``calls``, one for each input set, under what ``trying`` puts in force."""
        return GraphMeasure(lambda i: calls[i % len(calls)](), trying, self._plan.compiling_only, self.device)

    def calls(self, kernel: str, tokens: int) -> list[Callable[[], Results]]:
        """The products that ``kernel`` computes in a layer's step, for each input set; each routes its rows beforehand."""
        packed = kernel in self.tuning.KERNELS_4BIT
        if kernel in self.tuning.KERNELS_FEW:
            return [self._few_call(kernel, self.inputs(tokens)) for _ in range(INPUT_SETS)]

        def call(inputs: Inputs) -> Callable[[], Results]:
            products, routing = self._products(kernel, inputs, packed), self._route(inputs, packed)
            return lambda: products(routing)

        return [call(self.inputs(tokens)) for _ in range(INPUT_SETS)]

    def steps(self, packed: bool, tokens: int) -> list[Callable[[], Results]]:
        """All products of a layer's step that share the map of row tiles, and making that map, for each input set."""
        kernels = [name for name in self.kernels() if (name in self.tuning.KERNELS_4BIT) == packed]
        others = (*self.tuning.WGRADS, "shrink", *self.tuning.KERNELS_FEW)
        row_tiled = [name for name in kernels if name not in others]

        def step(inputs: Inputs) -> Callable[[], Results]:
            products = [self._products(kernel, inputs, packed) for kernel in row_tiled]

            def call() -> Results:
                routing = self._route(inputs, packed)
                return {name: value for of_kernel in products for name, value in of_kernel(routing).items()}

            return call

        return [step(self.inputs(tokens)) for _ in range(INPUT_SETS)]

    def inputs(self, tokens: int) -> Inputs:
        """Random tokens and their routing."""
        return Inputs.random(self.layer, tokens, self._generator)

    def packed_weights(self) -> tuple[Any, Any]:
        """The weights of both projections in 4 bits."""
        if self._packed is None:
            quantize = self.kernel.Packed4bitWeights.quantize
            self._packed = quantize(self.up, projections=2), quantize(self.down)
        return self._packed

    def stacks(self) -> tuple[Any, Any]:
        """The weights of both projections in 4 bits, as the stages take them."""
        up, down = (self._weights.stack_of(*self._weights.operands(packed)) for packed in self.packed_weights())
        return up, down

    def _route(self, inputs: Inputs, packed: bool) -> Any:
        """The routing of ``inputs``, with row tiles as high as the thresholds say."""
        index, experts, top_k = inputs.top_k_index, self.layer.experts, self.layer.top_k
        buffer = self.kernel.Routing.new_buffer(index, index.numel(), experts)
        routing = self.kernel.Routing.from_buffer(buffer, index.numel(), experts, top_k, packed=packed)
        self._launch.route(index, routing, DTYPE)
        return routing

    def _few_call(self, kernel: str, inputs: Inputs) -> Callable[[], Results]:
        """The product that a kernel of few rows computes."""
        layer, launch = self.layer, self._launch
        x, ids = inputs.hidden_states.detach(), inputs.top_k_index
        slots, hidden, inner = ids.numel(), layer.hidden, layer.intermediate
        if kernel == "few_linear_4bit":
            stacks = self._projections()
            return lambda: self._linear(x, stacks)
        up, down = self.stacks()
        h = torch.randn(slots, inner, generator=self._generator, device=self.device, dtype=DTYPE)

        def call_up() -> Results:
            out = h.new_zeros((slots, inner))
            launch.few_slots(kernel, x, ids, up, None, self._gate, layer.top_k, out)
            return {"h": out}

        def call_down() -> Results:
            out = h.new_zeros((slots, hidden), dtype=torch.float32)
            launch.few_slots(kernel, h, ids, down, None, None, 1, out)
            return {"z": out}

        return call_up if kernel == "few_up_4bit" else call_down

    def _linear(self, x: Tensor, stacks: Sequence[Any]) -> Results:
        outs = [x.new_empty((x.shape[0], stack.shape[1])) for stack in stacks]
        self._launch.few_rows_linear(x, stacks, [None] * len(stacks), outs)
        return {f"out {index}": out for index, out in enumerate(outs)}

    def _projections(self) -> list[Any]:
        """Projections to queries, keys and values as wide as in Qwen3-30B-A3B relative to the hidden size."""
        if not self._attention:
            hidden, operands = self.layer.hidden, self._weights.operands
            for features in (2 * hidden, hidden // 4, hidden // 4):
                weight = torch.randn(1, features, hidden, generator=self._generator, device=self.device, dtype=DTYPE)
                packed = self.kernel.Packed4bitWeights.quantize(weight.mul_(hidden**-0.5))
                self._attention.append(self._weights.stack_of(*operands(packed)))
        return self._attention

    def _products(self, kernel: str, inputs: Inputs, packed: bool) -> Products:
        """The products that ``kernel`` computes in a layer's step, on inputs of their own."""
        layer, launch, tuning = self.layer, self._launch, self.tuning
        hidden, inner, experts = layer.hidden, layer.intermediate, layer.experts
        x, weights = inputs.hidden_states.detach(), inputs.top_k_weights.detach()
        rows = inputs.top_k_index.numel()
        up, down = self.stacks() if packed else (self.up, self.down)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self._generator, device=self.device, dtype=DTYPE)

        def up_products(routing: Any) -> Results:
            h, gate_up = launch.grouped_up(x, up, routing, rows, None, self._gate, True)
            return {"h": h, "gate_up": gate_up}

        if kernel in ("up", "up_4bit"):
            return up_products

        if kernel in ("gemm", "gemm_short", "gemm_4bit", "transposed_4bit"):
            products = [("down", inner, down), ("up transposed", 2 * inner, up.mT)]
            if packed:
                chosen = products[:1] if kernel == "gemm_4bit" else products[1:]
            else:
                chosen = [product for product in products if (product[1] <= tuning.SHORT_K) == (kernel == "gemm_short")]
            operands = [(name, normal(rows, features), weight) for name, features, weight in chosen]
            return lambda routing: {
                name: launch.grouped_gemm(a, weight, routing, rows, None, False, 0.0) for name, a, weight in operands
            }

        if kernel in tuning.DOWN_BACKWARDS:
            gate_up = normal(rows, 2 * inner)

            def backward(routing: Any) -> Results:
                names = ("grad_gate_up", "weighted_h", "grad_weights")
                results = launch.down_backward(x, down, None, gate_up, routing, weights, self._gate, True)
                return dict(zip(names, results, strict=True))

            return backward

        if kernel == "shrink":
            factors = normal(experts, RANK, hidden)

            def shrink(routing: Any) -> Results:
                out = x.new_empty((rows, RANK))
                launch.shrink(x, factors, routing, True, 1.0, out)
                return {"left": out}

            return shrink

        features = RANK if kernel == "wgrad_thin" else 2 * inner
        left = normal(rows, features)

        def wgrad(routing: Any) -> Results:
            out = x.new_empty((experts, features, hidden))
            launch.grouped_wgrad(left, x, routing, False, True, out)
            return {"gradient": out}

        return wgrad


class GraphMeasure:
    """Times a call under configurations, see ``search.Measure``.

    Args:
        call: runs an input set, counted from 0, and returns results by name.
        trying: a context manager in which launches use a configuration.
        compiling_only: a context manager in which launches only compile.
        device: the device of the call.
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
        """Compiles in threads: the compiler lets other threads run, and the assembler is another process."""
        try:
            from triton import AsyncCompileMode
        except ImportError:  # before Triton 3.5: each configuration is compiled when it is timed
            return
        from triton.errors import TritonError

        workers = min(16, os.cpu_count() or 1)
        with (
            ThreadPoolExecutor(workers) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
            self._compiling_only(),
        ):
            for config in configs:
                # A configuration that does not compile is found again, and left out, when it is timed.
                with contextlib.suppress(RuntimeError, TritonError), self._trying(config):
                    self._call(0)

    def speedup(self, config: Any, over: Any) -> float | None:
        """Implements ``search.Measure.speedup``."""
        from triton.errors import TritonError

        incumbent, expected = self._graph(over)
        try:
            candidate, got = self._graph(config)
            candidate(0)
            incumbent(0)
            harness.compare("the candidate", got, expected)
        except (RuntimeError, TritonError):  # it needs too many resources, or gives wrong results
            return None
        return time_in_turns(candidate, incumbent, self._device)

    def _graph(self, config: Any) -> tuple[harness.Call, dict[str, Tensor]]:
        with self._trying(config):
            replay, results = harness.graph_of(self._call, INPUT_SETS)
        return replay, results


def time_in_turns(candidate: harness.Call, incumbent: harness.Call, device: torch.device) -> float | None:
    """How many times as fast ``candidate`` is as ``incumbent``; None if one of them runs out of memory."""
    calls = {"candidate": candidate, "incumbent": incumbent}
    times = harness.time_interleaved(calls, harness.clock_for(device), seconds=SECONDS)
    one, other = times["candidate"], times["incumbent"]
    return None if one is None or other is None else other.ms / one.ms
