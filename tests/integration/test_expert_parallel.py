"""Expert parallelism as Transformers does it: two ranks, each with half of the experts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch import multiprocessing as mp
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moe_fused
from moe_fused.hub import submodule

from .conftest import Calls
from .models import EXPERTS, GPT_OSS, QWEN3_MOE, ModelCase, experts_modules, tokens

RANKS = 2
CASES = (QWEN3_MOE, GPT_OSS)
# transformers >= 5.21 moves tokens to their experts' rank by default, and can mask the experts of the other ranks
# instead, which older releases always do.
CAN_DISPATCH = hasattr(DistributedConfig, "ep_size")
MASK = {"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"}


def _configurations(case: ModelCase) -> list[DistributedConfig]:
    if not CAN_DISPATCH:
        return [DistributedConfig(tp_size=RANKS, enable_expert_parallel=True)]
    if hasattr(DistributedConfig, "ep_implementation"):  # 5.24, where a plan no longer says how
        names = ("auto", "all_reduce") if case is QWEN3_MOE else ("auto",)
        return [DistributedConfig(tp_size=RANKS, ep_size=RANKS, ep_implementation=name) for name in names]
    plans = [None, MASK] if case is QWEN3_MOE else [None]
    return [DistributedConfig(tp_size=RANKS, ep_size=RANKS, tp_plan={}, ep_plan=plan) for plan in plans]


def _forward_backward(path: Path, implementation: str, configuration: DistributedConfig) -> dict[str, Tensor]:
    """Logits and the gradients that this rank holds."""
    model = AutoModelForCausalLM.from_pretrained(
        path, distributed_config=configuration, experts_implementation=implementation
    )
    assert all(module.num_experts == EXPERTS // RANKS for module in experts_modules(model))
    logits = model(tokens()).logits
    logits.square().sum().backward()
    results = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        results[name] = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return results


def _rank(rank: int, directory: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=RANKS)
    reader = submodule(moe_fused.get_kernel(), "experts_module")
    reader.moe_experts = spy = Calls(reader.moe_experts)
    moe_fused.enable()
    masked = []
    for case in CASES:
        path = directory / case.id
        for configuration in _configurations(case):
            spy.arguments.clear()
            theirs = _forward_backward(path, "grouped_mm", configuration)
            assert spy.count == 0
            ours = _forward_backward(path, "moe_fused", configuration)
            assert spy.count == case.moe_layers
            masked.append(all(arguments[1].max() == EXPERTS // RANKS for arguments in spy.arguments))
            torch.testing.assert_close(ours["logits"], torch.load(directory / f"{case.id}.pt"))
            assert ours.keys() == theirs.keys()
            for name, tensor in ours.items():
                torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-4)
    assert set(masked) == ({False, True} if CAN_DISPATCH else {True}), masked
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits equal the undivided model's, gradients those of Transformers' grouped_mm on the same rank."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # two ranks on one GPU is more than NCCL takes
    for case in CASES:
        model = case.build()
        model.save_pretrained(tmp_path / case.id)
        with torch.no_grad():
            torch.save(model(tokens()).logits, tmp_path / f"{case.id}.pt")
    mp.spawn(_rank, (tmp_path,), RANKS)
