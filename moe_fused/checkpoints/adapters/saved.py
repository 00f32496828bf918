"""An adapter's directory before its tensors are read: config, shapes, layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .config import CONFIG, AdapterConfig, module_of
from .detect import detect
from .factors import PROJECTIONS
from .layouts import Grouped, Place
from .names import Layout

WEIGHTS = "adapter_model.safetensors"


class SavedAdapter:
    """An adapter with LoRA on experts.

    Args:
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        argument: the name of the argument that gave ``directory``, for messages.
        given: the layout, if the adapter does not tell.

    Attributes:
        shapes: of all tensors, by key.
        layout: of the experts.
        places: what each tensor of experts is.
        others: of each other tensor the module that it adapts, None if it is no LoRA.

    Raises:
        FileNotFoundError: there is no adapter in safetensors.
        ValueError: it is wrong, mixed, or of an unknown layout.
    """

    def __init__(self, directory: Path, argument: str, given: Layout | None) -> None:
        self.directory = directory
        if not directory.is_dir():
            raise FileNotFoundError(f"{argument} {directory} is not a directory")
        for name in (CONFIG, WEIGHTS):
            if not (directory / name).is_file():
                hint = ", only safetensors are read" if (directory / "adapter_model.bin").exists() else ""
                raise FileNotFoundError(f"{argument} {directory} has no {name}{hint}")
        self.config = AdapterConfig.load(directory / CONFIG)
        try:
            self.file = safe_open(directory / WEIGHTS, "pt")
        except SafetensorError as error:
            raise ValueError(f"{directory / WEIGHTS}: {error}") from error
        self.shapes = {key: tuple(self.file.get_slice(key).get_shape()) for key in self.file.keys()}  # noqa: SIM118
        self.layout, self.places = detect(self.shapes, self.config, self.file.metadata() or {}, given)
        self.others = {key: module_of(key) for key in self.shapes if key not in self.places}

    def groups(self) -> Iterator[Grouped]:
        """The experts of each layer, in the file's order of numbers."""
        blocks: dict[str, dict[Place, str]] = {}
        for key, place in self.places.items():
            blocks.setdefault(place.block, {})[place] = key
        for name in sorted(blocks, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")]):
            present = {place.projection for place in blocks[name]}
            yield Grouped(name, blocks[name], tuple(part for part in PROJECTIONS if part in present))
