"""What the tests run on: the kernel's modules, the device, and the dtypes that mean something there."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

from tests.support import accelerator, load_kernel

kernel = load_kernel()

DEVICE = accelerator() or torch.device("cpu")
ON_GPU = DEVICE.type != "cpu"

# In the interpreter bf16 and float64 fall back to plain torch, which has to be right as well and costs nothing.
DTYPES = (
    (torch.bfloat16, torch.float16, torch.float32)
    if ON_GPU
    else (torch.float32, torch.float16, torch.bfloat16, torch.float64)
)


def module(name: str) -> ModuleType:
    """A submodule of the kernel under test, whose name changes with every build."""
    return importlib.import_module(f"{kernel.__name__}.{name}")


backend = module("stages")
HAS_TRITON = backend.uses_triton(torch.empty(0, device=DEVICE), torch.float32)
INTERPRETED = HAS_TRITON and not ON_GPU and os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:  # also in processes that tests start
    from tests.kernel.interpreter import mend

    mend()


def stages(dtype: torch.dtype) -> ModuleType:
    """The module whose functions serve ``dtype`` on this machine: ``launch`` or ``reference``."""
    return backend.backend_for(torch.empty(0, device=DEVICE), dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
