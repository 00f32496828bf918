"""What a model directory's config says about its experts: their parameters, and the names of those in checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

from .names import Names, Place, Target

CONFIG = "config.json"
# What the original project calls its classes, all for the config of Qwen3-MoE, and what Transformers does.
ORIGINAL_CLASSES = {"Qwen3MoeFusedForCausalLM": "Qwen3MoeForCausalLM", "Qwen3MoeFusedModel": "Qwen3MoeModel"}
_STACKS = {"gate_up_proj": 2, "up_proj": 1, "down_proj": 1}


def read_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` in ``directory``.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not a JSON object with a ``model_type``.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not the directory of a model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} must be a JSON object with a model_type")
    return config


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.

    Attributes:
        model: on meta.
        names: its experts' tensors.
        renamings: from names in checkpoints to names in the model, of whatever is not stacked or split, in order.
        reverse: the way back.
    """

    model: Any
    names: Names
    renamings: list[WeightRenaming]
    reverse: list[WeightRenaming]

    @classmethod
    def read(cls, directory: Path, config: dict[str, Any]) -> Architecture:
        """The architecture that ``config``, that of ``directory``, describes.

        Raises:
            ValueError: Transformers does not know it, or it has no experts that could be converted.
        """
        model = _on_meta(directory, config)
        targets = list(_targets(model))
        if not targets:
            raise ValueError(
                f"{directory} is of a {type(model).__name__}, which has no experts that could be converted"
            )
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        converters = [
            conversion
            for conversion in conversions
            if isinstance(conversion, WeightConverter)
            and any(target.name.endswith(tuple(conversion.target_patterns)) for target in targets)
        ]
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        # Those that only add or remove a prefix say nothing about what the checkpoint at hand has.
        reverse: list[Any] = [r.reverse_transform() for r in reversed(renamings) if not isinstance(r, PrefixChange)]
        return cls(model, Names(targets, converters, model.base_model_prefix), renamings, reverse)

    def in_model(self, key: str) -> str:
        """The name in the model of a checkpoint's tensor, as far as it is a matter of renaming."""
        return _renamed(key, self.renamings)

    def in_checkpoint(self, name: str) -> str:
        """The way back."""
        return _renamed(name, self.reverse)

    def target(self, place: Place) -> Target:
        """The parameter that ``place`` belongs to, called as the checkpoint's prefix has it."""
        prefix = f"{self.names.base_model_prefix}."
        for name in (place.target, prefix + place.target, place.target.removeprefix(prefix)):
            if name in self.names.targets:
                return replace(self.names.targets[name], name=place.target)
        raise AssertionError(f"{place.target} was located, but is no target")

    def is_ignored(self, name: str) -> bool:
        """Whether Transformers leaves a tensor of that name out on purpose, as those of layers that predict ahead."""
        return any(re.search(pattern, name) for pattern in self.model._keys_to_ignore_on_load_unexpected or ())


def _renamed(name: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def read_model(name: str) -> nn.Module:
    """The model on meta that the config at ``name``, a directory or a repository of the Hub, describes.

    Raises:
        OSError, ValueError: there is no such config, or Transformers does not know the model.
    """
    if not (Path(name) / CONFIG).is_file() and Path(name).is_dir():
        raise FileNotFoundError(f"{Path(name) / CONFIG} is missing")
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    model: nn.Module = _on_meta(Path(name), config.to_dict())
    return model


def _on_meta(directory: Path, config: dict[str, Any]) -> Any:
    names = [ORIGINAL_CLASSES.get(name, name) for name in config.get("architectures") or ()]
    known = [name for name in names if hasattr(transformers, name)]
    try:  # their own messages have many lines; code that comes with a model is not run
        own = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            if known:
                return getattr(transformers, known[0])._from_config(own)
            return transformers.AutoModelForCausalLM.from_config(own, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"{directory / CONFIG} is of a model that Transformers does not know: architectures {names}, model_type "
            f"{config['model_type']}"
        ) from error


def _targets(model: nn.Module) -> Iterator[Target]:
    """The stacked weights of the experts modules.

    Raises:
        ValueError: some are laid out as no other checkpoint has them.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name not in _STACKS or parameter.dim() != 3:
                continue
            if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
                raise ValueError(
                    f"{path}.{name} of {type(module).__name__} is transposed, or gate and up alternate: there is only "
                    "one layout of such experts"
                )
            yield Target(f"{path}.{name}", tuple(parameter.shape), _STACKS[name])
