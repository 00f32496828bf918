"""Quantizers for experts in formats that checkpoints are published in: mxfp4 and nvfp4.

While ``moe_fused`` is enabled, they take the place of Transformers' own for two methods:

- ``mxfp4``, as gpt-oss is published. Transformers' quantizer needs the kernels of ``triton_kernels``, cannot train, and
  dequantizes the model on most CPUs.
- ``compressed-tensors``, if all its groups are ``nvfp4-pack-quantized`` or all are ``mxfp4-pack-quantized``. Transformers'
  quantizer makes dense experts of them.

A ``quantization_config`` that is given to ``from_pretrained`` must be of the format that the checkpoint has, because
Transformers would drop it with a warning, or name two classes that do not say the format.

Experts keep the bytes of the checkpoint, and the kernel computes them. Linear layers that compressed-tensors quantized are
dequantized while they are loaded. A config with ``dequantize=True`` gets Transformers' own quantizer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import quantization_config as stock_configs

from moe_fused.checkpoints.converter import Quantization
from moe_fused.checkpoints.names import MATRIX_PARTS
from moe_fused.quantized import (
    COMPRESSED_FORMATS,
    COMPRESSED_TENSORS,
    MXFP4,
    check_transforms,
    compressed_content,
    compressed_quant_type,
    contradiction_of,
    fault_in,
    quantization_in,
)

from .conversions import DequantizeLinear
from .experts_quantizer import ExpertsQuantizer, refuse_offloaded
from .packed_experts import blocksize_of, packed_modules
from .saving import modules_not_quantized, no_matrices

_GPUS_ALONE = "give a device_map of GPUs alone"


class CompressedTensorsConfig(stock_configs.CompressedTensorsConfig):
    """The config of a checkpoint of compressed-tensors whose weights are in mxfp4 or nvfp4, which needs no such library.

    The name is that of Transformers' class, because Transformers compares names where the user gives a config as well.

    Attributes:
        fields: the config as the checkpoint has it.
        quant_type: the kernel's name of the format.
    """

    def __init__(self, **fields: Any) -> None:  # Transformers' __init__ needs the library
        quant_type = compressed_quant_type(fields)
        if quant_type is None:
            raise ValueError(
                f"the config must be of {' or '.join(COMPRESSED_FORMATS)} weights, got format {fields.get('format')!r}"
            )
        self.quant_type = quant_type
        self.quant_method = stock_configs.QuantizationMethod.COMPRESSED_TENSORS
        self.dequantize = bool(fields.pop("dequantize", False))
        self.use_optimized_inference = False
        self.quantization_config = None
        self.fields = fields

    @property
    def ignore(self) -> list[str]:
        """The names of modules that stay dense, or regular expressions after ``re:``."""
        return list(self.fields.get("ignore") or ())

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.fields) | {"quant_method": COMPRESSED_TENSORS}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_dict()}"


class _Configs:
    """Makes the config for ``compressed-tensors`` of a dictionary, in the place of Transformers' class."""

    @staticmethod
    def from_dict(config_dict: dict[str, Any], **kwargs: Any) -> Any:
        is_read = compressed_quant_type(config_dict) is not None
        if (fault := fault_in(config_dict) if is_read else contradiction_of(config_dict)) is not None:
            raise ValueError(f"the quantization_config of the checkpoint {fault}")
        if not is_read:
            return stock_configs.CompressedTensorsConfig.from_dict(config_dict, **kwargs)
        check_transforms("the checkpoint", config_dict)
        return CompressedTensorsConfig(**config_dict)


def compressed_config(quant_type: str) -> CompressedTensorsConfig:
    """Makes the ``quantization_config`` with which ``from_pretrained`` quantizes the experts of a dense checkpoint.

    Args:
        quant_type: ``"mxfp4"`` or ``"nvfp4"``.
    """
    return CompressedTensorsConfig(**compressed_content(quant_type))


class _NoOperation(ConversionOps):
    """What Transformers asks for to quantize a parameter. ``ExpertsConverter`` quantizes experts itself."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict


class PublishedQuantizer(ExpertsQuantizer):
    """What the quantizers of published formats share. They leave all layers but experts alone."""

    dtype: torch.dtype
    quantization_config: Any

    @property
    def quant_type(self) -> str:
        """The kernel's name of the format."""
        raise NotImplementedError

    def quantization(self) -> Quantization:
        return Quantization(self.pre_quantized, self.quant_type, blocksize_of(self.quant_type), None, self.dtype)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        # Transformers asks once more when it has made a device_map of a string; the experts are known then.
        refuse_offloaded(self.names.targets, kwargs.get("device_map"), _GPUS_ALONE)

    def warn_dense(self, what: str, reason: str) -> None:
        instead = "Load the model without this quantization_config, or with one of bitsandbytes"
        if self.pre_quantized:
            instead = "Load the model with quantization_config.dequantize = True, or its dense checkpoint"
        raise NotImplementedError(f"{what} cannot be loaded in {self.quant_type}: {reason}. {instead}")

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        self.dtype = model.dtype
        self.find_experts(model, device_map, kwargs.get("checkpoint_files"))
        if not self.names.targets and not self.pre_quantized:
            raise ValueError(f"{type(model).__name__} has no experts that could be held in {self.quant_type}")
        refuse_offloaded(self.names.targets, device_map, _GPUS_ALONE)

    def get_weight_conversions(self) -> list[Any]:
        return []

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.finish_experts(model)
        if next(packed_modules(model), None) is None:  # linear layers are dense, and so is the whole model
            self.keep_conversions(model)
            self.remove_quantization_config(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        state_dict = self.packed_state_dict(model)
        if state_dict is not None:
            self.record_dense_modules(model)
            # The config of a model inside another may be an object of its own.
            model.config.quantization_config = self.quantization_config
        return state_dict, {}

    def record_dense_modules(self, model: Any) -> None:
        """Writes into the config which modules of ``model`` are dense."""
        raise NotImplementedError

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # save_pretrained makes strings of the config's dtypes.
        self.unpack(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def get_quantize_ops(self) -> Any:
        return _NoOperation()


class Mxfp4ExpertsQuantizer(PublishedQuantizer):
    """Experts in mxfp4 with a tensor of blocks and one of scales for each stack, as gpt-oss has them."""

    skip_option = "modules_to_not_convert"
    save_formats = ("published",)

    quant_type = MXFP4

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        skipped = self.quantization_config.modules_to_not_convert
        self.modules_to_not_convert = self.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
        super()._process_model_before_weight_loading(model, device_map, **kwargs)

    def record_dense_modules(self, model: Any) -> None:
        pass  # the list in the config names more than dense experts, and stays as it is


class CompressedExpertsQuantizer(PublishedQuantizer):
    """Experts in mxfp4 or nvfp4 with tensors for each matrix, as compressed-tensors has them.

    Linear layers that are quantized in the checkpoint are dequantized.
    """

    skip_option = "ignore"
    names_matrices = True  # as the library expands regular expressions
    save_formats = ("published_per_expert",)

    @property
    def quant_type(self) -> str:
        return str(self.quantization_config.quant_type)

    def get_weight_conversions(self) -> list[Any]:
        if not self.pre_quantized:
            return []
        return [WeightConverter(list(MATRIX_PARTS), "weight", [DequantizeLinear(self, self.quant_type)])]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        # save_pretrained asks before it makes a directory.
        for target in self.names.targets.values():
            if self.names.per_expert(target) is None:
                raise ValueError(no_matrices(target, self.quant_type))
        return True

    def record_dense_modules(self, model: Any) -> None:
        self.quantization_config.fields["ignore"] = modules_not_quantized(model, self.quantization_config.ignore)


def _mxfp4_quantizer(quantization_config: Any, **kwargs: Any) -> HfQuantizer:
    kind = _stock[MXFP4] if quantization_config.dequantize else Mxfp4ExpertsQuantizer
    quantizer: HfQuantizer = kind(quantization_config, **kwargs)
    return quantizer


def _compressed_quantizer(quantization_config: Any, **kwargs: Any) -> HfQuantizer:
    if not isinstance(quantization_config, CompressedTensorsConfig):
        kind, config = _stock[COMPRESSED_TENSORS], quantization_config
    elif quantization_config.dequantize:
        fields = quantization_config.to_dict()
        kind, config = _stock[COMPRESSED_TENSORS], stock_configs.CompressedTensorsConfig(**fields, dequantize=True)
    else:
        kind, config = CompressedExpertsQuantizer, quantization_config
    quantizer: HfQuantizer = kind(config, **kwargs)
    return quantizer


def _merged(cls: Any, held: Any, wanted: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns the config to load a checkpoint with, in the place of ``AutoHfQuantizer.merge_quantization_configs``.

    Args:
        held: the config of the checkpoint, an object or a dictionary.
        wanted: the config that was given to ``from_pretrained``, or None.

    Raises:
        ValueError: one of the two is of a published format, and the other one of another format.
    """
    merge = _stock[_MERGE].__get__(None, cls)
    one, other = (None if each is None else quantization_in(_content(each)) for each in (held, wanted))
    if one is None or other is None or not (one.is_published or other.is_published):
        return merge(held, wanted, *args, **kwargs)
    if one.quant_type != other.quant_type:
        raise ValueError(
            f"quantization_config asks for {other.quant_type}, but the checkpoint is in {one.quant_type}: leave "
            "quantization_config out to load it as it is; for another format, make it dense by `moe-fused convert model "
            "CHECKPOINT DENSE --to fused --dequantize`, and load that"
        )
    if one.method == other.method:
        return merge(held, wanted, *args, **kwargs)
    # The format is the same, in another layout, so what the config says of the tensors is the checkpoint's to say.
    config = merge(held, None, *args, **kwargs)
    config.dequantize = bool(getattr(wanted, "dequantize", False))
    return config


def _content(config: Any) -> Any:
    return config if isinstance(config, Mapping) else config.to_dict()


_MERGE = "merge_quantization_configs"
# What Transformers has in the place of the quantizers and the function here, by the method or by the function's name.
_stock: dict[str, Any] = {}
_QUANTIZERS: dict[str, Any] = AUTO_QUANTIZER_MAPPING
_CONFIGS: dict[str, Any] = AUTO_QUANTIZATION_CONFIG_MAPPING


def register() -> None:
    """Puts these quantizers in the place of Transformers' own; a second call changes nothing."""
    if not _stock:
        _stock.update({method: _QUANTIZERS[method] for method in (MXFP4, COMPRESSED_TENSORS)})
        _QUANTIZERS.update({MXFP4: _mxfp4_quantizer, COMPRESSED_TENSORS: _compressed_quantizer})
        _CONFIGS[COMPRESSED_TENSORS] = _Configs
        _stock[_MERGE] = vars(AutoHfQuantizer)[_MERGE]
        setattr(AutoHfQuantizer, _MERGE, classmethod(_merged))


def is_registered() -> bool:
    """Whether these quantizers are in the place of Transformers' own."""
    return bool(_stock)


def unregister() -> None:
    """Undoes ``register``, and does nothing if that was never called."""
    if _stock:
        _QUANTIZERS.update(_stock)
        _CONFIGS[COMPRESSED_TENSORS] = stock_configs.CompressedTensorsConfig
        setattr(AutoHfQuantizer, _MERGE, _stock[_MERGE])
        _stock.clear()
