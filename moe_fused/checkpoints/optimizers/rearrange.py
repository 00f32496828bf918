"""Moves the elements of parameters' moments to where they are in the parameters of another layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .state import BLOCK, SMALLEST, Blockwise, Moment, ParameterState, Shape

Load = Callable[[str], Tensor]


@dataclass(frozen=True)
class Unit:
    """Parameters that become others, with the same elements in another order.

    Attributes:
        sources: shapes by name.
        rearrange: gives the others by name, from a function that gives the sources by name.
    """

    sources: Mapping[str, Shape]
    rearrange: Callable[[Load], Iterable[tuple[str, Tensor]]]

    def index(self) -> dict[str, Tensor]:
        """For each of the others, in its shape, where its elements are in the sources, one behind the other."""
        starts, end = {}, 0
        for name, shape in self.sources.items():
            starts[name], end = end, end + torch.Size(shape).numel()

        def numbers(name: str) -> Tensor:
            shape = self.sources[name]
            return torch.arange(starts[name], starts[name] + torch.Size(shape).numel()).view(shape)

        return dict(self.rearrange(numbers))


def rearrange(
    unit: Unit, states: Mapping[str, ParameterState | None]
) -> tuple[dict[str, ParameterState | None], list[str]]:
    """The states of the parameters that ``unit`` makes, and the names of those whose 8-bit moments were quantized anew.

    Args:
        states: of all sources; None for parameters that were not updated yet.

    Raises:
        ValueError: states that become one do not agree in steps or kind.
    """
    index = unit.index()
    first = _agreed(unit, states)
    if first is None:
        return dict.fromkeys(index), []
    moments: dict[str, dict[str, Moment]] = {name: {} for name in index}
    again = set()
    for key in first.moments:
        parts = [state.moments[key] for name in unit.sources if (state := states[name])]
        quantized = [part for part in parts if isinstance(part, Blockwise)]
        if not quantized:
            flat = torch.cat([part.reshape(-1) for part in parts if isinstance(part, Tensor)])
            for name, places in index.items():
                moments[name][key] = flat[places]
            continue
        whole = _Blocks(unit.sources, key, quantized)
        for name, places in index.items():
            moments[name][key], kept = whole.take(places)
            if not kept:
                again.add(name)
    result: dict[str, ParameterState | None] = {}
    for name, own in moments.items():
        # Its own: torch counts steps in place.
        step = first.step.clone() if isinstance(first.step, Tensor) else first.step
        result[name] = replace(first, step=step, moments=own)
    return result, sorted(again)


def _agreed(unit: Unit, states: Mapping[str, ParameterState | None]) -> ParameterState | None:
    """The state of one of the sources, with which the others agree in everything but their moments' values."""
    key = next((name for name in unit.sources if states[name] is not None), None)
    if key is None:
        return None
    first = states[key]
    assert first is not None
    for name in unit.sources:
        state = states[name]
        if state is None or float(state.step) != float(first.step):
            steps = 0 if state is None else float(state.step)
            raise ValueError(
                f"{name} was updated {steps:g} times, {key} {float(first.step):g} times: their states cannot become one"
            )
        if _kind(state) != _kind(first):
            raise ValueError(f"the state of {name} is {_kind(state)}, that of {key} is {_kind(first)}")
    return first


def _kind(state: ParameterState) -> str:
    kinds = (
        f"{key} in 8 bits" if isinstance(moment, Blockwise) else f"{key} in {str(moment.dtype).removeprefix('torch.')}"
        for key, moment in state.moments.items()
    )
    return ", ".join(kinds)


class _Blocks:
    """The moments in 8 bits of some parameters, one behind the other.

    Raises:
        ValueError: their codes have different meanings.
    """

    def __init__(self, sources: Mapping[str, Shape], key: str, parts: list[Blockwise]) -> None:
        self.parts = parts
        self.qmap = parts[0].qmap
        for name, part in zip(sources, parts, strict=True):
            if not torch.equal(part.qmap, self.qmap):
                number = key.removeprefix("state")
                raise ValueError(f"qmap{number} in the state of {name} is not that of {next(iter(sources))}")
        self.sizes = torch.tensor([part.codes.numel() for part in parts])
        self.starts = self.sizes.cumsum(0) - self.sizes
        blocks = torch.tensor([part.absmax.numel() for part in parts])
        self.first_blocks = blocks.cumsum(0) - blocks
        self.codes = torch.cat([part.codes.reshape(-1) for part in parts])
        self.absmax = torch.cat([part.absmax for part in parts])
        self._values: Tensor | None = None

    def take(self, places: Tensor) -> tuple[Moment, bool]:
        """The elements at ``places``, and whether they are exactly what they were."""
        if places.numel() < SMALLEST:
            return self.values[places], True
        flat = places.reshape(-1)
        heads = flat[::BLOCK]
        part = torch.searchsorted(self.starts, heads, right=True) - 1
        offset = heads - self.starts[part]
        whole = (heads[:, None] + torch.arange(BLOCK)).reshape(-1)[: flat.numel()]
        # A block that runs beyond the end of its part would go on in the next one.
        if (
            bool((offset % BLOCK == 0).all())
            and torch.equal(whole, flat)
            and bool((torch.searchsorted(self.starts, whole, right=True) - 1).eq(_spread(part, flat.numel())).all())
        ):
            absmax = self.absmax[self.first_blocks[part] + offset // BLOCK]
            return Blockwise(self.codes[places], absmax, self.qmap), True
        return self._quantize(self.values[places]), False

    @property
    def values(self) -> Tensor:
        if self._values is None:
            self._values = torch.cat([part.dequantize().reshape(-1) for part in self.parts])
        return self._values

    def _quantize(self, values: Tensor) -> Blockwise:
        from bitsandbytes.functional import quantize_blockwise

        codes, state = quantize_blockwise(values.reshape(-1), code=self.qmap, blocksize=BLOCK)
        return Blockwise(codes.view(values.shape), state.absmax, self.qmap)


def _spread(blocks: Tensor, count: int) -> Tensor:
    """A value for each element, from one for each block."""
    return blocks.repeat_interleave(BLOCK)[:count]
