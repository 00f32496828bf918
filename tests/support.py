"""The kernel under test, loaded as any user loads it.

``tests/conftest.py`` has set ``LOCAL_KERNELS`` before a test module can import this. Needs torch and kernels only:
where kernel-builder runs the tests, neither ``moe_fused`` nor Transformers exists.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent


def build_config() -> dict[str, Any]:
    """The ``[general]`` table of build.toml."""
    return tomllib.loads((REPOSITORY / "build.toml").read_text(encoding="utf-8"))["general"]


def repo_id() -> str:
    return build_config()["hub"]["repo-id"]


def accelerator() -> Any:
    """The torch device of the GPU that the tests run on, None on a machine without one.

    torch's CUDA build, which the package index gives to everybody, names its device where there is no GPU, too.
    """
    import torch

    return torch.accelerator.current_accelerator(check_available=True)


def python_path(*first: Path) -> str:
    """PYTHONPATH for a subprocess: ``first``, then what this process was given."""
    return os.pathsep.join(filter(None, [*map(str, first), os.environ.get("PYTHONPATH")]))


def unboxed(text: str) -> str:
    """What a command says, without the box that rich draws around it and its line breaks."""
    return " ".join(text.replace("│", " ").split())


@functools.cache
def load_kernel() -> ModuleType:
    """The kernel package, from ``LOCAL_KERNELS``."""
    from kernels import get_kernel

    assert repo_id() in os.environ.get("LOCAL_KERNELS", ""), "tests must not download a published kernel"
    return get_kernel(repo_id(), version=build_config()["version"])
