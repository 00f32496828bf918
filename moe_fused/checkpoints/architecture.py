"""Finds the parameters of a model's experts, and their names in checkpoints, from the model's config alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

from moe_fused.quantized import MXFP4, CheckpointQuantization

from .names import Names, Target, TensorRole
from .places import CONFIG, read_config

__all__ = ["CONFIG", "ORIGINAL_CLASSES", "Architecture", "read_config", "read_model"]

# The classes of the original project, all for the config of Qwen3-MoE, with the name that Transformers has for each.
ORIGINAL_CLASSES = {"Qwen3MoeFusedForCausalLM": "Qwen3MoeForCausalLM", "Qwen3MoeFusedModel": "Qwen3MoeModel"}
_STACKS = {"gate_up_proj": 2, "up_proj": 1, "down_proj": 1}


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.

    Attributes:
        model: the model on the meta device.
        names: the names of its experts' tensors in checkpoints.
        renamings: these turn names in checkpoints into names in the model, applied in order, for tensors that are neither
            stacked nor split.
        reverse: these turn names in the model into names in checkpoints.
    """

    model: Any
    names: Names
    renamings: list[WeightRenaming]
    reverse: list[WeightRenaming]

    @classmethod
    def read(
        cls, directory: Path, config: dict[str, Any], quantization: CheckpointQuantization | None = None
    ) -> Architecture:
        """Returns the architecture that ``config``, the content of ``config.json`` in ``directory``, describes.

        Args:
            quantization: how the config says that the checkpoint is quantized. Experts for which there is only one dense
                layout can be converted if they are in mxfp4, because they can be dequantized.

        Raises:
            ValueError: Transformers does not know the model, or the model has no experts that could be converted.
        """
        model = _on_meta(directory, config)
        if quantization is None or quantization.method != MXFP4:
            _check_convertible(model)
        result = cls.of(model, in_rows=quantization is not None and quantization.is_published)
        if not result.names.targets:
            raise ValueError(
                f"{directory} holds a {type(model).__name__}, which has no experts that could be converted"
            )
        return result

    @classmethod
    def of(cls, model: Any, *, in_rows: bool = False) -> Architecture:
        """Returns the architecture of ``model``, on meta. It may have no experts, or experts that cannot be converted.

        Args:
            in_rows: whether the checkpoint has experts in a format whose blocks lie along the in features. The shapes of
                transposed experts are then (E, out, in), too.
        """
        targets = list(_targets(model, in_rows))
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        converters = [
            conversion
            for conversion in conversions
            if isinstance(conversion, WeightConverter)
            and any(target.name.endswith(tuple(conversion.target_patterns)) for target in targets)
        ]
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        # A renaming that only adds or removes a prefix is left out, because a checkpoint may or may not have the prefix.
        reverse: list[Any] = [r.reverse_transform() for r in reversed(renamings) if not isinstance(r, PrefixChange)]
        return cls(model, Names(targets, converters, model.base_model_prefix), renamings, reverse)

    def in_model(self, key: str) -> str:
        """Returns the name in the model of the checkpoint's tensor ``key``, if it is only renamed."""
        return _renamed(key, self.renamings)

    def in_checkpoint(self, name: str) -> str:
        """Returns the name in checkpoints of the model's tensor ``name``, if it is only renamed."""
        return _renamed(name, self.reverse)

    def target(self, role: TensorRole) -> Target:
        """Returns the parameter that ``role`` belongs to, with the prefix that the checkpoint uses in its name."""
        for name in self.names.spellings(role.target):
            if name in self.names.targets:
                return replace(self.names.targets[name], name=role.target)
        raise AssertionError(f"{role.target} was located, but is no target")

    def has(self, name: str) -> bool:
        """Whether the model has a parameter of that name, with or without the prefix of the base model."""
        return not self._parameters.isdisjoint(self.names.spellings(name))

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.model.named_parameters())

    def dense_modules(self) -> list[str]:
        """Returns the names of modules that a checkpoint whose experts alone are quantized has to name as dense.

        These are linear layers, by their names in the model and in checkpoints, and routers, which Transformers 4 takes for
        linear layers, by their names in checkpoints.
        """
        linears = {path for path, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        routers = dict(routers_beside(self.model, (target.rpartition(".")[0] for target in self.names.targets))).keys()
        stored = {self.in_checkpoint(f"{name}.weight").removesuffix(".weight") for name in linears | routers}
        return sorted(linears | stored)

    def is_ignored(self, name: str) -> bool:
        """Whether Transformers ignores a tensor of that name on purpose, or it belongs to a layer that predicts ahead.

        Transformers knows the numbers of such layers for some models. For others, the config announces them.
        """
        known = self.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, name) for pattern in (*known, *self._ahead()))

    def _ahead(self) -> list[str]:
        """Returns patterns of names in the layers that the config announces after the last layer of the model."""
        config = self.model.config.get_text_config()
        ahead, layers = getattr(config, "num_nextn_predict_layers", None), getattr(config, "num_hidden_layers", None)
        if not isinstance(ahead, int) or not isinstance(layers, int):
            return []
        return [rf"(^|\.)layers\.{layers + number}\." for number in range(ahead)]


def routers_beside(model: nn.Module, experts: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields the routers that are no linear layers: their names in the model, and their weights.

    Args:
        experts: the names of experts modules. A router is in the same block.
    """
    for path in experts:
        block = path.rpartition(".")[0]
        for name, module in model.get_submodule(block).named_children():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(module, nn.Linear):
                yield f"{block}.{name}", weight


def _renamed(name: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def read_model(name: str) -> nn.Module:
    """Makes the model on meta that the config at ``name``, a directory or a repository of the Hub, describes.

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
    try:  # Transformers' error has many lines, so it is replaced; code that comes with a model is not run
        loaded = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            if known:
                return getattr(transformers, known[0])._from_config(loaded)
            return transformers.AutoModelForCausalLM.from_config(loaded, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"{directory / CONFIG} describes a model that Transformers does not know: architectures {names}, model_type "
            f"{config['model_type']}"
        ) from error
    except (AttributeError, KeyError, TypeError) as error:  # as for a dtype that torch does not have
        raise ValueError(f"{directory / CONFIG} is not that of a model: {error!r}") from error


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yields the stacked weights of experts: path and module, name and value of the parameter."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name in _STACKS and parameter.dim() == 3:
                yield path, module, name, parameter


def _is_plain(module: nn.Module) -> bool:
    """Whether the matrices of experts are (out, in), and gate stands before up."""
    return bool(getattr(module, "is_concatenated", True) and not getattr(module, "is_transposed", False))


def _check_convertible(model: nn.Module) -> None:
    """Raises ValueError if some experts are in a layout for which there is no other."""
    for path, module, name, _ in _stacks(model):
        if not _is_plain(module):
            raise ValueError(
                f"{path}.{name} of {type(module).__name__} is transposed, or gate and up alternate: there is only "
                "one layout of such experts"
            )


def _targets(model: nn.Module, in_rows: bool) -> Iterator[Target]:
    """Yields the stacked weights of the experts modules."""
    for path, module, name, parameter in _stacks(model):
        experts, rows, columns = parameter.shape
        transposed = in_rows and getattr(module, "is_transposed", False)
        shape = (experts, columns, rows) if transposed else (experts, rows, columns)
        yield Target(f"{path}.{name}", shape, _STACKS[name] if _is_plain(module) else 1, transposed)
