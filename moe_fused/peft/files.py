"""Files of adapters in which every expert has its own matrices, as Transformers 4 and PEFT wrote them.

``split`` and ``fuse`` go from the factors of our layers to such files and back, bit for bit; the rest puts them where PEFT
and Transformers read and write files.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.core_model_loading import MergeModulelist, WeightConverter

from .targets import Linear, unwrapped
from .wrapper import ParamWrapper, takes_adapters

PEFT_PREFIX = "base_model.model."
PLACES = "_moe_fused_places"

_MATRIX = re.compile(r"(?P<block>.+)\.(?P<expert>\d+)\.(?P<leaf>[^.]+)\.lora_(?P<factor>[AB])\.")


def wrappers(model: nn.Module) -> Iterator[tuple[str, ParamWrapper]]:
    """Our layers in ``model``, by the names that they have in its ``state_dict``."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            yield name.removeprefix("_fsdp_wrapped_module.").removeprefix("_orig_mod."), module


def _per_expert(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ParamWrapper, tuple[Linear, ...], str]]:
    """Name, layer, linear layers and the model's prefix of what is written expert by expert."""
    for name, wrapper in wrappers(model):
        if linears := wrapper.linears.get(adapter_name):
            yield name, wrapper, linears, unwrapped(name).removesuffix(linears[0].block)


def _stacked(matrices: list[list[Tensor]], factor: str) -> Tensor:
    """A factor as our layers hold it, of the matrices of all experts' linear layers."""
    if factor == "A":
        return torch.cat([matrix for own in matrices for matrix in own])
    b = torch.stack([torch.cat(own) for own in matrices])
    return b.permute(1, 2, 0).reshape(b.shape[1], -1)


def _matrices(stack: Tensor, factor: str, experts: int, linears: int) -> list[list[Tensor]]:
    """The inverse of ``_stacked``, in memory of their own."""
    if factor == "A":
        parts = stack.unflatten(0, (experts, linears, -1))
        return [[matrix.clone() for matrix in own] for own in parts]
    b = stack.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return [[matrix.clone(memory_format=torch.contiguous_format) for matrix in own.chunk(linears)] for own in b]


def split(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter, keys with its name in them, with a matrix for each expert where it was asked for so."""
    result = dict(state_dict)
    for name, wrapper, linears, prefix in _per_expert(model, adapter_name):
        for factor in "AB":
            stack = result.pop(f"{name}.lora_{factor}.{adapter_name}.weight", None)
            if stack is None:
                continue
            for expert, own in enumerate(_matrices(stack, factor, wrapper.num_experts, len(linears))):
                for linear, matrix in zip(linears, own, strict=True):
                    result[f"{prefix}{linear.names(expert)[0]}.lora_{factor}.{adapter_name}.weight"] = matrix
    return result


def fuse(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor], infix: str = "") -> dict[str, Tensor]:
    """The tensors of a file, with the factors of our layers in place of the experts' matrices.

    Args:
        infix: what stands between ``lora_A`` and ``.weight``, in both.

    Raises:
        ValueError: a matrix is missing or has another shape than that of the first expert.
    """
    result = dict(state_dict)
    for name, wrapper, linears, _ in _per_expert(model, adapter_name):
        for factor in "AB":
            suffix = f".lora_{factor}{infix}.weight"

            def find(expert: int, linear: Linear, suffix: str = suffix) -> tuple[str, Tensor | None]:
                keys = [f"{pre}{own}{suffix}" for own in linear.names(expert) for pre in (PEFT_PREFIX, "")]
                return next(((key, result.pop(key)) for key in keys if key in result), (keys[0], None))

            stack = _collected(find, wrapper.num_experts, linears, factor)
            if stack is not None:
                result[f"{name}{suffix}"] = stack
    return result


def _collected(
    find: Callable[[int, Linear], tuple[str, Tensor | None]], experts: int, linears: tuple[Linear, ...], factor: str
) -> Tensor | None:
    """A factor of the matrices that ``find`` gives with their keys; None if there are none at all."""
    found = [[find(expert, linear) for linear in linears] for expert in range(experts)]
    present = [(key, matrix) for own in found for key, matrix in own if matrix is not None]
    if not present:
        return None
    matrices: list[list[Tensor]] = []
    for own in found:
        matrices.append([])
        for (key, matrix), (first, like) in zip(own, found[0], strict=True):
            if matrix is None or like is None:
                raise ValueError(f"{key if matrix is None else first} is missing, which belongs to {present[0][0]}")
            if matrix.shape != like.shape:
                raise ValueError(f"{key} has shape {tuple(matrix.shape)}, needed is {tuple(like.shape)} as of {first}")
            matrices[-1].append(matrix)
    return _stacked(matrices, factor)


class Place(NamedTuple):
    """Where the matrices of a linear layer of all experts are in a model.

    Attributes:
        wrapper: name of the layer.
        linears: all that the layer stands for.
        experts: how many.
    """

    wrapper: str
    linears: tuple[Linear, ...]
    experts: int


def places_of(model: nn.Module, adapter_name: str) -> dict[tuple[str, str], Place]:
    """By block and leaf of a linear layer, where ``AdapterConverter`` puts it."""
    return {
        (linear.block, linear.leaf): Place(name, linears, wrapper.num_experts)
        for name, wrapper, linears, _ in _per_expert(model, adapter_name)
        for linear in linears
    }


class _Pattern(str):
    """A source pattern that carries what a tensor is from one call by Transformers to the next."""

    __slots__ = ("matrix",)
    matrix: tuple[int, Place, str, str]


class AdapterConverter(WeightConverter):
    """``fuse`` in the loading loop of Transformers' own ``load_adapter``.

    Transformers makes its converters before the adapter is in the model, so this one looks for the places of the experts'
    matrices, which the tuner leaves in the config, when the first tensor comes.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(["moe_fused_adapter"], ["moe_fused_adapter"], [MergeModulelist()])
        self.peft_config = config
        self.entries: dict[tuple[int, str], tuple[str, Any]] = {}
        self.place: Place | None = None
        self.factor = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterConverter:
        fresh = copy(self)
        fresh.entries = {}
        return fresh

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        places: dict[tuple[str, str], Place] = getattr(self.peft_config, PLACES, {})
        match = _MATRIX.match(source_key)
        if not places or match is None:
            return source_key, None
        # A model with another head, or none, has another prefix.
        known = (block for block, leaf in places if leaf == match["leaf"])
        block = next(
            (own for own in known if f".{match['block']}".endswith(f".{own}") or own.endswith(f".{match['block']}")),
            None,
        )
        if block is None:
            return source_key, None
        place = places[block, match["leaf"]]
        pattern = _Pattern(self.source_patterns[0])
        pattern.matrix = (int(match["expert"]), place, match["leaf"], match["factor"])
        return f"{place.wrapper}.lora_{match['factor']}.{source_key[match.end() :]}", pattern

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        assert isinstance(source_pattern, _Pattern)
        expert, self.place, leaf, self.factor = source_pattern.matrix
        self.entries[expert, leaf] = source_key, future
        self.layer_targets[target_key].add(source_key)

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Tensor]:
        """The factor ``layer_name``.

        Raises:
            ValueError: as ``fuse``.
        """
        place, factor = self.place, self.factor
        assert place is not None
        entries, self.entries = self.entries, {}

        def find(expert: int, linear: Linear) -> tuple[str, Tensor | None]:
            missing = (f"{linear.names(expert)[0]}.lora_{factor}.weight", None)
            key, tensor = entries.get((expert, linear.leaf), missing)
            if isinstance(tensor, Future):
                tensor = tensor.result()
            return key, tensor() if callable(tensor) else tensor

        stack = _collected(find, place.experts, place.linears, factor)
        assert stack is not None
        return {layer_name: stack}


def _warn_of_misses(adapter_name: str, missed: list[str], matched: list[str]) -> None:
    """Warns that tensors for experts find no place in the model."""
    others = f"{len(matched)} others are loaded, such as {matched[0]}" if matched else "no others are there"
    warnings.warn(
        f"adapter {adapter_name!r}: {len(missed)} tensors for experts match nothing in the model and are not loaded, such "
        f"as {missed[0]}; {others}. moe-fused convert adapter SOURCE TARGET --to peft-fused writes them so that "
        "target_parameters reads them",
        stacklevel=4,
    )


def _is_of_experts(key: str) -> bool:
    return ".lora_" in key and ".experts." in key


def check_matches(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Warns if ``state_dict``, about to be loaded into ``model``, has tensors for experts that it would pass over."""
    if not any(takes_adapters(module) for module in model.modules()):
        return
    known = model.state_dict().keys()
    adapter = [key for key in state_dict if ".lora_" in key]
    matched = [key for key in adapter if key in known or key.removeprefix(PEFT_PREFIX) in known]
    missed = [key for key in adapter if key not in set(matched) and _is_of_experts(key)]
    if missed:
        _warn_of_misses(adapter_name, missed, matched)


# Functions in place of those of PEFT and Transformers, which they call for everything else.


def config_conversion(original: Callable[..., None], plan: str) -> Callable[..., None]:
    """Leaves configs alone that are planned: PEFT's own conversion would make one adapter of rank 2r for gate and up."""

    def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: Any) -> None:
        if getattr(peft_config, plan, None) is None:
            original(peft_config, model=model, conversions=conversions)

    return convert_peft_config_for_transformers


def file_conversion(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Takes the experts' matrices, before PEFT's own conversion does the same to them as to the config."""

    def convert_peft_adapter_state_dict_for_transformers(
        model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, Tensor], adapter_name: str = "default"
    ) -> dict[str, Tensor]:
        fused = fuse(model, adapter_name, adapter_state_dict)
        return original(model=model, peft_config=peft_config, adapter_state_dict=fused, adapter_name=adapter_name)

    return convert_peft_adapter_state_dict_for_transformers


def weight_mapping(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Puts ``AdapterConverter`` before the converters of PEFT: the first to claim a tensor gets it."""

    def build_peft_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
        mapping = original(weight_conversions, adapter_name, peft_config=peft_config)
        return [AdapterConverter(peft_config), *mapping] if peft_config is not None and mapping else mapping

    return build_peft_weight_mapping


def hotswap(original: Callable[..., None]) -> Callable[..., None]:
    """Swaps what experts hold, and refuses what would be swapped wrongly."""

    def hotswap_adapter_from_state_dict(
        model: nn.Module,
        state_dict: dict[str, Tensor],
        adapter_name: str,
        config: Any,
        parameter_prefix: str = "lora_",
    ) -> None:
        infix = f".{adapter_name}"
        state_dict = fuse(model, adapter_name, state_dict, infix)
        for name, wrapper in wrappers(model):
            if adapter_name not in wrapper.lora_A:
                continue
            if config.rank_pattern or config.alpha_pattern:
                raise NotImplementedError(
                    "hotswapping LoRA on experts takes adapters without rank_pattern and alpha_pattern, which PEFT does "
                    "not look at here: use load_adapter and set_adapter"
                )
            for key, own in ((f"{name}.lora_{f}{infix}.weight", getattr(wrapper, f"lora_{f}")) for f in "AB"):
                wanted = own[adapter_name].weight.shape
                if key in state_dict and state_dict[key].shape != wanted:
                    raise ValueError(
                        f"{key} must have shape {tuple(wanted)} to be swapped in, got {tuple(state_dict[key].shape)}: "
                        "LoRA on experts cannot be swapped for one of another rank"
                    )
        original(model, state_dict, adapter_name, config, parameter_prefix=parameter_prefix)

    return hotswap_adapter_from_state_dict


def adapter_loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Warns after Transformers' ``load_adapter`` as ``check_matches`` does before PEFT's."""

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        info = original(self, *args, **kwargs)
        missed = sorted(key for key in getattr(info, "unexpected_keys", ()) if _is_of_experts(key))
        if missed and any(takes_adapters(module) for module in self.modules()):
            name = kwargs.get("adapter_name") or (args[1] if len(args) > 1 else None) or "default"
            own = [key for key in self.state_dict() if ".lora_" in key and f".{name}." in key]
            _warn_of_misses(name, missed, [key for key in own if key not in info.missing_keys])
        return info

    return load_adapter
