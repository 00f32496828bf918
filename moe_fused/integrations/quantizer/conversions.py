"""Changes to the conversions of weights that Transformers runs while it loads and saves a 4-bit model."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.quantizers_utils import get_module_from_name

from moe_fused.checkpoints.entries import check_scales
from moe_fused.checkpoints.finite import is_finite
from moe_fused.checkpoints.names import ACTIVATION_SCALE, MATRIX_PARTS
from moe_fused.hub import get_kernel

from .packed_experts import packed_modules


class DenseExpertsConverter(WeightConverter):
    """Transformers' converter for dense experts, which splits them on saving, made to skip modules that are packed."""

    packed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, converter: WeightConverter) -> DenseExpertsConverter:
        """Makes one that does what ``converter`` does."""
        dense = cls(
            list(converter._original_source_patterns), list(converter._original_target_patterns), converter.operations
        )
        dense.scope_prefix, dense.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        dense._was_used = True
        return dense

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key.rpartition(".")[0] in self.packed:
            return source_key, None
        return super().rename_source_key(source_key)

    def reverse_transform(self) -> Any:
        reverse: Any = super().reverse_transform()
        reverse.packed = self.packed
        return reverse


def skip_packed(model: Any) -> None:
    """Tells the conversions on ``model`` which of its modules are packed now."""
    packed = frozenset(name for name, _ in packed_modules(model))
    for conversion in model._weight_conversions:
        if isinstance(conversion, DenseExpertsConverter):
            conversion.packed = packed


class Deserialize(ConversionOps):
    """Transformers' deserialization of 4-bit weights, with two cases added that it does not handle.

    The routers of Transformers 4 were linear layers and were quantized like all others. In Transformers 5 they are
    parameters, so their 4-bit weights are dequantized here. Tensors that are not quantized get the dtype that was asked
    for, which newer versions of Transformers do not give them.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.hf_quantizer = original.hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Deserialize:
        return self  # a real copy would copy the quantizer for every tensor of a checkpoint

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        import bitsandbytes.functional as bnb
        from bitsandbytes.nn.modules import Linear4bit

        model, key = kwargs["model"], kwargs["full_layer_name"]
        module, _ = get_module_from_name(model, key)
        if isinstance(module, Linear4bit):
            result: dict[str, Any] = self.original.convert(input_dict, *args, **kwargs)
            return result
        parts = {part: value[0] if isinstance(value, list) else value for part, value in input_dict.items()}
        weight = parts.pop("weight")
        if parts:
            weight = bnb.dequantize_4bit(weight, bnb.QuantState.from_dict(parts, device=weight.device))
        return {"weight": weight.to(_dtype_for(model, key)) if weight.is_floating_point() else weight}


class Quantize(ConversionOps):
    """Transformers' quantization of linear layers, with a note of every weight that is not finite.

    bitsandbytes quantizes NaN without an error.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.hf_quantizer = original.hf_quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        for name, value in input_dict.items():
            if not is_finite(value[0] if isinstance(value, list) else value):
                fault = ValueError(f"{name} holds NaN or infinite values, which cannot be quantized")
                self.hf_quantizer.faults.append(fault)
        result: dict[str, Any] = self.original.convert(input_dict, *args, **kwargs)
        return result


class DequantizeLinear(ConversionOps):
    """Makes the dense weight of a linear layer of the tensors that compressed-tensors has for it."""

    def __init__(self, hf_quantizer: Any, quant_type: str) -> None:
        self.hf_quantizer, self.quant_type = hf_quantizer, quant_type

    def __deepcopy__(self, memo: dict[int, Any]) -> DequantizeLinear:
        return self  # a real copy would copy the quantizer for every tensor of a checkpoint

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model, name = kwargs["model"], kwargs["full_layer_name"]
        kernel = get_kernel()
        tensors = {part: value[0] if isinstance(value, list) else value for part, value in input_dict.items()}
        parts = {part: tensors[part][None] for part in MATRIX_PARTS if part in tensors and part != ACTIVATION_SCALE}
        shape = (1, *model.get_parameter_or_buffer(name).shape)
        form = kernel.Format4bit(shape, self.quant_type, dtype=_dtype_for(model, name))
        weights = kernel.interchange.stack_of_published(parts, form)
        try:
            check_scales(weights, parts, lambda part, *_: f"{name.removesuffix('weight')}{part}")
        except ValueError as error:
            self.hf_quantizer.faults.append(error)
        return {name: weights.dequantize()[0]}


# Conversions with these operations load what saving writes in another way.
LOADING_ONLY = (Deserialize, DequantizeLinear)


def _dtype_for(model: Any, key: str) -> torch.dtype:
    """Returns the dtype that the parameter or buffer ``key`` is to have; the model keeps some of them in fp32."""
    dtype: torch.dtype = model.get_parameter_or_buffer(key).dtype
    for pattern, kept in model._get_dtype_plan(dtype).items():
        if re.search(pattern.replace("*", ".*"), key):
            dtype = kept
    return dtype
