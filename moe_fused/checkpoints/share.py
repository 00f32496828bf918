"""The experts that one of several processes loads, when each is to hold a part of the experts of each layer.

There are two ways to ask for this:

- Within ``taking(share)``, a model that is loaded in 4 bits gets only the experts of this process.
- With a plan of Transformers (expert parallelism), an experts parameter that is still to be loaded is a DTensor, and
  ``share_of_placeholder`` says what this process holds of it.

Experts are divided as ``torch.chunk`` divides a dimension, which is how FSDP2 and DTensors divide it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Share:
    """What one of several processes loads.

    Attributes:
        rank, processes: The number of this process, counted from 0, and the number of processes.
        device: Where the model is loaded.
        dtype: The dtype that dense experts get before they are quantized.
        files: The safetensors file of each tensor of the checkpoint. A tensor that is in no file is read with all experts.
    """

    rank: int
    processes: int
    device: torch.device
    dtype: torch.dtype
    files: Mapping[str, Path]

    def of(self, experts: int) -> tuple[int, int]:
        """Returns the index of this process' first expert, and the number of its experts.

        Args:
            experts: The number of experts in a layer.

        Raises:
            ValueError: There is none for some of the processes.
        """
        size = -(-experts // self.processes)
        if size * (self.processes - 1) >= experts:
            raise ValueError(f"{experts} experts to a layer cannot be divided among {self.processes} processes")
        return self.rank * size, min(size, experts - self.rank * size)

    def holds(self, expert: int, experts: int) -> bool:
        """Whether this process has ``expert``, of so many in a layer."""
        first, count = self.of(experts)
        return first <= expert < first + count

    def rows(self, key: str, first: int, count: int) -> Tensor:
        """Reads rows ``first`` to ``first + count`` of the tensor ``key`` of the checkpoint, and nothing else of it."""
        with safe_open(self.files[key], "pt") as file:
            part: Tensor = file.get_slice(key)[first : first + count]
        # On a CPU it is a view of the whole tensor in the file's memory map.
        return torch.empty_like(part, device=self.device).copy_(part)


def is_divided(parameter: Any) -> bool:
    """Whether this process holds only a part of the parameter."""
    return isinstance(parameter, DTensor)


def local(parameter: Any) -> Tensor:
    """Returns what this process holds of a parameter, the same memory without a gradient."""
    # A step asks for hundreds. ``detach().to_local()`` takes the host 50 µs for each, while the GPU may wait.
    found: Tensor = parameter._local_tensor if isinstance(parameter, DTensor) else parameter.detach()
    return found


def share_of_placeholder(name: str, placeholder: Any, device: torch.device, files: Mapping[str, Path]) -> Share:
    """Returns what this process loads of an experts parameter that a plan of Transformers has divided.

    Args:
        name: The name of the parameter.
        placeholder: The parameter before it is loaded, a DTensor (E, out, in) on meta.
        device: Where the model is loaded.
        files: The safetensors file of each tensor of the checkpoint.

    Raises:
        NotImplementedError: It is not divided by whole experts.
    """
    mesh, placements = placeholder.device_mesh, placeholder.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise NotImplementedError(
            f"{name} is divided as {placements}, but 4-bit experts can only be divided by whole experts among the "
            "processes of one mesh dimension: leave them to the model's own ep_plan"
        )
    return Share(mesh.get_local_rank(), mesh.size(), device, placeholder.dtype, files)


def files_of(paths: Iterable[str]) -> dict[str, Path]:
    """Returns the file of each tensor in those of ``paths`` that are safetensors files. Only their headers are read."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
    return found


_taken: ContextVar[Share | None] = ContextVar("moe_fused_share", default=None)


def current() -> Share | None:
    """Returns the share within ``taking``, and None outside of it."""
    return _taken.get()


@contextlib.contextmanager
def taking(share: Share | None) -> Iterator[None]:
    """Lets models that are loaded within the block have the experts of ``share`` alone."""
    before = _taken.set(share)
    try:
        yield
    finally:
        _taken.reset(before)
