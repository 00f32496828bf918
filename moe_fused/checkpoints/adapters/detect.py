"""Finds the layout of an adapter file by its keys, its shapes and the marks of its writer.

Where these do not decide, the user must name the layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .config import B_LAYOUT, DETAILS, AdapterConfig
from .factors import DOWN, GATE_UP
from .layouts import LAYOUTS, ExpertLayout, FactorRole, Fused, Shapes, unprefixed
from .names import Layout

# A mark in the header of the files that are written here. In the config, PEFT would warn of an unknown option.
MARKER = "moe_fused.layout"
_B_LAYOUTS = {"rank_major": False, "grouped_by_expert": True}
_FAMILIES = (Layout.PER_EXPERT, Layout.PEFT_FUSED, Layout.ORIGINAL)
_WHERE = {
    Layout.PEFT_FUSED: "PEFT 0.19.1 and later",
    Layout.PEFT_SWAPPED: "PEFT 0.17 to 0.19.0",
    Layout.GPT_OSS_INVERTED: "PEFT 0.19.0 on gpt-oss",
    Layout.UNSLOTH_GROUPED: "Unsloth before September 2026",
    Layout.UNSLOTH_SWAPPED: "Unsloth before September 2026 with PEFT 0.17 to 0.19.0",
}


class NoExperts(ValueError):
    """An adapter file has no LoRA on experts."""


class AmbiguousLayout(ValueError):
    """Nothing in an adapter file tells which of several layouts it has.

    Attributes:
        layouts: the layouts that it may have.
    """

    def __init__(self, message: str, layouts: tuple[Layout, ...]) -> None:
        super().__init__(message)
        self.layouts = layouts


def _family(shapes: Shapes, config: AdapterConfig) -> tuple[ExpertLayout, dict[str, FactorRole]]:
    """Finds which kind of keys the file has, and the role of every tensor of experts."""
    roles: dict[Layout, dict[str, FactorRole]] = {}
    for key in shapes:
        for layout in _FAMILIES:
            if role := LAYOUTS[layout].locate(key, shapes, config):
                roles.setdefault(layout, {})[key] = role
                break
        else:
            if re.search(r"\.experts\.", key):
                raise ValueError(f"{key} is a tensor of experts in no layout that can be converted")
    if not roles:
        raise NoExperts(
            f"no LoRA on experts among {len(shapes)} tensors, of which {min(shapes, default='none')} is one"
        )
    if len(roles) > 1:
        rarer, common = sorted(roles, key=lambda layout: len(roles[layout]))[:2]
        raise ValueError(f"{min(roles[rarer])} is in layout {rarer.value}, other experts are in {common.value}")
    ((layout, found),) = roles.items()
    return LAYOUTS[layout], found


def _swapped_by_shapes(shapes: Shapes, roles: Mapping[str, FactorRole]) -> bool | None:
    """Whether lora_A and lora_B are swapped, or None if the shapes of gate_up and down do not show it."""
    sizes: dict[str, dict[tuple[str, str], int]] = {}
    for key, (block, projection, factor, _) in roles.items():
        shape = shapes[key]
        if len(shape) != 2:
            raise ValueError(f"{key} has shape {shape}, but needs two dimensions")
        sizes.setdefault(block, {})[projection, factor] = shape[1 if factor == "A" else 0]
    result = None
    for block, size in sizes.items():
        if len(size) < 4:
            continue
        gate_up, down = ((size[name, "A"], size[name, "B"]) for name in (GATE_UP, DOWN))
        straight = gate_up[0] == down[1] and gate_up[1] == 2 * down[0]
        swapped = gate_up[1] == down[0] and gate_up[0] == 2 * down[1]
        if straight == swapped or result not in (None, swapped):
            raise ValueError(
                f"{block}.base_layer.lora_A is {gate_up[0]} wide and its lora_B {gate_up[1]} high, {block}.lora_A "
                f"{down[0]} and {down[1]}: not gate_up_proj and down_proj of one kind of experts"
            )
        result = swapped
    return result


def _swapped_by_version(config: AdapterConfig) -> bool | None:
    version = config.peft_version
    if version is None:
        return None
    if version >= (0, 19, 1):
        return False
    # 0.17 and 0.18 took every parameter for (E, in, out), which is right for gpt-oss only. 0.19.0 swapped the wrong ones.
    return version == (0, 19, 0) if config.interleaved else True


def _grouped_by_marker(config: AdapterConfig) -> bool | None:
    """Whether Unsloth's marks say that the expert is the slowest index of lora_B, or None if there are no marks."""
    marks = {config.content[B_LAYOUT]} if B_LAYOUT in config.content else set()
    details = (config.content.get(DETAILS) or {}).get("parameters") or {}
    marks.update(detail[B_LAYOUT] for detail in details.values() if B_LAYOUT in detail)
    if not marks:
        return None
    if len(marks) > 1 or not marks <= _B_LAYOUTS.keys():
        raise ValueError(
            f"adapter_config.json: {B_LAYOUT} is {sorted(map(str, marks))}, but must be one of {[*_B_LAYOUTS]}"
        )
    return _B_LAYOUTS[marks.pop()]


def detect(
    shapes: Shapes, config: AdapterConfig, metadata: Mapping[str, str], given: Layout | None
) -> tuple[ExpertLayout, dict[str, FactorRole]]:
    """Finds the layout of a file, and the role of each of its tensors of experts.

    Args:
        shapes: the shapes of the file's tensors.
        config: the config of the adapter.
        metadata: the strings in the file's header.
        given: the layout that the user names. It must agree with what the file shows.

    Raises:
        ValueError: no layout or several are possible, or not the one that was ``given``.
    """
    family, roles = _family(shapes, config)
    if not isinstance(family, Fused):
        if given not in (None, family.layout):
            raise ValueError(f"{min(roles)} is in layout {family.layout.value}, not {given.value}")
        return family, roles
    swapped, grouped = _swapped_by_shapes(shapes, roles), _grouped_by_marker(config)
    if given is not None:
        layout = LAYOUTS[given]
        if (
            not isinstance(layout, Fused)
            or swapped not in (None, layout.swapped)
            or grouped not in (None, layout.grouped)
        ):
            possible = " or ".join(found.layout.value for found in _candidates(swapped, grouped, config))
            raise ValueError(f"{min(roles)} and the config are in layout {possible}, not {given.value}")
        return layout, roles
    if (marked := metadata.get(MARKER)) in [layout.value for layout in LAYOUTS]:
        return detect(shapes, config, {}, Layout(marked))
    if swapped is None:
        swapped = _swapped_by_version(config)
    if grouped is None and _orders_agree(roles, shapes, config):
        grouped = False
    candidates = _candidates(swapped, grouped, config)
    if len(candidates) > 1:
        names = " or ".join(f"--from {found.layout.value} ({_WHERE[found.layout]})" for found in candidates)
        message = f"{min(roles)}: nothing in the adapter tells its layout, say {names}"
        raise AmbiguousLayout(message, tuple(found.layout for found in candidates))
    return candidates[0], roles


def _candidates(swapped: bool | None, grouped: bool | None, config: AdapterConfig) -> list[Fused]:
    fused: Iterable[Fused] = (layout for layout in LAYOUTS.values() if isinstance(layout, Fused))
    other = Layout.PEFT_SWAPPED if config.interleaved else Layout.GPT_OSS_INVERTED
    return [
        layout
        for layout in fused
        if swapped in (None, layout.swapped) and grouped in (None, layout.grouped) and layout.layout != other
    ]


def _orders_agree(roles: Mapping[str, FactorRole], shapes: Shapes, config: AdapterConfig) -> bool:
    """Whether both orders of experts and ranks are the same, because all ranks are 1 or there is only one expert."""
    layout = LAYOUTS[Layout.PEFT_FUSED]
    for key, role in roles.items():
        rank = config.rank_of(layout.module(unprefixed(role.block), role.projection, 0))
        if rank != 1 and shapes[key][0 if role.factor == "A" else 1] != rank:
            return False
    return True
