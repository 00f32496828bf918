"""The tensors and the config that ``save_pretrained`` writes for a model with 4-bit experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, distributed, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.quantizers_utils import should_convert_module

from moe_fused.checkpoints.architecture import routers_beside
from moe_fused.checkpoints.fused import write_fused
from moe_fused.checkpoints.names import ACTIVATION_SCALE, MATRIX_PARTS, STACK_PARTS, Names, Target
from moe_fused.checkpoints.quant_state import write_matrix
from moe_fused.hub import get_kernel
from moe_fused.integrations.transformers.experts_module import Experts, projections_of

from .packed_experts import are_divided, gather_activation_scales, gather_packed, packed_modules

if TYPE_CHECKING:
    from qwen3_moe_fused import Packed4bitWeights

# "published" is the layout of the format's own checkpoints: those of gpt-oss, or those of compressed-tensors.
SaveFormat = Literal["per_expert", "fused", "published", "published_per_expert"]


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
    scales = gather_activation_scales(module, name)
    for part in weights.tensors():
        del state_dict[full if part == "packed" else f"{full}_{part}"]
    if are_divided(module):
        if distributed.get_rank() != 0:
            return
        weights = weights.to("cpu")
    target = Target(full, weights.format.shape, weights.format.projections)
    if save_format == "published":
        stacks = get_kernel().interchange.published_of(weights, STACK_PARTS[0])
        state_dict |= {f"{full}_{part}": value.contiguous() for part, value in stacks.items()}
        return
    if save_format == "published_per_expert":
        state_dict |= _published_matrices(weights, target, scales, names)
        return
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


def no_matrices(target: Target, quant_type: str) -> str:
    """Says that experts cannot be saved as compressed-tensors has them."""
    return (
        f"{target.name} cannot be saved in {quant_type}: checkpoints of its model have no matrix for each expert. Load the "
        "dense model with quantization_config=transformers.Mxfp4Config() instead"
    )


def _published_matrices(
    weights: Packed4bitWeights, target: Target, scales: Tensor | None, names: Names
) -> dict[str, Tensor]:
    """Returns the tensors of a stack's matrices as compressed-tensors has them, by their names in checkpoints.

    Args:
        scales: those of activations, (E, projections), NaN for a matrix that has none.
    """
    matrices = names.per_expert(target)
    if matrices is None:
        raise ValueError(no_matrices(target, weights.format.quant_type))
    parts = get_kernel().interchange.published_of(weights, MATRIX_PARTS[0])
    tensors: dict[str, Tensor] = {}
    for expert in range(weights.shape[0]):
        for projection, pattern in enumerate(matrices):
            key = pattern.replace("*", str(expert)).removesuffix("weight")
            for part, value in parts.items():
                # The tensors are copied, because safetensors does not write tensors that share memory.
                tensors[key + part] = value[expert].chunk(target.projections)[projection].clone()
            if scales is not None and not scales[expert, projection].isnan():
                tensors[key + ACTIVATION_SCALE] = scales[expert, projection].view(1).clone()
    return tensors


def modules_not_quantized(model: Any, skipped_by_name: Iterable[str]) -> list[str]:
    """Returns the modules that the config of a saved ``model`` has to name as dense.

    These are the modules that the config skipped by name; linear layers that are dense all the same, because a larger
    model skipped them by another name; and routers, which Transformers 4 takes for linear layers.
    """

    def in_checkpoint(path: str, weight: Tensor) -> str:
        (key,) = revert_weight_conversion(model, {f"{path}.weight": weight})
        return key.removesuffix(".weight")

    patterns = list(skipped_by_name)
    skipped = set(patterns)
    for path, module in model.named_modules():
        # The class is known by its name, because bitsandbytes need not be installed.
        in_4bit = any(base.__name__ == "Linear4bit" for base in type(module).__mro__)
        is_dense = isinstance(module, nn.Linear) and not in_4bit
        if is_dense and should_convert_module(path, patterns):
            skipped |= {path, in_checkpoint(path, module.weight)}
    for path, weight in routers_beside(model, (path for path, _ in packed_modules(model))):
        skipped.add(in_checkpoint(path, weight))
    return sorted(skipped)
