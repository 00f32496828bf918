"""Checks an installation: which packages are installed and fit, what would run, and whether it computes correctly.

A missing or broken package is a finding and never raises an error. The checks are independent, and a check that needs
something that another check found missing is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from . import hub
from .integrations.quantizer import bitsandbytes_cpu


class Status(str, Enum):
    OK = "ok"
    ABSENT = "absent"  # missing, but not needed for everything
    PROBLEM = "problem"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was checked.
        found: the finding, in a few words.
        advice: what to do, if anything.
    """

    name: str
    status: Status
    found: str
    advice: str | None = None


def examine() -> Iterator[Check]:
    """Yields all checks, each as soon as it is done."""
    yield _python()
    fit = True
    for check in _packages():
        fit &= check.status is not Status.PROBLEM
        yield check
    if importlib.util.find_spec("torch") is None:
        return
    for name, look in (("GPU", _gpus), ("4-bit weights", _four_bit), ("recurrent layers", _recurrent)):
        yield from _guarded(name, look)
    if not fit:
        yield Check("self-test", Status.ABSENT, "left out until the packages fit")
        return
    try:
        kernel = hub.get_kernel()
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the finding
        yield Check("kernel", Status.PROBLEM, _line(error), _kernel_advice())
        return
    yield from _guarded("kernel", partial(_kernel, kernel))
    yield from _guarded("published formats", _published)
    yield from _guarded("path", partial(_path, kernel))
    yield from _guarded("launches", partial(_launches, kernel))
    yield from _guarded("configurations", partial(_configurations, kernel))
    yield from _guarded("self-test", partial(_test, kernel))


def _guarded(name: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from look()
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the finding
        yield Check(name, Status.PROBLEM, _line(error))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# Packages.


def _python() -> Check:
    return Check("python", Status.OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Check]:
    try:
        for requirement in hub.requirements():
            status = Status.OK if requirement.problem is None else Status.PROBLEM
            found = requirement.found or "not installed"
            if requirement.package == "torch" and requirement.problem is None:
                found = _torch_build(found)
            yield Check(requirement.package, status, found, requirement.problem)
            if requirement.problem is not None and requirement.package == "transformers":
                break  # the next requirement depends on transformers
    except ImportError as error:
        yield Check("kernels", Status.PROBLEM, _line(error), hub.install("transformers"))
    for package, (needed, purpose) in hub.OPTIONAL.items():
        yield _optional(package, needed, purpose)


def _torch_build(found: str) -> str:
    """Returns the version that torch reports. It names the build (+cu130), which the version of the package may lack."""
    try:
        import torch
    except (ImportError, OSError):  # the check of GPUs finds a broken torch
        return found
    return str(torch.__version__)


def _optional(package: str, needed: str, purpose: str) -> Check:
    install = f"pip install '{package}{needed}'"
    found = hub.installed(package)
    if found is None:
        return Check(package, Status.ABSENT, "not installed", f"for {purpose}: {install}")
    try:
        if not hub.fits(found, needed):
            return Check(package, Status.PROBLEM, found, f"{purpose} needs {package}{needed}: {install}")
    except ImportError:
        return Check(package, Status.PROBLEM, found, "pip install packaging, by which versions are compared")
    return Check(package, Status.OK, found)


# Devices.


def driver_version() -> str:
    """Returns the version of NVIDIA's driver, or an empty string."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return ""
    command = [path, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.split("\n")[0].strip() if run.returncode == 0 else ""


def _gpus() -> Iterator[Check]:
    import torch

    driver = driver_version()
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            arch = f"compute capability {properties.major}.{properties.minor}"
            if torch.version.hip:
                arch = str(getattr(properties, "gcnArchName", "unknown"))
            found = f"{properties.name}, {arch}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {runtime}"
            yield Check(f"GPU {index}", Status.OK, f"{found}, driver {driver}" if driver else found)
    elif torch.xpu.is_available():
        for index in range(torch.xpu.device_count()):
            yield Check(f"GPU {index}", Status.OK, torch.xpu.get_device_name(index))
    elif driver:
        found = f"torch {torch.__version__} sees none, but there is one with driver {driver}"
        yield Check("GPU", Status.PROBLEM, found, "install a torch for that driver: pytorch.org/get-started")
    else:
        yield Check("GPU", Status.ABSENT, "none", "without one everything runs, slowly")


def _four_bit() -> Iterator[Check]:
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        advice = "pip install 'moe-fused[bnb]'"
        yield Check("4-bit weights", Status.ABSENT, f"not without {' and '.join(missing)}", advice)
        return
    importlib.import_module("bitsandbytes")  # this loads its native library
    yield Check("4-bit weights", Status.OK, "available, for linear layers and experts")
    if bitsandbytes_cpu.repacks_on_this_cpu():
        found = "linear layers compute as on every other CPU; bitsandbytes' own path for avx512_bf16 is switched off"
        yield Check("4-bit on the CPU", Status.OK, found)


def _recurrent() -> Iterator[Check]:
    """Says whether the kernels for recurrent layers run, which Transformers takes from other packages."""
    import torch

    from . import recurrent

    if not torch.cuda.is_available():
        yield Check("recurrent layers", Status.OK, "in plain torch, as there is no GPU")
        return
    kinds, there = set(recurrent.KINDS.values()), recurrent.packages()
    for kind in sorted(kinds, key=lambda kind: kind.title):
        if kind.package in there:
            yield Check(kind.title, Status.OK, f"in {kind.distribution}")
        else:
            dense = " with dense weights" if kind.needs_dense else ""
            advice = f"for models with such layers{dense}: pip install {kind.distribution}"
            yield Check(kind.title, Status.ABSENT, "in plain torch, which takes more memory and time", advice)


# What would run.


def _kernel(kernel: ModuleType) -> Iterator[Check]:
    source, place = hub.KernelSource.find(), Path(str(kernel.__file__)).parent
    if source.is_overridden():
        origin = "from LOCAL_KERNELS"
    elif source.has_builds():
        origin = "built in this checkout" if source.is_checkout else "shipped with moe-fused"
    else:
        origin = "from the Hub"
    yield Check("kernel", Status.OK, f"{source.repo_id} version {source.version}, {place.name}, {origin}: {place}")


def _published() -> Iterator[Check]:
    """Says which formats of published checkpoints are read, by quantizers that take the place of Transformers' own."""
    importlib.import_module("moe_fused.integrations.quantizer.published")
    found = (
        "experts in mxfp4 (gpt-oss) and in mxfp4 and nvfp4 of compressed-tensors are read as they are, without "
        "triton_kernels and compressed-tensors; linear layers of compressed-tensors are dequantized"
    )
    yield Check("published formats", Status.OK, found)


def _kernel_advice() -> str:
    """Returns what to do about a kernel that cannot be loaded."""
    if hub.malformed_entry() is not None or hub.KernelSource.find().is_overridden():
        return (
            "unset LOCAL_KERNELS, or correct it: it must hold REPOSITORY=DIRECTORY, with a directory that has a build"
        )
    return "reinstall moe-fused, or in a checkout `make build`"


def _device() -> Any:
    from .devices import choose_device

    return choose_device("auto")


def _path(kernel: ModuleType) -> Iterator[Check]:
    import torch

    device = _device()
    backend = hub.submodule(kernel, "stages")
    try:
        stages = backend.backend_for(torch.empty(0, device=device), torch.bfloat16)
    except RuntimeError as error:
        yield Check("path", Status.PROBLEM, _line(error))
        return
    name = "plain torch" if stages is kernel.reference else "Triton kernels"
    yield Check("path", Status.OK, f"{name} on {device.type}")
    if device.type == "cpu" and torch.cuda.is_available():
        yield Check("path", Status.PROBLEM, "the GPU is too old", "compute capability 8.0 (Ampere) or newer is needed")


def _launches(kernel: ModuleType) -> Iterator[Check]:
    """Says what is slower where Triton is not one whose launches can be shortened."""
    import torch

    device = _device()
    if device.type == "cpu":
        return
    try:
        hub.submodule(kernel, "stages").backend_for(torch.empty(0, device=device), torch.bfloat16)
    except RuntimeError:
        return  # the path says so
    path = hub.submodule(kernel, "stages.triton.launcher").launch_path()
    if path.cost:
        found = f"slower by {path.cost}, which matters up to some 512 tokens: {path.reason}"
        yield Check("launches", Status.OK, found)


def _configurations(kernel: ModuleType) -> Iterator[Check]:
    device, tuning = _device(), hub.submodule(kernel, "tuning")
    arch = tuning.target_of(device).arch
    tables = tuning.table_paths(arch)  # raises if MOE_FUSED_CONFIGS is no directory
    if device.type == "cpu":
        yield from _tables_for_gpus(tuning)
        return
    for path in tables:
        tuning.read_table(path)
    if tables:
        yield Check("configurations", Status.OK, f"measured: {', '.join(map(str, tables))}")
    else:
        advice = f"`moe-fused tune` measures, and {tuning.CONFIGS_VARIABLE} names the directory of the result"
        yield Check("configurations", Status.OK, f"defaults, as nobody has measured {arch}", advice)


def _tables_for_gpus(tuning: Any) -> Iterator[Check]:
    """Reads the tables in ``MOE_FUSED_CONFIGS`` on a machine without a GPU, which uses none of them."""
    directory = os.environ.get(tuning.CONFIGS_VARIABLE)
    if not directory:
        return
    tables = sorted(Path(directory).glob("*.json"))
    for path in tables:
        tuning.read_table(path)
    found = f"measured: {', '.join(map(str, tables))}" if tables else f"no tables in {directory}"
    yield Check("configurations", Status.OK, f"{found}; without a GPU none is used")


def _test(kernel: ModuleType) -> Iterator[Check]:
    from . import selftest

    for result in selftest.run(kernel, _device()):
        name, error = max(result.errors.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
        found = f"off by {error:.1e} in {name}, at most {result.tolerance:.0e} allowed, {result.seconds:.1f} s"
        advice = None if result.passed else "please report this with the output of `moe-fused doctor --json`"
        yield Check(f"self-test: {result.case.name}", Status.OK if result.passed else Status.PROBLEM, found, advice)


def environment() -> dict[str, str]:
    """Returns the environment variables that change what runs, as far as they are set."""
    names = (
        "LOCAL_KERNELS", "MOE_FUSED_ADAMW", "MOE_FUSED_CHECK", "MOE_FUSED_CONFIGS", "MOE_FUSED_QKV", "TRITON_INTERPRET",
        "CUDA_VISIBLE_DEVICES",
    )  # fmt: skip
    return {name: os.environ[name] for name in names if name in os.environ}
