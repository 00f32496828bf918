"""Which experts a LoRA config asks for by the names of linear layers that they no longer have.

In Transformers 4 an expert had three linear layers, ``experts.{i}.gate_proj``, ``up_proj`` and ``down_proj``, and so configs
(``target_modules``) and files of adapters still call them. A ``Plan`` says which stacked parameters that means.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings

from moe_fused.checkpoints.names import is_per_expert
from moe_fused.experts import Experts
from moe_fused.quantizer import projections_of

_ATTRIBUTE = "_moe_fused_linears"


class Linear(NamedTuple):
    """A linear layer that each expert of a layer had.

    Attributes:
        block: name of the experts module in the model.
        leaf: its name in an expert, as in ``block.{i}.leaf``.
        checkpoint: its name in checkpoints, with ``*`` for the expert.
    """

    block: str
    leaf: str
    checkpoint: str

    def names(self, expert: int) -> tuple[str, ...]:
        """What it may be called, first in checkpoints."""
        return tuple(dict.fromkeys((self.checkpoint.replace("*", str(expert)), f"{self.block}.{expert}.{self.leaf}")))


def linears_of(config: Any) -> tuple[Linear, ...]:
    """What ``config_for`` put into a config."""
    linears: tuple[Linear, ...] = getattr(config, _ATTRIBUTE, ())
    return linears


def config_for(config: Any, linears: tuple[Linear, ...], rank: int, alpha: float) -> Any:
    """A copy of a LoRA config for one parameter, which its layer knows to stand for ``linears``."""
    own = copy.copy(config)
    own.r, own.lora_alpha, own.rank_pattern, own.alpha_pattern = rank, alpha, {}, {}
    setattr(own, _ATTRIBUTE, linears)
    return own


def unwrapped(name: str) -> str:
    """The name of a module without the layers that PEFT put around it."""
    return name.replace(".base_layer", "")


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of a layer.

    Attributes:
        path: their name in the model.
        module: they themselves, without what PEFT put around them.
        experts: how many.
        linears: for each stacked parameter, the linear layers that it is made of; none for parameters whose checkpoints
            never had them.
    """

    path: str
    module: Experts
    experts: int
    linears: dict[str, tuple[Linear, ...]]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what can be adapted."""
        return tuple(f"{self.path}.{name}" for name in projections_of(self.module))


def expert_layers(model: Any, modules: Iterable[tuple[str, Experts]]) -> list[ExpertLayer]:
    """The layers of the experts modules that are given with their names in ``model``."""
    conversions = get_model_conversion_mapping(model, add_legacy=False) if hasattr(model, "config") else []
    converters = [own for own in conversions if isinstance(own, WeightConverter) and is_per_expert(own)]
    renamings = [own.reverse_transform() for own in reversed(conversions) if isinstance(own, WeightRenaming)]
    layers = []
    for name, module in modules:
        path = unwrapped(name)
        linears = {parameter: _linears(path, parameter, converters, renamings) for parameter in projections_of(module)}
        layers.append(ExpertLayer(path, module, int(module.num_experts), linears))
    return layers


def _linears(path: str, parameter: str, converters: list[WeightConverter], renamings: list[Any]) -> tuple[Linear, ...]:
    for converter in converters:
        stack = converter._original_target_patterns[0]
        if not f"{path}.{parameter}".endswith(stack):
            continue
        leaves = [source.rpartition("*.")[2].removesuffix(".weight") for source in converter._original_source_patterns]
        # Renamings are regular expressions on names with a number where we have none.
        names = [apply_renamings(f"{path}.0.{leaf}.weight", renamings).removesuffix(".weight") for leaf in leaves]
        return tuple(
            Linear(path, leaf, re.sub(r"\.0\.([^.]+)$", r".*.\1", name))
            for leaf, name in zip(leaves, names, strict=True)
        )
    return ()


@dataclass
class Plan:
    """What a config asks for by the names of linear layers.

    Attributes:
        targets: the parameters to adapt by their names, with their linear layers, rank and alpha.
        modules: names of the real modules that are asked for, too.
        parameters: names of other parameters, routers, which were linear layers as well.
        resolved: ``target_modules``, with "all-linear" replaced by names.
        patterns: keys of ``rank_pattern`` and ``alpha_pattern`` that only experts match.
    """

    targets: dict[str, tuple[tuple[Linear, ...], int, float]] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    resolved: Any = None
    patterns: set[str] = field(default_factory=set)


def plan_of(config: Any, model: nn.Module, layers: list[ExpertLayer]) -> Plan:
    """What ``config`` asks for; a plan without targets if it names no linear layer of experts.

    Raises:
        ValueError: gate or up without the other.
        NotImplementedError: some experts of a layer only, or ranks that differ among them.
    """
    plan = Plan(resolved=config.target_modules)
    if not config.target_modules or not any(layer.linears for layer in layers):
        return plan
    own = copy.copy(config)
    if isinstance(own.target_modules, str) and own.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        linear: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
        leaves = {own.leaf for layer in layers for linears in layer.linears.values() for own in linears}
        own.target_modules = {name.rpartition(".")[2] for name in linear.target_modules} | leaves
        plan.resolved = own.target_modules
    for layer in layers:
        for parameter, linears in layer.linears.items():
            wanted = [linear for linear in linears if _is_targeted(own, layer, linear)]
            if not wanted:
                continue
            if len(wanted) < len(linears):
                missing = ", ".join(linear.leaf for linear in linears if linear not in wanted)
                raise ValueError(
                    f"target_modules must name {missing} with {wanted[0].leaf}, {parameter} of {layer.path} holds both"
                )
            rank = _one_of(config, layer, linears, "rank_pattern", config.r)
            alpha = _one_of(config, layer, linears, "alpha_pattern", config.lora_alpha)
            plan.targets[f"{layer.path}.{parameter}"] = (linears, rank, alpha)
    if not plan.targets:
        return plan
    routers = set(_routers(model, layers))
    for name in _module_names(model):
        if check_target_module_exists(own, name):
            if name in routers:
                plan.parameters.add(f"{name}.weight")
            else:
                plan.modules.add(name)
    for pattern in {*config.rank_pattern, *config.alpha_pattern}:
        if not any(get_pattern_key([pattern], name) == pattern for name in plan.modules) and any(
            get_pattern_key([pattern], name) == pattern
            for linears, _, _ in plan.targets.values()
            for linear in linears
            for name in linear.names(0)
        ):
            plan.patterns.add(pattern)
    return plan


def _is_targeted(config: Any, layer: ExpertLayer, linear: Linear) -> bool:
    hits = [
        expert
        for expert in range(layer.experts)
        if any(check_target_module_exists(config, name) for name in linear.names(expert))
    ]
    if 0 < len(hits) < layer.experts:
        raise NotImplementedError(
            f"target_modules must name all experts of a layer or none, got {len(hits)} of {layer.experts} "
            f"{linear.leaf} of {layer.path}"
        )
    return bool(hits)


def _one_of(config: Any, layer: ExpertLayer, linears: tuple[Linear, ...], option: str, default: Any) -> Any:
    """The rank or alpha of a parameter's linear layers, which must be one."""
    patterns = getattr(config, option)
    if not patterns:
        return default
    values = set()
    for linear in linears:
        for expert in range(layer.experts):
            # The name itself is what is returned where no pattern matches.
            keys = [get_pattern_key(patterns.keys(), name) for name in linear.names(expert)]
            values.add(next((patterns[key] for key in keys if key in patterns), default))
    if len(values) > 1:
        leaves = " and ".join(linear.leaf for linear in linears)
        raise NotImplementedError(
            f"{option} must be the same for {leaves} of all experts of {layer.path}, got {sorted(values)}"
        )
    return values.pop()


def _module_names(model: nn.Module) -> Iterator[str]:
    """Names of the modules that PEFT could adapt: those that it put somewhere count as what they are put around."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        yield name


def _routers(model: nn.Module, layers: list[ExpertLayer]) -> Iterator[str]:
    """Names of the modules beside experts that were linear layers and now hold the matrix themselves."""
    for layer in layers:
        block = layer.path.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_children():
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            weight = base._parameters.get("weight")
            if not isinstance(base, nn.Linear) and weight is not None and weight.dim() == 2:
                yield f"{block}.{name}"
