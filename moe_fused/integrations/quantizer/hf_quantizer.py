"""The quantizer behind ``BitsAndBytesConfig(load_in_4bit=True)``, which includes the experts, and its registration.

Transformers' quantizer for this config replaces ``nn.Linear`` and leaves the stacked weights of experts dense. The one
here takes its place while ``moe_fused`` is enabled, and holds those weights as ``Packed4bitWeights`` (see
``packed_experts``). ``moe_fused.checkpoints`` reads and writes them. Models without experts that could be packed, and
models in 8 bits, load as before.

Neither bitsandbytes nor accelerate is imported before a model is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from moe_fused.checkpoints.converter import ExpertsConverter, Quantization
from moe_fused.checkpoints.names import Names, Target
from moe_fused.checkpoints.share import Share
from moe_fused.hub import get_kernel
from moe_fused.integrations.transformers.experts_module import projections_of
from moe_fused.integrations.transformers.originals import restore_experts

from .conversions import DenseExpertsConverter, Deserialize, Quantize, skip_packed
from .division import check_division, hide_division
from .packed_experts import (
    BLOCKSIZE,
    are_divided,
    matrices_per_expert,
    packed_modules,
    packing_refusal,
    pin,
    unpack_experts,
)
from .saving import SaveFormat, checkpoint_tensors, modules_not_quantized

_METHOD = "bitsandbytes_4bit"


def _holds_experts(module: nn.Module) -> bool:
    """Whether a parameter of ``module`` has the name and the dimensions of stacked expert weights."""
    return any(
        name in ("gate_up_proj", "up_proj", "down_proj") and parameter.dim() == 3
        for name, parameter in module.named_parameters(recurse=False)
    )


def _offloads(device_map: Any) -> bool:
    """Whether ``device_map`` puts modules on the CPU or the disk while others run elsewhere."""
    places = set(device_map.values()) if isinstance(device_map, dict) else set()
    return places != {"cpu"} and not places.isdisjoint({"cpu", "disk"})


def _refuse_offloaded(names: Iterable[str], device_map: Any, advice: str) -> None:
    """Raises ValueError if ``device_map`` offloads one of the modules or parameters ``names``, which are in 4 bits."""
    if not _offloads(device_map):
        return
    for name in names:
        holders = [module for module in device_map if not module or f"{name}.".startswith(f"{module}.")]
        place = device_map[max(holders, key=len)] if holders else None
        if place in ("cpu", "disk"):
            raise ValueError(
                f"{name} is in 4 bits and cannot be offloaded, but the device_map puts it on the {place}: {advice}"
            )


_GPUS_ALONE = (
    "give a device_map of GPUs alone, or load the dense checkpoint with llm_int8_enable_fp32_cpu_offload=True, which keeps "
    "what a device_map offloads dense"
)
_BY_NAME = (
    "llm_int8_enable_fp32_cpu_offload=True keeps dense only what a device_map offloads by name. Give a dict instead of a "
    "string"
)


def _warn_dense(what: str, reason: str) -> None:
    warnings.warn(f"{what} stays dense with load_in_4bit=True: {reason}", stacklevel=3)


class Experts4bitQuantizer(Bnb4BitHfQuantizer):
    """Transformers' quantizer for bitsandbytes in 4 bits, extended to stacked experts.

    Attributes:
        save_format: the layout in which ``save_pretrained`` writes packed experts.
        names: the names of the experts' tensors in checkpoints of the model.
        converter: the converter that reads those tensors, or None if the model has no experts to be packed.
        shares: what this process loads of the experts that a plan of Transformers has divided, by their parameters' names.
        not_finite: names of linear layers' weights that were to be quantized and hold NaN or infinite values.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.save_format: SaveFormat = "per_expert"
        self.names = Names(())
        self.converter: ExpertsConverter | None = None
        self.not_finite: list[str] = []
        self.shares: dict[str, Share] = {}
        self._hooks: list[RemovableHandle] = []

    # Loading.

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        keeps_dense = self.quantization_config.llm_int8_enable_fp32_cpu_offload
        if self.pre_quantized and not keeps_dense and _offloads(device_map):
            # Transformers would ask for that option, but takes it from the checkpoint whatever the user gives.
            raise ValueError(f"a checkpoint in 4 bits cannot be offloaded to the CPU or the disk: {_GPUS_ALONE}")
        super().validate_environment(*args, **kwargs)
        # Transformers asks once more when it has made a device_map of a string; the experts are known then.
        _refuse_offloaded(self.names.targets, device_map, _GPUS_ALONE if self.pre_quantized else _BY_NAME)

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        self._skip_head(model)
        # A checkpoint in 4 bits names its dense modules itself. Transformers would make modules of further tensors dense,
        # and all of them if the device is the CPU.
        named = None if self.pre_quantized and any(map(_holds_experts, model.modules())) else device_map
        super()._process_model_before_weight_loading(model, device_map=named, **kwargs)
        restore_experts(
            model
        )  # now, because what Unsloth has made of the call before changes forwards of experts' classes
        self.names = Names(self._targets(model), base_model_prefix=model.base_model_prefix)
        if self.names.targets:
            from bitsandbytes.nn.modules import Linear4bit

            linears = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
            _refuse_offloaded([*self.names.targets, *linears], device_map, _GPUS_ALONE)
        if self.names.targets and getattr(model.config, "distributed_config", None) is not None:
            check_division(model)
            device = next(iter(device_map.values())) if isinstance(device_map, dict) else "cpu"
            paths = kwargs.get("checkpoint_files") or ()
            self._hooks = hide_division(model, self.names.targets, self.shares, torch.device(device), paths)

    def _skip_head(self, model: Any) -> None:
        """Leaves the head of the model dense where the checkpoint is of a model with another head.

        ``get_state_dict_and_metadata`` wrote the modules that were skipped, the other head among them, into the
        checkpoint's ``llm_int8_skip_modules``, and where that is set, Transformers adds no modules by default.
        """
        config = self.quantization_config
        skipped = config.llm_int8_skip_modules
        if not (self.pre_quantized and skipped and any(_holds_experts(module) for module in model.modules())):
            return
        if not {name for name, _ in model.named_modules()}.issuperset(skipped):
            # A module that is skipped here although the checkpoint has it in 4 bits is dequantized while it is loaded.
            config.llm_int8_skip_modules = self.get_modules_to_not_convert(model, skipped, add_default_skips=True)

    def _targets(self, model: nn.Module) -> list[Target]:
        """Finds the parameters of experts that are to be packed, and warns of those that stay dense."""
        refused: dict[str, str] = {}
        targets = []
        for path, module in model.named_modules():
            if not _holds_experts(module) or not should_convert_module(path, self.modules_to_not_convert):
                continue
            if reason := packing_refusal(module, BLOCKSIZE):
                refused[type(module).__name__] = reason
                continue
            for pattern in self.quantization_config.llm_int8_skip_modules or ():
                if pattern.startswith(f"{path}."):
                    raise ValueError(
                        f"llm_int8_skip_modules must name all experts of a layer, {path}, or none, got {pattern}"
                    )
            targets += [
                Target(f"{path}.{name}", tuple(getattr(module, name).shape), matrices_per_expert(module, name))
                for name in projections_of(module)
            ]
        for class_name, reason in refused.items():
            _warn_dense(class_name, reason)
        if targets:
            self._warn_of_dtypes(model)
        return targets

    def _warn_of_dtypes(self, model: Any) -> None:
        """Warns of dtypes in the config that experts do not follow, or that the user can hardly want."""
        if self.quantization_config.bnb_4bit_compute_dtype == torch.float32 != model.dtype:
            warnings.warn(
                "experts in 4 bits compute in float32, the default of bnb_4bit_compute_dtype, although the model is "
                f"{model.dtype}: set bnb_4bit_compute_dtype to {model.dtype}",
                stacklevel=3,
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.names.targets or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        return Quantize(super().get_quantize_ops())

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        target = self.names.targets.get(param_name)
        if target is None:
            return super().param_element_size(model, param_name, param)
        form = self._format(target)
        return sum(rows * columns for rows, columns in form.storage().values()) / param.numel()

    def _format(self, target: Target) -> Any:
        """Returns the ``Format4bit`` of a parameter that is to be packed."""
        config = self.quantization_config
        return get_kernel().Format4bit(
            target.shape,
            config.bnb_4bit_quant_type,
            BLOCKSIZE,
            config.bnb_4bit_use_double_quant,
            target.projections,
            config.bnb_4bit_compute_dtype,
        )

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        targets, experts = self._with_converters(weight_conversions)
        self.names = Names(targets, experts, self.names.base_model_prefix)
        if not targets:
            return super().update_weight_conversions(weight_conversions, *args)
        others = [conversion for conversion in weight_conversions if conversion not in experts]
        config = self.quantization_config
        self.converter = ExpertsConverter(
            self.names,
            Quantization(
                self.pre_quantized,
                config.bnb_4bit_quant_type,
                BLOCKSIZE,
                config.bnb_4bit_use_double_quant,
                config.bnb_4bit_compute_dtype,
                config.bnb_4bit_quant_storage,
            ),
            self.shares,
        )
        # The first converter to claim a tensor gets it. Experts that stay dense go to Transformers' converters.
        return [self.converter, *experts, *super().update_weight_conversions(others, *args)]

    def _with_converters(self, weight_conversions: list[Any]) -> tuple[list[Target], list[WeightConverter]]:
        """Returns the targets that can be loaded, and Transformers' converters for them."""
        targets, converters = list(self.names.targets.values()), []
        for conversion in weight_conversions:
            if not isinstance(conversion, WeightConverter):
                continue
            made = [target for target in targets if target.name.endswith(tuple(conversion.target_patterns))]
            if made and len(conversion.target_patterns) > 1:
                modules = {target.name.rpartition(".")[0] for target in made}
                _warn_dense(
                    ", ".join(sorted(modules)), "checkpoints hold its experts together with those of another module"
                )
                targets = [target for target in targets if target.name.rpartition(".")[0] not in modules]
            elif made:
                converters.append(conversion)
        return targets, converters

    def get_weight_conversions(self) -> list[Any]:
        conversions = super().get_weight_conversions()
        if self.names.targets:
            for conversion in conversions:
                conversion.operations = [Deserialize(operation) for operation in conversion.operations]
        return conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # Newer versions of Transformers call this; older ones never cast a tensor that a converter renames.
        if isinstance(converter, ExpertsConverter):
            return None
        result: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return result

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        while self._hooks:
            self._hooks.pop().remove()
        if self.not_finite:
            # Raised here, because Transformers turns an error within a conversion into a report that lacks the name.
            raise ValueError(f"{self.not_finite[0]} holds NaN or infinite values, which cannot be quantized")
        if self.converter is None:
            return model
        for name in self.names.targets:
            if name not in self.converter.loaded:
                raise ValueError(f"{name} is missing from the checkpoint, in every layout that is known")
        for path, module in packed_modules(model):
            for name in projections_of(module):
                if getattr(module, f"{name}_format", None) is None:
                    raise ValueError(
                        f"{path}.{name} must be of 4-bit weights like the rest of its module, but is dense"
                    )
            pin(module)
        self._keep_conversions(model)
        for part in model.modules():
            if part is not model and isinstance(part, PreTrainedModel) and next(packed_modules(part), None):
                self._adopt(part)
        return model

    def _keep_conversions(self, model: Any) -> None:
        """Keeps on ``model`` only the conversions that saving has to revert, none of which touches packed weights."""
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not isinstance(conversion, ExpertsConverter)
            and conversion not in self.names.converters
            and not any(isinstance(op, Deserialize) for op in getattr(conversion, "operations", ()))
        ] + [DenseExpertsConverter.of(converter) for converter in self.names.converters]
        skip_packed(model)

    def _adopt(self, part: Any) -> None:
        """Lets ``part``, a model inside the one that was loaded, be saved by itself.

        ``save_pretrained`` of the part looks at attributes of the part alone.
        """
        part.hf_quantizer = self
        stacks = [f"{path}.{name}" for path, module in packed_modules(part) for name in projections_of(module)]
        part._weight_conversions = [
            DenseExpertsConverter.of(conversion)
            if isinstance(conversion, WeightConverter)
            and any(stack.endswith(tuple(conversion.target_patterns)) for stack in stacks)
            else conversion
            for conversion in get_model_conversion_mapping(part, add_legacy=False)
            if not isinstance(conversion, PrefixChange)  # it changes names for the whole model's checkpoint
        ]

    # Saving.

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        skip_packed(model)  # a part of the model may have been dequantized since it was loaded
        adapted = getattr(model, "_hf_peft_config_loaded", False)
        if adapted and any(are_divided(each) for _, each in packed_modules(model)):
            # Only the first process would come to the adapters, which it has to gather from all.
            raise NotImplementedError(
                "adapters of experts that are divided among processes cannot be saved by Transformers' save_pretrained: add "
                "them with peft.get_peft_model, whose model gathers them"
            )
        if adapted or next(packed_modules(model), None) is None:
            result: tuple[dict[str, Tensor] | None, dict[str, Any]] = super().get_state_dict_and_metadata(model)
            if self.quantization_config.llm_int8_enable_fp32_cpu_offload and not adapted:
                # Transformers would not know, when it loads the checkpoint, what is dense because it was offloaded.
                self._record_dense_modules(model)
            return result
        state_dict = checkpoint_tensors(model, self.names, self.save_format)
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
        unpack_experts(model, dense_dtype)
        for part in list(model.modules()):
            if getattr(part, "hf_quantizer", None) is self:
                skip_packed(part)
                self.remove_quantization_config(part)
        return model


def save_format(model: Any, layout: SaveFormat) -> None:
    """Implements ``moe_fused.save_format``."""
    if layout not in get_args(SaveFormat):
        raise ValueError(f"layout must be one of {', '.join(get_args(SaveFormat))}, got {layout!r}")
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, Experts4bitQuantizer) or next(packed_modules(model), None) is None:
        raise ValueError(f"model must have 4-bit experts, got a {type(model).__name__} without 4-bit experts")
    quantizer.save_format = layout


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
