"""Stacks of 4-bit weights as the parameters of a module.

The parameters are uint8, or the same bytes viewed as a floating dtype, which bitsandbytes' option
``bnb_4bit_quant_storage`` chooses. Only the functions here read or write such parameters. FSDP2 of torch before 2.13 shards
floating-point parameters alone, and its mixed precision leaves a parameter alone that already has the dtype of its policy.

Where the experts of a model are divided among processes (expert parallelism), the parameters are DTensors over all experts,
and a stack is what this process has of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .packed import Packed4bitWeights


def attach(
    weights: Packed4bitWeights, module: nn.Module, name: str, storage_dtype: torch.dtype | None = None
) -> dict[str, nn.Parameter]:
    """Makes ``module`` own the storage: frozen parameters ``name``, ``name_absmax``, … and ``name_format``.

    If the parameter ``name`` that ``module`` has is a DTensor of more experts, the new ones are divided as it is.

    Args:
        weights: the stack, with the experts of this process alone if they are divided.
        module: the module.
        name: the name of the stack in it.
        storage_dtype: the dtype that the parameters have. None keeps that of the stack which ``module`` has under this name,
            and takes uint8 if it has none.

    Returns:
        The parameters by their names, each (E, bytes / itemsize of ``storage_dtype``). Bytes that do not fill an element are
        followed by zeros.
    """
    dtype = storage_dtype or storage_dtype_of(module, name)
    before = module._parameters.get(name)
    made = {}
    for part, value in weights.tensors().items():
        parameter = nn.Parameter(divided_as(before, _as_storage(value, dtype)), requires_grad=False)
        made[parameter_name(name, part)] = parameter
        module.register_parameter(parameter_name(name, part), parameter)
    setattr(module, f"{name}_format", weights.format)
    setattr(module, f"{name}_storage_dtype", dtype)
    return made


def weights_of(module: Any, name: str) -> Tensor | Packed4bitWeights:
    """What ``attach`` gave ``module``, or the dense parameter of that name.

    If the experts are divided, the stack has the ones of this process.

    Raises:
        TypeError: a parameter was cast to another dtype, which changes the bytes.
    """
    format = getattr(module, f"{name}_format", None)
    if format is None:
        dense: Tensor = getattr(module, name)
        return dense
    parts = {part: getattr(module, parameter_name(name, part)) for part in format.storage()}
    if parts["packed"].shape[0] != format.shape[0]:
        parts = {part: value.to_local() for part, value in parts.items()}
    dtype = storage_dtype_of(module, name)
    if dtype is not torch.uint8:
        for part, (_, columns) in format.storage().items():
            if parts[part].dtype is not dtype:
                raise TypeError(
                    f"{parameter_name(name, part)} must be {_word(dtype)}, as which its bytes are held, got "
                    f"{_word(parts[part].dtype)}: 4-bit weights cannot be cast, load them again"
                )
            parts[part] = _as_bytes(parts[part], columns)
    return Packed4bitWeights(format, **parts)


def divided_as(like: Any, value: Tensor) -> Tensor:
    """Makes of this process' experts a DTensor that is divided as ``like``, or returns them if ``like`` is not divided.

    Args:
        like: a parameter with all experts first, or None.
        value: (E, …), the experts of this process.
    """
    if not hasattr(like, "placements") or like.shape[0] == value.shape[0]:
        return value
    from torch.distributed.tensor import DTensor

    value, shape = value.contiguous(), (like.shape[0], *value.shape[1:])
    whole: Tensor = DTensor.from_local(
        value, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=value.stride()
    )
    return whole


def detach(module: nn.Module, name: str) -> Packed4bitWeights:
    """Takes from ``module`` what ``attach`` gave it, and returns the stack."""
    weights = weights_of(module, name)
    assert isinstance(weights, Packed4bitWeights)
    for part in weights.tensors():
        delattr(module, parameter_name(name, part))
    for attribute in (f"{name}_format", f"{name}_storage_dtype"):
        if hasattr(module, attribute):  # a module that an older version has pickled lacks the second one
            delattr(module, attribute)
    return weights


def storage_dtype_of(module: Any, name: str) -> torch.dtype:
    """The dtype of the parameters that hold a stack's bytes; uint8 if ``module`` has no such stack."""
    dtype: torch.dtype = getattr(module, f"{name}_storage_dtype", torch.uint8)
    return dtype


def parameter_name(name: str, part: str) -> str:
    """The name of the parameter for a part of ``Packed4bitWeights.tensors()``."""
    return name if part == "packed" else f"{name}_{part}"


def _as_storage(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes (E, B) viewed as (E, ⌈B / itemsize⌉) of ``dtype``."""
    if dtype is torch.uint8:
        return value
    if missing := -value.shape[1] % dtype.itemsize:
        value = nn.functional.pad(value, (0, missing))
    return value.view(dtype)


def _as_bytes(value: Tensor, columns: int) -> Tensor:
    """The first ``columns`` bytes of each row of a parameter, contiguous."""
    return value.detach().view(torch.uint8).narrow(1, 0, columns).contiguous()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
