"""The kernel as ``get_kernel`` hands it over: its public names, its metadata and its operators' namespace."""

from __future__ import annotations

import pytest
import torch
from kernels import get_loaded_kernels

from tests.support import accelerator, build_config, load_kernel

kernel = load_kernel()


@pytest.mark.kernels_ci
def test_every_public_name_exists() -> None:
    assert kernel.__all__ == sorted(kernel.__all__)
    assert {name for name in kernel.__all__ if not hasattr(kernel, name)} == set()


@pytest.mark.kernels_ci
def test_metadata_is_ours() -> None:
    (loaded,) = [loaded for loaded in get_loaded_kernels() if loaded.module is kernel]
    assert str(loaded.metadata.name) == build_config()["name"]
    assert loaded.metadata.version == build_config()["version"]
    assert loaded.metadata.python_depends == []


@pytest.mark.kernels_ci
def test_operators_live_in_a_namespace_of_their_own() -> None:
    """Two versions in one process must not meet: every operator is under this build's id, which names its sources."""
    registered = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert kernel._ops._OPS_NAME in registered
    assert kernel._ops._OPS_NAME.startswith(f"_{build_config()['name'].replace('-', '_')}_")


@pytest.mark.kernels_ci
def test_experts_run_on_this_machine() -> None:
    """One token, one expert with identity weights: relu is all that is left."""
    device = accelerator() or torch.device("cpu")
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0]], device=device)
    weight = torch.eye(4, device=device)[None]
    index = torch.zeros(1, 1, dtype=torch.long, device=device)
    y = kernel.moe_experts(x, index, torch.ones(1, 1, device=device), weight, weight, activation="relu", gated=False)
    assert y.tolist() == [[1.0, 0.0, 3.0, 0.0]]
