"""Packed experts that a plan of Transformers (``DistributedConfig``) divides among processes.

Transformers replaces the parameters of experts by DTensors before it loads them, and reads the tensors of the checkpoint as
these are divided. That is wrong for 4-bit weights, whose tensors have other shapes. So while a model is loaded, its state
dict shows experts parameters that are whole, and the converter reads what this process holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import replace_layer_number_by_wildcard

from moe_fused.checkpoints.share import Share, files_of, share_of_placeholder

# What to ask for instead of tensor parallelism. Transformers before 5.21 has another option.
_ADVICE = (
    "take DistributedConfig(tp_size=N, ep_size=N, tp_plan={})"
    if hasattr(DistributedConfig, "ep_size")
    else "take DistributedConfig(tp_size=N, enable_expert_parallel=True)"
)


def check_division(model: Any) -> None:
    """Refuses divisions that a model with 4-bit weights cannot have.

    Args:
        model: The model before it is divided. Its config has the ``DistributedConfig``.

    Raises:
        NotImplementedError: FSDP, pipeline parallelism or a division of features is asked for.
    """
    config = model.config.distributed_config
    sizes = {name: getattr(config, name, None) or 1 for name in ("tp_size", "ep_size", "fsdp_size", "pp_size")}
    refused = "a model with 4-bit experts cannot be loaded with {} of DistributedConfig"
    if sizes["fsdp_size"] > 1:
        raise NotImplementedError(
            f"{refused.format('fsdp_size')}, because Transformers divides weights before they are quantized: for training, "
            "moe-fused finetune --shard divides such a model with FSDP2"
        )
    if sizes["pp_size"] > 1:
        raise NotImplementedError(f"{refused.format('pp_size')}: distribute its layers with device_map, or {_ADVICE}")
    if sizes["tp_size"] == 1:
        return
    if sizes["ep_size"] == 1 and not getattr(config, "enable_expert_parallel", False):
        raise NotImplementedError(
            f"{refused.format('tp_size')} alone, which divides the features of each expert: {_ADVICE}"
        )
    if name := _divided_linear(model, config.tp_plan):
        raise NotImplementedError(f"{name} is in 4 bits, and tp_plan of DistributedConfig would divide it: {_ADVICE}")


def _divided_linear(model: Any, override: Any) -> str | None:
    """Returns the name of a linear layer in 4 bits that the model's plan for tensor parallelism names, if there is one."""
    from bitsandbytes.nn.modules import Linear4bit

    plan = {} if override == {} else {**model.tp_plan, **(override if isinstance(override, dict) else {})}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and replace_layer_number_by_wildcard(name) in plan:
            return str(name)
    return None


def hide_division(
    model: nn.Module, targets: Iterable[str], shares: dict[str, Share], device: torch.device, paths: Iterable[str]
) -> list[RemovableHandle]:
    """Makes the state dict of a model show divided experts parameters as whole ones, on meta.

    Args:
        model: The model before it is divided.
        targets: The names of the experts parameters.
        shares: Gets what this process holds of each of them, once the state dict is asked for.
        device: Where the model is loaded.
        paths: The files of the checkpoint.

    Returns:
        The hooks, which have to be removed once the model is loaded.
    """
    names = set(targets)
    files = cache(lambda: files_of(paths))

    def hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        for key in (f"{prefix}{name}" for name in module._parameters):
            value = state_dict.get(key)
            if key in names and isinstance(value, DTensor):
                shares[key] = share_of_placeholder(key, value, device, files())
                state_dict[key] = torch.empty(value.shape, dtype=value.dtype, device="meta")

    modules = {name.rpartition(".")[0] for name in names}
    return [model.get_submodule(name).register_state_dict_post_hook(hook) for name in sorted(modules)]
