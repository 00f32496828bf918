"""Reads ``adapter_config.json``, and makes the targets and patterns of a converted adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_fused.checkpoints.places import read_object

from .factors import DOWN, GATE, GATE_UP, UP, Scaling
from .names import names_gpt_oss

CONFIG = "adapter_config.json"
LEAVES = {GATE_UP: "gate_up_proj", GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"}
# Unsloth's options: the order of lora_B, and the same for each parameter.
B_LAYOUT, DETAILS = "lora_B_layout", "unsloth_fused_expert_lora"
# Options that give an adapter parts that the conversion does not know.
_UNKNOWN_PARTS = ("use_dora", "lora_bias", "use_qalora", "kasa_config", "velora_config", "monteclora_config")


def module_of(key: str) -> str | None:
    """Returns the module that a LoRA tensor belongs to, by its name in PEFT's config, or None for other tensors."""
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(?:[AB]\.weight|embedding_[AB])", key)
    return match[1] if match else None


def _pattern(patterns: Iterable[str], module: str) -> str | None:
    """Returns the first of ``patterns`` that PEFT would apply to ``module``."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


def _serves(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


class AdapterConfig:
    """The content of ``adapter_config.json``.

    Raises:
        ValueError: the adapter is not a LoRA adapter, or has parts that the conversion does not know.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = dict(content)
        if self.content.get("peft_type") != "LORA":
            raise ValueError(f"{CONFIG}: peft_type is {self.content.get('peft_type')!r}, only 'LORA' can be converted")
        for option in _UNKNOWN_PARTS:
            if self.content.get(option):
                raise ValueError(f"{CONFIG}: {option} is set, such adapters cannot be converted")
        if not isinstance(self.content.get("r"), int) or not isinstance(self.content.get("lora_alpha"), (int, float)):
            raise ValueError(f"{CONFIG}: r and lora_alpha must be numbers")
        self.rslora = bool(self.content.get("use_rslora"))
        self.ranks: dict[str, int] = dict(self.content.get("rank_pattern") or {})
        self.alphas: dict[str, float] = dict(self.content.get("alpha_pattern") or {})

    @classmethod
    def load(cls, path: Path) -> AdapterConfig:
        return cls(read_object(path))

    @property
    def rank(self) -> int:
        return int(self.content["r"])

    @property
    def parameters(self) -> list[str]:
        return sorted(self.content.get("target_parameters") or ())

    @property
    def modules(self) -> list[str] | str:
        modules = self.content.get("target_modules") or []
        return modules if isinstance(modules, str) else sorted(modules)

    @property
    def peft_version(self) -> tuple[int, ...] | None:
        """The version of the PEFT that wrote the adapter. PEFT records it since 0.18."""
        match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(self.content.get("peft_version") or ""))
        return tuple(map(int, match.groups())) if match else None

    @property
    def interleaved(self) -> bool:
        """Whether the base model is gpt-oss, in which gate and up alternate, by its config or else by its name."""
        base = str(self.content.get("base_model_name_or_path"))
        mapping = self.content.get("auto_mapping") or {}
        names = [str(mapping.get("base_model_class")), base]
        if (local := Path(base) / "config.json").is_file():
            # The name of a directory says nothing, so its config is read.
            content = read_object(local)
            names[1:] = [str(content.get("model_type")), *map(str, content.get("architectures") or ())]
        return any(map(names_gpt_oss, names))

    def name_of(self, module: str) -> str:
        """Returns the name that patterns apply to, which is a router's weight if the router is adapted by its weight."""
        weight = f"{module}.weight"
        return weight if self.adapts_parameter(weight) else module

    def rank_of(self, module: str) -> int:
        key = _pattern(self.ranks, self.name_of(module))
        return self.rank if key is None else self.ranks[key]

    def scaling_of(self, module: str) -> Scaling:
        key = _pattern(self.alphas, self.name_of(module))
        return Scaling(self.content["lora_alpha"] if key is None else self.alphas[key], self.rslora)

    def adapts_parameter(self, parameter: str) -> bool:
        """Whether ``parameter``, with its module's full name, is one of ``target_parameters``."""
        return any(_serves(target, parameter) for target in self.parameters)


def retarget(
    config: AdapterConfig, others: Iterable[str], blocks: Mapping[str, Iterable[str]], fused: bool
) -> dict[str, Any]:
    """Makes ``target_modules`` and ``target_parameters`` of the converted adapter.

    With separate experts, ``target_modules`` also matches shared experts and dense layers, to which PEFT then adds factors
    that are zero. ``exclude_modules`` is not written against this: PEFT warns if it excludes nothing, and raises an error if
    it leaves no module.

    Args:
        config: the config of the source.
        others: the modules with LoRA that are not experts.
        blocks: for each experts module, the projections that are adapted in the target.
        fused: whether the target names the experts' parameters; if not, it names modules called after the projections.
    """
    others = sorted(set(others))
    expert_leaves = {LEAVES[name] for name in (GATE, UP, DOWN)}
    modules: set[str] = set()
    if isinstance(config.modules, str):  # a regular expression or "all-linear", which may match experts under any name
        modules.update(other.rpartition(".")[2] for other in others)
    else:
        modules.update(
            target
            for target in config.modules
            if any(_serves(target, other) for other in others)
            or not (target.rpartition(".")[2] in expert_leaves or re.search(r"(^|\.)experts(\.|$)", target))
        )
    parameters = {
        target
        for target in config.parameters
        if not any(_serves(target, f"{block}.{leaf}") for block in blocks for leaf in LEAVES.values())
    }
    projections = {name for names in blocks.values() for name in names}
    if not fused:
        # Tools that read separate experts know modules only, so that the router's weight, for example, becomes the router.
        for target in [target for target in parameters if target.endswith(".weight")]:
            parameters.remove(target)
            modules.add(target.removesuffix(".weight"))
        modules.update(LEAVES[name] for name in projections)
        return {"target_modules": sorted(modules), "target_parameters": sorted(parameters) or None}
    # PEFT takes modules with the last names of experts for the experts' parameters, whatever stands before. So shared
    # experts and dense layers are named by their weight. Each gets the name of the module that it is in, too.
    for target in [target for target in modules if target.rpartition(".")[2] in expert_leaves]:
        modules.remove(target)
        parameters.update(f"{'.'.join(other.split('.')[-2:])}.weight" for other in others if _serves(target, other))
    names = [(block, f"{block}.{LEAVES[name]}") for block, names in blocks.items() for name in names]
    numbers = {int(match[1]) for block in blocks if (match := re.search(r"\.(\d+)\.", block))}
    everywhere = len(set(map(frozenset, blocks.values()))) == 1 and numbers == set(range(len(blocks)))
    parameters.update(".".join(name.split(".")[-3:]) if everywhere else name for _, name in names)
    return {"target_modules": sorted(modules), "target_parameters": sorted(parameters)}


def repattern(
    config: AdapterConfig, others: Iterable[str], experts: Mapping[str, tuple[str, int, float]], fused: bool
) -> dict[str, dict[str, Any]]:
    """Makes ``rank_pattern`` and ``alpha_pattern`` that give every module its rank and alpha.

    Args:
        config: the config of the source, whose ``r`` and ``lora_alpha`` stay.
        others: the modules with LoRA that are not experts. Their patterns stay.
        experts: for each module or parameter of experts in the target, a regular expression for all of its kind, its
            rank and its alpha.
        fused: as for ``retarget``. If False, other parameters have become modules.
    """
    others = [config.name_of(other) for other in others]
    written = others if fused else [other.removesuffix(".weight") for other in others]
    result: dict[str, dict[str, Any]] = {}
    for option, patterns, default, index in (
        ("rank_pattern", config.ranks, config.rank, 0),
        ("alpha_pattern", config.alphas, config.content["lora_alpha"], 1),
    ):
        kept = {key: value for key, value in patterns.items() if any(_pattern([key], other) for other in others)}
        if fused:
            # Layers beside the experts may be named by their weight now.
            kept = {
                f"{key}(\\.weight)?" if re.search(r"(gate|up|down)_proj$", key) else key: value
                for key, value in kept.items()
            }
        else:
            # Both names must match, because PEFT under Transformers 5 turns the router back into the router's weight.
            kept = {re.sub(r"\\?\.weight$", r"(\\.weight)?", key): value for key, value in kept.items()}
        values: dict[str, set[Any]] = {}
        for kind, *numbers in experts.values():
            values.setdefault(kind, set()).add(numbers[index])
        first: dict[str, Any] = {}
        for module, (kind, *numbers) in experts.items():
            common = len(values[kind]) == 1 and not any(_pattern([kind], other) for other in written)
            key = _pattern(kept, module)
            if not common or numbers[index] != (default if key is None else kept[key]):
                first[kind if common else re.escape(module)] = numbers[index]
        # PEFT takes the first pattern that matches.
        result[option] = {**first, **kept}
    return result
