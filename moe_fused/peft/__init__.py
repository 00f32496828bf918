"""LoRA on experts through PEFT: what ``moe_fused.enable`` changes there.

``register`` puts our tuner for LoRA into PEFT's table, and our functions around a few of PEFT's for reading adapters. It
does so when PEFT is imported, which this package does not do itself.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MIN_PEFT = "0.21.2"

# What undoes the registration.
_undo: list[Callable[[], None]] = []


class _OnImport(MetaPathFinder):
    """Finds nothing, but registers once PEFT has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)  # or it would find itself
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
            return spec
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _patch()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_on_import = _OnImport()


def register() -> None:
    """Registers with PEFT, now or as soon as it is imported; a second call changes nothing."""
    if _undo or _on_import in sys.meta_path:
        return
    if "peft" in sys.modules:
        _patch()
    else:
        sys.meta_path.insert(0, _on_import)


def unregister() -> None:
    """Undoes ``register``; does nothing without one."""
    if _on_import in sys.meta_path:
        sys.meta_path.remove(_on_import)
    while _undo:
        _undo.pop()()


def _patch() -> None:
    import peft
    from packaging.version import Version

    if Version(peft.__version__) < Version(MIN_PEFT):
        warnings.warn(
            f"LoRA on experts needs peft>={MIN_PEFT}, found {peft.__version__}: PEFT does it its own way", stacklevel=2
        )
        return
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import hotswap, transformers_weight_conversion
    from transformers.integrations.peft import PeftAdapterMixin

    from . import files, tuner

    conversion = transformers_weight_conversion
    changes: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (conversion, "convert_peft_config_for_transformers", lambda own: files.config_conversion(own, tuner.PLAN)),
        (conversion, "convert_peft_adapter_state_dict_for_transformers", files.file_conversion),
        (conversion, "build_peft_weight_mapping", files.weight_mapping),
        (hotswap, "hotswap_adapter_from_state_dict", files.hotswap),
        (PeftAdapterMixin, "load_adapter", files.adapter_loading),
    ]
    for owner, name, replacement in changes:
        original = getattr(owner, name)
        _undo.append(partial(setattr, owner, name, original))
        setattr(owner, name, replacement(original))
    table = PEFT_TYPE_TO_TUNER_MAPPING
    _undo.append(partial(table.__setitem__, peft.PeftType.LORA, table[peft.PeftType.LORA]))
    table[peft.PeftType.LORA] = tuner.LoraModel
