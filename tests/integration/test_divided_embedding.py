"""An embedding that processes share gives what a whole one gives, to each its tokens."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

pytest.importorskip("trl")

from moe_fused.checkpoints.share import local
from moe_fused.finetune.divided_embedding import divide, is_divisible

ROWS, WIDTH = 10, 3
# For each process the shape of its token ids. One of them has no tokens.
SHAPES = ((2, 4), (1, 5), (0,))


def whole() -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH, dtype=torch.bfloat16).requires_grad_(False)


def ids_of(rank: int) -> Tensor:
    return torch.randint(ROWS, SHAPES[rank], generator=torch.Generator().manual_seed(rank))


def _look_up(rank: int, processes: int, directory: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.FileStore(f"{directory}/store", processes)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    embedding = whole()
    divide(embedding, init_device_mesh("cpu", (processes,)))
    found = [embedding(ids_of(rank)) for _ in range(2)]
    torch.save((found, local(embedding.weight)), f"{directory}/{rank}.pt")
    if processes == 1:
        for wrong in (-1, ROWS):
            with pytest.raises(RuntimeError, match=f"at least 0 and below {ROWS}"):
                embedding(torch.tensor([wrong]))
    distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [1, 3])
def test_each_gets_its_rows(tmp_path: Path, processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_look_up, args=(rank, processes, str(tmp_path))) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    held = []
    for rank in range(processes):
        found, rows = torch.load(tmp_path / f"{rank}.pt")
        held.append(rows)
        for each in found:
            assert torch.equal(each, whole()(ids_of(rank)))
    assert torch.equal(torch.cat(held), whole().weight)
    assert len(held[0]) == -(-ROWS // processes)


def test_what_cannot_be_divided() -> None:
    assert is_divisible(whole())
    assert not is_divisible(nn.Embedding(4, 2))  # trained
    assert not is_divisible(nn.Embedding(4, 2, max_norm=1.0).requires_grad_(False))
    assert not is_divisible(type("Scaled", (nn.Embedding,), {})(4, 2).requires_grad_(False))
    assert not is_divisible(nn.Linear(4, 2).requires_grad_(False))
