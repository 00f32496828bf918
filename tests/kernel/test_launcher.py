"""Launches hand the driver what Triton's own launcher would, on every Triton, and never fail because that has changed.

None of this needs a GPU: the launchers are Triton's own, with something in the place of what launches.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.kernel.machine import HAS_TRITON, ON_GPU, module
from tests.support import REPOSITORY

if not HAS_TRITON:
    pytest.skip("there are no launches without triton", allow_module_level=True)
if torch.version.hip is not None:
    pytest.skip("on AMD GPUs launches go through Triton's own functions", allow_module_level=True)

from triton import knobs
from triton.backends.nvidia import driver

from tests.kernel import fake_cuda

plan, launcher = module("stages.triton.bound_kernel"), module("stages.triton.launcher")


# With what Triton compiles from its C, on a library that runs nothing.


@pytest.fixture(scope="module")
def arrived(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What arrived at the driver, by kernel and launch."""
    if ON_GPU:
        pytest.skip("the library would stand before the real one")
    try:
        environment = fake_cuda.build(tmp_path_factory.mktemp("cuda"))
    except FileNotFoundError as error:
        pytest.skip(f"this machine lacks {error}")
    command = [sys.executable, "-m", "tests.kernel.fake_cuda"]
    run = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_launches_are_direct(arrived: dict[str, Any]) -> None:
    assert arrived["path"]["path"] == "direct", arrived["path"]["reason"]


@pytest.mark.parametrize("kernel", ["flat", "everything"])
def test_the_driver_gets_what_triton_hands_it(kernel: str, arrived: dict[str, Any]) -> None:
    """Grid, stream, and each parameter of the kernel, bit for bit."""
    launches = arrived[kernel]
    assert launches["path"] == "direct"
    encoded = {name: launch.pop("encoded") for name, launch in launches.items() if isinstance(launch, dict)}
    assert launches["here, directly"] == launches["here, by Triton"]
    assert launches["there, directly"] == launches["there, again"] == launches["there, by Triton"]
    assert launches["here, directly"] != launches["there, directly"]
    for place, address in zip(("here", "there"), launches["x"], strict=True):
        launch = launches[f"{place}, directly"]
        assert (launch["grid"], launch["stream"]) == ([3, 2, 1], 77)
        assert int.from_bytes(bytes.fromhex(launch["parameters"][0]), "little") == address
    descriptors = 2 if kernel == "everything" else 0
    assert encoded["there, by Triton"] == encoded["there, directly"] == descriptors
    assert encoded["there, again"] == 0, "tensor maps are kept"


def test_two_unlike_gpus_get_a_kernel_each(arrived: dict[str, Any]) -> None:
    """Compiled for the GPU of the tensors and launched there on its stream, whichever is the current one."""
    launches = arrived["two GPUs"]
    assert [launch["gpu"] for launch in launches] == [1, 0, 1, 0]
    assert [launch["on"] for launch in launches] == [1, 0, 1, 0]
    assert [launch["stream"] for launch in launches] == [78, 77, 78, 77]
    assert [launch["arch"] for launch in launches] == [80, 90, 80, 90]
    assert [launch["kernels"] for launch in launches] == [1, 2, 2, 2]
    assert {launch["after"] for launch in launches} == {0}, "the current GPU is what it was"


# With launchers that are built by hand.


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """A driver for an NVIDIA GPU, without one."""
    active = mock.Mock(launcher_cls=driver.CudaLauncher)
    active.get_current_device.return_value = 0
    active.get_current_stream.return_value = 11
    monkeypatch.setattr(launcher, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(plan, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(type(driver.triton.runtime.driver), "active", active)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "get_device_module", mock.Mock())
    return active


def built(launch: Callable[..., object], types: list[str], of: type = driver.CudaLauncher, **attributes: Any) -> Any:
    """A compiled kernel with arguments of ``types`` whose launcher calls ``launch``."""
    run = object.__new__(of)
    signature = {f"x{index}": name for index, name in enumerate(types)}
    metadata = [{"elem_size": 2} for name in types if name.startswith("tensordesc")]
    run.__dict__.update(
        {
            "launch": driver.wrap_handle_tensordesc(launch, signature, metadata),
            "arg_annotations": ["annotated"],
            "kernel_signature": b"signature",
            "gsan_enabled": False,
            "num_ctas": 1,
            "global_scratch_size": 0,
            "global_scratch_align": 1,
            "profile_scratch_size": 0,
            "profile_scratch_align": 1,
            "launch_cooperative_grid": False,
            "launch_pdl": False,
            **attributes,
        }
    )
    return SimpleNamespace(run=run, function=7, packed_metadata=("packed",), src=SimpleNamespace(signature=signature))


def descriptor(base: Tensor) -> Any:
    return plan.Descriptor(base, tuple(base.shape), base.stride(), (64, 64))


def test_the_installed_triton_is_known(nvidia: mock.Mock) -> None:
    """What direct launches rest on exists, and is as it was."""
    found = launcher.path_of(driver.CudaLauncher)
    assert found.path == "direct", found.reason
    assert found.cost == ""


def test_the_short_cut_passes_what_triton_passes(nvidia: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors between other arguments, twice, then one at another address: same arguments, two encodings."""
    encoded: list[int] = []

    def encode(descriptor: Any, metadata: dict[str, int], *_: Any) -> list[Any]:
        encoded.append(descriptor.base.data_ptr())
        return [(descriptor.base.data_ptr(), metadata["elem_size"]), *descriptor.shape, *descriptor.strides]

    launches: list[list[Any]] = []

    def launch(*args: Any) -> None:
        *before, last = args
        launches.append([*before, *last] if isinstance(last, list | tuple) else [*args])

    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    types = ["*bf16", "tensordesc<bf16[64,64]>", "i32", "tensordesc<bf16[32,64]>", "constexpr", "constexpr"]
    kernel = built(launch, types)
    compiled = launcher.Launcher(kernel, (1, 3))
    assert compiled.path == "direct"

    def call(rows: Tensor, other: Tensor) -> None:
        values = [rows.data_ptr(), descriptor(rows), 5, descriptor(other)]
        launches.clear()
        compiled((3, 1, 1), 11, values.copy(), (64, "silu"))
        kernel.run(3, 1, 1, 11, 7, ("packed",), None, None, None, *values, 64, "silu")
        assert len(launches) == 2
        assert launches[0] == launches[1]

    rows, other, third = (torch.zeros(size, 8) for size in (4, 6, 6))
    call(rows, other)
    once = encoded.copy()
    assert sorted(once[:2]) == sorted(once[2:])
    encoded.clear()
    call(rows, other)
    assert encoded == once[2:], "Triton's own encodes again, the short cut does not"
    encoded.clear()
    call(rows, third)
    assert encoded.count(third.data_ptr()) == 2
    assert encoded.count(rows.data_ptr()) == 1


# Launchers of a Triton that nobody has seen.


class OfOtherParameters(driver.CudaLauncher):
    """Wants the stream first."""

    def __call__(self, stream: int, gridX: int, gridY: int, gridZ: int, *args: Any) -> None:
        raise AssertionError("nobody knows what to call this with")


class OfOtherOrder(driver.CudaLauncher):
    """Hands the kernel's arguments over in front of everything."""

    def __call__(self, *args: Any) -> None:
        self.launch(*args[9:], *args[:9])


class OfTheGrid(driver.CudaLauncher):
    """Hands something over that depends on the grid."""

    def __call__(self, *args: Any) -> None:
        self.launch(*args[:5], args[0] * args[1] * args[2], *args[9:])


class OfMore(driver.CudaLauncher):
    """Wants an attribute that is private to it, and launches twice."""

    def __call__(self, *args: Any) -> None:
        self.launch(*args[:5], *args[9:])
        self.launch(*args[:5], *args[9:])


@pytest.mark.parametrize(
    "of, path", [(OfOtherParameters, "ordinary"), (OfOtherOrder, "run"), (OfTheGrid, "run"), (OfMore, "run")]
)
def test_an_unknown_launcher_launches_by_itself(of: type, path: str, nvidia: mock.Mock) -> None:
    found = launcher.path_of(of)
    assert found.path == path
    assert "Triton" in found.reason
    assert f"{20 if path == 'run' else 50} µs" in found.cost
    assert launcher.Launcher(built(print, ["*fp32"], of)).path == path


def test_scratch_memory_is_triton_s_to_allocate(nvidia: mock.Mock) -> None:
    assert launcher.Launcher(built(print, ["*fp32"], global_scratch_size=128)).path == "run"
    assert launcher.Launcher(built(print, ["*fp32"], profile_scratch_size=128)).path == "run"


def test_an_unknown_expansion_of_descriptors(nvidia: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's launcher gets descriptors as it compiled for, whatever it reads of them."""
    given: list[Any] = []

    class Other(driver.CudaLauncher):
        def __call__(self, *args: Any) -> None:
            given.extend(args)

    types = ["tensordesc<fp32[64,64]>", "i32"]
    kernel = built(print, types, Other)
    assert launcher.Launcher(built(print, types), (0,)).path == "direct"
    monkeypatch.delattr(driver, "wrap_handle_tensordesc")
    assert launcher.path_of(driver.CudaLauncher).path == "run"
    compiled = launcher.Launcher(kernel, (0,))
    assert compiled.path == "run"
    given.clear()
    rows = torch.zeros(4, 8)
    compiled((3, 1, 1), 11, [descriptor(rows), 5], (64,))
    assert given[:9] == [3, 1, 1, 11, 7, ("packed",), None, None, None]
    assert type(given[9]) is plan.TensorDescriptor
    assert (given[9].base is rows, given[10:]) == (True, [5, 64])


class Kernel:
    """A kernel of two arguments and a constant; ``ordinary`` counts its ordinary launches."""

    arg_names = ("x", "n", "BLOCK")

    def __init__(self, compiled: Any) -> None:
        self.compiled, self.ordinary = compiled, 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self.ordinary += 1
            return self.compiled

        return launch


def launched_once(run: Callable[..., None]) -> tuple[Kernel, Callable[[], Any]]:
    """A kernel whose direct launches call ``run``, after its first launch, and a function that launches it again."""
    kernel = Kernel(built(run, ["*fp32", "i32", "constexpr"]))
    bound = plan.BoundKernel(kernel, {"BLOCK": 64})
    call = functools.partial(bound, torch.device("cuda", 0), (1, 1, 1), torch.zeros(8), 5)
    call()
    return kernel, call


def test_a_launch_does_not_fail_as_triton_has_changed(nvidia: mock.Mock) -> None:
    def refuse(*args: Any) -> None:
        raise TypeError("function takes exactly 17 arguments (16 given)")

    kernel, call = launched_once(refuse)
    with pytest.warns(RuntimeWarning, match="'direct' failed: function takes exactly 17"):
        call()
    call()
    assert kernel.ordinary == 3


def test_an_error_of_the_gpu_is_not_one_of_triton(nvidia: mock.Mock) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    kernel, call = launched_once(fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        call()
    assert kernel.ordinary == 1


def test_a_compiled_kernel_without_a_launcher(nvidia: mock.Mock) -> None:
    """It is launched as it was the first time, and not examined again."""
    kernel = Kernel(SimpleNamespace())
    bound = plan.BoundKernel(kernel, {"BLOCK": 64})
    with mock.patch.object(plan, "Launcher", wraps=plan.Launcher) as examined:
        for _ in range(3):
            bound(torch.device("cuda", 0), (1, 1, 1), torch.zeros(8), 5)
    assert (kernel.ordinary, examined.call_count) == (3, 1)


# Which way launches take here, and why.


class NoDriver:
    @property
    def active(self) -> None:
        raise RuntimeError("0 active drivers ([]).\nThere should only be one.")


def test_the_path_of_this_process(nvidia: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert launcher.launch_path().path == "direct"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert launcher.launch_path().path == "run"
    monkeypatch.setattr(launcher, "driver", NoDriver())
    assert launcher.launch_path() == (
        "ordinary",
        "Triton has no driver here: 0 active drivers ([]). There should only be one.",
    )
    monkeypatch.setattr(launcher, "_AMD", True)
    assert re.search("AMD", launcher.launch_path().reason)
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert re.search("interpreter", launcher.launch_path().reason)


def test_a_profiler_hears_of_launches(nvidia: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    kernel = Kernel(built(lambda *_: None, ["*fp32", "i32", "constexpr"]))
    bound = plan.BoundKernel(kernel, {"BLOCK": 64})
    call = functools.partial(bound, torch.device("cuda", 0), (1, 1, 1), torch.zeros(8), 5)
    call()
    call()
    assert kernel.ordinary == 1
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", print)
    call()
    assert kernel.ordinary == 2
    assert launcher.launch_path().path == "ordinary"
    assert "profiler" in launcher.launch_path().reason
