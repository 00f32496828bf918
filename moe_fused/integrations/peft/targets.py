"""The stacked parameters of experts that a LoRA config asks for by the names of linear layers.

In Transformers 4 an expert had three linear layers, ``experts.{i}.gate_proj``, ``up_proj`` and ``down_proj``. LoRA configs
(``target_modules``) and adapter files still use these names. ``ExpertTargets`` holds the stacked parameters that they mean.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from moe_fused.checkpoints.names import is_per_expert
from moe_fused.integrations.transformers.experts_module import Experts, projections_of

_ATTRIBUTE = "_moe_fused_linears"


class Linear(NamedTuple):
    """A linear layer that each expert of a layer had in Transformers 4.

    Attributes:
        block: name of the experts module in the model.
        leaf: name of the linear layer within an expert, as in ``block.{i}.leaf``.
        checkpoint: name of the linear layer in checkpoints, with ``*`` for the expert.
    """

    block: str
    leaf: str
    checkpoint: str

    def names(self, expert: int) -> tuple[str, ...]:
        """The names that the linear layer of ``expert`` may have; the one that checkpoints use comes first."""
        return tuple(dict.fromkeys((self.checkpoint.replace("*", str(expert)), f"{self.block}.{expert}.{self.leaf}")))


def linears_of(config: Any) -> tuple[Linear, ...]:
    """Returns the linear layers that ``config_for`` put into a config."""
    linears: tuple[Linear, ...] = getattr(config, _ATTRIBUTE, ())
    return linears


def config_for(config: Any, linears: tuple[Linear, ...], rank: int, alpha: float) -> Any:
    """Copies a LoRA config for one parameter, and notes in the copy that the parameter stands for ``linears``."""
    one = copy.copy(config)
    one.r, one.lora_alpha, one.rank_pattern, one.alpha_pattern = rank, alpha, {}, {}
    setattr(one, _ATTRIBUTE, linears)
    return one


def rank_and_alpha(config: Any, name: str) -> tuple[int, float]:
    """Returns the rank and the alpha that a LoRA config gives to the module or the parameter ``name``."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    return rank, config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)


def unwrapped(name: str) -> str:
    """Removes the layers that PEFT put around a module from the module's name."""
    return name.replace(".base_layer", "")


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one decoder layer.

    Attributes:
        path: the name of the experts module in the model.
        module: the experts module, without what PEFT put around it.
        experts: the number of experts.
        linears: for each stacked parameter, the linear layers that it is made of. The tuple is empty for a parameter whose
            checkpoints never had separate linear layers.
    """

    path: str
    module: Experts
    experts: int
    linears: dict[str, tuple[Linear, ...]]

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that can be adapted."""
        return tuple(f"{self.path}.{name}" for name in projections_of(self.module))


def expert_layers(model: Any, modules: Iterable[tuple[str, Experts]]) -> list[ExpertLayer]:
    """Describes the experts modules that are given with their names in ``model``."""
    conversions = get_model_conversion_mapping(model, add_legacy=False) if hasattr(model, "config") else []
    converters = [item for item in conversions if isinstance(item, WeightConverter) and is_per_expert(item)]
    renamings = [item.reverse_transform() for item in reversed(conversions) if isinstance(item, WeightRenaming)]
    layers = []
    for name, module in modules:
        path = unwrapped(name)
        linears = {parameter: _linears(path, parameter, converters, renamings) for parameter in projections_of(module)}
        layers.append(ExpertLayer(path, module, int(module.num_experts), linears))
    return layers


def _linears(path: str, parameter: str, converters: list[WeightConverter], renamings: list[Any]) -> tuple[Linear, ...]:
    """Finds the linear layers that a stacked parameter is made of, by Transformers' conversions of checkpoints."""
    for converter in converters:
        stack = converter._original_target_patterns[0]
        if not f"{path}.{parameter}".endswith(stack):
            continue
        leaves = [source.rpartition("*.")[2].removesuffix(".weight") for source in converter._original_source_patterns]
        # Renamings are regular expressions on names with an expert's number, so expert 0 stands for all.
        names = [f"{path}.0.{leaf}.weight" for leaf in leaves]
        for renaming in renamings:
            names = [renaming.rename_source_key(name)[0] for name in names]
        return tuple(Linear(path, leaf, _in_layer(path, name)) for leaf, name in zip(leaves, names, strict=True))
    return ()


def _in_layer(path: str, name: str) -> str:
    """Joins the model's name of a decoder layer with a checkpoint's name, within that layer, of expert 0's weight.

    PEFT writes the model's names. The other tensors of an adapter file therefore lack the prefix that checkpoints put
    before the layer, and the experts' matrices must lack it, too.
    """
    layer = re.match(r".*?\.\d+\.", path)
    head = layer[0] if layer else ""
    tail = re.sub(r"^.*?\.\d+\.", "", name) if layer else name
    return head + re.sub(r"\.0\.([^.]+)\.weight$", r".*.\1", tail)


@dataclass
class ExpertTargets:
    """What a LoRA config asks for, with the names of experts' linear layers resolved to stacked parameters.

    Attributes:
        targets: by name, the experts' parameters to adapt, with their linear layers, rank and alpha.
        modules: names of the modules that the config asks for beside the experts.
        parameters: names of the routers' weights that it asks for; routers were linear layers as well.
        by_weight: names of the linear layers whose weight it names in ``target_parameters``. They are adapted as modules.
        resolved: ``target_modules`` of the config, with "all-linear" replaced by names.
        patterns: keys of ``rank_pattern`` and ``alpha_pattern`` that match experts only.
    """

    targets: dict[str, tuple[tuple[Linear, ...], int, float]] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    parameters: set[str] = field(default_factory=set)
    by_weight: set[str] = field(default_factory=set)
    resolved: Any = None
    patterns: set[str] = field(default_factory=set)

    def is_of_linears(self, parameter: str) -> bool:
        """Whether a name in ``target_parameters`` is that of the weight of a layer in ``by_weight``."""
        return any(f".{name}.weight".endswith(f".{parameter}") for name in self.by_weight)


def is_all_linear(config: Any) -> bool:
    """Whether ``target_modules`` is "all-linear", PEFT's word for all linear layers."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def stacks_of(config: Any, layers: list[ExpertLayer]) -> list[str]:
    """Returns the names that "all-linear" adds to ``target_parameters``: stacks that never were linear layers.

    ``exclude_modules`` and ``modules_to_save`` exclude experts as they exclude linear layers.
    """
    if not is_all_linear(config):
        return []
    named = copy.copy(config)
    chosen: dict[str, list[str]] = {}  # the key is the name within a layer, which stands for all layers
    left_out: set[str] = set()
    for layer in layers:
        for parameter in (name for name, linears in layer.linears.items() if not linears):
            named.target_modules = {layer.path.rpartition(".")[2], parameter}
            name = f"{layer.path}.{parameter}"
            short = re.split(r"\.\d+\.", name, maxsplit=1)[-1]
            if all(check_target_module_exists(named, path) for path in (layer.path, name)):
                chosen.setdefault(short, []).append(name)
            else:
                left_out.add(short)
    return sorted(name for short, names in chosen.items() for name in (names if short in left_out else [short]))


def expert_targets(config: Any, model: nn.Module, layers: list[ExpertLayer]) -> ExpertTargets:
    """Resolves what ``config`` asks for. The result has no ``targets`` if the config names no linear layer of experts.

    Raises:
        ValueError: the config names gate_proj without up_proj, or up_proj without gate_proj.
        NotImplementedError: it names only some experts of a layer, or their ranks differ.
    """
    found = ExpertTargets(resolved=config.target_modules, by_weight=set(_linears_by_weight(config, model)))
    if not found.by_weight and (not config.target_modules or not any(layer.linears for layer in layers)):
        return found
    by_leaf = copy.copy(config)
    by_leaf.target_modules = config.target_modules or set()
    if is_all_linear(by_leaf):
        all_linear: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
        leaves = {linear.leaf for layer in layers for linears in layer.linears.values() for linear in linears}
        named = {name for name in all_linear.target_modules if not _is_of_the_model(model.get_submodule(name))}
        by_leaf.target_modules = {name.rpartition(".")[2] for name in named} | leaves
        found.resolved = by_leaf.target_modules
    _add_stacks(found, config, by_leaf, layers)
    if found.targets or found.by_weight:
        _add_the_rest(found, config, by_leaf, model, layers)
    return found


def _linears_by_weight(config: Any, model: nn.Module) -> Iterator[str]:
    """Yields the names of the linear layers whose weight ``target_parameters`` names.

    PEFT takes some names of modules for those of experts, whatever stands before them. Such a layer beside the experts
    can only be named by its weight. PEFT's own layer for parameters adds B·A to the weight in each pass, and cannot do
    so in 4 bits. The layer for linear modules computes the same, and has the same tensors under the same names.
    """
    named = tuple(name for name in config.target_parameters or () if name.endswith(".weight"))
    for name in _module_names(model) if named else ():
        if f"{name}.weight" not in named and not f"{name}.weight".endswith(tuple(f".{target}" for target in named)):
            continue
        module = model.get_submodule(name)
        if isinstance(module, lora.ParamWrapper):  # an earlier adapter, from before the experts ran in the kernel
            continue
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, nn.Linear) and not _is_of_the_model(base):
            yield name


def _add_stacks(found: ExpertTargets, config: Any, by_leaf: Any, layers: list[ExpertLayer]) -> None:
    """Adds the experts' parameters to ``found``; ``by_leaf`` is ``config`` with "all-linear" replaced by names."""
    for layer in layers:
        for parameter, linears in layer.linears.items():
            wanted = [linear for linear in linears if _is_targeted(by_leaf, layer, linear)]
            if not wanted:
                continue
            if len(wanted) < len(linears):
                missing = ", ".join(linear.leaf for linear in linears if linear not in wanted)
                raise ValueError(
                    f"target_modules must name {missing} with {wanted[0].leaf}, {parameter} of {layer.path} holds both"
                )
            rank = _one_of(config, layer, linears, "rank_pattern", config.r)
            alpha = _one_of(config, layer, linears, "alpha_pattern", config.lora_alpha)
            found.targets[f"{layer.path}.{parameter}"] = (linears, rank, alpha)


def _add_the_rest(found: ExpertTargets, config: Any, by_leaf: Any, model: nn.Module, layers: list[ExpertLayer]) -> None:
    """Adds modules, routers and patterns to ``found``, which has the experts' parameters already."""
    routers = set(_routers(model, layers))
    found.modules |= found.by_weight
    for name in _module_names(model):
        if check_target_module_exists(by_leaf, name):
            if name in routers:
                found.parameters.add(f"{name}.weight")
            else:
                found.modules.add(name)
    for pattern in {*config.rank_pattern, *config.alpha_pattern}:
        if not any(get_pattern_key([pattern], name) == pattern for name in found.modules) and any(
            get_pattern_key([pattern], name) == pattern
            for linears, _, _ in found.targets.values()
            for linear in linears
            for name in linear.names(0)
        ):
            found.patterns.add(pattern)


def _is_of_the_model(module: nn.Module) -> bool:
    """Whether the class of a linear layer belongs to the model. PhiMoE's router is one, and returns more than a product."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return type(base).__module__.startswith("transformers.models.")


def _is_targeted(config: Any, layer: ExpertLayer, linear: Linear) -> bool:
    """Whether ``config`` names ``linear`` of the layer's experts. Raises NotImplementedError if it names only some."""
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
    """Returns the rank or alpha of a parameter's linear layers, which must have the same one."""
    patterns = getattr(config, option)
    if not patterns:
        return default
    values = set()
    for linear in linears:
        for expert in range(layer.experts):
            # get_pattern_key returns the name itself where no pattern matches.
            keys = [get_pattern_key(patterns.keys(), name) for name in linear.names(expert)]
            values.add(next((patterns[key] for key in keys if key in patterns), default))
    if len(values) > 1:
        leaves = " and ".join(linear.leaf for linear in linears)
        raise NotImplementedError(
            f"{option} must be the same for {leaves} of all experts of {layer.path}, got {sorted(values)}"
        )
    return values.pop()


def _module_names(model: nn.Module) -> Iterator[str]:
    """Yields the names of the modules that PEFT could adapt. A layer of PEFT counts as the module that it wraps."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        yield name


def _routers(model: nn.Module, layers: list[ExpertLayer]) -> Iterator[str]:
    """Yields the names of routers: modules beside experts that were linear layers and now hold the matrix themselves."""
    for layer in layers:
        block = layer.path.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_children():
            base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            weight = base._parameters.get("weight")
            if not isinstance(base, nn.Linear) and weight is not None and weight.dim() == 2:
                yield f"{block}.{name}"
