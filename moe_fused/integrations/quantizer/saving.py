"""The tensors and the config that ``save_pretrained`` writes for a model with 4-bit experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, distributed, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.quantizers_utils import should_convert_module

from moe_fused.checkpoints.fused import write_fused
from moe_fused.checkpoints.names import Names, Target
from moe_fused.checkpoints.quant_state import write_matrix
from moe_fused.integrations.transformers.experts_module import Experts, projections_of

from .packed_experts import are_divided, gather_packed, packed_modules

SaveFormat = Literal["per_expert", "fused"]


def checkpoint_tensors(model: nn.Module, names: Names, save_format: SaveFormat) -> dict[str, Tensor]:
    """Returns the state dict of ``model`` with the packed experts in the layout that was asked for.

    If the experts are divided among processes, all of these have to call this. The first one gets all experts, on the CPU,
    and the others none.

    Args:
        names: the names of the experts' tensors in checkpoints of ``model``.
    """
    state_dict = model.state_dict()
    for path, module in packed_modules(model):
        for name in projections_of(module):
            _write_stack(state_dict, f"{path}.{name}", module, name, names, save_format)
    return state_dict


def _write_stack(
    state_dict: dict[str, Tensor], full: str, module: Experts, name: str, names: Names, save_format: SaveFormat
) -> None:
    """Replaces the tensors of one packed parameter in ``state_dict``; ``full`` is its name in the model."""
    weights, dtype = gather_packed(module, name), getattr(module, f"{name}_source_dtype")
    for part in weights.tensors():
        del state_dict[full if part == "packed" else f"{full}_{part}"]
    if are_divided(module):
        if distributed.get_rank() != 0:
            return
        weights = weights.to("cpu")
    target = Target(full, weights.format.shape, weights.format.projections)
    matrices = names.per_expert(target) if save_format == "per_expert" else None
    if matrices is None:
        parts = write_fused(weights, dtype)
        state_dict |= {f"{full}_{part}" if part else full: value for part, value in parts.items()}
        return
    for expert in range(weights.shape[0]):
        for projection, pattern in enumerate(matrices):
            key = pattern.replace("*", str(expert))
            parts = write_matrix(weights, expert, projection, dtype)
            state_dict |= {f"{key}.{part}" if part else key: value for part, value in parts.items()}


def modules_not_quantized(model: Any, skipped_by_name: Iterable[str]) -> list[str]:
    """Returns the modules that ``llm_int8_skip_modules`` has to name in the config of a saved ``model``.

    These are the modules that the config skipped by name; linear layers that are dense all the same, because a larger
    model skipped them by another name; and routers, which Transformers 4 takes for linear layers.
    """
    from bitsandbytes.nn.modules import Linear4bit

    def in_checkpoint(path: str, weight: Tensor) -> str:
        (key,) = revert_weight_conversion(model, {f"{path}.weight": weight})
        return key.removesuffix(".weight")

    patterns = list(skipped_by_name)
    skipped = set(patterns)
    for path, module in model.named_modules():
        is_dense = isinstance(module, nn.Linear) and not isinstance(module, Linear4bit)
        if is_dense and should_convert_module(path, patterns):
            skipped |= {path, in_checkpoint(path, module.weight)}
    for path, _ in packed_modules(model):
        block = path.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_children():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Linear):
                skipped.add(in_checkpoint(f"{block}.{name}", weight))
    return sorted(skipped)
