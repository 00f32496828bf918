"""Reads the config, the shapes and the layout of an adapter, but not its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moe_fused.checkpoints.places import ADAPTER_WEIGHTS, check_adapter_source

from .config import CONFIG, AdapterConfig, module_of
from .detect import detect
from .factors import PROJECTIONS
from .layouts import FactorRole, Grouped
from .names import Layout

WEIGHTS = ADAPTER_WEIGHTS


class SavedAdapter:
    """An adapter with LoRA on experts.

    Args:
        directory: the directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        argument: the argument that gave ``directory``, for messages.
        given: the layout, if the adapter does not show it.

    Attributes:
        shapes: the shapes of all tensors, by key.
        layout: the layout of the experts.
        roles: the role of each tensor of experts.
        others: for each other tensor, the module that it adapts, or None if it is not part of LoRA.

    Raises:
        FileNotFoundError: there is no adapter in safetensors.
        ValueError: the adapter is wrong, or its layout is mixed or unknown.
    """

    def __init__(self, directory: Path, argument: str, given: Layout | None) -> None:
        self.directory = directory
        check_adapter_source(directory, argument)
        self.config = AdapterConfig.load(directory / CONFIG)
        try:
            self.file = safe_open(directory / WEIGHTS, "pt")
        except SafetensorError as error:
            raise ValueError(f"{directory / WEIGHTS}: {error}") from error
        self.shapes = {key: tuple(self.file.get_slice(key).get_shape()) for key in self.file.keys()}  # noqa: SIM118
        self.layout, self.roles = detect(self.shapes, self.config, self.file.metadata() or {}, given)
        self.others = {key: module_of(key) for key in self.shapes if key not in self.roles}

    def groups(self) -> Iterator[Grouped]:
        """Yields the experts of each layer, ordered by the number of the layer."""
        blocks: dict[str, dict[FactorRole, str]] = {}
        for key, role in self.roles.items():
            blocks.setdefault(role.block, {})[role] = key
        for name in sorted(blocks, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")]):
            present = {role.projection for role in blocks[name]}
            yield Grouped(name, blocks[name], tuple(part for part in PROJECTIONS if part in present))
