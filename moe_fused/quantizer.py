"""``BitsAndBytesConfig(load_in_4bit=True)`` that means the experts, too.

Transformers' own quantizer for it replaces ``nn.Linear`` and leaves the stacked weights of experts as they are. Ours, in its
place while ``moe_fused`` is enabled, holds them as ``Packed4bitWeights``: the parameters of an experts module become uint8,
with their companions beside them, and its forward is the kernel's whatever ``experts_implementation`` says, for no other can
read them. ``checkpoints`` reads and writes them. Models without experts that it could serve, and 8 bits, go on as before.

Imports neither bitsandbytes nor accelerate before a model is loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter, revert_weight_conversion
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from .checkpoints.converter import ExpertsConverter, Quantization
from .checkpoints.fused import write_fused
from .checkpoints.names import Names, Target
from .checkpoints.quant_state import write_matrix
from .experts import IMPLEMENTATION, Experts, is_packed, layout_refusal
from .hub import get_kernel

if TYPE_CHECKING:
    from qwen3_moe_fused.quantization import Packed4bitWeights

_METHOD = "bitsandbytes_4bit"
# What bitsandbytes quantizes with; BitsAndBytesConfig does not name it.
BLOCKSIZE = 64

SaveFormat = Literal["per_expert", "fused"]


def four_bit_config(dtype: torch.dtype, quant_type: str = "nf4", double_quant: bool = True) -> BitsAndBytesConfig:
    """What ``from_pretrained`` takes to quantize a dense checkpoint.

    Args:
        dtype: to compute in.
        quant_type: ``"nf4"`` or ``"fp4"``.
        double_quant: whether the scales of blocks are held in 8 bits.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


class PackedConfig:
    """The config of an experts module with packed weights: that of its model, except for the experts implementation.

    Attributes:
        model_config: the config that the module shares with its model.
    """

    _experts_implementation = IMPLEMENTATION

    def __init__(self, model_config: Any) -> None:
        self.model_config = model_config

    def __getattr__(self, name: str) -> Any:
        if name == "model_config" or name.startswith("__"):  # not there yet while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.model_config, name)


def projections_of(module: Experts) -> tuple[str, str]:
    """The names of the parameters of an experts module that can be packed."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")


def packed_modules(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The experts modules that hold packed weights, with their names."""
    for name, module in model.named_modules():
        if is_packed(module):
            yield name, module


def packing_refusal(module: Experts, blocksize: int) -> str | None:
    """Why the weights of ``module`` cannot be held in 4 bits; None if they can."""
    if not hasattr(type(module), "_apply_gate"):
        return "it is not under Transformers' experts interface"
    if reason := layout_refusal(module):
        return reason
    format4bit = get_kernel().quantization.Format4bit
    try:
        for name in projections_of(module):
            format4bit(tuple(getattr(module, name).shape), blocksize=blocksize, projections=_parts(module, name))
    except ValueError as error:
        return str(error)
    return None


def _parts(module: Experts, name: str) -> int:
    """Matrices of one expert in the parameter of that name, one after the other."""
    halves = getattr(module, "is_concatenated", True) and not getattr(module, "is_transposed", False)
    return 2 if name == "gate_up_proj" and halves else 1


def _holds_experts(module: nn.Module) -> bool:
    return any(
        name in ("gate_up_proj", "up_proj", "down_proj") and parameter.dim() == 3
        for name, parameter in module.named_parameters(recurse=False)
    )


def _warn_dense(what: str, reason: str) -> None:
    warnings.warn(f"{what} stays dense with load_in_4bit=True: {reason}", stacklevel=3)


class _DenseOnly(WeightConverter):
    """A converter of Transformers for experts, there to split dense ones on save, that leaves packed modules alone."""

    packed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, converter: WeightConverter) -> _DenseOnly:
        own = cls(
            list(converter._original_source_patterns), list(converter._original_target_patterns), converter.operations
        )
        own.scope_prefix, own.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        own._was_used = True
        return own

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key.rpartition(".")[0] in self.packed:
            return source_key, None
        return super().rename_source_key(source_key)

    def reverse_transform(self) -> Any:
        reverse: Any = super().reverse_transform()
        reverse.packed = self.packed
        return reverse


def _leave_packed_alone(model: Any) -> None:
    """Tells the conversions on ``model`` which of its modules are packed."""
    packed = frozenset(name for name, _ in packed_modules(model))
    for conversion in model._weight_conversions:
        if isinstance(conversion, _DenseOnly):
            conversion.packed = packed


class _Deserialize(ConversionOps):
    """Transformers' deserialization of 4-bit weights, and what it leaves undone.

    The routers of version 4 were linear layers, and were quantized like the rest; in version 5 they are parameters. And
    tensors that are not quantized get the dtype asked for, which newer versions do not see to.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.hf_quantizer = original.hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Deserialize:
        return self  # or Transformers would copy the quantizer for every tensor of a checkpoint

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


def _dtype_for(model: Any, key: str) -> torch.dtype:
    """The dtype that the parameter or buffer ``key`` is to have, some of which stay in fp32."""
    dtype: torch.dtype = model.get_parameter_or_buffer(key).dtype
    for pattern, kept in model._get_dtype_plan(dtype).items():
        if re.search(pattern.replace("*", ".*"), key):
            dtype = kept
    return dtype


class Experts4bitQuantizer(Bnb4BitHfQuantizer):
    """Transformers' quantizer for bitsandbytes in 4 bits, and for fused experts.

    Attributes:
        save_format: the layout in which ``save_pretrained`` writes packed experts.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.save_format: SaveFormat = "per_expert"
        self.names = Names(())
        self.converter: ExpertsConverter | None = None

    # Loading.

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        self._skip_head(model)
        super()._process_model_before_weight_loading(model, device_map=device_map, **kwargs)
        self.names = Names(self._targets(model), base_model_prefix=model.base_model_prefix)

    def _skip_head(self, model: Any) -> None:
        """Skips the head of a model whose checkpoint names that of another, and so has no weights for this one.

        ``get_state_dict_and_metadata`` names skipped modules, and then Transformers looks for no others.
        """
        config = self.quantization_config
        skipped = config.llm_int8_skip_modules
        if not (self.pre_quantized and skipped and any(_holds_experts(module) for module in model.modules())):
            return
        if not {name for name, _ in model.named_modules()}.issuperset(skipped):
            # What this skips needlessly is dequantized while loading.
            config.llm_int8_skip_modules = self.get_modules_to_not_convert(model, skipped, add_default_skips=True)

    def _targets(self, model: nn.Module) -> list[Target]:
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
                Target(f"{path}.{name}", tuple(getattr(module, name).shape), _parts(module, name))
                for name in projections_of(module)
            ]
        for class_name, reason in refused.items():
            _warn_dense(class_name, reason)
        storage = self.quantization_config.bnb_4bit_quant_storage
        if targets and storage != torch.uint8:
            warnings.warn(f"bnb_4bit_quant_storage={storage} is for linear layers, experts are uint8", stacklevel=2)
        if targets and self.quantization_config.bnb_4bit_compute_dtype == torch.float32 != model.dtype:
            warnings.warn(
                f"experts in 4 bits compute in float32, the default of bnb_4bit_compute_dtype, although the model is "
                f"{model.dtype}: set bnb_4bit_compute_dtype to that",
                stacklevel=2,
            )
        return targets

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.names.targets or super().param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        target = self.names.targets.get(param_name)
        if target is None:
            return super().param_element_size(model, param_name, param)
        form = self._format(target)
        return sum(rows * columns for rows, columns in form.storage().values()) / param.numel()

    def _format(self, target: Target) -> Any:
        config = self.quantization_config
        return get_kernel().quantization.Format4bit(
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
            ),
        )
        # The first to claim a tensor gets it: experts that stay dense are left to Transformers' own converters.
        return [self.converter, *experts, *super().update_weight_conversions(others, *args)]

    def _with_converters(self, weight_conversions: list[Any]) -> tuple[list[Target], list[WeightConverter]]:
        """The targets that can be loaded, and Transformers' own converters for them."""
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
                conversion.operations = [_Deserialize(operation) for operation in conversion.operations]
        return conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # Newer Transformers ask; older ones leave alone whatever a converter renames.
        if isinstance(converter, ExpertsConverter):
            return None
        result: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return result

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
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
        """Leaves the conversions on ``model`` that saving has to revert: of packed weights none, in any layer."""
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not isinstance(conversion, ExpertsConverter)
            and conversion not in self.names.converters
            and not any(isinstance(op, _Deserialize) for op in getattr(conversion, "operations", ()))
        ] + [_DenseOnly.of(converter) for converter in self.names.converters]
        _leave_packed_alone(model)

    def _adopt(self, part: Any) -> None:
        """Lets a model inside the one that was loaded be saved by itself, which goes by what is on it alone."""
        part.hf_quantizer = self
        stacks = [f"{path}.{name}" for path, module in packed_modules(part) for name in projections_of(module)]
        part._weight_conversions = [
            _DenseOnly.of(conversion)
            if isinstance(conversion, WeightConverter)
            and any(stack.endswith(tuple(conversion.target_patterns)) for stack in stacks)
            else conversion
            for conversion in get_model_conversion_mapping(part, add_legacy=False)
            if not isinstance(conversion, PrefixChange)  # of the whole model's checkpoint
        ]

    # Saving.

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        _leave_packed_alone(model)  # a part of it may have been dequantized
        if getattr(model, "_hf_peft_config_loaded", False) or next(packed_modules(model), None) is None:
            result: tuple[dict[str, Tensor] | None, dict[str, Any]] = super().get_state_dict_and_metadata(model)
            return result
        state_dict = model.state_dict()
        for path, module in packed_modules(model):
            for name in projections_of(module):
                weights, dtype = get_packed(module, name), getattr(module, f"{name}_source_dtype")
                full = f"{path}.{name}"
                for part in weights.tensors():
                    del state_dict[full if part == "packed" else f"{full}_{part}"]
                target = Target(full, weights.format.shape, weights.format.projections)
                matrices = self.names.per_expert(target) if self.save_format == "per_expert" else None
                if matrices is None:
                    parts = write_fused(weights, dtype)
                    state_dict |= {f"{full}_{part}" if part else full: value for part, value in parts.items()}
                    continue
                for expert in range(weights.shape[0]):
                    for projection, pattern in enumerate(matrices):
                        key = pattern.replace("*", str(expert))
                        parts = write_matrix(weights, expert, projection, dtype)
                        state_dict |= {f"{key}.{part}" if part else key: value for part, value in parts.items()}
        self.quantization_config.llm_int8_skip_modules = self._not_quantized(model)
        # The config of a model inside another may be one of its own.
        model.config.quantization_config = self.quantization_config
        return state_dict, {}

    def _not_quantized(self, model: Any) -> list[str]:
        """What ``llm_int8_skip_modules`` has to name.

        Of a model inside the one that was loaded, also linear layers that were skipped by their name in the whole. And
        routers: for Transformers 4 they are linear layers, but not quantized.
        """
        from bitsandbytes.nn.modules import Linear4bit

        def in_checkpoint(path: str, weight: Tensor) -> str:
            (key,) = revert_weight_conversion(model, {f"{path}.weight": weight})
            return key.removesuffix(".weight")

        skipped = set(self.modules_to_not_convert)
        for path, module in model.named_modules():
            is_dense = isinstance(module, nn.Linear) and not isinstance(module, Linear4bit)
            if is_dense and should_convert_module(path, self.modules_to_not_convert):
                skipped |= {path, in_checkpoint(path, module.weight)}
        for path, _ in packed_modules(model):
            block = path.rpartition(".")[0]
            for name, module in model.get_submodule(block).named_children():
                weight = getattr(module, "weight", None)
                if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Linear):
                    skipped.add(in_checkpoint(f"{block}.{name}", weight))
        return sorted(skipped)

    # The way back.

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # save_pretrained makes strings of the config's dtypes.
        dense_dtype: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        from bitsandbytes.nn.modules import Linear4bit

        if any(isinstance(module, Linear4bit) for module in model.modules()):  # Transformers takes that for granted
            model = super()._dequantize(model, dtype=dense_dtype)
        unpack_experts(model, dense_dtype)
        for part in list(model.modules()):
            if getattr(part, "hf_quantizer", None) is self:
                _leave_packed_alone(part)
                self.remove_quantization_config(part)
        return model


def get_packed(module: Experts, name: str) -> Packed4bitWeights:
    """The packed parameter ``name`` of an experts module."""
    weights: Packed4bitWeights = get_kernel().quantization.Packed4bitWeights.of_module(module, name)
    return weights


def pin(module: Experts) -> None:
    """Makes the kernel the implementation of an experts module, whatever its model is set to."""
    if not isinstance(module.config, PackedConfig):
        module.config = PackedConfig(module.config)


def unpack(module: Experts, name: str, dtype: torch.dtype | None) -> None:
    """Makes the packed parameter ``name`` a dense one."""
    weights = get_packed(module, name)
    dense = weights.dequantize(dtype or getattr(module, f"{name}_source_dtype"))
    for part in weights.tensors():
        delattr(module, name if part == "packed" else f"{name}_{part}")
    for attribute in (f"{name}_format", f"{name}_source_dtype"):
        delattr(module, attribute)
    module.register_parameter(name, nn.Parameter(dense))


def save_format(model: Any, layout: SaveFormat) -> None:
    """See ``moe_fused.save_format``."""
    if layout not in get_args(SaveFormat):
        raise ValueError(f"layout must be one of {', '.join(get_args(SaveFormat))}, got {layout!r}")
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, Experts4bitQuantizer) or next(packed_modules(model), None) is None:
        raise ValueError(f"model must have 4-bit experts, got a {type(model).__name__} without")
    quantizer.save_format = layout


def unpack_experts(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Makes all packed experts of ``model`` dense, of ``dtype`` or of what they had, and leaves other layers alone."""
    for _, module in list(packed_modules(model)):
        for name in projections_of(module):
            unpack(module, name, dtype)
        module.config = module.config.model_config


_replaced: list[Any] = []


def register() -> None:
    """Puts the quantizer in place of Transformers'; a second call changes nothing."""
    if not _replaced:
        _replaced.append(AUTO_QUANTIZER_MAPPING[_METHOD])
        AUTO_QUANTIZER_MAPPING[_METHOD] = Experts4bitQuantizer


def unregister() -> None:
    """Undoes ``register``; does nothing without one."""
    if _replaced:
        AUTO_QUANTIZER_MAPPING[_METHOD] = _replaced.pop()
