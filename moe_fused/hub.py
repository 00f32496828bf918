"""Where the kernel comes from, and which libraries it takes to use it.

``get_kernel`` loads the kernel through ``kernels``, as any user of the Hub would. The first of these that exists wins:

1. the directory that ``LOCAL_KERNELS`` names for our repository;
2. the build that ships with this package: ``moe_fused/_kernel/torch-*`` in a wheel, ``build/torch-*`` in a checkout;
3. the Hub. A checkout without a build is an error instead: the Hub's kernel may differ from the sources beside it.

Which variant (cpu, cuda, rocm, xpu) is up to ``kernels``; every variant serves CPU tensors as well.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MIN_TORCH = "2.9"
MIN_TRANSFORMERS = "5.17"
MIN_TRITON = "3.4"  # on a GPU
# What parts of this package, or of training with it, need: the versions, and for what. As in pyproject.toml.
OPTIONAL = {
    "triton": (f">={MIN_TRITON}", "the kernels on a GPU"),
    "peft": (">=0.21.2", "adapters"),
    "accelerate": (">=1.10", "4-bit weights and training"),
    "bitsandbytes": (">=0.50", "4-bit weights"),
    "trl": (">=1.16", "fine-tuning"),
    "liger-kernel": (">=0.8.5", "fine-tuning in less memory"),
}

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class KernelSource:
    """The kernel package as this installation knows it.

    Attributes:
        repo_id: its repository on the Hub.
        version: its version there.
        builds: the directory that holds, or would hold, its ``torch-*`` variants.
        is_checkout: whether the builds are made from sources that stand beside them.
    """

    repo_id: str
    version: int
    builds: Path
    is_checkout: bool

    @classmethod
    def find(cls, package: Path = _PACKAGE) -> KernelSource:
        """Reads the ``build.toml`` of a wheel (in ``package/_kernel``) or of the checkout around ``package``.

        Raises:
            FileNotFoundError: there is neither.
        """
        shipped, checkout = package / "_kernel", package.parent
        for root, builds in ((shipped, shipped), (checkout, checkout / "build")):
            path = root / "build.toml"
            if path.is_file():
                general = tomllib.loads(path.read_text(encoding="utf-8"))["general"]
                return cls(general["hub"]["repo-id"], general["version"], builds, root is checkout)
        raise FileNotFoundError(f"build.toml is neither in {shipped} nor in {checkout}: reinstall moe-fused")

    def has_builds(self) -> bool:
        return any(path.is_dir() for path in self.builds.glob("torch-*"))

    def is_overridden(self) -> bool:
        """Whether ``LOCAL_KERNELS`` (repo_id=path, separated by colons) names this repository."""
        entries = os.environ.get("LOCAL_KERNELS", "").split(":")
        return any(entry.split("=", 1)[0] == self.repo_id for entry in entries if "=" in entry)


def load(source: KernelSource) -> ModuleType:
    """Loads the kernel of ``source`` in the order of this module's docstring, through ``kernels``.

    Raises:
        FileNotFoundError: no build for this machine in the ``LOCAL_KERNELS`` directory or in the checkout.
        Exception: what ``kernels`` raises if the Hub has none or cannot be reached.
    """
    import kernels

    if source.is_overridden():
        # A revision, unlike a version, is not looked up on the Hub before LOCAL_KERNELS is.
        return kernels.get_kernel(source.repo_id, revision="main")
    if source.has_builds():
        return kernels.get_local_kernel(source.builds)
    if source.is_checkout:
        raise FileNotFoundError(
            f"no kernel build in {source.builds}: run `make build` or `python scripts/build_kernel.py`"
        )
    # Whoever installed this package trusts its publisher, and the kernel depends on no other.
    return kernels.get_kernel(source.repo_id, version=source.version, trust_remote_code=True)


@functools.cache
def get_kernel() -> ModuleType:
    """The kernel module (``moe_experts``, ``moe_fused_linear``, ``layers``, …), loaded once.

    Raises:
        RuntimeError: torch, transformers or kernels is missing or does not fit.
        FileNotFoundError: there is no build of the kernel for this machine.
    """
    check_versions()
    return load(KernelSource.find())


def submodule(kernel: ModuleType, name: str) -> Any:
    """A module of the kernel, whose own name changes with every build."""
    return importlib.import_module(f"{kernel.__name__}.{name}")


@dataclass(frozen=True)
class Requirement:
    """A package that must be there.

    Attributes:
        found: its version, None without it.
        needed: the versions that fit, as pip takes them.
        problem: what is wrong, in one line that says what to do; None if nothing is.
    """

    package: str
    found: str | None
    needed: str
    problem: str | None


def installed(package: str) -> str | None:
    """The version of a package, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _requirement(package: str, needed: str) -> Requirement:
    found = installed(package)
    problem = None
    if found is None:
        problem = f"moe_fused needs {package}, which is not installed: pip install {package}"
    elif not fits(found, needed):
        problem = f"moe_fused needs {package}{needed}, found {found}"
    return Requirement(package, found, needed, problem)


def fits(found: str, needed: str) -> bool:
    """Whether a version is one of those needed; by its base version, so that 2.9.0a0+git counts as 2.9."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return SpecifierSet(needed).contains(Version(found).base_version)


def requirements() -> Iterator[Requirement]:
    """torch, transformers and kernels, in an order in which each can be asked once those before have no problem.

    Each transformers release declares the range of kernels it works with, and otherwise acts as if kernels were absent.
    """
    yield _requirement("torch", f">={MIN_TORCH}")
    yield _requirement("transformers", f">={MIN_TRANSFORMERS}")

    from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

    needed = f">={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}"
    own = _requirement("kernels", needed)
    if own.found is not None and own.problem is not None:
        problem = (
            f"transformers {installed('transformers')} needs kernels{needed}, found {own.found}: "
            f"pip install 'kernels{needed}'"
        )
        own = replace(own, problem=problem)
    yield own


def check_versions() -> None:
    """Raises RuntimeError unless torch and transformers are recent enough and transformers can use this kernels."""
    for requirement in requirements():
        if requirement.problem is not None:
            raise RuntimeError(requirement.problem)
