"""A launch may reuse a compiled kernel only for what it was compiled for.

Triton compiles a kernel for the dtypes of its arguments; a plan that hands a bf16 kernel fp16 tensors computes silently
wrong numbers. Here every compilation is recorded instead of made, so this needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.kernel.machine import HAS_TRITON, module

if not HAS_TRITON:
    pytest.skip("there are no launches without triton", allow_module_level=True)

from tests.kernel.compile_launches import _tiled, _untiled, tokens_of_bucket

launch, tuning, routing = module("launch"), module("tuning"), module("routing")
GATE = module("activations").Gate()


def signature(args: tuple[Any, ...]) -> list[str]:
    """The type of each argument as a compiled kernel takes it for granted."""
    return [str(getattr(getattr(arg, "base", arg), "dtype", type(arg).__name__)) for arg in args]


class Compiled:
    """Stands for a compiled kernel: refuses arguments of other types."""

    def __init__(self, name: str, compiled_for: list[str]) -> None:
        self.name, self.compiled_for = name, compiled_for

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            given = signature(args)
            different = [f"{have} for {was}" for have, was in zip(given, self.compiled_for, strict=True) if have != was]
            assert different == [], f"{self.name}, compiled for other types: {', '.join(different)}"

        return run


@pytest.fixture(autouse=True)
def compilations() -> Iterator[list[str]]:
    """The names of the kernels compiled from now on. No plan outlives the test."""
    cached = [function for function in vars(launch).values() if hasattr(function, "cache_clear")]
    kernel_type = type(module("kernels.permute").combine_kernel)
    compiled: list[str] = []

    def run(function: Any, *args: Any, grid: object, warmup: bool, **options: object) -> Compiled:
        compiled.append(function.__name__)
        return Compiled(function.__name__, signature(args))

    for function in cached:
        function.cache_clear()
    with (
        mock.patch.object(kernel_type, "run", run),
        mock.patch.object(tuning, "target_of", return_value=tuning.TARGETS[90]),
    ):
        yield compiled
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("height", tuning.BUCKETS)
def test_two_dtypes_of_one_size(height: int) -> None:
    """bf16 and fp16 share configurations, not kernels."""
    for dtype in (torch.bfloat16, torch.float16):
        for _, _, call in _tiled(dtype, tokens_of_bucket(height)):
            call()


def test_two_dtypes_of_one_size_without_configurations() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for _, _, call in _untiled(dtype):
            call()


def test_a_second_call_compiles_nothing(compilations: list[str]) -> None:
    for _, _, call in _tiled(torch.bfloat16, 512):
        call()
    once = len(compilations)
    assert once > 0
    for _, _, call in _tiled(torch.bfloat16, 512):
        call()
    assert len(compilations) == once


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def views(slots: int, experts: int, top_k: int) -> Any:
    size = routing.Routing.buffer_size(slots, experts)
    return routing.Routing.from_buffer(meta(size, dtype=torch.int32), slots, experts, top_k)


@pytest.mark.parametrize("tokens", [8, 4096], ids=["single-block", "blocks"])
def test_ids_of_two_widths(tokens: int) -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8):
        launch.route(meta(tokens, 2, dtype=dtype), views(2 * tokens, 16, 2), torch.bfloat16)
        launch.route_sorted(meta(16, dtype=dtype), 2 * tokens, views(2 * tokens, 16, 2), torch.bfloat16)


STAGES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "combine": lambda weights, ids: launch.combine(meta(16, 64), views(16, 4, 2), 8, weights),
    "combine_backward": lambda weights, ids: launch.combine_backward(
        meta(8, 64), meta(16, 64), views(16, 4, 2), weights
    ),
    "grouped_row_sum": lambda weights, ids: launch.grouped_row_sum(meta(8, 64), views(16, 4, 2), weights, True),
    "down_backward": lambda weights, ids: launch.down_backward(
        meta(8, 64), meta(4, 64, 32), None, meta(16, 64), views(16, 4, 2), weights, GATE, True
    ),
    "decode": lambda weights, ids: launch.decode(
        meta(8, 64), ids, weights, meta(4, 64, 64), meta(4, 64, 32), None, None, GATE
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_routing_weights_of_two_dtypes(stage: str) -> None:
    """A router's fp32 in one model, bf16 in the next."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        STAGES[stage](meta(8, 2, dtype=dtype), meta(8, 2, dtype=torch.int64))


def test_decode_with_ids_of_two_widths() -> None:
    for dtype in (torch.int64, torch.int32):
        STAGES["decode"](meta(8, 2, dtype=torch.float32), meta(8, 2, dtype=dtype))
