"""A launch may reuse a compiled kernel only for what it was compiled for.

Triton compiles a kernel for the dtypes of its arguments; a plan that hands a bf16 kernel fp16 tensors computes silently
wrong numbers. Here every compilation is recorded instead of made, so this needs no GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.kernel.machine import HAS_TRITON, kernel, module

if not HAS_TRITON:
    pytest.skip("there are no launches without triton", allow_module_level=True)

import triton

from tests.kernel.compile_launches import tiled, untiled

launch, tuning, routing = module("stages.triton"), module("tuning"), module("routing")
GATE = module("activations").Gate()


def signature(args: tuple[Any, ...]) -> list[str]:
    """The type of each argument as a compiled kernel takes it for granted."""
    types: list[str] = []
    for argument in args:
        arg = getattr(argument, "record", argument)  # of a record that was prepared
        if isinstance(arg, tuple) and not hasattr(arg, "base"):  # a record
            types += signature(arg)
        else:
            typed = arg if hasattr(arg, "dtype") else getattr(arg, "base", arg)
            types.append(str(getattr(typed, "dtype", type(typed).__name__)))
    return types


class Compiled:
    """Stands for a compiled kernel: refuses arguments of other types than it was compiled for."""

    function = packed_metadata = None

    def __init__(self, name: str, compiled_for: list[str], given: list[str]) -> None:
        self.name, self.compiled_for, self.given = name, compiled_for, given

    def run(self, *_: Any) -> None:
        """Gets addresses, so ``given`` tells the types of the call."""
        pairs = zip(self.given, self.compiled_for, strict=False)
        different = [f"{have} for {was}" for have, was in pairs if have != was]
        assert different == [], f"{self.name}, compiled for other types: {', '.join(different)}"


@pytest.fixture(autouse=True)
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels compiled from now on. No plan outlives the test."""
    modules = [
        module(f"stages.triton.{name}")
        for name in (
            "dequantize",
            "down_backward",
            "few_rows",
            "gemv",
            "grouped_gemm",
            "grouped_wgrad",
            "packed_down_backward",
            "packed_gemm",
            "packed_gemv",
            "permute",
            "routing",
        )
    ]
    cached = [value for part in modules for value in vars(part).values() if hasattr(value, "cache_clear")]
    plan = module("stages.triton.bound_kernel")
    kernel_type, call = type(module("kernels.permute").combine_kernel), plan.BoundKernel.__call__
    if not hasattr(kernel_type, "run"):
        pytest.skip(f"Triton {triton.__version__} gives each kernel of its interpreter a run of its own")
    compiled: list[str] = []
    given: list[str] = []

    def noting_types(self: Any, device: torch.device, grid: tuple[int, int, int], *args: Any) -> None:
        given[:] = signature(args)
        call(self, device, grid, *args)

    def run(function: Any, *args: Any, grid: object, warmup: bool, **options: object) -> Compiled:
        compiled.append(function.__name__)
        return Compiled(function.__name__, signature(args), given)

    monkeypatch.setattr(plan, "driver", mock.MagicMock())
    monkeypatch.setattr(plan.BoundKernel, "__call__", noting_types)
    monkeypatch.setattr(kernel_type, "run", run)
    monkeypatch.setattr(tuning, "target_of", lambda _: tuning.TARGETS[90])
    for function in cached:
        function.cache_clear()
    yield compiled
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("height", tuning.BUCKETS)
def test_two_dtypes_of_one_size(height: int) -> None:
    """bf16 and fp16 share configurations, not kernels."""
    for dtype in (torch.bfloat16, torch.float16):
        for _, _, call in tiled(dtype, height):
            call()


def test_two_dtypes_of_one_size_without_configurations() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for _, _, call in untiled(dtype):
            call()


def test_a_second_call_compiles_nothing(compilations: list[str]) -> None:
    for _, _, call in tiled(torch.bfloat16, 32):
        call()
    once = len(compilations)
    assert once > 0
    for _, _, call in tiled(torch.bfloat16, 32):
        call()
    assert len(compilations) == once


@pytest.mark.parametrize("skip", [False, True], ids=["all", "with-rows"])
def test_packed_weights_dequantized_to_two_dtypes(skip: bool, compilations: list[str]) -> None:
    """The same weights, dequantized to what autocast wants."""
    layout = kernel.Format4bit((4, 64, 64))
    storage = {name: meta(*shape, dtype=torch.uint8) for name, shape in layout.storage().items()}
    stack = module("stages.stacks").PackedStack(layout, tuple(storage.values()))
    offsets = meta(5, dtype=torch.int32) if skip else None
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        out = meta(4, 64, 64, dtype=dtype)
        runs = module("kernels.records").ByteRuns(64 * 32, 64 * 32)
        module("stages.triton.dequantize").dequantize_runs(stack, runs, 0, 4, out, offsets)
    assert compilations == ["dequantize_kernel"] * 2


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
    "gemv": lambda weights, ids: launch.gemv_experts(
        meta(8, 64), ids, weights, meta(4, 64, 64), meta(4, 64, 32), None, None, GATE
    ),
}


def packed(experts: int, out_features: int, in_features: int) -> object:
    form = kernel.Format4bit((experts, out_features, in_features), dtype=torch.bfloat16)
    storage = (meta(*shape, dtype=torch.uint8) for shape in form.storage().values())
    return module("stages.stacks").PackedStack(form, tuple(storage))


STAGES["few_slots"] = lambda weights, ids: launch.gemv_experts(
    meta(8, 64), ids, weights, packed(4, 128, 64), packed(4, 64, 64), None, None, GATE
)


@pytest.mark.parametrize("stage", STAGES)
def test_routing_weights_of_two_dtypes(stage: str) -> None:
    """A router's fp32 in one model, bf16 in the next."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        STAGES[stage](meta(8, 2, dtype=dtype), meta(8, 2, dtype=torch.int64))


def test_gemv_with_ids_of_two_widths() -> None:
    for dtype in (torch.int64, torch.int32):
        STAGES["gemv"](meta(8, 2, dtype=torch.float32), meta(8, 2, dtype=dtype))


def test_a_launch_on_another_device_than_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, and back afterwards; none is entered where there is no need."""
    plan = module("stages.triton.bound_kernel")
    current, entered, launched = [0], [], []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        before, current[0] = current[0], index
        yield
        current[0] = before

    class Kernel:
        arg_names = ("x", "N")

        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *args, **options: launched.append(current[0])

    monkeypatch.setattr(plan.driver.active, "get_current_device", lambda: current[0])
    monkeypatch.setattr(torch, "get_device_module", lambda _: mock.Mock(device=device))
    bound = plan.BoundKernel(Kernel(), {"N": 3})
    bound(torch.device("cuda", 1), (1, 1, 1), 5)
    bound(torch.device("cuda", 0), (1, 1, 1), 5)
    assert (launched, entered, current) == ([1, 0], [1], [0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_a_view_is_the_memory_from_an_element_on(dtype: torch.dtype) -> None:
    base = torch.arange(64, dtype=torch.uint8)[16:]
    view = module("stages.triton.bound_kernel").View(base, 4, dtype)
    slice_of_it = base[4:].view(dtype)
    checked = view.checked()
    assert view.data_ptr() == checked.data_ptr() == slice_of_it.data_ptr()
    assert view.dtype == checked.dtype == dtype
    assert checked[0] == slice_of_it[0]
