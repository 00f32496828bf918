"""``moe_fused.register_layers``: classes carry the names of the kernel's layers, and ``kernels`` has the mapping.

After it, ``kernels.kernelize`` puts the layers on any model. Classes of Transformers and PEFT that are not imported yet get
their names when they are. Whether a layer serves a module, ``kernels`` asks a condition, which looks at the module itself.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import kernels
import transformers.integrations
from torch import nn
from transformers.integrations import moe

from moe_fused.imports import LibraryPatch, Undo

from .mapping import EXPERTS, KERNEL_MAPPING, LORA_EXPERTS, LORA_WRAPPER, QWEN3_BLOCK
from .selection import QWEN3_MODULE, has_layer, refusal_of

_DECORATOR = "use_experts_implementation"


def has_conditions() -> bool:
    """Whether the installed ``kernels`` asks a condition for each module, as 0.17 and newer do."""
    return "condition" in inspect.signature(kernels.replace_kernel_forward_from_hub).parameters


def _mapping_in_force() -> dict[str, Any]:
    """What ``kernels.kernelize`` looks layers up in. ``kernels`` has no public name for it."""
    from kernels.layer.globals import _KERNEL_MAPPING

    mapping: dict[str, Any] = _KERNEL_MAPPING.get()
    return mapping


def _condition(layer: str) -> Callable[[nn.Module], bool]:
    """Makes the condition under which a module gets ``layer``. It warns of a module that keeps its own forward."""

    def serves(module: nn.Module) -> bool:
        # For a layer that the mapping lacks, kernels would write a line for every module and reset its forward.
        if layer not in _mapping_in_force() or not has_layer(module, layer):
            return False
        reason = refusal_of(module)
        if reason is not None:
            warnings.warn(f"{type(module).__name__} keeps its own forward instead of {layer}: {reason}", stacklevel=2)
        return reason is None

    return serves


def _name(cls: type[nn.Module], layer: str, on_undo: Callable[[Undo], None]) -> None:
    """Gives ``cls`` the name of its layer, unless its library has given it one."""
    if "kernel_layer_name" in vars(cls):
        return
    kernels.replace_kernel_forward_from_hub(cls, layer, _condition(layer))
    on_undo(partial(delattr, cls, "kernel_condition"))
    on_undo(partial(delattr, cls, "kernel_layer_name"))


def _classes(base: type[nn.Module]) -> Iterator[type[nn.Module]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _classes(cls)


def _name_experts(on_undo: Callable[[Undo], None]) -> None:
    """Names every experts class that exists, and those that Transformers or code of a model will decorate."""
    for cls in {cls for cls in _classes(nn.Module) if "_apply_gate" in vars(cls)}:
        _name(cls, EXPERTS, on_undo)

    original = moe.use_experts_implementation

    @functools.wraps(original)
    def use_experts_implementation(experts_class: type[nn.Module] | None = None, **options: Any) -> Any:
        def decorate(cls: type[nn.Module]) -> type[nn.Module]:
            decorated = original(cls, **options)
            _name(decorated, EXPERTS, on_undo)
            return decorated

        return decorate if experts_class is None else decorate(experts_class)

    owners: tuple[ModuleType, ...] = (moe, transformers.integrations)
    for owner in owners:
        on_undo(partial(setattr, owner, _DECORATOR, original))
        setattr(owner, _DECORATOR, use_experts_implementation)


def _name_block(on_undo: Callable[[Undo], None]) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    _name(Qwen3MoeSparseMoeBlock, QWEN3_BLOCK, on_undo)


def _name_wrappers(on_undo: Callable[[Undo], None]) -> None:
    from moe_fused.integrations import peft

    if not peft.is_supported():
        return
    from peft.tuners.lora.layer import ParamWrapper

    from moe_fused.integrations.peft import wrapper

    _name(ParamWrapper, LORA_WRAPPER, on_undo)
    _name(wrapper.ParamWrapper, LORA_EXPERTS, on_undo)


def _register_mapping(on_undo: Callable[[Undo], None]) -> None:
    mapping = _mapping_in_force()
    # An entry of the user stays as it is.
    ours = {name: entry for name, entry in KERNEL_MAPPING.items() if name not in mapping}
    for name in ours:
        on_undo(partial(mapping.pop, name, None))
    kernels.register_kernel_mapping(ours)


_undo: list[Undo] = []
_libraries = (LibraryPatch(QWEN3_MODULE, _name_block), LibraryPatch("peft", _name_wrappers))


def register() -> None:
    """Names the classes and registers the mapping; a second call changes nothing.

    Raises:
        RuntimeError: the installed ``kernels`` cannot leave single modules out.
    """
    if not has_conditions():
        raise RuntimeError(
            f"register_layers needs kernels>=0.17, found {kernels.__version__}: moe_fused.kernelize(model) works with both"
        )
    if _undo:
        return
    _register_mapping(_undo.append)
    _name_experts(_undo.append)
    for library in _libraries:
        library.register()


def unregister() -> None:
    """Undoes ``register``, the last change first, and does nothing if that was never called."""
    for library in _libraries:
        library.unregister()
    while _undo:
        _undo.pop()()
