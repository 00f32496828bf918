"""A process that is to hold a part of the experts loads these, bit for bit, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Replicate
from torch.distributed.tensor import Shard as TensorShard

import moe_fused
from moe_fused.checkpoints import share as shares
from moe_fused.checkpoints.loading import share_of
from moe_fused.checkpoints.share import Share, share_of_placeholder, taking

from .conftest import DEVICE
from .four_bit import NEMOTRON_H, build, config, load, packed, stacked_checkpoint, v4_checkpoint
from .models import GPT_OSS, QWEN3_MOE, ModelCase

EXPERTS, PROCESSES = 6, 4


@pytest.fixture(autouse=True)
def _enabled(enabled: None) -> None:
    pass


def _dense(path: Path) -> None:
    build().save_pretrained(path)


def _dense_fused(path: Path) -> None:
    build(GPT_OSS).save_pretrained(path)


def _without_gate(path: Path) -> None:
    build(NEMOTRON_H).save_pretrained(path)


def _of_transformers_4(path: Path) -> None:
    _dense(path / "dense")
    v4_checkpoint(path / "dense", path)


def _packed(path: Path) -> None:
    _dense(path / "dense")
    model = load(path / "dense", quantization_config=config(), dtype=torch.bfloat16)
    moe_fused.save_format(model, "fused")
    model.save_pretrained(path)


def _of_the_original_project(path: Path) -> None:
    _dense(path / "dense")
    stacked_checkpoint(path / "dense", path)


LAYOUTS: dict[str, tuple[ModelCase, Callable[[Path], None], bool]] = {
    "dense, per expert": (QWEN3_MOE, _dense, True),
    "dense, fused": (GPT_OSS, _dense_fused, True),
    "dense, without gate": (NEMOTRON_H, _without_gate, True),
    "4 bits, per expert": (QWEN3_MOE, _of_transformers_4, False),
    "4 bits, fused": (QWEN3_MOE, _packed, False),
    "4 bits, of the original project": (QWEN3_MOE, _of_the_original_project, False),
}


def share(path: Path, rank: int, processes: int) -> Share:
    return share_of(str(path), "the model", rank, processes, device=torch.device(DEVICE), dtype=torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_process_loads_its_experts(layout: str, tmp_path: Path) -> None:
    case, make, quantizes = LAYOUTS[layout]
    make(tmp_path)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": DEVICE}}
    if quantizes:
        options["quantization_config"] = config(bnb_4bit_compute_dtype=torch.bfloat16)
    whole = packed(load(tmp_path, case, **options))
    experts = next(iter(whole.values())).shape[0]
    for rank, processes in [(0, 2), (1, 2), (experts - 1, experts)]:
        with taking(share(tmp_path, rank, processes)):
            held = packed(load(tmp_path, case, **options))
        assert held.keys() == whole.keys()
        for name, weights in held.items():
            expected = whole[name].narrow(*share(tmp_path, rank, processes).of(experts))
            assert weights.format == expected.format
            for part, value in weights.tensors().items():
                assert torch.equal(value, expected.tensors()[part]), f"{name} {part}, rank {rank} of {processes}"
                # The memory of the others must be free.
                assert value.untyped_storage().nbytes() == value.nbytes, f"{name} {part}"
    assert all(weights.shape[0] == experts for weights in packed(load(tmp_path, case, **options)).values())


@pytest.mark.parametrize("layout", ["dense, per expert", "dense, fused", "4 bits, per expert", "4 bits, fused"])
def test_no_other_expert_is_read(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of tensors of experts is what the share has, and nothing of them is read in another way."""
    from moe_fused.checkpoints import converter, entries

    case, make, quantizes = LAYOUTS[layout]
    make(tmp_path)
    read: list[str] = []
    rows = Share.rows

    def noted(self: Share, key: str, first: int, count: int) -> torch.Tensor:
        value = rows(self, key, first, count)
        assert len(value) == count
        read.append(f"{key}[{first}:{first + count}]")
        return value

    class Noted(entries.Entry):
        def __new__(cls, key: str, role: Any, load_: Callable[[], Any]) -> Any:
            def loaded() -> Any:
                read.append(key)
                return load_()

            return entries.Entry(key, role, loaded)

    monkeypatch.setattr(Share, "rows", noted)
    monkeypatch.setattr(converter, "Entry", Noted)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": DEVICE}}
    if quantizes:
        options["quantization_config"] = config(bnb_4bit_compute_dtype=torch.bfloat16)
    with taking(share(tmp_path, 1, 2)):
        load(tmp_path, case, **options)
    tensors = load_file(tmp_path / "model.safetensors")
    of_experts = {key for key in tensors if ".experts." in key and not key.endswith("_bias")}
    if "per expert" in layout:
        assert set(read) == {key for key in of_experts if int(key.split(".experts.")[1].split(".")[0]) >= EXPERTS // 2}
        return
    experts = len(tensors[next(key for key in of_experts if key.endswith("down_proj"))])
    rows_read = {f"{key}[{experts // 2}:{experts}]" for key in of_experts if not key.endswith("_format")}
    assert set(read) == rows_read | {key for key in of_experts if key.endswith("_format")}


def test_a_missing_expert_of_another_process_is_named(tmp_path: Path) -> None:
    _dense(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with (
        taking(share(tmp_path, 0, 2)),
        pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight is missing"),
    ):
        load(tmp_path, quantization_config=config())


def test_weights_of_torch_save_cannot_be_shared(tmp_path: Path) -> None:
    model = build()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^the model has weights of torch\.save, .* save them as safetensors first$"):
        share(tmp_path, 0, 2)


@pytest.mark.parametrize(
    ("experts", "processes", "expected"),
    [(128, 2, [(0, 64), (64, 64)]), (60, 8, [(0, 8), (8, 8), (16, 8), (24, 8), (32, 8), (40, 8), (48, 8), (56, 4)])],
)
def test_shares_are_those_of_chunk(experts: int, processes: int, expected: list[tuple[int, int]]) -> None:
    found = [Share(rank, processes, torch.device("cpu"), torch.float32, {}).of(experts) for rank in range(processes)]
    assert found == expected
    assert [len(part) for part in torch.arange(experts).chunk(processes)] == [count for _, count in found]


def test_too_many_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="6 experts to a layer cannot be divided among 4 processes"):
        Share(0, PROCESSES, torch.device("cpu"), torch.float32, {}).of(EXPERTS)


def test_dense_experts_of_a_4_bit_checkpoint_are_refused(tmp_path: Path) -> None:
    _dense(tmp_path / "dense")
    v4_checkpoint(tmp_path / "dense", tmp_path, "self_attn")
    with (
        taking(share(tmp_path, 0, 2)),
        pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.experts\.\w+ is dense in this 4-bit checkpoint"),
    ):
        load(tmp_path)


@pytest.mark.parametrize(("dimensions", "placement"), [(1, TensorShard(1)), (1, Replicate()), (2, TensorShard(0))])
def test_a_plan_divides_whole_experts(dimensions: int, placement: Any) -> None:
    mesh = SimpleNamespace(ndim=dimensions, get_local_rank=lambda: 1, size=lambda: 2)
    placeholder = SimpleNamespace(device_mesh=mesh, placements=(placement,), dtype=torch.float16)
    with pytest.raises(NotImplementedError, match=r"^experts is divided as .*can only be divided by whole experts"):
        share_of_placeholder("experts", placeholder, torch.device("cpu"), {})
    mesh.ndim, placeholder.placements = 1, (TensorShard(0),)
    found = share_of_placeholder("experts", placeholder, torch.device("cpu"), {})
    assert found == Share(1, 2, torch.device("cpu"), torch.float16, {})


def test_the_share_ends_with_the_block() -> None:
    one = Share(0, 1, torch.device("cpu"), torch.float32, {})
    with taking(one), taking(None):
        assert shares.current() is None
    assert shares.current() is None
    with taking(one):
        assert shares.current() is one
