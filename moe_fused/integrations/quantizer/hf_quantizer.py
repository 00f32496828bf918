"""The quantizer behind ``BitsAndBytesConfig(load_in_4bit=True)``, which includes the experts, and its registration.

Transformers' quantizer for this config replaces ``nn.Linear`` and leaves the stacked weights of experts dense. The one
here takes its place while ``moe_fused`` is enabled, and holds those weights as ``Packed4bitWeights`` (see
``packed_experts``). Models without experts that could be packed, and models in 8 bits, load as before.

Neither bitsandbytes nor accelerate is imported before a model is loaded.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from moe_fused.checkpoints.converter import Quantization

from .conversions import Deserialize, Quantize
from .experts_quantizer import ExpertsQuantizer, holds_experts, offloads, refuse_offloaded
from .packed_experts import BLOCKSIZE, packed_modules
from .saving import SaveFormat, modules_not_quantized

_METHOD = "bitsandbytes_4bit"
_GPUS_ALONE = (
    "give a device_map of GPUs alone, or load the dense checkpoint with llm_int8_enable_fp32_cpu_offload=True, which keeps "
    "what a device_map offloads dense"
)
_BY_NAME = (
    "llm_int8_enable_fp32_cpu_offload=True keeps dense only what a device_map offloads by name. Give a dict instead of a "
    "string"
)


class Experts4bitQuantizer(ExpertsQuantizer, Bnb4BitHfQuantizer):
    """Transformers' quantizer for bitsandbytes in 4 bits, extended to stacked experts."""

    skip_option = "llm_int8_skip_modules"

    def quantization(self) -> Quantization:
        config = self.quantization_config
        return Quantization(
            self.pre_quantized,
            config.bnb_4bit_quant_type,
            BLOCKSIZE,
            config.bnb_4bit_use_double_quant,
            config.bnb_4bit_compute_dtype,
            config.bnb_4bit_quant_storage,
        )

    def warn_dense(self, what: str, reason: str) -> None:
        warnings.warn(f"{what} stays dense with load_in_4bit=True: {reason}", stacklevel=3)

    # Loading.

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        keeps_dense = self.quantization_config.llm_int8_enable_fp32_cpu_offload
        if self.pre_quantized and not keeps_dense and offloads(device_map):
            # Transformers would ask for that option, but takes it from the checkpoint whatever the user gives.
            raise ValueError(f"a checkpoint in 4 bits cannot be offloaded to the CPU or the disk: {_GPUS_ALONE}")
        super().validate_environment(*args, **kwargs)
        # Transformers asks once more when it has made a device_map of a string; the experts are known then.
        refuse_offloaded(self.names.targets, device_map, _GPUS_ALONE if self.pre_quantized else _BY_NAME)

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        self._skip_head(model)
        # A checkpoint in 4 bits names its dense modules itself. Transformers would make modules of further tensors dense,
        # and all of them if the device is the CPU.
        named = None if self.pre_quantized and any(map(holds_experts, model.modules())) else device_map
        super()._process_model_before_weight_loading(model, device_map=named, **kwargs)
        self.find_experts(model, device_map, kwargs.get("checkpoint_files"))
        if self.names.targets:
            from bitsandbytes.nn.modules import Linear4bit

            linears = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
            refuse_offloaded([*self.names.targets, *linears], device_map, _GPUS_ALONE)

    def _skip_head(self, model: Any) -> None:
        """Leaves the head of the model dense where the checkpoint is of a model with another head.

        ``get_state_dict_and_metadata`` wrote the modules that were skipped, the other head among them, into the
        checkpoint's ``llm_int8_skip_modules``, and where that is set, Transformers adds no modules by default.
        """
        config = self.quantization_config
        skipped = config.llm_int8_skip_modules
        if not (self.pre_quantized and skipped and any(holds_experts(module) for module in model.modules())):
            return
        if not {name for name, _ in model.named_modules()}.issuperset(skipped):
            # A module that is skipped here although the checkpoint has it in 4 bits is dequantized while it is loaded.
            config.llm_int8_skip_modules = self.get_modules_to_not_convert(model, skipped, add_default_skips=True)

    def check_dtype(self, model: Any) -> None:
        if self.quantization_config.bnb_4bit_compute_dtype == torch.float32 != model.dtype:
            warnings.warn(
                "experts in 4 bits compute in float32, the default of bnb_4bit_compute_dtype, although the model is "
                f"{model.dtype}: set bnb_4bit_compute_dtype to {model.dtype}",
                stacklevel=3,
            )

    def get_quantize_ops(self) -> Any:
        return Quantize(super().get_quantize_ops())

    def get_weight_conversions(self) -> list[Any]:
        conversions = super().get_weight_conversions()
        if self.names.targets:
            for conversion in conversions:
                conversion.operations = [Deserialize(operation) for operation in conversion.operations]
        return conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        self.finish_experts(model)
        self._check_linears(model)
        return model

    def _check_linears(self, model: Any) -> None:
        """Raises ValueError for a linear layer that the config has in 4 bits and the checkpoint does not.

        Transformers loads it, and its first product ends in an error without a message.
        """
        from bitsandbytes.nn.modules import Linear4bit, Params4bit

        for name, module in model.named_modules():
            if isinstance(module, Linear4bit) and not isinstance(module.weight, Params4bit):
                raise ValueError(
                    f"{name}.weight is dense in this 4-bit checkpoint: add {name} to {self.skip_option} in the "
                    "quantization_config of its config.json"
                )

    # Saving.

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        state_dict = self.packed_state_dict(model)
        if state_dict is None:
            result: tuple[dict[str, Tensor] | None, dict[str, Any]] = super().get_state_dict_and_metadata(model)
            adapted = getattr(model, "_hf_peft_config_loaded", False)
            if self.quantization_config.llm_int8_enable_fp32_cpu_offload and not adapted:
                # Transformers would not know, when it loads the checkpoint, what is dense because it was offloaded.
                self._record_dense_modules(model)
            return result
        self._record_dense_modules(model)
        # The config of a model inside another may be an object of its own.
        model.config.quantization_config = self.quantization_config
        return state_dict, {}

    def _record_dense_modules(self, model: Any) -> None:
        """Writes into the config which modules of ``model`` are dense."""
        self.quantization_config.llm_int8_skip_modules = modules_not_quantized(model, self.modules_to_not_convert)

    # Dequantizing.

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # save_pretrained makes strings of the config's dtypes.
        dense_dtype: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        from bitsandbytes.nn.modules import Linear4bit

        if any(isinstance(module, Linear4bit) for module in model.modules()):  # Transformers' function needs one
            model = super()._dequantize(model, dtype=dense_dtype)
        self.unpack(model, dense_dtype)
        return model


def save_format(model: Any, layout: SaveFormat) -> None:
    """Implements ``moe_fused.save_format``."""
    quantizer = getattr(model, "hf_quantizer", None)
    if layout not in ExpertsQuantizer.save_formats:
        raise ValueError(f"layout must be one of {', '.join(ExpertsQuantizer.save_formats)}, got {layout!r}")
    if not isinstance(quantizer, ExpertsQuantizer) or next(packed_modules(model), None) is None:
        raise ValueError(f"model must have 4-bit experts, got a {type(model).__name__} without 4-bit experts")
    if layout in quantizer.save_formats:
        quantizer.save_format = layout
        return
    (published,) = quantizer.save_formats  # formats that are kept as they are published have one layout
    only = "fused" if published == "published" else "per_expert"
    if layout != only:
        raise ValueError(
            f"layout must be {only!r}, got {layout!r}: this model is saved as it is published. To change its layout, use "
            "moe-fused convert model on a saved model"
        )


# Transformers' quantizer while ours is in its place.
_replaced: list[Any] = []


def register() -> None:
    """Puts this quantizer in the place of Transformers' own; a second call changes nothing."""
    if not _replaced:
        _replaced.append(AUTO_QUANTIZER_MAPPING[_METHOD])
        AUTO_QUANTIZER_MAPPING[_METHOD] = Experts4bitQuantizer


def unregister() -> None:
    """Undoes ``register``, and does nothing if that was never called."""
    if _replaced:
        AUTO_QUANTIZER_MAPPING[_METHOD] = _replaced.pop()
