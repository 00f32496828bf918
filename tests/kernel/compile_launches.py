"""Compiles what one Qwen3-30B-A3B layer launches on one GPU target, and prints what each launch takes as JSON.

A program of its own because Triton's interpreter, under which the other tests may run, replaces the kernels when they
are imported: ``python -m tests.kernel.compile_launches 90 bfloat16 plain:128 adapted:16 adapted:128 untiled short:16``
(target, dtype, and what: the tiled stages of a bucket without and with adapters, those without a tile to choose, those over
packed weights in blocks shorter than usual, and, as ``int4:64``, those over weights in the format of that name).

Without arguments it reads them as JSON from lines of its input, and forks a process for each line. Tests ask such a server
with ``compiled``, because importing everything again takes seconds for each target.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.kernel.machine import ON_GPU, kernel, module
from tests.kernel.offline_compile import compiling_for
from tests.support import REPOSITORY

# One Qwen3-30B-A3B layer.
EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 128, 2048, 768, 8
# The rank of its adapters. One adapter's rank is one block; those of gate and up together are a block of the largest
# width.
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
    warps: int
    programs: int
    narrow_stores: int
    seconds: float


def tokens_of_bucket(block_m: int) -> int:
    """A number of tokens whose rows per expert fall into the bucket of tiles ``block_m`` high."""
    thresholds = _thresholds()
    return _tokens(thresholds.dense.get(block_m, 256), block_m, packed=False)


def packed_tokens_of_bucket(block_m: int) -> int:
    """A number of tokens for the bucket over packed weights, few enough for every product to dequantize them itself."""
    thresholds = _thresholds()
    return _tokens(thresholds.packed.get(block_m, min(thresholds.dequantize_rows.values())), block_m, packed=True)


def _thresholds() -> Any:
    """The thresholds of the target that is compiled for."""
    tuning = module("tuning")
    return tuning.thresholds_of(tuning.target_of(torch.device("meta")))


def _tokens(rows: int, block_m: int, packed: bool) -> int:
    tuning = module("tuning")
    tokens = rows * EXPERTS // TOP_K
    assert tuning.bucket(tokens * TOP_K, EXPERTS, packed, tuning.target_of(torch.device("meta"))) == block_m
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
    stored, bias = meta(EXPERTS, HIDDEN, 2 * INTERMEDIATE), meta(EXPERTS, 2 * INTERMEDIATE)
    alternating = module("activations").Gate("swiglu_oai", True, True, 1.702, 7.0)
    call = _call(launch.grouped_up, x, stored.mT, routing, rows, bias, alternating, True)
    yield "up, gpt-oss", "up", call
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
    yield "wgrad, gather a", "wgrad", lambda: launch.grouped_wgrad(x, rows_i, routing, True, False, down)
    yield "wgrad, gather b", "wgrad", lambda: launch.grouped_wgrad(rows_2i, x, routing, False, True, up)


def _adapted(
    dtype: torch.dtype, tokens: int, packed: bool, **options: Any
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(stage, kernel family, call) of every stage that an adapter adds a product to, over dense or packed weights."""
    launch, gate, routing = _modules(tokens, packed)
    rows = tokens * TOP_K
    term = module("stages.terms").LowRankTerm

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, rows_i, rows_2i = meta(tokens, HIDDEN), meta(rows, INTERMEDIATE), meta(rows, 2 * INTERMEDIATE)
    up: Any = meta(EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    down: Any = meta(EXPERTS, HIDDEN, INTERMEDIATE)
    weights = torch.empty((tokens, TOP_K), device="meta")
    if packed:
        up, down = _packed_stacks(dtype, **options)
    suffix = "_4bit" if packed else ""
    # Gate and up have separate factors here, so the block of ranks is the largest.
    left, lefts = meta(rows, RANK), meta(rows, 2 * RANK)
    up_a, up_b = meta(EXPERTS, 2 * RANK, HIDDEN), meta(EXPERTS, 2 * INTERMEDIATE, RANK)
    down_a, down_b = meta(EXPERTS, RANK, INTERMEDIATE), meta(EXPERTS, HIDDEN, RANK)
    call = _call(launch.grouped_up, x, up, routing, rows, None, gate, True, term(lefts, up_b))
    yield f"up{suffix}, adapter", f"up{suffix}", call
    for label, a, w, low_rank in (
        ("down", rows_i, down, term(left, down_b)),
        ("up transposed", rows_2i, up.mT, term(lefts, up_a.mT)),
    ):
        family = "gemm" if w.shape[2] > module("tuning").SHORT_K else "gemm_short"
        if packed:
            family = "gemm_4bit" if label == "down" else "transposed_4bit"
        call = _call(launch.grouped_gemm, a, w, routing, rows, None, False, 0.0, low_rank)
        yield f"gemm{suffix}, {label}, adapter", family, call
    backward = (x, down, None, rows_2i, routing, weights, gate, True, term(left, down_a.mT), True)
    yield f"down backward{suffix}, adapter, in place", f"down_backward{suffix}", _call(launch.down_backward, *backward)
    if packed:
        # One left factor for gate and up, as in PEFT's layout.
        call = _call(launch.grouped_up, x, up, routing, rows, None, gate, True, term(left, up_b))
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
        yield f"wgrad, {label}", "wgrad_thin", _call(launch.grouped_wgrad, a, b, routing, gather_a, gather_b, out, by)
    yield "up, gate_up alone", "up", lambda: launch.grouped_up(x, up, routing, rows, None, gate, True, save_h=False)


def _packed_stacks(dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """The layer's projections in 4 bits."""

    def stack(rows: int, columns: int, projections: int) -> Any:
        layout = kernel.Format4bit((EXPERTS, rows, columns), projections=projections, dtype=dtype, **options)
        storage = (torch.empty(shape, dtype=torch.uint8, device="meta") for shape in layout.storage().values())
        return module("stages.stacks").PackedStack(layout, tuple(storage))

    return stack(2 * INTERMEDIATE, HIDDEN, 2), stack(HIDDEN, INTERMEDIATE, 1)


def _packed_tiled(dtype: torch.dtype, tokens: int, **options: Any) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(stage, kernel family, call) of every stage that dequantizes packed weights inside its product."""
    launch, gate, routing = _modules(tokens, packed=True)
    rows = tokens * TOP_K
    up, down = _packed_stacks(dtype, **options)

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


def _packed_untiled(dtype: torch.dtype, **options: Any) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(stage, "", call) of what packed weights launch besides: the path of few slots, and filling a workspace."""
    tokens = 4096
    launch, gate, routing = _modules(tokens, packed=True)
    dequantize, (up, down) = module("stages.triton.dequantize"), _packed_stacks(dtype, **options)

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    biases = (meta(EXPERTS, 2 * INTERMEDIATE), meta(EXPERTS, HIDDEN))
    # With up to 64 slots on any GPU, and on tensor cores where these serve few slots.
    for few_slots in (0, 128):
        label = "few slots 4bit" if few_slots else "gemv 4bit"
        for few, of in ((1, (None, None)), (8, biases)):
            inputs = (meta(few, HIDDEN), *_choices(few), up, down, *of, gate)
            yield f"{label}, {few} tokens", "", _with_few_slots(few_slots, _call(launch.gemv_experts, *inputs))
    for rows, out, has_bias in ((1, (4096, 512, 512), False), (16, (4096,), True), (64, (4096,), False)):
        yield f"few rows 4bit, {rows}", "", _linear(launch, dtype, rows, out, has_bias, **options)
    yield "dequantize", "", _call(launch.dequantize, up, 0, EXPERTS, meta(*up.shape))
    # A third of the features, with their gate and up rows.
    third = INTERMEDIATE // 3
    _, runs = dequantize._runs(third, third, 2 * INTERMEDIATE, HIDDEN, gate, False)
    part = (up, runs, 0, EXPERTS, meta(EXPERTS, 2 * third, HIDDEN), routing.offsets)
    yield "dequantize a part", "", _call(dequantize.dequantize_runs, *part)


def _choices(tokens: int) -> tuple[Tensor, Tensor]:
    """Expert ids and routing weights."""
    ids = torch.empty((tokens, TOP_K), dtype=torch.int64, device="meta")
    return ids, torch.empty((tokens, TOP_K), device="meta")


def _with_few_slots(slots: int, call: Callable[[], object]) -> Callable[[], object]:
    """``call`` where tensor cores serve up to so many slots."""
    tuning = module("tuning")

    def calling() -> None:
        with tuning.trying_thresholds(replace(_thresholds(), few_slots=slots)):
            call()

    return calling


def _linear(
    launch: Any, dtype: torch.dtype, rows: int, out: tuple[int, ...], has_bias: bool, **options: Any
) -> Callable[[], object]:
    """Linear layers of a few rows, one for each number of out features."""

    def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    stacks = []
    for features in out:
        form = kernel.Format4bit((1, features, HIDDEN), dtype=dtype, **options)
        storage = (meta(*shape, of=torch.uint8) for shape in form.storage().values())
        stacks.append(module("stages.stacks").PackedStack(form, tuple(storage)))
    biases = [meta(features) if has_bias else None for features in out]
    outs = [meta(rows, features) for features in out]
    return _call(launch.few_rows_linear, meta(rows, HIDDEN), stacks, biases, outs)


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
    few = (meta(1, HIDDEN), one, weights[:1], up, down)
    yield "gemv", "", _call(launch.gemv_experts, *few, None, None, gate)
    biases = (meta(EXPERTS, 2 * INTERMEDIATE), meta(EXPERTS, HIDDEN))
    yield "gemv, bias", "", _call(launch.gemv_experts, *few, *biases, gate)


def _reciprocal() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """What quantizing on an NVIDIA GPU launches."""
    absmax = torch.empty(EXPERTS, device="meta")
    yield "reciprocal", "", _call(module("formats.absmax").approximate_reciprocal, absmax)


def plain(dtype: torch.dtype, height: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """All stages with a tile to choose and no adapter, in the bucket of tiles ``height`` high."""
    yield from _tiled(dtype, tokens_of_bucket(height))
    yield from _packed_tiled(dtype, packed_tokens_of_bucket(height))


def adapted(dtype: torch.dtype, height: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """All stages with an adapter.

    The weight gradient of dense weights is not among them, for no adapter takes part in it.
    """
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


def short(dtype: torch.dtype, height: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """The stages that dequantize packed weights, in blocks of 32. A row of a tile then holds twice as many as usual."""
    for name, family, call in _packed_tiled(dtype, packed_tokens_of_bucket(height), blocksize=32):
        yield f"{name}, blocks of 32", family, call
    launch, gate, _ = _modules(1, packed=True)
    x = torch.empty((1, HIDDEN), dtype=dtype, device="meta")
    ids, weights = (
        torch.empty((1, TOP_K), dtype=value_dtype, device="meta") for value_dtype in (torch.int64, torch.float32)
    )
    few = (x, ids, weights, *_packed_stacks(dtype, blocksize=32), None, None, gate)
    yield f"gemv 4bit, blocks of 32, {height}", "", _call(launch.gemv_experts, *few)


def of_format(name: str, dtype: torch.dtype, height: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """All stages over packed weights in the format of that name, which may be the one that only tests have."""
    formats = module("formats")
    if name == "int4" and name not in formats.names():
        from tests.kernel.int4 import Int4

        formats.register(Int4())
    tokens = packed_tokens_of_bucket(height)
    yield from _packed_tiled(dtype, tokens, quant_type=name)
    yield from _adapted(dtype, tokens, packed=True, quant_type=name)
    yield from _packed_untiled(dtype, quant_type=name)


def _call(stage: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: stage(*args)


def _modules(tokens: int, packed: bool = False) -> tuple:
    routing = module("routing").Routing
    buffer = torch.empty(routing.buffer_size(tokens * TOP_K, EXPERTS), dtype=torch.int32, device="meta")
    views = routing.from_buffer(buffer, tokens * TOP_K, EXPERTS, TOP_K, packed=packed)
    return module("stages.triton"), module("activations").Gate(), views


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
                of_form = {"plain": plain, "adapted": adapted, "short": short}.get(
                    form, functools.partial(of_format, form)
                )
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


def _print_launches(arch: str, dtype: str, *what: str) -> None:
    launches = compile_launches(int(arch) if arch.isdigit() else arch, getattr(torch, dtype), list(what))
    print(json.dumps([asdict(launch) for launch in launches]))


def _serve() -> None:
    """Answers each line with the exit status of its process and what that wrote to stdout and stderr, as JSON."""
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if child == 0:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                status = 1
                try:
                    _print_launches(*json.loads(line))
                    status = 0
                finally:
                    if status:
                        traceback.print_exc()
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
            _, status = os.waitpid(child, 0)
            texts = [file.read() for file in (out, err) if file.seek(0) == 0]
        print(json.dumps([os.waitstatus_to_exitcode(status), *texts]), flush=True)


def _environment() -> dict[str, str]:
    # Line numbers change nothing in what a kernel takes, and make the compiler slower by a tenth.
    return {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.kernel.compile_launches"],
        cwd=REPOSITORY, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def end() -> None:
        server.stdin.close()
        server.wait()

    atexit.register(end)
    return server


def compiled(arch: int | str, dtype: str, what: list[str]) -> list[Launch]:
    """What each launch takes, compiled in a process of its own.

    Raises:
        AssertionError: A launch does not compile.
    """
    arguments = [str(arch), dtype, *what]
    if ON_GPU:  # CUDA does not work in a process that was forked
        command = [sys.executable, "-m", "tests.kernel.compile_launches", *arguments]
        run = subprocess.run(command, cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, check=False)
        status, out, err = run.returncode, run.stdout, run.stderr
    else:
        server = _server()
        print(json.dumps(arguments), file=server.stdin, flush=True)
        answer = server.stdout.readline()
        assert answer, f"the process that compiles ended with {server.wait()}"
        status, out, err = json.loads(answer)
    assert status == 0, f"{' '.join(arguments)} ended with {status}:\n{err[-4000:]}"
    return [Launch(**row) for row in json.loads(out)]


if __name__ == "__main__":
    if sys.argv[1:]:
        _print_launches(*sys.argv[1:])
    else:
        _serve()
