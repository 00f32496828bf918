"""Which layout a file has: by its keys, its shapes and what its writer left behind; else the user must say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .config import B_LAYOUT, DETAILS, AdapterConfig
from .factors import DOWN, GATE_UP
from .layouts import LAYOUTS, ExpertLayout, Fused, Place, Shapes, unprefixed
from .names import Layout

# In the header of the files we write. Not in the config, where PEFT would warn of an option that it does not know.
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


def _family(shapes: Shapes, config: AdapterConfig) -> tuple[ExpertLayout, dict[str, Place]]:
    """The kind of keys that the file has, with the place of every tensor of experts."""
    places: dict[Layout, dict[str, Place]] = {}
    for key in shapes:
        for layout in _FAMILIES:
            if place := LAYOUTS[layout].locate(key, shapes, config):
                places.setdefault(layout, {})[key] = place
                break
        else:
            if re.search(r"\.experts\.", key):
                raise ValueError(f"{key} is a tensor of experts in no layout that can be converted")
    if not places:
        raise ValueError(
            f"no LoRA on experts among {len(shapes)} tensors, of which {min(shapes, default='none')} is one"
        )
    if len(places) > 1:
        rarer, common = sorted(places, key=lambda layout: len(places[layout]))[:2]
        raise ValueError(f"{min(places[rarer])} is in layout {rarer.value}, other experts are in {common.value}")
    ((layout, found),) = places.items()
    return LAYOUTS[layout], found


def _swapped_by_shapes(shapes: Shapes, places: Mapping[str, Place]) -> bool | None:
    """Whether lora_A and lora_B have changed places, which the shapes of gate_up and down together tell."""
    sizes: dict[str, dict[tuple[str, str], int]] = {}
    for key, (block, projection, factor, _) in places.items():
        shape = shapes[key]
        if len(shape) != 2:
            raise ValueError(f"{key} has shape {shape}, needed are two dimensions")
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
    # 0.17 and 0.18 took every parameter for (E, in, out), which gpt-oss has; 0.19.0 changed the wrong ones.
    return version == (0, 19, 0) if config.interleaved else True


def _grouped_by_marker(config: AdapterConfig) -> bool | None:
    """Whether lora_B has the expert slowest, as Unsloth's marks say."""
    marks = {config.content[B_LAYOUT]} if B_LAYOUT in config.content else set()
    details = (config.content.get(DETAILS) or {}).get("parameters") or {}
    marks.update(detail[B_LAYOUT] for detail in details.values() if B_LAYOUT in detail)
    if not marks:
        return None
    if len(marks) > 1 or not marks <= _B_LAYOUTS.keys():
        raise ValueError(
            f"adapter_config.json: {B_LAYOUT} is {sorted(map(str, marks))}, needed is one of {[*_B_LAYOUTS]}"
        )
    return _B_LAYOUTS[marks.pop()]


def detect(
    shapes: Shapes, config: AdapterConfig, metadata: Mapping[str, str], given: Layout | None
) -> tuple[ExpertLayout, dict[str, Place]]:
    """The layout of a file, and the place of each of its tensors of experts.

    Args:
        shapes: of the file's tensors.
        config: of the adapter.
        metadata: the file's own strings.
        given: what the user says, which must agree with what the file tells.

    Raises:
        ValueError: no or several layouts are possible, or another than the one ``given``.
    """
    family, places = _family(shapes, config)
    if not isinstance(family, Fused):
        if given not in (None, family.layout):
            raise ValueError(f"{min(places)} is in layout {family.layout.value}, not {given.value}")
        return family, places
    swapped, grouped = _swapped_by_shapes(shapes, places), _grouped_by_marker(config)
    if given is not None:
        layout = LAYOUTS[given]
        if (
            not isinstance(layout, Fused)
            or swapped not in (None, layout.swapped)
            or grouped not in (None, layout.grouped)
        ):
            possible = " or ".join(found.layout.value for found in _candidates(swapped, grouped, config))
            raise ValueError(f"{min(places)} and the config are in layout {possible}, not {given.value}")
        return layout, places
    if (marked := metadata.get(MARKER)) in [layout.value for layout in LAYOUTS]:
        return detect(shapes, config, {}, Layout(marked))
    if swapped is None:
        swapped = _swapped_by_version(config)
    if grouped is None and _orders_agree(places, shapes, config):
        grouped = False
    candidates = _candidates(swapped, grouped, config)
    if len(candidates) > 1:
        names = " or ".join(f"--from {found.layout.value} ({_WHERE[found.layout]})" for found in candidates)
        raise ValueError(f"{min(places)}: nothing in the adapter tells its layout, say {names}")
    return candidates[0], places


def _candidates(swapped: bool | None, grouped: bool | None, config: AdapterConfig) -> list[Fused]:
    fused: Iterable[Fused] = (layout for layout in LAYOUTS.values() if isinstance(layout, Fused))
    other = Layout.PEFT_SWAPPED if config.interleaved else Layout.GPT_OSS_INVERTED
    return [
        layout
        for layout in fused
        if swapped in (None, layout.swapped) and grouped in (None, layout.grouped) and layout.layout != other
    ]


def _orders_agree(places: Mapping[str, Place], shapes: Shapes, config: AdapterConfig) -> bool:
    """Whether experts and ranks lie the same in both orders, since there is one of either everywhere."""
    layout = LAYOUTS[Layout.PEFT_FUSED]
    for key, place in places.items():
        rank = config.rank_of(layout.module(unprefixed(place.block), place.projection, 0))
        if rank != 1 and shapes[key][0 if place.factor == "A" else 1] != rank:
            return False
    return True
