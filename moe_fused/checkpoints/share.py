"""The experts that one of several processes loads, when each is to hold a part of the experts of each layer.

Within ``taking(share)``, a model that is loaded in 4 bits gets packed experts with only the process' own ones, and no others
are read from the files. Experts are divided as ``torch.chunk`` divides a dimension, which is how FSDP2 shards it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """What one of several processes loads.

    Attributes:
        rank, processes: The number of this process, counted from 0, and the number of processes.
        device: Where the model is loaded.
        dtype: The dtype that dense experts get before they are quantized.
        files: The safetensors file of each tensor of the checkpoint.
    """

    rank: int
    processes: int
    device: torch.device
    dtype: torch.dtype
    files: Mapping[str, Path]

    def of(self, experts: int) -> tuple[int, int]:
        """Returns the first of this process' experts, of so many in a layer, and their number.

        Raises:
            ValueError: There is none for some of the processes.
        """
        size = -(-experts // self.processes)
        if size * (self.processes - 1) >= experts:
            raise ValueError(f"{experts} experts to a layer cannot be divided among {self.processes} processes")
        return self.rank * size, min(size, experts - self.rank * size)

    def rows(self, key: str, first: int, count: int) -> Tensor:
        """Reads rows ``first`` to ``first + count`` of the tensor ``key`` of the checkpoint, and nothing else of it."""
        with safe_open(self.files[key], "pt") as file:
            part: Tensor = file.get_slice(key)[first : first + count]
        # On a CPU it is a view of the whole tensor in the file's memory map.
        return torch.empty_like(part, device=self.device).copy_(part)

    def dense_rows(self, key: str, first: int, count: int) -> Tensor:
        """Reads rows of a dense tensor, in the dtype that it gets before it is quantized."""
        part = self.rows(key, first, count)
        return part.to(self.dtype) if part.is_floating_point() else part


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
