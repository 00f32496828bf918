"""Gives experts their class of Transformers back if another library has replaced it.

When Unsloth loads a model, it writes a copy of the model's source and puts the classes of the copy into Transformers'
module. The experts among them are not under Transformers' experts interface. It also gives Transformers' own classes of
experts another forward. ``experts_implementation`` has no effect on either, and what holds their weights in 4 bits is
Unsloth's. Nothing here imports Unsloth, and where nobody else has, nothing happens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .experts_module import is_under_interface

# The library that does this. A model is looked through only where somebody has imported it.
_LIBRARY = "unsloth"
_HOME = "transformers.models."


def _released(name: str) -> ModuleType:
    """Runs the source of a module of Transformers once more, and leaves the module that others import as it is.

    Every call makes new classes, because Unsloth also changes classes that a model has had before.
    """
    spec = find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"there is no source of {name}", name=name)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replaced_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[nn.Module], Any]]:
    """Yields the experts of ``model`` whose class is not as Transformers released it.

    A class is known by its name, and by the module that holds the class of the model around it.

    Yields:
        The name of the experts module, the module, Transformers' class for it, and the config of the model around it.
    """
    if _LIBRARY not in sys.modules:
        return
    around: dict[str, PreTrainedModel] = {}
    released: dict[str, ModuleType] = {}
    for path, module in model.named_modules():
        inside = around.get(path.rpartition(".")[0])
        owner = module if isinstance(module, PreTrainedModel) else inside
        if owner is None:
            continue
        around[path] = owner
        # Experts hold their matrices themselves; a dense layer of this name would be a submodule.
        if "down_proj" not in module._parameters or is_under_interface(type(module)):
            continue
        home = type(owner).__module__
        if not home.startswith(_HOME):
            continue
        if home not in released:
            released[home] = _released(home)
        original = getattr(released[home], type(module).__name__, None)
        if original is not None and is_under_interface(original):
            yield path, module, original, owner.config


def restore_experts(model: nn.Module) -> None:
    """Gives the experts of ``model`` back the classes that Transformers released, unless another library packed the weights.

    What is set on a module stays. What Transformers' class sets beside it, the config and the flags of the layout, is added.
    """
    for _, module, original, config in list(replaced_experts(model)):
        if module._parameters["down_proj"].dim() != 3:  # type: ignore[union-attr]
            continue  # what only the other library's forward can read
        with torch.device("meta"):
            new = original(config)
        module.__class__ = original
        for name, value in vars(new).items():
            if name not in vars(module):
                setattr(module, name, value)
