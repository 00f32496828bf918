"""What is installed here, whether it fits, what would run, and whether that computes what it should.

Never raises for what is missing or broken: that is what it is asked about. Each check stands on its own, and one that needs
what another found missing is left out.
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


class Status(str, Enum):
    OK = "ok"
    ABSENT = "absent"  # and not needed for everything
    PROBLEM = "problem"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: of what was looked at.
        found: what there is, in a few words.
        advice: what to do, if something is.
    """

    name: str
    status: Status
    found: str
    advice: str | None = None


def examine() -> Iterator[Check]:
    """All checks, each as it comes."""
    yield _python()
    fit = True
    for check in _packages():
        fit &= check.status is not Status.PROBLEM
        yield check
    if importlib.util.find_spec("torch") is None:
        return
    for name, look in (("GPU", _gpus), ("4-bit weights", _four_bit)):
        yield from _guarded(name, look)
    if not fit:
        yield Check("self-test", Status.ABSENT, "left out until the packages fit")
        return
    try:
        kernel = hub.get_kernel()
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises is the finding
        yield Check("kernel", Status.PROBLEM, _line(error), "reinstall moe-fused, or in a checkout `make build`")
        return
    yield from _guarded("kernel", partial(_kernel, kernel))
    yield from _guarded("path", partial(_path, kernel))
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
        for own in hub.requirements():
            status = Status.OK if own.problem is None else Status.PROBLEM
            found = own.found or "not installed"
            if own.package == "torch" and own.problem is None:
                found = _torch_build(found)
            yield Check(own.package, status, found, own.problem)
            if own.problem is not None and own.package == "transformers":
                break  # the next one asks it
    except ImportError as error:
        yield Check("kernels", Status.PROBLEM, _line(error), "pip install --upgrade moe-fused")
    for package, (needed, purpose) in hub.OPTIONAL.items():
        yield _optional(package, needed, purpose)


def _torch_build(found: str) -> str:
    """The version as torch has it, with the build (+cu130), which that of its distribution may lack."""
    try:
        import torch
    except (ImportError, OSError):  # a broken one is found by who asks it for GPUs
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


# What they would run on.


def _driver() -> str:
    """The version of NVIDIA's driver, or nothing."""
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

    driver = _driver()
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            own = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            arch = f"compute capability {own.major}.{own.minor}"
            if torch.version.hip:
                arch = str(getattr(own, "gcnArchName", "unknown"))
            found = f"{own.name}, {arch}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {runtime}"
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
    importlib.import_module("bitsandbytes")  # which loads its library
    yield Check("4-bit weights", Status.OK, "available, for linear layers and experts")


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


def _device() -> Any:
    from .devices import choose_device

    return choose_device("auto")


def _path(kernel: ModuleType) -> Iterator[Check]:
    import torch

    device = _device()
    backend = hub.submodule(kernel, "backend")
    try:
        stages = backend.backend_for(torch.empty(0, device=device), torch.bfloat16)
    except RuntimeError as error:
        yield Check("path", Status.PROBLEM, _line(error))
        return
    name = "plain torch" if stages is kernel.reference else "Triton kernels"
    yield Check("path", Status.OK, f"{name} on {device.type}")
    if device.type == "cpu" and torch.cuda.is_available():
        yield Check("path", Status.PROBLEM, "the GPU is too old", "compute capability 8.0 (Ampere) or newer is needed")


def _configurations(kernel: ModuleType) -> Iterator[Check]:
    device = _device()
    if device.type == "cpu":
        return
    tuning = hub.submodule(kernel, "tuning")
    arch = tuning.target_of(device).arch
    tables = tuning.table_paths(arch)
    for path in tables:
        tuning.read_table(path)
    if tables:
        yield Check("configurations", Status.OK, f"measured: {', '.join(map(str, tables))}")
    else:
        advice = f"`moe-fused tune` measures, and {tuning.CONFIGS_VARIABLE} names the directory of the result"
        yield Check("configurations", Status.OK, f"defaults, as nobody has measured {arch}", advice)


def _test(kernel: ModuleType) -> Iterator[Check]:
    from . import selftest

    for result in selftest.run(kernel, _device()):
        name, error = max(result.errors.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
        found = f"off by {error:.1e} in {name}, at most {result.tolerance:.0e} allowed, {result.seconds:.1f} s"
        advice = None if result.passed else "please report this with the output of `moe-fused doctor --json`"
        yield Check(f"self-test: {result.case.name}", Status.OK if result.passed else Status.PROBLEM, found, advice)


def environment() -> dict[str, str]:
    """The variables that change what runs, as they are set."""
    names = ("LOCAL_KERNELS", "MOE_FUSED_CHECK", "MOE_FUSED_CONFIGS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    return {name: os.environ[name] for name in names if name in os.environ}
