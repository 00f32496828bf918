"""Builds the kernel and points ``LOCAL_KERNELS`` at it, before any test module is imported.

The build goes to ``build/``, where ``moe_fused`` looks as well, so every test sees the sources as they are now. It is
idempotent and locked: pytest-xdist's workers find it done. Where ``LOCAL_KERNELS`` names our kernel already, that is
tested: kernel-builder runs the tests that way, with nothing but build.toml, torch-ext/ and tests/ present.
"""

from __future__ import annotations

import os

import pytest

from tests.support import REPOSITORY, repo_id

# No test may depend on the network, nor pass because something was downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _provide_kernel() -> str:
    entries = [entry for entry in os.environ.get("LOCAL_KERNELS", "").split(":") if entry]
    ours = [entry for entry in entries if entry.startswith(f"{repo_id()}=")]
    if ours:
        return ours[0]
    from scripts.build_kernel import build

    build(REPOSITORY, REPOSITORY / "build")
    os.environ["LOCAL_KERNELS"] = ":".join([*entries, f"{repo_id()}={REPOSITORY / 'build'}"])
    return os.environ["LOCAL_KERNELS"]


KERNEL = _provide_kernel()


def pytest_report_header(config: pytest.Config) -> str:
    import torch

    return f"kernel: {KERNEL}, torch {torch.__version__}, accelerator: {torch.accelerator.current_accelerator()}"
