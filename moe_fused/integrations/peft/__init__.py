"""LoRA on experts through PEFT.

``register`` puts a tuner of this package into PEFT's table of tuners, and wraps a few functions of PEFT and Transformers
that read adapters. Both wait until somebody imports PEFT.

- ``targets``: the stacked parameters that a LoRA config asks for.
- ``tuner``: which experts are adapted and what is refused; saving, loading and merging.
- ``wrapper``: the layer that hands an adapter's factors to the experts' forward.
- ``files``: adapter files with a matrix for each expert.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from moe_fused.imports import LibraryPatch, Undo

MIN_PEFT = "0.21.2"


def is_supported() -> bool:
    """Whether the installed PEFT is new enough for LoRA on experts in the kernel."""
    import peft
    from packaging.version import Version

    return Version(peft.__version__) >= Version(MIN_PEFT)


def _patch(on_undo: Callable[[Undo], None]) -> None:
    import peft

    if not is_supported():
        warnings.warn(
            f"LoRA on experts needs peft>={MIN_PEFT}, found {peft.__version__}: PEFT's own implementation is used",
            stacklevel=2,
        )
        return
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import hotswap, transformers_weight_conversion
    from transformers.integrations.peft import PeftAdapterMixin

    from . import files, tuner

    conversion = transformers_weight_conversion
    changes: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (
            conversion,
            "convert_peft_config_for_transformers",
            partial(files.config_conversion, attribute=tuner.TARGETS),
        ),
        (conversion, "convert_peft_adapter_state_dict_for_transformers", files.file_conversion),
        (conversion, "build_peft_weight_mapping", files.weight_mapping),
        (hotswap, "hotswap_adapter_from_state_dict", files.hotswap),
        (PeftAdapterMixin, "load_adapter", files.adapter_loading),
    ]
    for owner, name, replacement in changes:
        original = getattr(owner, name)
        on_undo(partial(setattr, owner, name, original))
        setattr(owner, name, replacement(original))
    table = PEFT_TYPE_TO_TUNER_MAPPING
    on_undo(partial(table.__setitem__, peft.PeftType.LORA, table[peft.PeftType.LORA]))
    table[peft.PeftType.LORA] = tuner.LoraModel


_patches = LibraryPatch("peft", _patch)
register, unregister = _patches.register, _patches.unregister
