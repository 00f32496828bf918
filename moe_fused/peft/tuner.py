"""PEFT's LoRA on models whose experts the kernel serves: what is adapted, refused, saved and loaded.

PEFT looks its tuner for LoRA up in a table, where ``register`` puts ours: PEFT's own, which asks us first about experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moe_fused.experts import Experts
from moe_fused.quantizer import make_dense

from .files import PLACES, check_matches, places_of, split, wrappers
from .targets import ExpertLayer, Plan, config_for, expert_layers, plan_of, unwrapped
from .wrapper import ARGUMENTS, ParamWrapper, takes_adapters

PLAN = "_moe_fused_plan"

_INITIALIZATIONS = (True, False, "gaussian")
# Beside the fields of LoraConfig that PEFT marks as variants.
_OPTIONS = ("lora_bias", "fan_in_fan_out", "use_qalora", "layer_replication")


def served_experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The experts modules that run in the kernel, with their names, inside whatever PEFT put around them."""
    for name, module in model.named_modules():
        if takes_adapters(module):
            yield name, module


def refuse_unsupported(config: Any) -> None:
    """Raises NotImplementedError for options of ``LoraConfig`` that cannot hold for experts."""
    variants = [own.name for own in dataclasses.fields(config) if own.metadata.get("is_lora_variant")]
    for option in (*variants, *_OPTIONS):
        if value := getattr(config, option, None):
            raise NotImplementedError(
                f"{option}={value!r} is not supported for LoRA on experts: leave it out, or leave the experts out of "
                "target_modules and target_parameters"
            )
    if config.init_lora_weights not in _INITIALIZATIONS:
        raise NotImplementedError(
            f"init_lora_weights={config.init_lora_weights!r} is not supported for LoRA on experts: use one of "
            f"{', '.join(map(repr, _INITIALIZATIONS))}, or leave the experts out of target_modules and target_parameters"
        )


def _named(config: Any, layers: list[ExpertLayer]) -> set[str]:
    """The experts' parameters that ``target_parameters`` names."""
    targets = tuple(config.target_parameters or ())
    return {
        name
        for layer in layers
        for name in layer.parameters
        if name in targets or name.endswith(tuple(f".{target}" for target in targets))
    }


class LoraModel(lora.LoraModel):
    """PEFT's tuner for LoRA, with experts."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        vars(config).pop(PLACES, None)  # of another model that the config was used for
        layers = expert_layers(model, served_experts(model))
        plan = plan_of(config, model, layers) if layers else Plan()
        adapted = _named(config, layers) | plan.targets.keys()
        if adapted:
            refuse_unsupported(config)
            self._check_nesting(model, adapted, plan)
        if not plan.targets:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        with _planned(config, plan):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        setattr(config, PLACES, places_of(model, adapter_name))

    def _check_nesting(self, model: nn.Module, adapted: set[str], plan: Plan) -> None:
        """Raises ValueError unless all adapters of a layer's experts adapt the same parameters.

        Where a factor is in the model, and in files, depends on what else is adapted.
        """
        for name, module in model.named_modules():
            path = unwrapped(name)
            if name != path or not isinstance(module, lora.ParamWrapper):
                continue
            there: dict[str, nn.Module] = {}
            layer: Any = module
            while isinstance(layer, lora.ParamWrapper):
                there[f"{path}.{layer.parameter_name}"] = layer
                layer = layer.base_layer
            new = {name for name in adapted if name.rpartition(".")[0] == path}
            if not new:
                continue
            if new != there.keys():
                raise ValueError(
                    f"all adapters of {path} must adapt the same parameters, got {sorted(new)} after {sorted(there)}"
                )
            if any(name in plan.targets and not isinstance(own, ParamWrapper) for name, own in there.items()):
                raise ValueError(
                    f"{path} has adapters from before it ran in the kernel: add them again after "
                    'set_experts_implementation("moe_fused"), or use target_parameters'
                )

    def _create_and_replace(  # type: ignore[override]  # named as in PEFT's LoraModel
        self, lora_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        plan: Plan | None = getattr(lora_config, PLAN, None)
        if plan is not None and kwargs["current_key"] in plan.targets:
            lora_config = config_for(lora_config, *plan.targets[kwargs["current_key"]])
        super()._create_and_replace(lora_config, adapter_name, *args, **kwargs)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if kwargs.get("parameter_name") in ARGUMENTS and takes_adapters(base):
            return ParamWrapper(target, adapter_name, config=lora_config, **kwargs)
        module: nn.Module = lora.LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        return module

    def _check_add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        for name, wrapper in wrappers(self.model):
            for adapter in adapters:
                if adapter in wrapper.lora_A:
                    raise ValueError(
                        f"add_weighted_adapter cannot mix LoRA on experts, which adapter {adapter!r} has on {name}: "
                        "activate several adapters with base_model.set_adapter([...]), or merge them"
                    )
        return super()._check_add_weighted_adapter(adapters, *args, **kwargs)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """PEFT's, with a choice for 4-bit experts.

        Args:
            progressbar, safe_merge, adapter_names: as PEFT has them.
            dtype: None quantizes merged 4-bit experts again; a dtype makes them dense, which loses nothing but the rounding
                to it. Layers that are not experts are not affected.
        """
        if dtype is not None:
            make_dense(self.model, dtype)
        model: nn.Module = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        return model

    # What PEFT calls to save and load; see ``files`` for what it calls before.

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)
        return split(model, adapter_name, own)

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
def _planned(config: Any, plan: Plan) -> Iterator[None]:
    """Makes ``config`` ask for what is planned, as PEFT understands it, and leaves it asking for what it did."""
    before = {name: getattr(config, name) for name in ("target_parameters", "rank_pattern", "alpha_pattern")}
    config.target_modules = plan.modules
    config.target_parameters = sorted({*(config.target_parameters or ()), *plan.parameters, *plan.targets})
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        setattr(config, name, {key: value for key, value in patterns.items() if key not in plan.patterns})
    setattr(config, PLAN, plan)
    try:
        yield
    finally:
        delattr(config, PLAN)
        config.target_modules = plan.resolved
        for name, value in before.items():
            setattr(config, name, value)
