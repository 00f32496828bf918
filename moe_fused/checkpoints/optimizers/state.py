"""Reads and writes the file with an optimizer's state."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_fused.checkpoints.finite import is_finite

# In bitsandbytes' 8-bit optimizers: how many elements share a scale, and from which size on tensors are in 8 bits.
BLOCK, SMALLEST = 256, 4096
# The key under which bitsandbytes hides moments that FSDP could not gather.
_WRAPPER = "__bnb_optimizer_quant_state__"
# The moments that are means of gradients. All others are means of their squares.
FIRST_MOMENTS = ("exp_avg", "state1")
_TORCH = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_BNB = ("state1", "state2")
_BNB_PARTS = tuple(f"{part}{number}" for part in ("state", "qmap", "absmax") for number in (1, 2))

Shape = tuple[int, ...]


class Blockwise(NamedTuple):
    """A moment in 8 bits.

    Attributes:
        codes: uint8, in the shape of the parameter.
        absmax: (blocks,) fp32, the scale of each 256 elements.
        qmap: (256,) fp32, the value of each code.
    """

    codes: Tensor
    absmax: Tensor
    qmap: Tensor

    def dequantize(self) -> Tensor:
        """Returns the fp32 values, in the shape of the parameter."""
        flat = self.qmap[self.codes.reshape(-1).long()]
        return (flat * self.absmax.repeat_interleave(BLOCK)[: flat.numel()]).view(self.codes.shape)


Moment = Tensor | Blockwise


@dataclass(frozen=True)
class ParameterState:
    """The state of one parameter.

    Attributes:
        step: the number of updates, either a number or torch's tensor without dimensions.
        moments: the moments by the optimizer's names for them, each in the shape of the parameter.
        wrapped: whether the moments are hidden from FSDP.
    """

    step: Tensor | int | float
    moments: Mapping[str, Moment]
    wrapped: bool

    @property
    def shape(self) -> Shape:
        """The shape of the parameter."""
        return _shape_and_bits(next(iter(self.moments.values())))[0]

    @property
    def bits(self) -> int:
        """8, or 32 for moments that are not quantized."""
        return _shape_and_bits(next(iter(self.moments.values())))[1]

    @property
    def nbytes(self) -> int:
        return sum(
            moment.codes.nbytes + moment.absmax.nbytes if isinstance(moment, Blockwise) else moment.nbytes
            for moment in self.moments.values()
        )

    @classmethod
    def read(cls, name: str, entry: Any) -> ParameterState | None:
        """Reads the state of the parameter ``name`` from its ``entry`` in the file. Returns None if the entry is empty.

        Raises:
            ValueError: it is not a state of torch's or bitsandbytes' AdamW.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(f"the state of {name} must be a dictionary, got {type(entry).__name__}")
        if not entry:
            return None
        wrapped = _WRAPPER in entry
        entries = {**{key: value for key, value in entry.items() if key != _WRAPPER}, **entry.get(_WRAPPER, {})}
        step = entries.pop("step", None)
        if not isinstance(step, (int, float)) and not (isinstance(step, Tensor) and step.numel() == 1):
            raise ValueError(f"the state of {name} has no step, so that it is not AdamW's: {_listed(entry)}")
        required, known = (_BNB, _BNB_PARTS) if "state1" in entries else (_TORCH[:2], _TORCH)
        for key in required:
            if key not in entries:
                raise ValueError(f"the state of {name} has no {key}, so that it is not AdamW's: {_listed(entries)}")
        for key, value in entries.items():
            if key not in known:
                raise ValueError(
                    f"the state of {name} has {key}, which AdamW's state does not have: it cannot be converted"
                )
            if not isinstance(value, Tensor):
                raise ValueError(f"{key} in the state of {name} must be a tensor, got {type(value).__name__}")
        keys = _BNB if "state1" in entries else [key for key in _TORCH if key in entries]
        moments = {key: _moment(name, key, entries) for key in keys}
        for key, moment in moments.items():
            if _shape_and_bits(moment) != _shape_and_bits(moments[keys[0]]):
                raise ValueError(f"{key} in the state of {name} has another shape or dtype than {keys[0]}")
        return cls(step, moments, wrapped)

    def entry(self) -> dict[str, Any]:
        """Returns the entry for the file."""
        moments: dict[str, Any] = {}
        for key, moment in self.moments.items():
            if isinstance(moment, Blockwise):
                number = key.removeprefix("state")
                moments |= {key: moment.codes, f"qmap{number}": moment.qmap, f"absmax{number}": moment.absmax}
            else:
                moments[key] = moment
        return {"step": self.step, **({_WRAPPER: moments} if self.wrapped else moments)}


def _shape_and_bits(moment: Moment) -> tuple[Shape, int]:
    if isinstance(moment, Blockwise):
        return tuple(moment.codes.shape), 8
    return tuple(moment.shape), 32


def _listed(keys: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, keys)) or "nothing"


def _moment(name: str, key: str, entries: Mapping[str, Tensor]) -> Moment:
    value = entries[key]
    scales = value if value.is_floating_point() else entries.get(f"absmax{key.removeprefix('state')}")
    if scales is not None and not is_finite(scales):
        raise ValueError(f"{key} in the state of {name} holds NaN or infinite values")
    if value.is_floating_point():
        return value
    if key not in _BNB or value.dtype != torch.uint8:
        raise ValueError(f"{key} in the state of {name} is {value.dtype}, but must be a floating-point dtype or uint8")
    number = key.removeprefix("state")
    for part, size in ((f"absmax{number}", -(-value.numel() // BLOCK)), (f"qmap{number}", 256)):
        tensor = entries.get(part)
        shape = None if tensor is None else tuple(tensor.shape)
        if tensor is None or shape != (size,) or not tensor.is_floating_point():
            raise ValueError(
                f"{part} in the state of {name} has shape {shape}, but needs ({size},) for blocks of {BLOCK} elements"
            )
    return Blockwise(value, entries[f"absmax{number}"], entries[f"qmap{number}"])


class Slot(NamedTuple):
    """A parameter in the optimizer: its number, the index of its group, and its state, which has not been read yet."""

    number: int
    group: int
    entry: Any

    @property
    def shape(self) -> Shape | None:
        """The shape of the parameter, or None if its state does not show it."""
        entries = {**self.entry, **self.entry.get(_WRAPPER, {})} if isinstance(self.entry, Mapping) else {}
        moment = next((entries[key] for key in (*_TORCH, *_BNB) if isinstance(entries.get(key), Tensor)), None)
        return None if moment is None else tuple(moment.shape)


class OptimizerState:
    """The content of an optimizer's file.

    Attributes:
        path: the file.
        groups: the hyper-parameters of each group.
        slots: the parameters, group by group.
        names: the names of the parameters, if the optimizer was given names.

    Raises:
        ValueError: the file is damaged, or does not hold the state of an optimizer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:  # the file is mapped, so that a tensor is only read when it is used
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{path} is not a whole file of torch.save: {error}") from error
        if not isinstance(content, dict) or not {"state", "param_groups"} <= content.keys():
            raise ValueError(f"{path} is not the state of an optimizer, which has state and param_groups")
        state, groups = content["state"], content["param_groups"]
        if (
            not isinstance(state, dict)
            or not isinstance(groups, list)
            or not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
        ):
            raise ValueError(f"{path} is not the state of an optimizer, with a list of parameters in each group")
        numbers = [number for group in groups for number in group["params"]]
        if len(set(numbers)) != len(numbers) or (left := state.keys() - set(numbers)):
            what = f"a state of {next(iter(left))}" if len(set(numbers)) == len(numbers) else "parameters twice"
            raise ValueError(f"{path} has {what}, which its groups do not have so")
        self.others = {key: value for key, value in content.items() if key not in ("state", "param_groups")}
        self.groups = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.slots = [
            Slot(number, index, state.get(number, {}))
            for index, group in enumerate(groups)
            for number in group["params"]
        ]
        self.names = self._param_names([len(group["params"]) for group in groups])

    def _param_names(self, sizes: list[int]) -> list[str] | None:
        lists = [group.pop("param_names", None) for group in self.groups]
        if all(names is None for names in lists):
            return None
        for index, (names, size) in enumerate(zip(lists, sizes, strict=True)):
            if len(names or ()) != size:
                raise ValueError(
                    f"{self.path}: group {index} has {size} parameters, but {len(names or ())} param_names"
                )
        return [name for names in lists for name in names or ()]

    def mismatch(self, names: Sequence[str], shape_of: Callable[[str], Shape]) -> str | None:
        """Why the optimizer's parameters cannot have these names in this order, or None if they can."""
        if len(names) != len(self.slots):
            return f"there are {len(names)} parameters, but the state has {len(self.slots)}"
        for slot, name in zip(self.slots, names, strict=True):
            if slot.shape not in (None, shape_of(name)):
                return f"{name} has shape {shape_of(name)}, number {slot.number} of the state has {slot.shape}"
        return None


def pack(
    source: OptimizerState, groups: Sequence[Sequence[str]], states: Mapping[str, ParameterState | None]
) -> dict[str, Any]:
    """Makes the content of a file like ``source`` with other parameters.

    Args:
        groups: for each group, the names of its parameters, in order.
        states: the states of all parameters.
    """
    numbers: Iterator[int] = iter(range(sum(map(len, groups))))
    result: dict[str, Any] = {"state": {}, "param_groups": [], **source.others}
    for options, names in zip(source.groups, groups, strict=True):
        group = {**options, "params": []}
        if source.names is not None:
            group["param_names"] = list(names)
        for name in names:
            number = next(numbers)
            group["params"].append(number)
            if (state := states[name]) is not None:
                result["state"][number] = state.entry()
        result["param_groups"].append(group)
    return result
