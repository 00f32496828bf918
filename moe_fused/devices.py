"""Which device a command runs on, and how torch allocates on it."""

from __future__ import annotations

import os

import torch


def use_expandable_segments() -> None:
    """Has torch's allocator grow blocks, which leaves no holes, as the plan of memory counts on.

    Takes effect before the first tensor on a GPU; whoever has set something of the allocator keeps that.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU that the kernels support, if there is one, and otherwise the CPU.

    Raises:
        ValueError: no such device on this machine.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        if cuda and (torch.version.hip or torch.cuda.get_device_capability() >= (8, 0)):
            return torch.device("cuda")
        return torch.device("xpu" if torch.xpu.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda", "xpu"):
        raise ValueError(f"--device {name} is not served by the kernels: use auto, cpu, cuda or xpu")
    return device
