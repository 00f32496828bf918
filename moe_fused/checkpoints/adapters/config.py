"""``adapter_config.json``: which rank and alpha a module has, which modules are adapted, and how to say so for others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .factors import DOWN, GATE, GATE_UP, UP, Scaling

CONFIG = "adapter_config.json"
LEAVES = {GATE_UP: "gate_up_proj", GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"}
# What Unsloth writes: the order of lora_B, and the same again for each parameter.
B_LAYOUT, DETAILS = "lora_B_layout", "unsloth_fused_expert_lora"
# Options that give an adapter parts which the conversion does not know.
_UNKNOWN_PARTS = ("use_dora", "lora_bias", "use_qalora", "kasa_config", "velora_config", "monteclora_config")


def module_of(key: str) -> str | None:
    """The module, as PEFT names it in a config, that a LoRA tensor of an adapter belongs to; None for other tensors."""
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(?:[AB]\.weight|embedding_[AB])", key)
    return match[1] if match else None


def _pattern(patterns: Iterable[str], module: str) -> str | None:
    """The first of ``patterns`` that PEFT would apply to ``module``."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


def _serves(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


class AdapterConfig:
    """The content of ``adapter_config.json``.

    Raises:
        ValueError: not a LoRA adapter, or one with parts that the conversion does not know.
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
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error

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
        """Of the PEFT that wrote the adapter, which says so from 0.18 on."""
        match = re.match(r"(\d+)\.(\d+)\.(\d+)", str(self.content.get("peft_version") or ""))
        return tuple(map(int, match.groups())) if match else None

    @property
    def interleaved(self) -> bool:
        """Whether gate and up take turns in the base model, gpt-oss, as far as its name and its own config tell."""
        base = str(self.content.get("base_model_name_or_path"))
        mapping = self.content.get("auto_mapping") or {}
        names = [base, str(mapping.get("base_model_class"))]
        if (local := Path(base) / "config.json").is_file():
            names.append(local.read_text(encoding="utf-8"))
        return any(re.search(r"gpt[-_]?oss", name, re.IGNORECASE) for name in names)

    def name_of(self, module: str) -> str:
        """What patterns go by: the parameter, where a module such as the router is adapted by its weight."""
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
    """``target_modules`` and ``target_parameters`` of the converted adapter.

    Args:
        config: of the source.
        others: modules with LoRA that are not experts.
        blocks: the projections that are adapted in the target, by the experts' module.
        fused: whether the experts' parameters are targeted, else modules named after the projections.
    """
    others = sorted(set(others))
    expert_leaves = {LEAVES[name] for name in (GATE, UP, DOWN)}
    modules: set[str] = set()
    if isinstance(config.modules, str):  # a regular expression or "all-linear", which may match experts by any name
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
        # Such as the router's weight, a module's only parameter: tools that read separate experts know modules.
        for target in [target for target in parameters if target.endswith(".weight")]:
            parameters.remove(target)
            modules.add(target.removesuffix(".weight"))
        modules.update(LEAVES[name] for name in projections)
        return {"target_modules": sorted(modules), "target_parameters": sorted(parameters) or None}
    # Names that PEFT would take for experts: of shared experts and dense layers, with the module they are in.
    for target in modules & expert_leaves:
        modules.remove(target)
        modules.update(".".join(other.split(".")[-2:]) for other in others if _serves(target, other))
    names = [(block, f"{block}.{LEAVES[name]}") for block, names in blocks.items() for name in names]
    numbers = {int(match[1]) for block in blocks if (match := re.search(r"\.(\d+)\.", block))}
    everywhere = len(set(map(frozenset, blocks.values()))) == 1 and numbers == set(range(len(blocks)))
    parameters.update(".".join(name.split(".")[-3:]) if everywhere else name for _, name in names)
    return {"target_modules": sorted(modules), "target_parameters": sorted(parameters)}


def repattern(
    config: AdapterConfig, others: Iterable[str], experts: Mapping[str, tuple[str, int, float]], fused: bool
) -> dict[str, dict[str, Any]]:
    """``rank_pattern`` and ``alpha_pattern`` that give every module its own rank and alpha.

    Args:
        config: of the source, whose ``r`` and ``lora_alpha`` stay.
        others: modules with LoRA that are not experts: what is said of them stays.
        experts: for each module or parameter of experts in the target a regular expression for all of its kind, its
            rank and its alpha.
        fused: as for ``retarget``, which makes modules of other parameters where they are not.
    """
    others = [config.name_of(other) for other in others]
    result: dict[str, dict[str, Any]] = {}
    for option, patterns, default, place in (
        ("rank_pattern", config.ranks, config.rank, 0),
        ("alpha_pattern", config.alphas, config.content["lora_alpha"], 1),
    ):
        kept = {key: value for key, value in patterns.items() if any(_pattern([key], other) for other in others)}
        if not fused:
            # By either name: PEFT under Transformers 5 makes the router's weight of the module again.
            kept = {re.sub(r"\\?\.weight$", r"(\\.weight)?", key): value for key, value in kept.items()}
        values: dict[str, set[Any]] = {}
        for kind, *numbers in experts.values():
            values.setdefault(kind, set()).add(numbers[place])
        first: dict[str, Any] = {}
        for module, (kind, *numbers) in experts.items():
            common = len(values[kind]) == 1 and not any(_pattern([kind], other) for other in others)
            key = _pattern(kept, module)
            if not common or numbers[place] != (default if key is None else kept[key]):
                first[kind if common else re.escape(module)] = numbers[place]
        # PEFT takes the first that matches.
        result[option] = {**first, **kept}
    return result
