"""What the quantizers of packed experts share: finding, loading, saving and dequantizing the experts of a model.

``hf_quantizer`` has the quantizer of bitsandbytes' formats, ``published`` those of formats that come with checkpoints.
``moe_fused.checkpoints`` reads and writes the tensors of checkpoints.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from moe_fused.checkpoints.converter import ExpertsConverter, Quantization
from moe_fused.checkpoints.names import Names, Target
from moe_fused.checkpoints.readahead import Readahead, is_possible
from moe_fused.checkpoints.share import Share
from moe_fused.checkpoints.share import current as current_share
from moe_fused.integrations.transformers.experts_module import projections_of
from moe_fused.integrations.transformers.originals import restore_experts

from .conversions import LOADING_ONLY, DenseExpertsConverter, skip_packed
from .division import check_division, hide_division
from .packed_experts import are_divided, packed_modules, packing_refusal, pin, target_of, unpack_experts
from .saving import SaveFormat, checkpoint_tensors


def holds_experts(module: nn.Module) -> bool:
    """Whether a parameter of ``module`` has the name and the dimensions of stacked expert weights."""
    return any(
        name in ("gate_up_proj", "up_proj", "down_proj") and parameter.dim() == 3
        for name, parameter in module.named_parameters(recurse=False)
    )


def offloads(device_map: Any) -> bool:
    """Whether ``device_map`` puts modules on the CPU or the disk while others run elsewhere."""
    places = set(device_map.values()) if isinstance(device_map, dict) else set()
    return places != {"cpu"} and not places.isdisjoint({"cpu", "disk"})


def refuse_offloaded(names: Iterable[str], device_map: Any, advice: str) -> None:
    """Raises ValueError if ``device_map`` offloads one of the modules or parameters ``names``, which are in 4 bits."""
    if not offloads(device_map):
        return
    for name in names:
        holders = [module for module in device_map if not module or f"{name}.".startswith(f"{module}.")]
        place = device_map[max(holders, key=len)] if holders else None
        if place in ("cpu", "disk"):
            raise ValueError(
                f"{name} is in 4 bits and cannot be offloaded, but the device_map puts it on the {place}: {advice}"
            )


def _progress_of(quantizer: ExpertsQuantizer) -> Callable[[], float | None]:
    """Returns what says which part of the experts was loaded. It says None if the quantizer is gone, as after an error."""
    found = weakref.ref(quantizer)

    def progress() -> float | None:
        alive = found()
        if alive is None:
            return None
        return (
            len(alive.converter.loaded) / len(alive.names.targets) if alive.converter and alive.names.targets else 0.0
        )

    return progress


class ExpertsQuantizer(HfQuantizer):
    """The part of a quantizer that concerns packed experts, to be mixed into one of Transformers.

    Attributes:
        skip_option: the option of the config that names modules which stay dense.
        names_matrices: whether ``skip_option`` names each matrix of an expert that is dense in the checkpoint. The tensors
            then say which experts are dense.
        save_formats: the layouts in which ``save_pretrained`` can write packed experts, the default first.
        save_format: the one that it uses.
        names: the names of the experts' tensors in checkpoints of the model.
        converter: the converter that reads those tensors, or None if the model has no experts to be packed.
        shares: what this process loads of the experts that a plan of Transformers has divided, by their parameters' names.
        faults: what the conversions of other layers found wrong with tensors. ``finish_experts`` raises the first one,
            because Transformers turns an error within a conversion into a report that lacks the name.
    """

    skip_option: ClassVar[str]
    names_matrices: ClassVar[bool] = False
    save_formats: ClassVar[tuple[SaveFormat, ...]] = ("per_expert", "fused")

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.save_format: SaveFormat = self.save_formats[0]
        self.names = Names(())
        self.converter: ExpertsConverter | None = None
        self.shares: dict[str, Share] = {}
        self.modules_to_not_convert: list[str] = []
        self.faults: list[ValueError] = []
        self._hooks: list[RemovableHandle] = []
        self._readahead: Readahead | None = None

    def quantization(self) -> Quantization:
        """Returns how the experts are to be loaded."""
        raise NotImplementedError

    def warn_dense(self, what: str, reason: str) -> None:
        """Says that experts stay dense, or raises an error if they cannot."""
        raise NotImplementedError

    # Loading.

    def find_experts(self, model: Any, device_map: Any, paths: Iterable[str] | None) -> None:
        """Finds the experts of ``model``, before its weights are loaded.

        Args:
            device_map: the one of ``from_pretrained``.
            paths: the files of the checkpoint.
        """
        # Now, because what Unsloth has made of the call before changes forwards of experts' classes.
        restore_experts(model)
        self.names = Names(self._targets(model), base_model_prefix=model.base_model_prefix)
        if self.names.targets and getattr(model.config, "distributed_config", None) is not None:
            check_division(model)
            device = next(iter(device_map.values())) if isinstance(device_map, dict) else "cpu"
            self._hooks = hide_division(model, self.names.targets, self.shares, torch.device(device), paths or ())
        elif self.names.targets and current_share() is None and is_possible():
            self._readahead = Readahead(paths or (), _progress_of(self)).start()

    def _targets(self, model: nn.Module) -> list[Target]:
        """Finds the parameters of experts that are to be packed, and warns of those that stay dense."""
        refused: dict[str, str] = {}
        targets = []
        quantization = self.quantization()
        for path, module in model.named_modules():
            if not holds_experts(module) or not should_convert_module(path, self.modules_to_not_convert):
                continue
            if reason := packing_refusal(module, quantization.quant_type):
                refused[type(module).__name__] = reason
                continue
            for pattern in getattr(self.quantization_config, self.skip_option, None) or ():
                if pattern.startswith(f"{path}.") and not (self.names_matrices and self.pre_quantized):
                    raise ValueError(
                        f"{self.skip_option} must name all experts of a layer, {path}, or none, got {pattern}"
                    )
            targets += [target_of(path, module, name, quantization.quant_type) for name in projections_of(module)]
        for class_name, reason in refused.items():
            self.warn_dense(class_name, reason)
        if targets:
            self.check_dtype(model)
        return targets

    def check_dtype(self, model: Any) -> None:
        """Warns of dtypes that the user can hardly want for the experts of ``model``."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.names.targets or super().param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        target = self.names.targets.get(param_name)
        if target is None:
            size: float = super().param_element_size(model, param_name, param)
            return size
        quantization = self.quantization()
        storage = quantization.format_of(target, quantization.compute_dtype).storage()
        return sum(rows * columns for rows, columns in storage.values()) / param.numel()

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        targets, experts = self._with_converters(weight_conversions)
        self.names = Names(targets, experts, self.names.base_model_prefix)
        if not targets:
            unchanged: list[Any] = super().update_weight_conversions(weight_conversions, *args)
            return unchanged
        others = [conversion for conversion in weight_conversions if conversion not in experts]
        self.converter = ExpertsConverter(self.names, self.quantization(), self.shares)
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
                self.warn_dense(
                    ", ".join(sorted(modules)), "checkpoints hold its experts together with those of another module"
                )
                targets = [target for target in targets if target.name.rpartition(".")[0] not in modules]
            elif made:
                converters.append(conversion)
        return targets, converters

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # Newer versions of Transformers call this; older ones never cast a tensor that a converter renames.
        if isinstance(converter, ExpertsConverter):
            return None
        result: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return result

    def finish_experts(self, model: Any) -> None:
        """Checks that all weights were loaded without a fault, and lets the kernel compute the experts.

        Raises:
            ValueError: weights are missing or broken, or experts of a module are packed in part. The message names them.
        """
        while self._hooks:
            self._hooks.pop().remove()
        if self._readahead is not None:
            self._readahead.stop()
            self._readahead = None
        if self.faults:
            raise self.faults[0]
        if self.converter is None:
            return
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
        self.keep_conversions(model)
        for part in model.modules():
            if part is not model and isinstance(part, PreTrainedModel) and next(packed_modules(part), None):
                self._adopt(part)

    def keep_conversions(self, model: Any) -> None:
        """Keeps on ``model`` only the conversions that saving has to revert, none of which touches packed weights."""
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not isinstance(conversion, ExpertsConverter)
            and conversion not in self.names.converters
            and not any(isinstance(op, LOADING_ONLY) for op in getattr(conversion, "operations", ()))
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

    def packed_state_dict(self, model: Any) -> dict[str, Tensor] | None:
        """Returns the state dict of ``model`` with its experts as they are saved, or None if Transformers is to make it.

        Raises:
            NotImplementedError: there are adapters beside experts that are divided among processes.
        """
        skip_packed(model)  # a part of the model may have been dequantized since it was loaded
        adapted = getattr(model, "_hf_peft_config_loaded", False)
        if adapted and any(are_divided(each) for _, each in packed_modules(model)):
            # Only the first process would come to the adapters, which it has to gather from all.
            raise NotImplementedError(
                "adapters of experts that are divided among processes cannot be saved by Transformers' save_pretrained: add "
                "them with peft.get_peft_model, whose model gathers them"
            )
        if adapted or next(packed_modules(model), None) is None:
            return None
        return checkpoint_tensors(model, self.names, self.save_format)

    # Dequantizing.

    def unpack(self, model: Any, dtype: torch.dtype | None) -> None:
        """Makes the experts of ``model`` dense, and forgets the quantization of the models in it.

        Args:
            dtype: of the dense weights; by default each gets the dtype that it had before it was quantized.
        """
        unpack_experts(model, dtype)
        for part in list(model.modules()):
            if getattr(part, "hf_quantizer", None) is self:
                skip_packed(part)
                self.remove_quantization_config(part)
