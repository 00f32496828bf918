"""Arguments and constants of kernels that are records: NamedTuples, whose fields a kernel reads by attribute."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.kernel.machine import DEVICE, HAS_TRITON, ON_GPU, module

if not HAS_TRITON:
    pytest.skip("there are no launches without triton", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from tests.kernel.offline_compile import compiling_for, gpu_target, source_of
from tests.support import REPOSITORY, python_path

plan = module("stages.triton.bound_kernel")


class Scales(NamedTuple):
    absmax: Any
    offset: Any


class Weights(NamedTuple):
    codes: Any
    scales: Any


class OtherWeights(NamedTuple):
    scales: Any
    codes: Any


class Formula(NamedTuple):
    function: Any
    bias: float
    name: str
    digest: str = ""


class Tiles(NamedTuple):
    block: int
    formula: Formula


class Undigested(NamedTuple):
    function: Any


@triton.jit
def formula(x):
    return x + x


DOUBLE = formula


@triton.jit
def formula(x):  # of the same name
    return x * x


SQUARE = formula


@triton.jit(do_not_specialize=["n"])
def kernel(x, weights, n, factor, out, FORMULA: tl.constexpr, TILES: tl.constexpr):
    """Grid (ceil(n / TILES.block),): out = FORMULA(x · (absmax + offset) + codes) · factor + bias, all (n,)."""
    at = tl.program_id(0) * TILES.block + tl.arange(0, TILES.block)
    inside = at < n
    scale = tl.load(weights.scales.absmax + at, mask=inside) + tl.load(weights.scales.offset + at, mask=inside)
    value = tl.load(x + at, mask=inside) * scale + tl.load(weights.codes + at, mask=inside).to(tl.float32)
    value = FORMULA.function(value) * factor + FORMULA.bias
    if FORMULA.name == "Doubled twice":
        value = TILES.formula.function(value)
    tl.store(out + at, value, mask=inside)


COMPILED = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, do_not_specialize=["n"])


def compiled(function: Any) -> JITFunction:
    """``function`` as it is outside the interpreter."""
    return function if isinstance(function, JITFunction) else JITFunction(function.fn)


def constants(function: Any, name: str = "silu") -> dict[str, Any]:
    return {"FORMULA": Formula(function, 0.25, name), "TILES": Tiles(16, Formula(function, 0.0, ""))}


def tensors(device: torch.device | str = DEVICE) -> list[Tensor]:
    """x, absmax, memory whose elements from 16 on are the offsets, codes, out."""
    generator = torch.Generator().manual_seed(3)
    x, absmax, memory, out = (torch.randn(size, generator=generator).to(device) for size in (40, 40, 56, 40))
    codes = torch.randint(0, 256, (40,), generator=generator, dtype=torch.uint8).to(device)
    return [x, absmax, memory, codes, out]


def test_a_kernel_reads_records_by_attribute() -> None:
    """With a View in a record within a record, and functions and numbers in records of constants."""
    x, absmax, memory, codes, out = tensors()
    weights = Weights(codes, Scales(absmax, plan.View(memory, 16, torch.float32)))
    value = x * (absmax + memory[16:]) + codes
    for function, expected in ((DOUBLE, value + value), (SQUARE, value * value)):
        for name in ("silu", "Doubled twice"):
            bound = plan.BoundKernel(kernel, constants(function, name))
            for _ in range(2):  # compiled, then launched
                out.zero_()
                bound(out.device, (3, 1, 1), x, weights, 40, 0.5, out)
                once = expected * 0.5 + 0.25
                twice = once + once if function is DOUBLE else once * once
                torch.testing.assert_close(out, once if name == "silu" else twice)


def compile_for_hopper(name: str) -> list[tuple[str, int]]:
    """The kernels that a launch compiles, with their spills."""
    x, absmax, memory, codes, out = tensors("meta")
    weights = Weights(codes, Scales(absmax, plan.View(memory, 16, torch.float32)))
    bound = plan.BoundKernel(COMPILED, constants(compiled(DOUBLE), name))
    with compiling_for(90) as resources:
        bound(torch.device("cpu"), (3, 1, 1), x, weights, 40, 0.5, out)
    return [(kernel.kernel, kernel.spills) for kernel in resources]


@pytest.mark.skipif(triton.__version__.startswith("3.5."), reason="what its interpreter patches stays so")
def test_it_compiles_for_hopper() -> None:
    """In a process of its own, because a kernel that fails in the interpreter leaves Triton's language changed."""
    program = """
from tests.kernel.test_bound_kernel_records import compile_for_hopper
print([compile_for_hopper(name) for name in ("silu", "Doubled twice")])
"""
    environment = {**os.environ, "PYTHONPATH": python_path(REPOSITORY)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == str([[("kernel", 0)]] * 2)


# What compiled kernels are kept for.


class Recording:
    """A kernel whose compiled ones note what they are launched with."""

    arg_names = ("first", "record", "second", "BLOCK")

    def __init__(self) -> None:
        self.ordinary: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self.ordinary.append(args)
            return SimpleNamespace(run=run, function=7, packed_metadata=None)

        def run(*args: Any) -> None:
            self.launched.append(args[9:])

        return launch


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    active = mock.Mock()
    active.get_current_device.return_value = 0
    monkeypatch.setattr(plan, "driver", SimpleNamespace(active=active))
    return Recording()


def bind(recording: Recording) -> Callable[..., None]:
    bound = plan.BoundKernel(recording, {"BLOCK": 64})
    return lambda *args: bound(torch.device("cuda", 0), (1, 1, 1), *args)


def test_launches_have_addresses_nested_as_the_records_are(recording: Recording) -> None:
    x, absmax, memory, codes, out = tensors("cpu")
    view = plan.View(memory, 16, torch.float32)
    call = bind(recording)
    record = Weights(codes, Scales(absmax, view))
    call(x, record, out)
    call(x, record, out)
    ((first, given, second, block),) = recording.ordinary
    assert (first is x, second is out, block) == (True, True, 64)
    assert (type(given), type(given.scales)) == (Weights, Scales), "Triton reads fields by name"
    assert (given.codes is codes, given.scales.absmax is absmax) == (True, True)
    assert torch.equal(given.scales.offset[:1], memory[16:17]), "Views become tensors"
    nested = (codes.data_ptr(), (absmax.data_ptr(), memory[16:].data_ptr()))
    assert recording.launched == [(x.data_ptr(), nested, out.data_ptr(), 64)]


@pytest.mark.parametrize("place", ["top", "field", "nested field", "view"])
def test_each_dtype_has_a_kernel_of_its_own(place: str, recording: Recording) -> None:
    call = bind(recording)
    for dtype in (torch.float32, torch.float16, torch.float32, torch.float16):
        x, absmax, memory, codes, out = tensors("cpu")
        if place == "top":
            x = x.to(dtype)
        elif place == "field":
            codes = codes.to(dtype)
        elif place == "nested field":
            absmax = absmax.to(dtype)
        offset = plan.View(
            memory.to(dtype) if place == "view" else memory, 16, dtype if place == "view" else torch.float32
        )
        call(x, Weights(codes, Scales(absmax, offset)), out)
    assert (len(recording.ordinary), len(recording.launched)) == (2, 2)


def test_each_dtype_of_a_descriptor_has_a_kernel_of_its_own(recording: Recording) -> None:
    call = bind(recording)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16, torch.float16):
        rows = torch.zeros(32, 32, dtype=dtype)
        call(plan.Descriptor(rows, (32, 32), (32, 1), (16, 16)), Scales(rows, rows.view(torch.int16)), 5)
    assert (len(recording.ordinary), len(recording.launched)) == (2, 2)


def test_each_type_of_record_has_a_kernel_of_its_own(recording: Recording) -> None:
    """Fields are read by name, so the same dtypes in another record are another kernel."""
    x, absmax, memory, _, out = tensors("cpu")
    call = bind(recording)
    for _ in range(2):
        call(x, Weights(absmax, memory), out)
        call(x, OtherWeights(absmax, memory), out)
    assert (len(recording.ordinary), len(recording.launched)) == (2, 2)


@pytest.mark.parametrize("place", ["field", "nested field", "view"])
def test_a_pointer_in_a_record_that_is_not_aligned(place: str, recording: Recording) -> None:
    """Kernels are compiled for aligned ones, so it takes the ordinary way, and what that compiles is not kept."""
    x, absmax, memory, codes, out = tensors("cpu")
    call = bind(recording)
    aligned = Weights(codes, Scales(absmax, plan.View(memory, 16, torch.float32)))
    if place == "field":
        askew = aligned._replace(codes=codes[1:])
    elif place == "nested field":
        askew = aligned._replace(scales=aligned.scales._replace(absmax=absmax[1:]))
    else:
        askew = aligned._replace(scales=aligned.scales._replace(offset=plan.View(memory, 15, torch.float32)))
    call(x, askew, out)
    call(x, aligned, out)
    call(x, askew, out)
    assert (len(recording.ordinary), len(recording.launched)) == (3, 0)
    call(x, aligned, out)
    assert (len(recording.ordinary), len(recording.launched)) == (3, 1)


@pytest.mark.parametrize("wrong", ["a number", "None", "a descriptor"])
def test_what_records_of_arguments_cannot_hold(wrong: str, recording: Recording) -> None:
    """Triton would compile for the number's value, although its parameter says otherwise."""
    x, absmax, _, codes, out = tensors("cpu")
    rows = torch.zeros(32, 32)
    field = {"a number": 16, "None": None, "a descriptor": plan.Descriptor(rows, (32, 32), (32, 1), (16, 16))}[wrong]
    with pytest.raises(AssertionError, match="records of arguments hold tensors and further records"):
        bind(recording)(x, Weights(codes, Scales(absmax, field)), out)
    assert recording.ordinary == []


# Constants.


def hash_of(bound: Any) -> str:
    """What Triton finds the compiled kernel by on the disk."""
    x, absmax, memory, codes, out = tensors("meta")
    args = (x, Weights(codes, Scales(absmax, memory)), 40, 0.5, out)
    source, _ = source_of(bound.kernel, (*args, *bound.constants), bound.options, gpu_target(90))
    return source.hash()


def test_a_function_s_code_is_part_of_the_hash() -> None:
    """The hash tells apart two functions with the same name, as before and after a change, in any record."""
    double, square = compiled(DOUBLE), compiled(SQUARE)
    assert str(double) == str(square)
    bound = [
        plan.BoundKernel(COMPILED, {"FORMULA": Formula(first, 0.0, ""), "TILES": Tiles(16, Formula(second, 0.0, ""))})
        for first in (double, square)
        for second in (double, square)
    ]
    assert len({hash_of(one) for one in bound}) == 4
    again = plan.BoundKernel(COMPILED, constants(double))
    assert hash_of(again) == hash_of(plan.BoundKernel(COMPILED, constants(double)))


def test_without_a_digest_triton_takes_one_function_for_another() -> None:
    """What digests are for. Once this fails on every Triton that we take, they can go."""
    hashes = set()
    for function in (DOUBLE, SQUARE):
        bound = plan.BoundKernel(COMPILED, constants(compiled(function)))
        bound.constants = (Formula(compiled(function), 0.0, ""), Tiles(16, Formula(compiled(function), 0.0, "")))
        hashes.add(hash_of(bound))
    assert len(hashes) == 1


def test_digests() -> None:
    function = compiled(DOUBLE)
    formula = plan.with_digest(Formula(function, 0.5, "silu"))
    assert (type(formula), formula.function, formula.bias, formula.name) == (Formula, function, 0.5, "silu")
    assert len(formula.digest) == 64
    assert formula.digest == formula.digest.lower(), "a D means an aligned pointer to Triton 3.6"
    tiles = plan.with_digest(Tiles(16, Formula(function, 0.5, "silu")))
    assert tiles == Tiles(16, formula), "also within another record"
    assert plan.with_digest(Formula(None, 0.5, "silu", "old")).digest == "", "without a function there is none"
    plain = (3, "silu", (1, 2), Scales(3, None), function, tl.float32)
    assert tuple(map(plan.with_digest, plain)) == plain


@pytest.mark.parametrize("wrap", [lambda record: record, lambda record: Scales(record, 3), lambda record: (record, 3)])
def test_a_record_with_functions_needs_a_digest(wrap: Callable[[Any], Any]) -> None:
    record = wrap(Undigested(compiled(DOUBLE)))
    with pytest.raises(AssertionError, match=r"needs a field named digest: .*Undigested"):
        plan.BoundKernel(COMPILED, {"FORMULA": record, "TILES": 16})


@pytest.mark.skipif(ON_GPU or isinstance(kernel, JITFunction), reason="not in the interpreter")
def test_in_the_interpreter_digests_are_empty() -> None:
    assert plan.with_digest(Formula(DOUBLE, 0.5, "silu")).digest == ""
    assert plan.with_digest(Undigested(DOUBLE)) == Undigested(DOUBLE)
