"""``moe_fused`` no longer registers its experts implementation: the patched Transformers loads it as a kernel.

The kernel is a small one of its own, made here, which calls the implementation of ``moe_fused``. So the tests that count
calls of the kernel see them.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from moe_fused.integrations.transformers import forward

KERNEL = "org/experts-stand-in"
# With a version instead of a revision, kernels would ask the Hub before it looks at LOCAL_KERNELS.
NAME = f"{KERNEL}@main"
SOURCE = """
from moe_fused.integrations.transformers.forward import implementation


def experts_forward(self, hidden_states, top_k_index, top_k_weights, **adapters):
    return implementation()(self, hidden_states, top_k_index, top_k_weights, **adapters)
"""
_directory = tempfile.TemporaryDirectory(prefix="moe-fused-tests-")


def make_kernel(root: Path, backends: tuple[str, ...] = ("cpu", "cuda", "rocm", "xpu")) -> None:
    """Writes the builds of a kernel whose code is ``SOURCE`` below ``root``."""
    for backend in backends:
        build = root / f"torch-{backend}"
        build.mkdir(parents=True)
        (build / "__init__.py").write_text(SOURCE, encoding="utf-8")
        metadata = {
            "name": "experts-stand-in",
            "id": f"_experts_stand_in_{backend}",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "kernel-depends": [],
            "backend": {"type": backend},
        }
        (build / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    make_kernel(Path(_directory.name))
    entry = f"{KERNEL}={_directory.name}"
    os.environ["LOCAL_KERNELS"] = ":".join(filter(None, [os.environ.get("LOCAL_KERNELS"), entry]))
    forward.register = lambda recompute=False: None
    forward.unregister = lambda: None
    checked = PreTrainedModel._check_and_adjust_experts_implementation

    def check(self: Any, experts_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        asked = NAME if experts_implementation == forward.IMPLEMENTATION else experts_implementation
        return checked(self, asked, *args, **kwargs)

    PreTrainedModel._check_and_adjust_experts_implementation = check
