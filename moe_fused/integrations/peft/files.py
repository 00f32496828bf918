"""Adapter files in which every expert has matrices of its own, as Transformers 4 and PEFT wrote them.

``split`` turns the factors of ``ParamWrapper`` layers into the tensors of such a file, and ``fuse`` turns them back, bit for
bit. The rest of this file calls the two where PEFT and Transformers write and read adapters.
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

from moe_fused.hub import get_kernel
from moe_fused.integrations.quantizer.packed_experts import are_divided, packed_modules

from .targets import Linear, unwrapped
from .wrapper import ParamWrapper, takes_adapters

PEFT_PREFIX = "base_model.model."
# The attribute of a LoRA config that holds the model's ``adapted_stacks`` for ``AdapterConverter``.
ADAPTED_STACKS = "_moe_fused_adapted_stacks"

# Keys of experts' factors in any layout. The original project's layout has no module for the experts.
_OF_EXPERTS = re.compile(r"\.(experts\.(.+\.)?|mlp\.(gate|up|down)_proj\.)lora_")
_MATRIX = re.compile(r"(?P<block>.+)\.(?P<expert>\d+)\.(?P<leaf>[^.]+)\.lora_(?P<factor>[AB])\.")


def wrappers(model: nn.Module) -> Iterator[tuple[str, ParamWrapper]]:
    """Yields the ``ParamWrapper`` layers of ``model``, by the names that they have in its ``state_dict``."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            yield name.removeprefix("_fsdp_wrapped_module.").removeprefix("_orig_mod."), module


def _per_expert(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ParamWrapper, tuple[Linear, ...], str]]:
    """Yields what is written expert by expert: name, layer, linear layers, and what the model puts before their names."""
    for name, wrapper in wrappers(model):
        if linears := wrapper.linears.get(adapter_name):
            yield name, wrapper, linears, unwrapped(name).removesuffix(linears[0].block)


class _Experts(NamedTuple):
    """The experts of a ``ParamWrapper`` layer.

    Attributes:
        parameter: what is adapted. It is a DTensor of all experts if they are divided among processes.
        held: how many of the experts this process has.
    """

    parameter: Any
    held: int

    @classmethod
    def of(cls, wrapper: ParamWrapper) -> _Experts:
        return cls(wrapper.weight, wrapper.num_experts)

    @property
    def all(self) -> int:
        """How many experts there are."""
        return int(self.parameter.shape[0])

    @property
    def are_divided(self) -> bool:
        return self.all != self.held

    def gather(self, factor: Tensor, letter: str) -> Tensor:
        """Returns the factor of all experts. All processes have to call this."""
        parts: Any = get_kernel().modules.divided_as(self.parameter, _by_expert(factor, letter, self.held))
        return _of_experts(parts.full_tensor(), letter)

    def own(self, factor: Tensor, letter: str) -> Tensor:
        """Returns the rows of this process of the factor of all experts."""
        first = self.parameter.device_mesh.get_local_rank() * self.held
        return _of_experts(_by_expert(factor, letter, self.all)[first : first + self.held], letter)


def _by_expert(factor: Tensor, letter: str, experts: int) -> Tensor:
    """Returns A (E·r, in) as (E, r, in), or B (out, r·E) as (E, out, r)."""
    return factor.unflatten(0, (experts, -1)) if letter == "A" else factor.unflatten(1, (-1, experts)).permute(2, 0, 1)


def _of_experts(factors: Tensor, letter: str) -> Tensor:
    """Undoes ``_by_expert``. The result has memory of its own."""
    return (factors.flatten(0, 1) if letter == "A" else factors.permute(1, 2, 0).flatten(1)).clone()


def _stacked(matrices: list[list[Tensor]], factor: str) -> Tensor:
    """Joins the matrices of each expert's linear layers to one factor as ``ParamWrapper`` holds it."""
    if factor == "A":
        return torch.cat([matrix for expert in matrices for matrix in expert])
    b = torch.stack([torch.cat(expert) for expert in matrices])
    return b.permute(1, 2, 0).reshape(b.shape[1], -1)


def _matrices(stack: Tensor, factor: str, experts: int, linears: int) -> list[list[Tensor]]:
    """Undoes ``_stacked``. Each matrix has memory of its own."""
    if factor == "A":
        parts = stack.unflatten(0, (experts, linears, -1))
        return [[matrix.clone() for matrix in expert] for expert in parts]
    b = stack.unflatten(1, (-1, experts)).permute(2, 0, 1)
    return [[part.clone(memory_format=torch.contiguous_format) for part in expert.chunk(linears)] for expert in b]


def split(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of an adapter, with a matrix for each expert where the config named linear layers.

    The keys contain the adapter's name, as in the model. If the experts are divided among processes, all of these have to
    call this, and all get the factors of all experts.
    """
    result = dict(state_dict)
    _change_divided(model, result, f".{adapter_name}", _Experts.gather)
    for name, wrapper, linears, prefix in _per_expert(model, adapter_name):
        for factor in "AB":
            stack = result.pop(f"{name}.lora_{factor}.{adapter_name}.weight", None)
            if stack is None:
                continue
            for expert, matrices in enumerate(_matrices(stack, factor, _Experts.of(wrapper).all, len(linears))):
                for linear, matrix in zip(linears, matrices, strict=True):
                    result[f"{prefix}{linear.names(expert)[0]}.lora_{factor}.{adapter_name}.weight"] = matrix
    return result


def fuse(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor], infix: str = "") -> dict[str, Tensor]:
    """Returns the tensors of a file with the experts' matrices replaced by the factors of ``ParamWrapper`` layers.

    If the experts are divided among processes, the result has the factors of this process.

    Args:
        infix: the text between ``lora_A`` and ``.weight``, in the keys of the file and of the result.

    Raises:
        ValueError: a matrix is missing, or its shape differs from that of the first expert.
    """
    result = dict(state_dict)
    for name, wrapper, linears, _ in _per_expert(model, adapter_name):
        for factor in "AB":
            suffix = f".lora_{factor}{infix}.weight"

            def find(expert: int, linear: Linear, suffix: str = suffix) -> tuple[str, Tensor | None]:
                keys = [f"{pre}{name}{suffix}" for name in linear.names(expert) for pre in (PEFT_PREFIX, "")]
                return next(((key, result.pop(key)) for key in keys if key in result), (keys[0], None))

            stack = _collected(find, _Experts.of(wrapper).all, linears, factor)
            if stack is not None:
                result[f"{name}{suffix}"] = stack
    _change_divided(model, result, infix, _Experts.own)
    return result


def _change_divided(
    model: nn.Module, tensors: dict[str, Tensor], infix: str, change: Callable[[_Experts, Tensor, str], Tensor]
) -> None:
    """Replaces the factors of experts that are divided among processes in ``tensors`` by what ``change`` makes of them.

    Args:
        infix: the text between ``lora_A`` and ``.weight`` in the keys.
        change: ``_Experts.gather`` or ``_Experts.own``.
    """
    for name, wrapper in wrappers(model):
        experts = _Experts.of(wrapper)
        for letter in "AB" if experts.are_divided else "":
            key = f"{name}.lora_{letter}{infix}.weight"
            if key in tensors:
                tensors[key] = change(experts, tensors[key], letter)


def _collected(
    find: Callable[[int, Linear], tuple[str, Tensor | None]], experts: int, linears: tuple[Linear, ...], factor: str
) -> Tensor | None:
    """Joins the matrices that ``find`` returns with their keys to one factor. Returns None if all of them are missing."""
    found = [[find(expert, linear) for linear in linears] for expert in range(experts)]
    present = [(key, matrix) for pairs in found for key, matrix in pairs if matrix is not None]
    if not present:
        return None
    matrices: list[list[Tensor]] = []
    for pairs in found:
        matrices.append([])
        for (key, matrix), (first, like) in zip(pairs, found[0], strict=True):
            if matrix is None or like is None:
                raise ValueError(
                    f"{key if matrix is None else first} is missing, although it belongs to {present[0][0]}"
                )
            if matrix.shape != like.shape:
                raise ValueError(f"{key} has shape {tuple(matrix.shape)}, but needs {tuple(like.shape)} like {first}")
            matrices[-1].append(matrix)
    return _stacked(matrices, factor)


class AdaptedStack(NamedTuple):
    """A layer of a model that holds the LoRA factors of linear layers of all experts.

    Attributes:
        wrapper: the name of the layer.
        linears: the linear layers of an expert whose factors it holds.
        experts: the number of experts.
    """

    wrapper: str
    linears: tuple[Linear, ...]
    experts: int


def adapted_stacks(model: nn.Module, adapter_name: str) -> dict[tuple[str, str], AdaptedStack]:
    """Returns, by block and leaf of a linear layer, the layer into which ``AdapterConverter`` puts its matrices."""
    return {
        (linear.block, linear.leaf): AdaptedStack(name, linears, wrapper.num_experts)
        for name, wrapper, linears, _ in _per_expert(model, adapter_name)
        for linear in linears
    }


class _Pattern(str):
    """A source pattern that also says what a tensor is: expert, layer, leaf and factor.

    Transformers hands the pattern from ``rename_source_key`` to ``add_tensor``.
    """

    __slots__ = ("matrix",)
    matrix: tuple[int, AdaptedStack, str, str]


class AdapterConverter(WeightConverter):
    """Does what ``fuse`` does, within the loading loop of Transformers' ``load_adapter``.

    Transformers makes its converters before the adapter is in the model. So this one reads the model's ``adapted_stacks``,
    which the tuner leaves in the config, only when the first tensor comes.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(["moe_fused_adapter"], ["moe_fused_adapter"], [MergeModulelist()])
        self.peft_config = config
        self.entries: dict[tuple[int, str], tuple[str, Any]] = {}
        self.stack: AdaptedStack | None = None
        self.factor = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterConverter:
        fresh = copy(self)
        fresh.entries = {}
        return fresh

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        stacks: dict[tuple[str, str], AdaptedStack] = getattr(self.peft_config, ADAPTED_STACKS, {})
        match = _MATRIX.match(source_key)
        if not stacks or match is None:
            return source_key, None
        # The prefix differs if the file was written for a model with another head, or with none.
        written = match["block"]
        known = (block for block, leaf in stacks if leaf == match["leaf"])
        block = next((b for b in known if f".{written}".endswith(f".{b}") or b.endswith(f".{written}")), None)
        if block is None:
            return source_key, None
        stack = stacks[block, match["leaf"]]
        pattern = _Pattern(self.source_patterns[0])
        pattern.matrix = (int(match["expert"]), stack, match["leaf"], match["factor"])
        return f"{stack.wrapper}.lora_{match['factor']}.{source_key[match.end() :]}", pattern

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        assert isinstance(source_pattern, _Pattern)
        expert, self.stack, leaf, self.factor = source_pattern.matrix
        self.entries[expert, leaf] = source_key, future
        self.layer_targets[target_key].add(source_key)

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> dict[str, Tensor]:
        """Returns the factor ``layer_name``.

        Raises:
            ValueError: as ``fuse``.
        """
        adapted, factor = self.stack, self.factor
        assert adapted is not None
        entries, self.entries = self.entries, {}

        def find(expert: int, linear: Linear) -> tuple[str, Tensor | None]:
            missing = (f"{linear.names(expert)[0]}.lora_{factor}.weight", None)
            key, tensor = entries.get((expert, linear.leaf), missing)
            if isinstance(tensor, Future):
                tensor = tensor.result()
            return key, tensor() if callable(tensor) else tensor

        stack = _collected(find, adapted.experts, adapted.linears, factor)
        assert stack is not None
        return {layer_name: stack}


def _warn_of_misses(adapter_name: str, missed: list[str], matched: list[str]) -> None:
    """Warns that tensors for experts match nothing in the model."""
    others = f"{len(matched)} others are loaded, such as {matched[0]}" if matched else "no others are there"
    warnings.warn(
        f"adapter {adapter_name!r}: {len(missed)} tensors for experts match nothing in the model and are not loaded, such "
        f"as {missed[0]}; {others}. moe-fused convert adapter SOURCE TARGET --to peft-fused writes them so that "
        "target_parameters reads them",
        stacklevel=4,
    )


def _is_of_experts(key: str) -> bool:
    return _OF_EXPERTS.search(key) is not None


def check_matches(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Warns if ``state_dict`` has tensors for experts that loading it into ``model`` would ignore."""
    if not any(takes_adapters(module) for module in model.modules()):
        return
    known = model.state_dict().keys()
    matched, missed = [], []
    for key in state_dict:
        if key in known or key.removeprefix(PEFT_PREFIX) in known:
            matched.append(key)
        elif _is_of_experts(key):
            missed.append(key)
    if missed:
        _warn_of_misses(adapter_name, missed, matched)


# Replacements for functions of PEFT and Transformers. They call the original for everything else.


def config_conversion(original: Callable[..., None], attribute: str) -> Callable[..., None]:
    """Skips PEFT's conversion of configs for which the tuner has resolved the experts, and which have ``attribute``.

    PEFT's conversion would make one adapter of rank 2r for gate and up.
    """

    def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: Any) -> None:
        if getattr(peft_config, attribute, None) is None:
            original(peft_config, model=model, conversions=conversions)

    return convert_peft_config_for_transformers


def file_conversion(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """Fuses the experts' matrices before PEFT's own conversion, which would make one adapter of rank 2r of them."""

    def convert_peft_adapter_state_dict_for_transformers(
        model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, Tensor], adapter_name: str = "default"
    ) -> dict[str, Tensor]:
        fused = fuse(model, adapter_name, adapter_state_dict)
        return original(model=model, peft_config=peft_config, adapter_state_dict=fused, adapter_name=adapter_name)

    return convert_peft_adapter_state_dict_for_transformers


def weight_mapping(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Puts ``AdapterConverter`` before PEFT's converters, because the first converter to claim a tensor gets it."""

    def build_peft_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> list[Any]:
        mapping = original(weight_conversions, adapter_name, peft_config=peft_config)
        return [AdapterConverter(peft_config), *mapping] if peft_config is not None and mapping else mapping

    return build_peft_weight_mapping


def hotswap(original: Callable[..., None]) -> Callable[..., None]:
    """Swaps the factors of experts, too, and refuses adapters that would be swapped wrongly."""

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
            for key, layers in ((f"{name}.lora_{f}{infix}.weight", getattr(wrapper, f"lora_{f}")) for f in "AB"):
                wanted = layers[adapter_name].weight.shape
                if key in state_dict and state_dict[key].shape != wanted:
                    raise ValueError(
                        f"{key} must have shape {tuple(wanted)} to be swapped in, got {tuple(state_dict[key].shape)}: "
                        "LoRA on experts cannot be swapped for one of another rank"
                    )
        original(model, state_dict, adapter_name, config, parameter_prefix=parameter_prefix)

    return hotswap_adapter_from_state_dict


def adapter_loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes Transformers' ``load_adapter`` warn of ignored tensors, as ``check_matches`` does for PEFT's."""

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(are_divided(module) for _, module in packed_modules(self)):
            raise NotImplementedError(
                "an adapter of a model whose experts are divided among processes cannot be loaded by Transformers' "
                "load_adapter: load it with peft.PeftModel.from_pretrained(model, path)"
            )
        info = original(self, *args, **kwargs)
        missed = sorted(key for key in getattr(info, "unexpected_keys", ()) if _is_of_experts(key))
        if missed and any(takes_adapters(module) for module in self.modules()):
            name = kwargs.get("adapter_name") or (args[1] if len(args) > 1 else None) or "default"
            keys = [key for key in self.state_dict() if ".lora_" in key and f".{name}." in key]
            _warn_of_misses(name, missed, [key for key in keys if key not in info.missing_keys])
        return info

    return load_adapter
