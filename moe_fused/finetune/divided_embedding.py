"""An embedding whose rows are divided among several processes, for ``--shard``.

Each process looks up the rows that it has, for the tokens of all processes.

FSDP2 would gather the whole embedding in every pass, although a batch uses only a few thousand of its rows. That takes more
than twice the memory of the embedding (a buffer, the whole weight, and the rows of this process), and nothing can be
computed meanwhile. Here the processes exchange the ids of their tokens, and then the rows of these ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional


def is_divisible(embedding: object) -> bool:
    """Whether the rows of an embedding can be divided: it must be frozen, and do nothing but look up rows."""
    return type(embedding) is nn.Embedding and not embedding.weight.requires_grad and embedding.max_norm is None


def divide(embedding: nn.Embedding, mesh: DeviceMesh) -> None:
    """Keeps only this process' ⌈V/N⌉ rows of an embedding (V, H). From then on it gets other rows from the other processes.

    All processes must call the embedding equally often. They may have different numbers of tokens.

    Args:
        embedding: A frozen embedding, which is the same in all processes.
        mesh: The processes, in one dimension.
    """
    weight = embedding.weight.detach()
    each = -(-len(weight) // mesh.size())
    first = min(mesh.get_local_rank() * each, len(weight))
    rows = weight[first : first + each].clone()
    whole = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=weight.shape, stride=weight.stride())
    embedding.weight = nn.Parameter(whole, requires_grad=False)
    lookup: Any = _Lookup(rows, first, len(weight), mesh.get_group())
    embedding.forward = lookup  # type: ignore[method-assign]


class _Lookup:
    """The forward of an embedding of which this process has some rows.

    Args:
        rows: The rows of this process, (rows, H).
        first: The id of the first of them.
        count: The number of ids.
        group: The processes.
    """

    def __init__(self, rows: Tensor, first: int, count: int, group: Any) -> None:
        self._rows, self._first, self._count, self._group = rows, first, count, group
        self._processes = distributed.get_world_size(group)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns the rows of token ids of any shape, (…, H).

        Raises:
            RuntimeError: An id is below 0 or not below V. On a GPU, this is an assertion of the device.
        """
        longest = self._longest(tokens)
        mine = tokens.new_zeros(longest)
        mine[: tokens.numel()] = tokens.reshape(-1)
        known = ((mine >= 0) & (mine < self._count)).all()
        torch._assert_async(known, f"token ids must be at least 0 and below {self._count}")
        ids = tokens.new_empty(self._processes, longest)
        distributed.all_gather_into_tensor(ids.view(-1), mine, group=self._group)
        found = self._rows.new_empty(longest, self._rows.shape[1])
        # One piece at a time, so that the rows of a piece for all processes take no more memory than ``found`` does.
        size = -(-longest // self._processes)
        for start in range(0, longest, size):
            piece = found[start : start + size]
            distributed.reduce_scatter_tensor(piece, self._find(ids[:, start : start + size]), group=self._group)
        return found[: tokens.numel()].view(*tokens.shape, found.shape[1])

    def _find(self, ids: Tensor) -> Tensor:
        """Returns the rows of ids (N, T) as (N·T, H). Rows that other processes have are zero."""
        places = ids.reshape(-1) - self._first
        here = (places >= 0) & (places < len(self._rows))
        if not len(self._rows):
            return self._rows.new_zeros(len(places), self._rows.shape[1])
        return functional.embedding(places * here, self._rows).mul_(here.unsqueeze(1))

    def _longest(self, tokens: Tensor) -> int:
        """Returns the most tokens that a process has. A CUDA graph is recorded with as many as any batch can have."""
        counts = torch.full((self._processes,), tokens.numel(), device=tokens.device)
        distributed.all_gather_into_tensor(counts, counts[:1].clone(), group=self._group)
        if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
            return tokens.numel()
        return int(counts.max())
