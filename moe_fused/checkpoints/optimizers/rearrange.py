"""Moves the elements of moments to the positions that they have in another layout of the parameters."""

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
    """Parameters that become other parameters, with the same elements in another order.

    Attributes:
        sources: the shapes of the parameters by name.
        rearrange: returns the other parameters by name. Its argument is a function that returns a source by name, with the
            number of each element (int64) as its value.
    """

    sources: Mapping[str, Shape]
    rearrange: Callable[[Load], Iterable[tuple[str, Tensor]]]

    def index(self) -> dict[str, Tensor]:
        """Returns, for each of the other parameters, the positions of its elements in the concatenated sources."""
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
    """Makes the states of the parameters that ``unit`` makes.

    Args:
        states: the states of all sources; None for parameters that were not updated yet.

    Returns:
        The states, and the names of the parameters whose 8-bit moments were quantized again.

    Raises:
        ValueError: states that become one differ in the number of steps or in their kind.
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
            for name, positions in index.items():
                moments[name][key] = flat[positions]
            continue
        whole = _Blocks(unit.sources, key, quantized)
        for name, positions in index.items():
            moments[name][key], kept = whole.take(positions)
            if not kept:
                again.add(name)
    result: dict[str, ParameterState | None] = {}
    for name, moved in moments.items():
        # Each gets a copy of the step, because torch counts steps in place.
        step = first.step.clone() if isinstance(first.step, Tensor) else first.step
        result[name] = replace(first, step=step, moments=moved)
    return result, sorted(again)


def _agreed(unit: Unit, states: Mapping[str, ParameterState | None]) -> ParameterState | None:
    """Returns the state of one source, after checking that the others differ in the values of their moments only."""
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
    """Brings all states to the largest number of steps among them.

    Adam divides its moments by ``1 - beta ** step``. The moments are scaled so that the quotient stays the same. The moments
    of parameters that were not updated yet are zero.

    Args:
        states: the states of the sources of ``unit``.
        betas: the optimizer's, for the first and the second moments.

    Returns:
        The states, and the names of the parameters whose states were changed.
    """
    present = [state for name in unit.sources if (state := states[name]) is not None]
    if not present:
        return dict(states), []
    last = max(present, key=lambda state: float(state.step))
    result, changed = dict(states), []
    for name, shape in unit.sources.items():
        state = states[name]
        if state is not None and (float(state.step) == float(last.step) or _kind(state) != _kind(last)):
            continue  # states of another kind are refused later
        changed.append(name)
        factors = (0.0, 0.0)
        if state is not None and float(state.step):
            factors = (_correction(betas[0], last, state), _correction(betas[1], last, state))
        moments = {}
        for key, example in last.moments.items():
            moment = _zeros(example, shape) if state is None else state.moments[key]
            factor = factors[key not in FIRST_MOMENTS]
            scaled = (
                moment._replace(absmax=moment.absmax * factor) if isinstance(moment, Blockwise) else moment * factor
            )
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
    """The concatenated 8-bit moments of some parameters.

    Raises:
        ValueError: their code books differ.
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

    def take(self, positions: Tensor) -> tuple[Moment, bool]:
        """Returns the elements at ``positions``, and whether their values are exactly the same."""
        if positions.numel() < SMALLEST:
            return self.values[positions], True
        blocks = self._blocks(positions.reshape(-1))
        if blocks is None:
            return self._quantize(self.values[positions]), False
        return Blockwise(self.codes[positions], self.absmax[blocks], self.qmap), True

    def _blocks(self, positions: Tensor) -> Tensor | None:
        """Returns the blocks that ``positions`` consists of, or None if it does not consist of whole blocks in order."""
        result = []
        for chunk in positions.split(_CHUNK):
            heads = chunk[::BLOCK].contiguous()
            part = torch.searchsorted(self.starts, heads, right=True) - 1
            offset = heads - self.starts[part]
            if (offset % BLOCK).any():
                return None
            if not torch.equal((heads[:, None] + torch.arange(BLOCK)).reshape(-1)[: len(chunk)], chunk):
                return None
            # The last block of a part may be short, and the elements after it belong to the next part.
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
