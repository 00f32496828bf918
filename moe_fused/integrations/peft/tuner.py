"""The tuner for LoRA on models whose experts the kernel computes: what is adapted, refused, saved and loaded.

PEFT finds its tuner for LoRA in a table. ``register`` puts the tuner of this file there, which extends PEFT's and leaves
everything but experts to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moe_fused.integrations.quantizer.packed_experts import unpack_experts
from moe_fused.integrations.quantizer.published import PublishedQuantizer
from moe_fused.integrations.transformers.experts_module import Experts
from moe_fused.integrations.transformers.originals import replaced_experts

from .files import ADAPTED_STACKS, adapted_stacks, check_matches, split, wrappers
from .targets import (
    ExpertLayer,
    ExpertTargets,
    config_for,
    expert_layers,
    expert_targets,
    rank_and_alpha,
    stacks_of,
    unwrapped,
)
from .wrapper import ARGUMENTS, ParamWrapper, refuse_unsupported, takes_adapters

# The attribute of a LoRA config that holds its ``ExpertTargets`` while PEFT adds the adapter.
TARGETS = "_moe_fused_targets"


def served_experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Yields the experts modules that run in the kernel, with their names, inside whatever PEFT put around them."""
    for name, module in model.named_modules():
        if takes_adapters(module):
            yield name, module


def _named(config: Any, layers: list[ExpertLayer]) -> set[str]:
    """Returns the experts' parameters that ``target_parameters`` names."""
    targets = tuple(config.target_parameters or ())
    return {
        name
        for layer in layers
        for name in layer.parameters
        if name in targets or name.endswith(tuple(f".{target}" for target in targets))
    }


def _refuse_offloaded(model: nn.Module, adapted: set[str]) -> None:
    """Raises ValueError if parameters in ``adapted`` are of experts that Accelerate keeps on the CPU or on the disk.

    PEFT puts factors where the parameter is. That is the meta device while the experts do not run, and nothing brings the
    factors back from there.
    """
    for name, experts in served_experts(model):
        path = unwrapped(name)
        offloaded = hasattr(experts, "_hf_hook") and any(value.is_meta for value in experts.parameters(recurse=False))
        if offloaded and any(parameter.rpartition(".")[0] == path for parameter in adapted):
            raise ValueError(
                f"{path} must be on a GPU for LoRA, but the device_map offloads it to the CPU or the disk: give "
                "from_pretrained a device_map of GPUs alone, load the model in 4 bits, or leave these experts out of "
                "target_modules and target_parameters"
            )


def _warn_of_replaced(model: nn.Module) -> None:
    """Warns if experts that the kernel could serve are computed by another library."""
    for name, module, _, _ in replaced_experts(model):
        if not takes_adapters(module):
            warnings.warn(
                f"{name} is a {type(module).__module__}.{type(module).__qualname__} and not Transformers' class, so neither "
                "it nor its adapters run in the kernel. Call moe_fused.enable() before a model is loaded in 4 bits, and "
                "moe_fused.kernelize(model) for a dense one, before adapters are added",
                stacklevel=3,
            )
            return


class LoraModel(lora.LoraModel):
    """PEFT's tuner for LoRA, extended to experts that run in the kernel."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        vars(config).pop(ADAPTED_STACKS, None)  # the config may have been used for another model
        layers = expert_layers(model, served_experts(model))
        if stacks := stacks_of(config, layers):  # kept in the config, as PEFT keeps its names for "all-linear"
            config.target_parameters = sorted({*(config.target_parameters or ()), *stacks})
        requested = expert_targets(config, model, layers) if layers else ExpertTargets()
        adapted = _named(config, layers) | requested.targets.keys()
        _warn_of_replaced(model)
        if adapted:
            refuse_unsupported(config)
            _refuse_offloaded(model, adapted)
            self._check_nesting(model, adapted, requested)
        if not requested.targets and not requested.by_weight:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        with _asking_for(config, requested):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        setattr(config, ADAPTED_STACKS, adapted_stacks(model, adapter_name))

    def _check_new_adapter_config(self, config: Any) -> None:
        parameters = config.target_parameters
        if getattr(config, TARGETS, None) is not None:
            # PEFT would compare the names as they are written. _check_nesting has compared the parameters that they mean.
            config.target_parameters = None
        try:
            super()._check_new_adapter_config(config)
        finally:
            config.target_parameters = parameters

    def _check_nesting(self, model: nn.Module, adapted: set[str], requested: ExpertTargets) -> None:
        """Raises ValueError unless all adapters of a layer's experts adapt the same parameters.

        The name of a factor, in the model and in files, depends on which other parameters of the layer are adapted.
        """
        for name, module in model.named_modules():
            path = unwrapped(name)
            if name != path or not isinstance(module, lora.ParamWrapper):
                continue
            there: dict[str, nn.Module] = {}
            layer: Any = module
            while isinstance(layer, lora.ParamWrapper):
                if layer.parameter_name in ARGUMENTS:
                    there[f"{path}.{layer.parameter_name}"] = layer
                layer = layer.base_layer
            new = {name for name in adapted if name.rpartition(".")[0] == path}
            if not new:
                continue
            if new != there.keys():
                others = next(iter(module.lora_A), "")
                raise ValueError(  # the message begins as PEFT's does
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(new)} for the new adapter and {sorted(there)} for adapter '{others}': "
                    f"give both the same targets in {path}, or use two models"
                )
            if any(name in requested.targets and not isinstance(layer, ParamWrapper) for name, layer in there.items()):
                raise ValueError(
                    f"{path} has adapters from before it ran in the kernel: add them again after "
                    'set_experts_implementation("moe_fused"), or use target_parameters'
                )

    def _create_and_replace(  # type: ignore[override]  # named as in PEFT's LoraModel
        self, lora_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        requested: ExpertTargets | None = getattr(lora_config, TARGETS, None)
        if requested is not None and (key := kwargs["current_key"]) in requested.targets:
            lora_config = config_for(lora_config, *requested.targets[key])
        elif requested is not None and key in requested.by_weight:
            lora_config = config_for(lora_config, (), *rank_and_alpha(lora_config, f"{key}.weight"))
        super()._create_and_replace(lora_config, adapter_name, *args, **kwargs)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if kwargs.get("parameter_name") in ARGUMENTS and takes_adapters(base):
            return ParamWrapper(target, adapter_name, config=lora_config, **kwargs)
        module: nn.Module = lora.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        return module

    def _check_add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        known = all(adapter in self.peft_config for adapter in adapters)  # PEFT itself checks the names first
        for name, wrapper in wrappers(self.model) if known else ():
            for adapter in adapters:
                if adapter in wrapper.lora_A:
                    raise ValueError(  # the message begins as PEFT's does
                        f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{adapter}'): "
                        f"it has LoRA on {name}; activate several adapters with base_model.set_adapter([...]), or merge them"
                    )
        return super()._check_add_weighted_adapter(adapters, *args, **kwargs)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Merges adapters into the model and removes PEFT's layers, as PEFT does, with a choice for 4-bit experts.

        Args:
            progressbar, safe_merge, adapter_names: as in PEFT.
            dtype: None quantizes merged 4-bit experts again. A dtype makes them dense, which loses nothing but the rounding
                to that dtype. Other layers are not affected.
        """
        if dtype is not None:
            merged = [(layer, layer.merged_adapters[:]) for _, layer in wrappers(self.model) if layer.unmerged]
            for wrapper, _ in merged:
                wrapper.unmerge()
            quantizer = getattr(self.model, "hf_quantizer", None)
            # Then nothing but experts is in 4 bits, and the config must not say so any more.
            if isinstance(quantizer, PublishedQuantizer):
                quantizer.unpack(self.model, dtype)
            else:
                unpack_experts(self.model, dtype)
            for wrapper, names in merged:
                wrapper.merge(safe_merge, names)
        model: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        return model

    # PEFT calls these to save and load. The functions that it calls before them are wrapped in ``files``.

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        return split(model, adapter_name, tensors)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_matches(model, adapter_name, remapped)
        return remapped


@contextmanager
def _asking_for(config: Any, requested: ExpertTargets) -> Iterator[None]:
    """Makes ``config`` ask for ``requested`` in terms that PEFT understands, and restores the config afterwards."""
    before = {name: getattr(config, name) for name in ("target_parameters", "rank_pattern", "alpha_pattern")}
    config.target_modules = requested.modules
    named = (name for name in config.target_parameters or () if not requested.is_of_linears(name))
    config.target_parameters = sorted({*named, *requested.parameters, *requested.targets})
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        setattr(config, name, {key: value for key, value in patterns.items() if key not in requested.patterns})
    setattr(config, TARGETS, requested)
    try:
        yield
    finally:
        delattr(config, TARGETS)
        config.target_modules = requested.resolved
        for name, value in before.items():
            setattr(config, name, value)
