"""Compiles what one Qwen3-30B-A3B layer launches on one GPU target, and prints what each launch takes as JSON.

A program of its own because Triton's interpreter, under which the other tests may run, replaces the kernels when they
are imported: ``python -m tests.kernel.compile_launches 90 bfloat16 plain:128 adapted:16 adapted:128 untiled`` (target,
dtype, and what: the tiled stages of a bucket without and with adapters, and those without a tile to choose).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.kernel.machine import kernel, module
from tests.kernel.offline_compile import compiling_for

# One Qwen3-30B-A3B layer.
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 128, 2048, 768, 8
# Of its adapters: one block, and one that is as wide as blocks get.
RANK = 64


@dataclass(frozen=True)
class Launch:
    """One compiled launch: the stage, its configuration if it has one, and what it takes."""

    stage: str
    config: str
    kernel: str
    shared: int
    registers: int
    spills: int
    narrow_stores: int
    seconds: float


def tokens_of_bucket(block_m: int) -> int:
    """A number of tokens whose rows per expert fall into the bucket of tiles ``block_m`` high."""
    tuning = module("tuning")
    rows = tuning.BUCKETS[block_m] or 256
    tokens = rows * EXPERTS // TOP_K
    assert tuning.bucket(tokens * TOP_K, EXPERTS) == block_m
    return tokens


def packed_tokens_of_bucket(block_m: int) -> int:
    """The same of packed weights, few enough rows for them to be decoded inside the products on every target."""
    tuning = module("tuning")
    rows = tuning.PACKED_BUCKETS[block_m] or tuning.DEFAULT_DECODE_ROWS
    tokens = rows * EXPERTS // TOP_K
    assert tuning.bucket(tokens * TOP_K, EXPERTS, packed=True) == block_m
    return tokens


def _tiled(dtype: torch.dtype, tokens: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(stage, kernel family, call) of every stage with a tile to choose."""
    launch, gate, routing = _modules(tokens)
    rows = tokens * TOP_K

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, rows_h, rows_i, rows_2i = (
        meta(tokens, HIDDEN),
        meta(rows, HIDDEN),
        meta(rows, INTERMEDIATE),
        meta(rows, 2 * INTERMEDIATE),
    )
    up, down = meta(EXPERTS, 2 * INTERMEDIATE, HIDDEN), meta(EXPERTS, HIDDEN, INTERMEDIATE)
    weights = torch.empty((tokens, TOP_K), device="meta")
    yield "up, train", "up", lambda: launch.grouped_up(x, up, routing, rows, None, gate, True)
    yield "up, infer", "up", lambda: launch.grouped_up(x, up, routing, rows, None, gate, False)
    for name, a, w in (("down", rows_i, down), ("up", rows_h, up)):
        backward = rows_2i if name == "up" else rows_h
        for label, left, right in ((f"gemm, {name}", a, w), (f"gemm, {name} transposed", backward, w.mT)):
            family = "gemm" if right.shape[2] > module("tuning").SHORT_K else "gemm_short"
            yield label, family, _gemm(launch, left, right, routing, rows)
    yield (
        "down backward",
        "down_backward",
        lambda: launch.down_backward(x, down, None, rows_2i, routing, weights, gate, True),
    )
    yield "gram, gather a", "gram", lambda: launch.grouped_gram(x, rows_i, routing, True, False, down)
    yield "gram, gather b", "gram", lambda: launch.grouped_gram(rows_2i, x, routing, False, True, up)


def _adapted(dtype: torch.dtype, tokens: int, packed: bool) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """As ``_tiled`` and ``_packed_tiled``, of what an adapter adds a product to."""
    launch, gate, routing = _modules(tokens, packed)
    rows = tokens * TOP_K
    extension = module("lora").Extension

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, rows_i, rows_2i = meta(tokens, HIDDEN), meta(rows, INTERMEDIATE), meta(rows, 2 * INTERMEDIATE)
    up: Any = meta(EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    down: Any = meta(EXPERTS, HIDDEN, INTERMEDIATE)
    weights = torch.empty((tokens, TOP_K), device="meta")
    if packed:
        up, down = _packed_stacks(dtype)
    suffix = "_4bit" if packed else ""
    # Factors of their own for gate and up; the largest block of ranks.
    left, lefts = meta(rows, RANK), meta(rows, 2 * RANK)
    up_a, up_b = meta(EXPERTS, 2 * RANK, HIDDEN), meta(EXPERTS, 2 * INTERMEDIATE, RANK)
    down_a, down_b = meta(EXPERTS, RANK, INTERMEDIATE), meta(EXPERTS, HIDDEN, RANK)
    call = _call(launch.grouped_up, x, up, routing, rows, None, gate, True, extension(lefts, up_b))
    yield f"up{suffix}, adapter", f"up{suffix}", call
    for label, a, w, own in (
        ("down", rows_i, down, extension(left, down_b)),
        ("up transposed", rows_2i, up.mT, extension(lefts, up_a.mT)),
    ):
        family = "gemm" if w.shape[2] > module("tuning").SHORT_K else "gemm_short"
        if packed:
            family = "gemm_4bit" if label == "down" else "transposed_4bit"
        call = _call(launch.grouped_gemm, a, w, routing, rows, None, False, 0.0, own)
        yield f"gemm{suffix}, {label}, adapter", family, call
    backward = (x, down, None, rows_2i, routing, weights, gate, True, extension(left, down_a.mT), True)
    yield f"down backward{suffix}, adapter, in place", f"down_backward{suffix}", _call(launch.down_backward, *backward)
    if packed:
        # One left factor for gate and up, as in PEFT's layout.
        call = _call(launch.grouped_up, x, up, routing, rows, None, gate, True, extension(left, up_b))
        yield "up_4bit, shared adapter", "up_4bit", call
        return
    yield "shrink, gather", "shrink", _call(launch.shrink, x, up_a, routing, True, 1.0, lefts)
    yield "shrink", "shrink", _call(launch.shrink, rows_i, down_a, routing, False, 1.0, left)
    halves = (rows_2i[:, :INTERMEDIATE], up_b[:, :INTERMEDIATE].mT, routing, False, 1.0, lefts[:, :RANK])
    yield "shrink, across", "shrink", _call(launch.shrink, *halves)
    for label, a, b, gather_a, gather_b, of, by in (
        ("grad a", left, rows_i, False, False, down_a, None),
        ("grad b", rows_2i[:, :INTERMEDIATE], lefts[:, :RANK], False, False, up_b[:, :INTERMEDIATE], None),
        ("weighted", x, left, True, False, down_b, weights),
    ):
        # Factors are trained in fp32.
        out = torch.empty_like(of, dtype=torch.float32)
        yield f"gram, {label}", "gram_thin", _call(launch.grouped_gram, a, b, routing, gather_a, gather_b, out, by)
    yield "up, gate_up alone", "up", lambda: launch.grouped_up(x, up, routing, rows, None, gate, True, save_h=False)


def _packed_stacks(dtype: torch.dtype) -> tuple[Any, Any]:
    """The layer's projections in 4 bits."""

    def stack(rows: int, columns: int, projections: int) -> Any:
        own = kernel.Format4bit((EXPERTS, rows, columns), projections=projections, dtype=dtype)
        storage = {name: torch.empty(shape, dtype=torch.uint8, device="meta") for name, shape in own.storage().items()}
        return module("weights").PackedStack(kernel.Packed4bitWeights(own, **storage))

    return stack(2 * INTERMEDIATE, HIDDEN, 2), stack(HIDDEN, INTERMEDIATE, 1)


def _packed_tiled(dtype: torch.dtype, tokens: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """As ``_tiled``, of what decodes packed weights on the way."""
    launch, gate, routing = _modules(tokens, packed=True)
    rows = tokens * TOP_K
    up, down = _packed_stacks(dtype)

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, rows_i, rows_2i = meta(tokens, HIDDEN), meta(rows, INTERMEDIATE), meta(rows, 2 * INTERMEDIATE)
    yield "up 4bit, train", "up_4bit", lambda: launch.grouped_up(x, up, routing, rows, None, gate, True)
    yield "up 4bit, infer", "up_4bit", lambda: launch.grouped_up(x, up, routing, rows, None, gate, False)
    yield "gemm 4bit, down", "gemm_4bit", _gemm(launch, rows_i, down, routing, rows)
    yield "gemm 4bit, up transposed", "transposed_4bit", _gemm(launch, rows_2i, up.mT, routing, rows)
    weights = torch.empty((tokens, TOP_K), device="meta")
    backward = (x, down, None, rows_2i, routing, weights, gate, True)
    yield "down backward 4bit", "down_backward_4bit", _call(launch.down_backward, *backward)


def _packed_untiled(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """What packed weights launch beside them: few slots, and a workspace in parts."""
    tokens = 4096
    launch, gate, routing = _modules(tokens, packed=True)
    packed, (up, down) = module("launch.packed"), _packed_stacks(dtype)

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids = torch.empty((1, TOP_K), dtype=torch.int64, device="meta")
    decode = (meta(1, HIDDEN), ids, torch.empty((1, TOP_K), device="meta"), up, down)
    yield "decode 4bit", "", _call(launch.decode, *decode, None, None, gate)
    biases = (meta(EXPERTS, 2 * INTERMEDIATE), meta(EXPERTS, HIDDEN))
    yield "decode 4bit, bias", "", _call(launch.decode, *decode, *biases, gate)
    yield "dequantize", "", _call(launch.dequantize, up.weights, 0, EXPERTS, meta(*up.shape))
    # A third of the features, gate and up rows of them.
    third = INTERMEDIATE // 3
    _, runs = packed._runs(third, third, 2 * INTERMEDIATE, HIDDEN, gate, False)
    part = (up.weights.packed, up.weights, runs, 0, EXPERTS, meta(EXPERTS, 2 * third, HIDDEN), routing.offsets)
    yield "dequantize a part", "", _call(packed._decode, *part)


def _gemm(launch: object, a: Tensor, w: Any, routing: object, rows: int) -> Callable[[], object]:
    return lambda: launch.grouped_gemm(a, w, routing, rows, None, False, 0.0)  # type: ignore[attr-defined]


def _untiled(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """The stages without a configuration, biases, and routing in one block and in many."""
    for tokens in (32, 4096):
        launch, gate, routing = _modules(tokens)
        ids = torch.empty((tokens, TOP_K), dtype=torch.int64, device="meta")
        yield f"route, {tokens} tokens", "", _call(launch.route, ids, routing, dtype)
    tokens, rows = 4096, 4096 * TOP_K

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, z, weights = meta(tokens, HIDDEN), meta(rows, HIDDEN), torch.empty((tokens, TOP_K), device="meta")
    up, down = meta(EXPERTS, 2 * INTERMEDIATE, HIDDEN), meta(EXPERTS, HIDDEN, INTERMEDIATE)
    sizes = torch.empty(EXPERTS, dtype=torch.int32, device="meta")
    yield "route sorted", "", _call(launch.route_sorted, sizes, rows, routing, dtype)
    yield "combine", "", _call(launch.combine, z, routing, tokens, weights)
    yield "combine, no weights", "", _call(launch.combine, z, routing, tokens, None)
    yield "combine backward", "", _call(launch.combine_backward, x, z, routing, weights)
    yield "dispatch", "", _call(launch.dispatch, x, routing, rows)
    yield "row sum", "", _call(launch.grouped_row_sum, z, routing, None, False)
    yield "row sum, weighted", "", _call(launch.grouped_row_sum, x, routing, weights, True)
    one = torch.empty((1, TOP_K), dtype=torch.int64, device="meta")
    decode = (meta(1, HIDDEN), one, weights[:1], up, down)
    yield "decode", "", _call(launch.decode, *decode, None, None, gate)
    biases = (meta(EXPERTS, 2 * INTERMEDIATE), meta(EXPERTS, HIDDEN))
    yield "decode, bias", "", _call(launch.decode, *decode, *biases, gate)


def _reciprocal() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """What quantizing on an NVIDIA GPU launches."""
    absmax = torch.empty(EXPERTS, device="meta")
    yield "reciprocal", "", _call(module("launch.reciprocal").approximate_reciprocal, absmax)


def plain(dtype: torch.dtype, height: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """All stages with a tile to choose and no adapter, in the bucket of tiles ``height`` high."""
    yield from _tiled(dtype, tokens_of_bucket(height))
    yield from _packed_tiled(dtype, packed_tokens_of_bucket(height))


def adapted(dtype: torch.dtype, height: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Those with an adapter: each family but the Gram product of weights, which no adapter takes part in."""
    yield from _adapted(dtype, tokens_of_bucket(height), packed=False)
    yield from _adapted(dtype, packed_tokens_of_bucket(height), packed=True)


def tiled(dtype: torch.dtype, height: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """All stages with a tile to choose."""
    yield from plain(dtype, height)
    yield from adapted(dtype, height)


def untiled(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """All stages without one."""
    yield from _untiled(dtype)
    yield from _packed_untiled(dtype)


def _call(stage: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: stage(*args)


def _modules(tokens: int, packed: bool = False) -> tuple:
    routing = module("routing").Routing
    buffer = torch.empty(routing.buffer_size(tokens * TOP_K, EXPERTS), dtype=torch.int32, device="meta")
    views = routing.from_buffer(buffer, tokens * TOP_K, EXPERTS, TOP_K, packed=packed)
    return module("launch"), module("activations").Gate(), views


def compile_launches(arch: int | str, dtype: torch.dtype, what: list[str]) -> Iterator[Launch]:
    """Every launch for ``arch`` once: what two buckets share is compiled in the first."""
    tuning = module("tuning")
    target = tuning.TARGETS[arch]
    seen = set()
    with mock.patch.object(tuning, "target_of", return_value=target), compiling_for(arch) as compiled:
        stages = []
        for form, _, height in (name.partition(":") for name in what):
            if form == "untiled":
                stages += [(stage, 0) for stage in untiled(dtype)]
                stages += [(stage, 0) for stage in (_reciprocal() if isinstance(arch, int) else ())]
            else:
                of_form = plain if form == "plain" else adapted
                stages += [(stage, int(height)) for stage in of_form(dtype, int(height))]
        for (name, family, call), height in stages:
            config = tuning.launch_config(family, height, target, dtype.itemsize) if family else None
            if family and (name, config) in seen:
                continue
            seen.add((name, config))
            before, start = len(compiled), time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            assert len(compiled) > before, f"{name} launched nothing"
            for resources in compiled[before:]:
                yield Launch(name, str(config or ""), **asdict(resources), seconds=seconds)


def main() -> None:
    arch, dtype, *what = sys.argv[1:]
    launches = compile_launches(int(arch) if arch.isdigit() else arch, getattr(torch, dtype), what)
    print(json.dumps([asdict(launch) for launch in launches]))


if __name__ == "__main__":
    main()
