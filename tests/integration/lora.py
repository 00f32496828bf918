"""The same LoRA twice: in the kernel, and as PEFT alone computes it on Transformers' own experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

import moe_fused

from .conftest import DEVICE
from .models import EXPERTS, QWEN3_MOE, ModelCase, tokens

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LINEAR = ["gate_proj", "up_proj", "down_proj"]
RANK = 3
OPTIONS: dict[str, Any] = {"r": RANK, "lora_alpha": 5}


@contextmanager
def disabled() -> Iterator[None]:
    """PEFT and Transformers as they are without us."""
    moe_fused.disable()
    try:
        yield
    finally:
        moe_fused.enable()


def randomize(model: nn.Module, adapter: str = "default", seed: int = 3) -> None:
    """Gives an adapter values of its own, equal wherever names and shapes are; none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name and f".{adapter}." in name:
                value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(value * 0.2)


def plain(case: ModelCase = QWEN3_MOE, **options: Any) -> PreTrainedModel:
    """The model without an adapter, set to run in the kernel."""
    model = case.build(**options).to(DEVICE)
    model.set_experts_implementation("moe_fused")
    return model


def ours(case: ModelCase = QWEN3_MOE, **options: Any) -> PeftModel:
    """The model with an adapter in the kernel, in evaluation mode."""
    return adapt(plain(case), **options)


def theirs(case: ModelCase = QWEN3_MOE, **options: Any) -> PeftModel:
    """The same with PEFT's own adapter on eager experts."""
    with disabled():
        return adapt(case.build().to(DEVICE), **options)


def fix_routes(model: nn.Module) -> None:
    """Sends token t to experts t, t + 1, …, weighted by its router.

    Where a router's margin is smaller than what rounding makes of its logits, two models of one precision route apart,
    and then differ by an expert. Whatever each of them computes is to be compared, not that.
    """

    def choose(router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, _ = output
        number = torch.arange(len(logits), device=logits.device)[:, None]
        index = (number + torch.arange(router.top_k, device=logits.device)) % router.num_experts
        chosen = logits.gather(1, index)
        return logits, chosen.softmax(-1, torch.promote_types(logits.dtype, torch.float32)).to(weights.dtype), index

    routers = [module for module in model.modules() if isinstance(module, Qwen3MoeTopKRouter)]
    if not routers:
        raise TypeError(f"{type(model).__name__} has no Qwen3MoeTopKRouter, whose output this replaces")
    for router in routers:
        router.register_forward_hook(choose)


def run(model: nn.Module) -> Any:
    """The output of a pass."""
    return model(input_ids=tokens(device=str(model.device)))


def adapt(model: PreTrainedModel, **options: Any) -> PeftModel:
    targets = {} if "target_modules" in options else {"target_parameters": BOTH, "target_modules": []}
    adapted = get_peft_model(model, LoraConfig(**{**OPTIONS, **targets, **options}))
    randomize(adapted)
    adapted.eval()
    return adapted


def wrappers(model: nn.Module) -> list[ParamWrapper]:
    """PEFT's layers around parameters, ours or its own, but for routers."""
    found = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    return [module for module in found if module.parameter_name != "weight"]


def is_ours(wrapper: nn.Module) -> bool:
    return type(wrapper).__module__.startswith("moe_fused")


def block_diagonal(b: Tensor) -> Tensor:
    """PEFT's one factor B (2I, 2r·E) for gate and up, of our (2I, r·E) with a half for each."""
    gate, up = b.unflatten(1, (-1, EXPERTS)).permute(2, 0, 1).chunk(2, dim=1)
    rank = gate.shape[2]
    both = torch.cat([nn.functional.pad(gate, (0, rank)), nn.functional.pad(up, (rank, 0))], dim=1)
    return both.permute(1, 2, 0).flatten(1)


def own_blocks(b: Tensor) -> Tensor:
    """The inverse of ``block_diagonal``, whatever stands beside the diagonal."""
    both = b.unflatten(1, (-1, EXPERTS))
    out, rank = both.shape[0] // 2, both.shape[1] // 2
    return torch.cat([both[:out, :rank], both[out:, rank:]]).flatten(1)
