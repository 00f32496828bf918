"""Chooses the device that a command runs on, makes it torch's current one, and sets how torch allocates memory on it."""

from __future__ import annotations

import os

import torch


def use_expandable_segments() -> None:
    """Lets torch's allocator grow its blocks, which leaves no holes. The memory plan relies on this.

    It must be called before the first tensor on a GPU is made. A setting of the allocator that the user made is kept.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the variable
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def choose_device(name: str) -> torch.device:
    """Returns the device called ``name``. ``auto`` is a GPU that the kernels support if there is one, else the CPU.

    A GPU with a number becomes the current one, because streams, events and CUDA graphs are made on the current device.

    Raises:
        ValueError: this machine has no such device, or the kernels do not support it.
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
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device.index)
    return device
