"""Finds and loads the kernel, and checks that the libraries it needs are installed.

``get_kernel`` loads the kernel through ``kernels``, as any user of the Hub would. The first of these that exists wins:

1. the directory that ``LOCAL_KERNELS`` names for our repository;
2. the build that ships with this package: ``moe_fused/_kernel/torch-*`` in a wheel, ``build/torch-*`` in a checkout;
3. the Hub. A checkout without a build is an error instead: the Hub's kernel may differ from the sources beside it.

``kernels`` chooses the variant (cpu, cuda, rocm, xpu). Every variant works on CPU tensors, too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The versions that fit, as in pyproject.toml. docs/versions.md says which ones are tested and why newer ones are excluded.
REQUIRED = {"torch": ">=2.9", "transformers": ">=5.17,<5.23", "kernels": ">=0.16,<0.18"}
# Packages that only parts of this package need: the versions, and what they are for. Triton comes with torch on a GPU; the
# others are as in pyproject.toml.
OPTIONAL = {
    "triton": (">=3.5", "the kernels on a GPU"),
    "peft": (">=0.21.2", "adapters"),
    "accelerate": (">=1.10", "4-bit weights and training"),
    "bitsandbytes": (">=0.50", "4-bit weights"),
    "trl": (">=1.16,<1.17", "fine-tuning"),
    "datasets": (">=5.2", "fine-tuning"),
    "liger-kernel": (">=0.8.5,<0.9", "fine-tuning in less memory"),
}

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class KernelSource:
    """The kernel package as this installation knows it.

    Attributes:
        repo_id: the repository of the kernel on the Hub.
        version: the version of the kernel on the Hub.
        builds: the directory for the kernel's ``torch-*`` variants, whether or not it exists.
        is_checkout: whether the builds are made from sources beside them.
    """

    repo_id: str
    version: int
    builds: Path
    is_checkout: bool

    @classmethod
    def find(cls, package: Path = _PACKAGE) -> KernelSource:
        """Reads ``build.toml``, either of a wheel (in ``package/_kernel``) or of the checkout around ``package``.

        Raises:
            FileNotFoundError: there is no ``build.toml``.
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
        return any(entry.split("=", 1)[0] == self.repo_id for entry in _entries() if "=" in entry)


def _entries() -> list[str]:
    """Returns the entries of ``LOCAL_KERNELS``. As for ``kernels``, an empty variable has one, which is empty."""
    variable = os.environ.get("LOCAL_KERNELS")
    return [] if variable is None else variable.split(":")


def malformed_entry() -> str | None:
    """Returns the first entry of ``LOCAL_KERNELS`` that is not REPOSITORY=DIRECTORY, or None."""
    return next((entry for entry in _entries() if "=" not in entry), None)


def load(source: KernelSource) -> ModuleType:
    """Loads the kernel through ``kernels``, from the first place in this module's docstring that exists.

    Raises:
        ValueError: ``LOCAL_KERNELS`` has an entry that is not REPOSITORY=DIRECTORY.
        FileNotFoundError: the ``LOCAL_KERNELS`` directory or the checkout has no build for this machine.
        Exception: the error of ``kernels`` if the Hub has no such kernel or cannot be reached.
    """
    import kernels

    # kernels 0.17 refuses such an entry here. 0.16 does so only when a kernel of the Hub is asked for, later.
    if (entry := malformed_entry()) is not None:
        raise ValueError(f"LOCAL_KERNELS has the entry {entry!r}: each entry must be REPOSITORY=DIRECTORY")
    if source.is_overridden():
        # With a version, kernels would ask the Hub before it looks at LOCAL_KERNELS; with a revision it does not.
        return kernels.get_kernel(source.repo_id, revision="main", **_on_any_gpu(kernels.get_kernel))
    if source.has_builds():
        return kernels.get_local_kernel(source.builds, **_on_any_gpu(kernels.get_local_kernel))
    if source.is_checkout:
        raise FileNotFoundError(
            f"no kernel build in {source.builds}: run `make build` or `python scripts/build_kernel.py`"
        )
    # Who installed this package trusts its publisher, and the kernel needs no code of anybody else.
    options = _on_any_gpu(kernels.get_kernel)
    return kernels.get_kernel(source.repo_id, version=source.version, trust_remote_code=True, **options)


def _on_any_gpu(function: Callable[..., ModuleType]) -> dict[str, bool]:
    """The argument that lets ``function`` load the kernel beside a GPU that is too old for it.

    kernels 0.17 would refuse to load it there, although it serves CPU tensors and other GPUs. The kernel itself checks the
    device of the tensors that it is given. kernels 0.16 checks nothing and has no such argument.
    """
    return {"check_arch": False} if "check_arch" in inspect.signature(function).parameters else {}


@functools.cache
def get_kernel() -> ModuleType:
    """Returns the kernel module (``moe_experts``, ``moe_fused_linear``, ``layers``, …), which is loaded once.

    Raises:
        RuntimeError: torch, transformers or kernels is missing or does not fit.
        ValueError: ``LOCAL_KERNELS`` has an entry that is not REPOSITORY=DIRECTORY.
        FileNotFoundError: there is no build of the kernel for this machine.
    """
    check_versions()
    return load(KernelSource.find())


def submodule(kernel: ModuleType, name: str) -> Any:
    """Imports a submodule of the kernel. The name of the kernel's package changes with every build."""
    return importlib.import_module(f"{kernel.__name__}.{name}")


@dataclass(frozen=True)
class Requirement:
    """A package that must be installed.

    Attributes:
        found: the installed version, or None if the package is not installed.
        needed: the versions that fit, as pip writes them.
        problem: one line that says what is wrong and what to do, or None if the package fits.
    """

    package: str
    found: str | None
    needed: str
    problem: str | None


def installed(package: str) -> str | None:
    """Returns the installed version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _requirement(package: str, needed: str) -> Requirement:
    found = installed(package)
    problem = None
    if found is None:
        problem = f"moe_fused needs {package}, which is not installed: {install(package)}"
    elif not fits(found, needed):
        problem = f"moe_fused needs {package}{needed}, found {found}: {install(package)}"
    return Requirement(package, found, needed, problem)


def install(*packages: str) -> str:
    """Returns the ``pip install`` command for versions that fit.

    Transformers is named with its extra "kernels", so that pip chooses a pair of versions that match.
    """
    wanted = [f"'{name}{'[kernels]' * (name == 'transformers')}{REQUIRED[name]}'" for name in packages]
    return f"pip install {' '.join(wanted)}"


def fits(found: str, needed: str) -> bool:
    """Whether a version is one of those needed. Only the base version counts, so that 2.9.0a0+git is 2.9."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return SpecifierSet(needed).contains(Version(found).base_version)


def requirements() -> Iterator[Requirement]:
    """Yields the requirements on torch, transformers and kernels, in this order.

    The requirement on kernels can only be found if transformers has no problem: each release of transformers declares the
    range of kernels that it works with, and acts as if kernels were absent outside that range. The advice is always within
    the ranges of this package. For a transformers that is too new, it is an older one.
    """
    yield _requirement("torch", REQUIRED["torch"])
    library = _requirement("transformers", REQUIRED["transformers"])
    limit = REQUIRED["transformers"].rpartition("<")[2]
    if library.found is not None and library.problem is not None and fits(library.found, f">={limit}"):
        advice = f"{library.problem}. Use transformers<{limit} until moe_fused takes a newer one"
        library = replace(library, problem=advice)
    yield library

    from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

    needed = f">={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}"
    found = installed("kernels")
    problem = None
    if found is None:
        problem = f"moe_fused needs kernels, which is not installed: pip install 'kernels{needed}'"
    elif not fits(found, needed):
        advice = f"pip install 'kernels{needed}'"
        if not fits(str(KERNELS_MIN_VERSION), REQUIRED["kernels"]):
            advice = install("transformers")
        problem = f"transformers {installed('transformers')} needs kernels{needed}, found {found}: {advice}"
    yield Requirement("kernels", found, needed, problem)


def check_versions() -> None:
    """Raises RuntimeError unless torch and transformers fit and transformers can use the installed kernels."""
    for requirement in requirements():
        if requirement.problem is not None:
            raise RuntimeError(requirement.problem)
