"""Builds the kernel and points ``LOCAL_KERNELS`` at it, before any test module is imported.

The build goes to ``build/``, where ``moe_fused`` looks as well, so every test sees the sources as they are now. It is
idempotent and locked: pytest-xdist's workers find it done. Where ``LOCAL_KERNELS`` names our kernel already, that is
tested: kernel-builder runs the tests that way, with nothing but build.toml, torch-ext/ and tests/ present.
"""

from __future__ import annotations

import os

import pytest

from tests.cpu_path import sitecustomize as cpu_path
from tests.support import REPOSITORY, accelerator, python_path, repo_id

# No test may depend on the network, nor pass because something was downloaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where the processor's path in bitsandbytes is forced, it is forced in the processes that tests start as well.
if cpu_path.VARIABLE in os.environ:
    os.environ["PYTHONPATH"] = python_path(REPOSITORY / "tests" / "cpu_path")


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
# Where kernel-builder runs the tests there is only the kernel to test, and nothing that the other tests import.
_FOLDERS = sorted({path.parent.name for path in (REPOSITORY / "tests").glob("*/*.py")})
collect_ignore = [] if (REPOSITORY / "moe_fused").is_dir() else [name for name in _FOLDERS if name != "kernel"]


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers here because kernel-builder copies neither a pytest.ini nor pyproject.toml beside the tests."""
    for marker in (
        "kernels_ci: run by kernel-builder's CI on every variant; together they cover the public API in a minute",
        "gpu: needs an accelerator",
        "host: gives the same with a GPU and without; left out by make test-gpu",
        "readers: installs another tool from the package index; left out unless -m names it, run by make test-readers",
        "upstream: tests a patch for another library; left out unless -m names it, run by make test-upstream",
        "slow: takes more than some ten seconds on two cores; run by make test-slow, not by make test",
    ):
        config.addinivalue_line("markers", marker)


# Folders and modules whose tests read and write files, check options or plan runs, and compute nothing on a GPU.
HOST_FOLDERS = frozenset({"docs", "upstream"})
HOST_MODULES = frozenset({
    "test_adapter_fits", "test_adapters", "test_adapters_command", "test_bitsandbytes_cpu", "test_checkpoint_complete",
    "test_checkpoint_files", "test_checkpoint_finite", "test_convert_models", "test_convert_models_gguf",
    "test_convert_models_refusals", "test_convert_optimizers", "test_convert_optimizers_refusals", "test_expert_parallel",
    "test_expert_parallel_4bit", "test_divided_embedding", "test_finetune_card", "test_finetune_data",
    "test_finetune_data_killed", "test_finetune_duration", "test_finetune_gpus", "test_finetune_hub",
    "test_finetune_hub_killed", "test_finetune_mixture", "test_finetune_options", "test_finetune_parallel",
    "test_finetune_plan_shown", "test_finetune_refusals", "test_finetune_render", "test_finetune_resolve",
    "test_finetune_rows", "test_finetune_sharded", "test_finetune_show", "test_fsdp", "test_hub", "test_share",
    "test_staging", "test_startup",
})  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what has to be asked for by name: it installs packages, or changes when other libraries do."""
    for item in items:
        if item.path.parent.name in HOST_FOLDERS or item.path.stem in HOST_MODULES:
            item.add_marker("host")
    left_out = []
    for marker in ("readers", "upstream"):
        if marker not in str(config.getoption("markexpr")):
            left_out += [item for item in items if item.get_closest_marker(marker)]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_report_header(config: pytest.Config) -> str:
    import torch

    return f"kernel: {KERNEL}, torch {torch.__version__}, accelerator: {accelerator()}"
