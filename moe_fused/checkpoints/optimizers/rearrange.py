"""Moves the elements of parameters' moments to where they are in the parameters of another layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .state import BLOCK, FIRST_MOMENTS, SMALLEST, Blockwise, Moment, ParameterState, Shape

Load = Callable[[str], Tensor]
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Unit:
    """Parameters that become others, with the same elements in another order.

    Attributes:
        sources: shapes by name.
        rearrange: gives the others by name, from a function that gives the sources by name: for each element of these
            its number, int64.
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
    found = next(((name, state) for name in unit.sources if (state := states[name]) is not None), None)
    if found is None:
        return None
    key, first = found
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


def aligned(
    unit: Unit, states: Mapping[str, ParameterState | None], betas: tuple[float, float]
) -> tuple[dict[str, ParameterState | None], list[str]]:
    """The states as if all had been updated as often as the one that was most often, and the names of those changed.

    Adam divides its moments by ``1 - beta ** step``. They are scaled so that this gives what it gave before; those of
    parameters that were not updated yet are zero.

    Args:
        states: of the sources of ``unit``.
        betas: of the optimizer, for the moments and those of the squares.
    """
    present = [state for name in unit.sources if (state := states[name]) is not None]
    if not present:
        return dict(states), []
    last = max(present, key=lambda state: float(state.step))
    result, changed = dict(states), []
    for name, shape in unit.sources.items():
        state = states[name]
        if state is not None and (float(state.step) == float(last.step) or _kind(state) != _kind(last)):
            continue  # the latter cannot become one anyway
        changed.append(name)
        factors = (0.0, 0.0)
        if state is not None and float(state.step):
            factors = (_correction(betas[0], last, state), _correction(betas[1], last, state))
        moments = {}
        for key, example in last.moments.items():
            own = _zeros(example, shape) if state is None else state.moments[key]
            factor = factors[key not in FIRST_MOMENTS]
            scaled = own._replace(absmax=own.absmax * factor) if isinstance(own, Blockwise) else own * factor
            moments[key] = scaled
        result[name] = replace(last, moments=moments)
    return result, changed


def _correction(beta: float, last: ParameterState, state: ParameterState) -> float:
    return (1 - beta ** float(last.step)) / (1 - beta ** float(state.step))


def _zeros(like: Moment, shape: Shape) -> Moment:
    if not isinstance(like, Blockwise):
        return torch.zeros(shape, dtype=like.dtype)
    blocks = -(-torch.Size(shape).numel() // BLOCK)
    return Blockwise(torch.zeros(shape, dtype=torch.uint8), torch.zeros(blocks), like.qmap)


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
        blocks = self._blocks(places.reshape(-1))
        if blocks is None:
            return self._quantize(self.values[places]), False
        return Blockwise(self.codes[places], self.absmax[blocks], self.qmap), True

    def _blocks(self, places: Tensor) -> Tensor | None:
        """The blocks that ``places`` consist of; None if they have other elements, or in another order."""
        result = []
        for chunk in places.split(_CHUNK):
            heads = chunk[::BLOCK].contiguous()
            part = torch.searchsorted(self.starts, heads, right=True) - 1
            offset = heads - self.starts[part]
            if (offset % BLOCK).any():
                return None
            if not torch.equal((heads[:, None] + torch.arange(BLOCK)).reshape(-1)[: len(chunk)], chunk):
                return None
            # The last block of a part may be short, and what follows is of the next.
            ends = torch.clamp(torch.arange(1, len(heads) + 1) * BLOCK, max=len(chunk))
            if (offset + ends - torch.arange(len(heads)) * BLOCK > self.sizes[part]).any():
                return None
            result.append(self.first_blocks[part] + offset // BLOCK)
        return torch.cat(result)

    @property
    def values(self) -> Tensor:
        if self._values is None:
            self._values = torch.cat([part.dequantize().reshape(-1) for part in self.parts])
        return self._values

    def _quantize(self, values: Tensor) -> Blockwise:
        from bitsandbytes.functional import quantize_blockwise

        codes, state = quantize_blockwise(values.reshape(-1), code=self.qmap, blocksize=BLOCK)
        return Blockwise(codes.view(values.shape), state.absmax, self.qmap)
