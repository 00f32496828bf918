"""Times 4-bit products of a few rows in CUDA graphs, as a decoding step has them, and searches their launch configurations.

    python -m benchmarks.few_rows                   the ways that experts and linear layers can take, a minute on an H200
    python -m benchmarks.few_rows --sweep           the launch configurations of each kernel, the fastest first

Experts are those of Qwen3-30B-A3B in NF4 with double quantization, without gradients:

- ``few``: ``few_slots_kernel``, tensor cores without sorting.
- ``gemv``: ``packed_gemv``, a matrix-vector product for each slot.
- ``sorted``: routing and ``packed_gemm``.

Linear layers are the projections of its attention, to queries, keys and values together and to the output:

- ``few``: ``linear_4bit``.
- ``bitsandbytes``: its layers, one after the other.

A graph has one call for each of several input sets, as a step has layers, whose weights do not fit the L2. Times are those
of a call in µs. ``bytes`` is what reading the weights alone would take at the bandwidth of a large copy.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor, nn

from moe_fused.benchmark import harness
from moe_fused.benchmark.inputs import DTYPE, Inputs, random_weights
from moe_fused.benchmark.layers import LAYERS
from moe_fused.hub import get_kernel
from moe_fused.tuner.workload import GraphMeasure

from . import runner

LAYER = LAYERS["qwen3-30b-a3b"]
TOKENS = (1, 2, 4, 8, 16, 32)
# In and out features of the matrices that share a launch.
LINEAR = {"qkv": (2048, (4096, 512, 512)), "o": (4096, (2048,))}
ROWS = (1, 2, 8, 16, 32, 64)
ALWAYS = 2**31
CALLS = 16  # of a graph
SECONDS = 0.1
SHOWN = 5  # configurations

# What a sweep tries: warps, how many of them divide the in features, and columns of a warp; then what depends less on
# these, for the best of them.
SHAPES = [
    (warps, split, columns)
    for warps in (1, 2, 4, 8)
    for split in (1, 2, 4, 8)
    for columns in (16, 32)
    if split <= warps
]  # fmt: skip
STEPS = (128, 256)
STAGES, REGISTERS = (2, 3, 4), (0, 128, 168)


def candidates(tuning: Any, kernel: str, height: int, target: Any) -> list[Any]:
    """The shapes of tiles that a sweep of ``kernel`` starts with."""
    found = [
        tuning.LaunchConfig(
            height, columns * warps // split, step, warps, 3, split_k=split, registers=168, prefetch=True
        )
        for warps, split, columns in SHAPES
        for step in STEPS
    ]
    return [config for config in found if is_valid(tuning, kernel, config, target)]


def variants(tuning: Any, kernel: str, config: Any, target: Any) -> list[Any]:
    """``config`` with other stages and registers."""
    found = [
        replace(config, num_stages=stages, registers=registers, prefetch=prefetch)
        for stages in STAGES
        for registers in REGISTERS
        for prefetch in (False, True)
    ]
    return [each for each in found if is_valid(tuning, kernel, each, target)]


def is_valid(tuning: Any, kernel: str, config: Any, target: Any) -> bool:
    try:
        tuning.check(kernel, config, target, DTYPE.itemsize)
    except ValueError:
        return False
    return True


class Bench:
    """Weights on a GPU, and what is timed over them."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.kernel = get_kernel()
        self.tuning = self._module("tuning")
        self.few = self._module("stages.triton.few_rows")
        self.launch = self._module("stages.triton")
        self.target = self.tuning.target_of(torch.device("cuda", torch.cuda.current_device()))
        self._generator = torch.Generator(self.device).manual_seed(0)
        self.bandwidth = harness.measure_ceilings(self.device).bytes_per_second

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"{self.kernel.__name__}.{name}")

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device, dtype=torch.float32).to(DTYPE)

    def us(self, calls: dict[str, Callable[[int], Any]]) -> dict[str, float]:
        """The time of one call in a graph of ``CALLS``, by name."""
        graphs = {name: harness.graph_of(call, CALLS)[0] for name, call in calls.items()}
        times = harness.time_interleaved(graphs, harness.clock_for(self.device), seconds=SECONDS)
        return {name: 1e3 * timing.ms / CALLS if timing else float("nan") for name, timing in times.items()}

    # Experts.

    def experts(self) -> tuple[Any, Any]:
        up, down = random_weights(LAYER, self._generator)
        quantize = self.kernel.Packed4bitWeights.quantize
        return quantize(up, projections=2), quantize(down)

    def inputs(self, tokens: int) -> list[Inputs]:
        return [Inputs.random(LAYER, tokens, self._generator) for _ in range(CALLS)]

    @torch.no_grad()
    def compare_experts(self, tokens: Sequence[int]) -> None:
        weights = self.experts()
        usual = self.tuning.thresholds_of(self.target)
        limits = {"few": (ALWAYS, 0), "gemv": (0, ALWAYS), "sorted": (0, 0)}
        print(
            f"{'tokens':>8} {'experts':>8} {'bytes':>8} " + " ".join(f"{name:>8}" for name in limits) + "   difference"
        )
        for number in tokens:
            sets = self.inputs(number)

            def call(few: int, gemv: int, sets: list[Inputs] = sets) -> Callable[[int], Tensor]:
                thresholds = replace(usual, few_slots=few, gemv_slots=gemv)

                def run(i: int) -> Tensor:
                    with self.tuning.trying_thresholds(thresholds):
                        x = sets[i]
                        y: Tensor = self.kernel.moe_experts(x.hidden_states, x.top_k_index, x.top_k_weights, *weights)
                        return y

                return run

            calls = {name: call(*limit) for name, limit in limits.items()}
            one, other = (calls[name](0).float() for name in ("few", "sorted"))
            apart = ((one - other).norm() / other.norm()).item()
            chosen = sum(len(each.top_k_index.unique()) for each in sets) / CALLS
            least = 1e6 * chosen * sum(each.nbytes for each in weights) / LAYER.experts / self.bandwidth
            times = self.us(calls)
            shown = " ".join(f"{times[name]:8.1f}" for name in limits)
            print(f"{number:8} {chosen:8.1f} {least:8.1f} {shown}   {apart:.1e}")

    @torch.no_grad()
    def sweep_experts(self, tokens: Sequence[int]) -> None:
        stack_of, operands = (getattr(self._module("weights"), name) for name in ("stack_of", "operands"))
        up, down = (stack_of(*operands(each)) for each in self.experts())
        gate = self._module("activations").Gate()
        for number in tokens:
            slots = number * LAYER.top_k
            sets = self.inputs(number)
            hs = [self.random(slots, LAYER.intermediate) for _ in sets]
            h, z = torch.empty_like(hs[0]), torch.empty(slots, LAYER.hidden, device=self.device)

            def call_up(i: int, sets: list[Inputs] = sets, h: Tensor = h) -> dict[str, Tensor]:
                x = sets[i]
                ids = x.top_k_index
                self.few.few_slots("few_up_4bit", x.hidden_states, ids, up, None, gate, LAYER.top_k, h)
                return {"h": h}

            def call_down(i: int, sets: list[Inputs] = sets, hs: list[Tensor] = hs, z: Tensor = z) -> dict[str, Tensor]:
                self.few.few_slots("few_down_4bit", hs[i], sets[i].top_k_index, down, None, None, 1, z)
                return {"z": z}

            for kernel, call in (("few_up_4bit", call_up), ("few_down_4bit", call_down)):
                bucket = self.tuning.bucket_of_few(slots)
                self._sweep(f"{kernel}, {number} tokens (bucket {bucket})", kernel, bucket, (8, 16), call)

    def _sweep(
        self, title: str, kernel: str, bucket: int, heights: Sequence[int], call: Callable[[int], dict[str, Tensor]]
    ) -> None:
        tuning, target = self.tuning, self.target
        usual = tuning.launch_config(kernel, bucket, target, DTYPE.itemsize)

        def trying(config: Any) -> Any:
            return tuning.trying(kernel, bucket, DTYPE.itemsize, config)

        bound = self._module("stages.triton.bound_kernel")
        measure = GraphMeasure(call, trying, bound.compiling_only, self.device)

        def timed(configs: list[Any]) -> Iterator[tuple[float, Any]]:
            measure.prepare(configs)
            for config in configs:
                try:
                    with trying(config):
                        (us,) = self.us({"": call}).values()
                except RuntimeError as error:  # too many resources
                    print(f"  {config}: {error}")
                    continue
                yield us, config

        def best(found: list[tuple[float, Any]]) -> list[Any]:
            return [config for _, config in sorted(found, key=lambda each: each[0])]

        found = list(timed([usual]))
        now = found[0][0] if found else float("nan")
        start = [config for height in heights for config in candidates(tuning, kernel, height, target)]
        found += timed([config for config in start if config != usual])
        tried = {config for _, config in found}
        near = [each for config in best(found)[:2] for each in variants(tuning, kernel, config, target)]
        found += timed([config for config in dict.fromkeys(near) if config not in tried])
        print(f"{title}: {now:.1f} us now")
        times = {config: us for us, config in found}
        for config in best(found)[:SHOWN]:
            fields = {
                name: value
                for name, value in asdict(config).items()
                if name not in ("descriptor", "slices", "half_tiles")
            }
            print(f"  {times[config]:7.1f}  {json.dumps(fields)}")

    # Linear layers.

    def layers(self, name: str) -> list[list[Any]]:
        """For each call of a graph, layers of bitsandbytes."""
        from bitsandbytes.nn import modules

        in_features, out = LINEAR[name]

        def layer(features: int) -> Any:
            made = modules.Linear4bit(
                in_features, features, bias=False, compute_dtype=DTYPE, quant_type="nf4", device="meta"
            )
            values = self.random(features, in_features) * in_features**-0.5
            made.weight = modules.Params4bit(values.cpu(), requires_grad=False, quant_type="nf4", module=made)
            return made.to(self.device)

        return [[layer(features) for features in out] for _ in range(CALLS)]

    @torch.no_grad()
    def compare_linear(self, rows: Sequence[int], sweep: bool) -> None:
        from moe_fused.decoding import linear

        for name, (in_features, out) in LINEAR.items():
            layers = self.layers(name)
            matrices = [[linear._matrix(layer, DTYPE) for layer in each] for each in layers]
            least = 1e6 * sum(matrix.nbytes for matrix in matrices[0]) / self.bandwidth
            for number in rows:
                xs = [self.random(number, in_features) for _ in range(CALLS)]

                def ours(i: int, xs: list[Tensor] = xs, matrices: Any = matrices) -> dict[str, Tensor]:
                    return {str(j): y for j, y in enumerate(self.kernel.linear_4bit(xs[i], matrices[i]))}

                def theirs(i: int, xs: list[Tensor] = xs, layers: list[list[nn.Module]] = layers) -> dict[str, Tensor]:
                    return {str(j): layer(xs[i]) for j, layer in enumerate(layers[i])}

                if sweep:
                    bucket = self.tuning.bucket_of_few(number)
                    with mock.patch.object(self.few, "LEAST_WARPS", 0):
                        title = f"few_linear_4bit, {name}, {number} rows (bucket {bucket})"
                        self._sweep(title, "few_linear_4bit", bucket, (max(8, number),), ours)
                    continue
                one, other = (torch.cat([y.float() for y in call(0).values()], dim=1) for call in (ours, theirs))
                apart = ((one - other).norm() / other.norm()).item()
                times = self.us({"few": ours, "bitsandbytes": theirs})
                shown = ", ".join(f"{key} {value:.1f}" for key, value in times.items())
                print(
                    f"{name:>4} {number:3} rows, {out} of {in_features}: bytes {least:.1f}, {shown}, difference {apart:.1e}"
                )


def sizes_of(text: str) -> tuple[int, ...]:
    """Reads ``--sizes``. Raises typer.BadParameter unless it is whole numbers above 0, or empty."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"it must be numbers above 0 with commas, such as 1,8, got {text}", param_hint="--sizes"
        )
    return tuple(map(int, parts))


def main(
    sweep: Annotated[bool, typer.Option("--sweep", help="Search launch configurations.")] = False,
    only: Annotated[str, typer.Option(help="experts or linear; both by default.")] = "",
    sizes: Annotated[
        str, typer.Option(help="Numbers of tokens or rows, such as 1,8.  [default: up to 32 tokens and 64 rows]")
    ] = "",
) -> None:
    """Times 4-bit products of a few rows in CUDA graphs. Needs a GPU, and writes nothing."""
    if only:
        runner.choices("only", [only], ("experts", "linear"), ())
    chosen = sizes_of(sizes)
    if not torch.cuda.is_available():
        typer.echo(f"This benchmark needs a CUDA GPU, and torch {torch.__version__} sees none", err=True)
        raise typer.Exit(2)
    bench = Bench()
    if only in ("", "experts"):
        (bench.sweep_experts if sweep else bench.compare_experts)(chosen or TOKENS)
    if only in ("", "linear"):
        bench.compare_linear(chosen or ROWS, sweep)


if __name__ == "__main__":
    typer.run(main)
