"""A training script's own FSDP2 over a model with 4-bit experts, whose bytes are parameters of a floating-point dtype."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch import multiprocessing as mp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

pytest.importorskip("peft")

import moe_fused

from .four_bit import build, config, load, packed
from .models import tokens

RANKS = 2


def _model(path: Path, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    quantization = config(bnb_4bit_compute_dtype=torch.bfloat16, **options)
    model = load(path, dtype=torch.bfloat16, quantization_config=quantization, experts_implementation="moe_fused")
    torch.manual_seed(0)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(torch.bfloat16) * 0.1
    return adapted


def _trained(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _rank(rank: int, directory: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=RANKS)
    moe_fused.enable()
    whole, divided = _model(directory / "model"), _model(directory / "model", bnb_4bit_quant_storage=torch.bfloat16)
    before = packed(divided)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    base = divided.get_base_model()
    for layer in base.model.layers:
        # Linear layers in 4 bits stay whole, because FSDP2 would lose bitsandbytes' state of them.
        theirs = {parameter for name, parameter in layer.named_parameters() if name.endswith("base_layer.weight")}
        others = {value for name, value in layer.named_parameters() if "_proj.weight" in name and "lora" not in name}
        fully_shard(layer, mp_policy=policy, ignored_params=theirs | others)
    assert all(
        isinstance(module.down_proj, DTensor) for module in base.modules() if hasattr(module, "down_proj_format")
    )
    batch = tokens(batch=RANKS)
    loss = _trained(divided, batch[rank : rank + 1])
    distributed.all_reduce(loss)
    torch.testing.assert_close(loss / RANKS, _trained(whole, batch), rtol=1e-2, atol=1e-2)
    for (name, ours), theirs_ in zip(divided.named_parameters(), whole.parameters(), strict=True):
        if theirs_.grad is None:
            continue
        gradient = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
        error = (gradient - theirs_.grad).float().norm() / theirs_.grad.float().norm()
        assert error < 0.05, f"{name}: {error}"
    for layer in base.model.layers:
        layer.unshard()
    for name, weights in packed(divided).items():
        for part, value in weights.tensors().items():
            assert torch.equal(value, before[name].tensors()[part]), f"{name} {part}"
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients are those of the undivided model, and mixed precision leaves the bytes as they are."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # two ranks on one GPU is more than NCCL takes
    build().save_pretrained(tmp_path / "model")
    mp.spawn(_rank, (tmp_path,), RANKS)
