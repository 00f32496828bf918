"""Experts modules that hold their weights in 4 bits.

The parameters of such a module hold bytes, as uint8 or as the dtype of ``bnb_4bit_quant_storage``, with their companions
(``gate_up_proj_absmax``, …) beside them. Its forward is the kernel's, whatever ``experts_implementation`` says, because no
other implementation can read such weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from moe_fused.checkpoints.converter import activation_scales_name, restore_orientation, was_transposed
from moe_fused.checkpoints.names import Target
from moe_fused.hub import get_kernel
from moe_fused.integrations.transformers.experts_module import Experts, is_packed, layout_refusal, projections_of
from moe_fused.integrations.transformers.forward import IMPLEMENTATION

if TYPE_CHECKING:
    from qwen3_moe_fused import Packed4bitWeights

# The block size that bitsandbytes quantizes with; BitsAndBytesConfig has no option for it.
BLOCKSIZE = 64


def four_bit_config(dtype: torch.dtype, quant_type: str = "nf4", double_quant: bool = True) -> BitsAndBytesConfig:
    """Makes the ``quantization_config`` with which ``from_pretrained`` quantizes a dense checkpoint to 4 bits.

    Args:
        dtype: the dtype that products with the weights compute in.
        quant_type: ``"nf4"`` or ``"fp4"``.
        double_quant: whether the scales of the blocks are held in 8 bits.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


class PackedConfig:
    """The config of an experts module with packed weights: its model's config with another experts implementation.

    Attributes:
        model_config: the config that the module shares with its model.
    """

    _experts_implementation = IMPLEMENTATION

    def __init__(self, model_config: Any) -> None:
        self.model_config = model_config

    def __getattr__(self, name: str) -> Any:
        if name == "model_config" or name.startswith("__"):  # absent while the object is copied or unpickled
            raise AttributeError(name)
        return getattr(self.model_config, name)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Yields the experts modules of ``model`` that hold packed weights, with their names."""
    for name, module in model.named_modules():
        if is_packed(module):
            yield name, module


def packing_refusal(module: Experts, quant_type: str = "nf4") -> str | None:
    """Why the weights of ``module`` cannot be held in 4 bits, or None if they can.

    Args:
        quant_type: the kernel's name of the format. The default stands for bitsandbytes' formats.
    """
    if not hasattr(type(module), "_apply_gate"):
        return "it is not under Transformers' experts interface"
    if reason := layout_refusal(module):
        return reason
    format4bit = get_kernel().Format4bit
    try:
        for name in projections_of(module):
            target = target_of("", module, name, quant_type)
            format4bit(target.shape, quant_type, blocksize_of(quant_type), projections=target.projections)
    except ValueError as error:
        return str(error)
    return None


def blocksize_of(quant_type: str) -> int:
    """Returns how many weights share a scale in a model that is held in a format."""
    sizes = get_kernel().formats.named(quant_type).blocksizes
    return BLOCKSIZE if BLOCKSIZE in sizes else int(sizes[0])


def target_of(path: str, module: Experts, name: str, quant_type: str) -> Target:
    """Returns what the parameter ``name`` of an experts module becomes when it is packed.

    Formats whose blocks lie along the in features hold (E, out, in), also where the dense weights are (E, in, out).
    """
    shape = tuple(getattr(module, name).shape)
    transposed = getattr(module, "is_transposed", False) and get_kernel().formats.named(quant_type).blocks_in_rows
    if transposed:
        shape = (shape[0], shape[2], shape[1])
    return Target(f"{path}.{name}", shape, matrices_per_expert(module, name), transposed)


def matrices_per_expert(module: Experts, name: str) -> int:
    """How many matrices of one expert the parameter ``name`` holds one after the other: 2 for gate and up, else 1."""
    halves = getattr(module, "is_concatenated", True) and not getattr(module, "is_transposed", False)
    return 2 if name == "gate_up_proj" and halves else 1


def get_packed(module: Experts, name: str) -> Packed4bitWeights:
    """Returns the packed parameter ``name`` of an experts module. Divided experts are those of this process alone."""
    weights: Packed4bitWeights = get_kernel().modules.weights_of(module, name)
    return weights


def are_divided(module: Experts) -> bool:
    """Whether this process has a part of the experts of a module alone, in 4 bits."""
    for name in projections_of(module):
        form = getattr(module, f"{name}_format", None)
        if form is not None and module._parameters[name].shape[0] != form.shape[0]:
            return True
    return False


def gather_packed(module: Experts, name: str) -> Packed4bitWeights:
    """Returns the packed parameter ``name`` with the experts of all processes, which all have to call this."""
    mine, parameter = get_packed(module, name), module._parameters[name]
    if parameter.shape[0] == mine.shape[0]:
        return mine
    parts: dict[str, Any] = {
        part: get_kernel().modules.divided_as(parameter, value) for part, value in mine.tensors().items()
    }
    form = replace(mine.format, shape=(parameter.shape[0], *mine.format.shape[1:]))
    whole: Packed4bitWeights = get_kernel().Packed4bitWeights(
        form, **{part: value.full_tensor() for part, value in parts.items()}
    )
    return whole


def gather_activation_scales(module: Experts, name: str) -> Tensor | None:
    """Returns the scales of activations that the checkpoint had beside a packed parameter, (E, projections) on the CPU.

    As for ``gather_packed``, all processes have to call this. None stands for no scales.
    """
    scales: Tensor | None = getattr(module, activation_scales_name(name), None)
    parameter = module._parameters[name]
    if scales is None or scales.shape[0] == parameter.shape[0]:
        return scales
    whole: Any = get_kernel().modules.divided_as(parameter, scales.to(parameter.device))
    gathered: Tensor = whole.full_tensor().cpu()
    return gathered


def pin(module: Experts) -> None:
    """Makes the kernel the implementation of an experts module, whatever its model is set to."""
    if not isinstance(module.config, PackedConfig):
        module.config = PackedConfig(module.config)


def unpack(module: Experts, name: str, dtype: torch.dtype | None) -> None:
    """Replaces the packed parameter ``name`` by a dense one of ``dtype``, by default of its dtype before quantization."""
    dense = get_packed(module, name).dequantize(dtype or getattr(module, f"{name}_source_dtype"))
    if was_transposed(module):
        dense = dense.mT.contiguous()
    dense = get_kernel().modules.divided_as(module._parameters[name], dense)
    get_kernel().modules.detach(module, name)
    delattr(module, f"{name}_source_dtype")
    module.register_parameter(name, nn.Parameter(dense))


def unpack_experts(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Makes all packed experts of ``model`` dense and leaves other layers alone.

    Args:
        dtype: of the dense weights; by default each gets the dtype that it had before it was quantized.
    """
    for _, module in list(packed_modules(model)):
        for name in projections_of(module):
            unpack(module, name, dtype)
        restore_orientation(module)
        module.config = module.config.model_config
