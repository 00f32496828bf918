"""Steps of bitsandbytes' 8-bit AdamW over many parameters in one launch, with bitsandbytes' states.

bitsandbytes launches a kernel for each parameter. On an H200, in the rows of ``finetune_30b`` for four models, the kernels
of a step take 3.5 µs for each tensor and 27 ps for each element, within 0.5 %. For Qwen3-30B-A3B, with 576 tensors and 328
million elements, this is 10.9 ms, of which 8.9 ms are of the elements. An element in bf16 is 10 bytes to read and write,
0.8 ms in all at the 4.2 TB/s of a copy. bitsandbytes' kernel is bound by its instructions: a thread has one element, for
which the compiled kernel (0.50.2, CUDA 13, sm_90) has some 500 instructions, 14 barriers and two binary searches in shared
memory. So fewer calls of it would save 2.0 ms at most.

``adamw_device.adamw_kernel`` computes the same on the same states: codes in uint8, the code books ``qmap1`` and ``qmap2``,
and a maximum in fp32 for each block of 256 elements. A table holds the addresses of all tensors, so nothing is copied or
moved, and one launch updates all parameters of a group. Compiled for sm_90 (Triton 3.6, bf16), a thread has 16 elements and
67 instructions for each: 60 for the element itself, and 7 as its share of what a thread does once. A thread has 74
registers and no spills.

**What a step would take.** These are estimates, nobody has measured the kernel. At 1.75 GHz an H200 makes an instruction for
each of 328 million elements in 11 µs, so 67 take 0.75 ms. Half of them go through a pipe that takes two clocks for a warp,
which is 0.75 ms as well. Reading different words of shared memory takes a warp some 3.5 clocks, because of conflicts of
banks, four times for each element: 0.6 ms. With the 0.8 ms of the bytes, a step takes 0.8 ms if all this overlaps, and 2.2
ms if nothing does.

**How numbers become codes, and codes numbers.** The numbers of instructions are for an element of one state on sm_90. Those
of what the kernel does were counted in its compiled code, the others are estimates.

- Decode by a table in shared memory: 3, and a load of shared memory. The kernel does this.
- Decode by arithmetic, with a linear function for each of the 7 powers of ten: some 9, without a load. It was not taken
  because it does not give the same bits: the values of the code books were rounded several times when they were made.
- Encode by a table whose index is the number itself, that is its exponent and the highest bits of its fraction (``Book``):
  8, and a load of shared memory. It is exact for every number in fp32. The kernel does this. The tables are 12 KiB, which
  a program copies to shared memory for its 4096 elements.
- Encode by arithmetic: the code is the smallest value of 7 linear functions, which takes 13. It must then be compared with
  the exact border, which takes 4, and a load.
- Encode by a binary search: 8 loads that wait for each other, and some 32.
- All tables in global memory: nothing is copied, but the L1 cache serves one line at a time. A warp reads up to 8 lines of
  a code book, and more of the larger tables.

**What differs from bitsandbytes' kernel**, beside roundings:

- Weights decay before they are updated, and are rounded once. bitsandbytes' kernel rounds an updated weight, multiplies it,
  and rounds it again. In bf16 this loses each decay of less than 2⁻⁹.
- A first moment that is nearest to 0 becomes 0. bitsandbytes' kernel takes the smallest negative value if it is negative.
- A block whose largest moment is below 2⁻¹²⁶ becomes zeros.

bitsandbytes' implementation for CPUs differs from both. It rounds moments to multiples of 2⁻¹⁵ of a block's largest before
it looks for the nearest code, and a gradient that is not finite spoils its block.

**Paged states** are prefetched before each step, as bitsandbytes does it, although the kernel could read them without. To
ask CUDA where each of them is would take as many calls as the prefetches do.
"""

from __future__ import annotations

import contextlib
import functools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from moe_fused.memory import STATE_BLOCK

from . import adamw_device as device_code

# How many blocks of state a program updates, and with how many warps.
BLOCKS, WARPS = 16, 8
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# What addresses and numbers of elements must be multiples of.
_ALIGNMENT, _ELEMENTS = 16, 8
# With a smaller epsilon, the inverse of a denominator may be too large for fp32.
_SMALLEST_EPS = 1e-30


def runs_on(device: torch.device) -> bool:
    """Whether the kernel runs on a device: on a GPU of NVIDIA or AMD, and on a CPU in Triton's interpreter."""
    return device.type == "cuda" or (device.type == "cpu" and bool(triton.knobs.runtime.interpret))


class Together:
    """The parameters of an optimizer that the kernel updates.

    They have 8-bit states of AdamW, as bitsandbytes makes them. All others stay with bitsandbytes: those with 32-bit states,
    with a configuration of their own or with other code books, and tensors that are not contiguous, that do not begin at a
    multiple of 16 bytes, or whose number of elements is not a multiple of 8.

    Args:
        optimizer: An optimizer of bitsandbytes, whose parameters have their states.
    """

    def __init__(self, optimizer: Any) -> None:
        self._states = optimizer.state
        self._numbers = _numbers(optimizer)
        found: dict[tuple[int, torch.device, torch.dtype], list[nn.Parameter]] = {}
        known: dict[int, bool] = {}
        options, manager = optimizer.args, optimizer.mng
        if optimizer.optimizer_name == "adam" and options.max_unorm == 0 and not options.skip_zeros:
            for group_index, group in enumerate(optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    is_special = id(parameter) in manager.pid2config or (group_index, index) in manager.index2config
                    if not is_special and _is_served(parameter, self._states.get(parameter, {}), known):
                        found.setdefault((group_index, parameter.device, parameter.dtype), []).append(parameter)
        self._launches = [_Launch(key[0], parameters, self._states) for key, parameters in found.items()]

    def is_current(self, optimizer: Any) -> bool:
        """Whether parameters and states are those that were found, at the same addresses."""
        is_same = optimizer.state is self._states and _numbers(optimizer) == self._numbers
        return is_same and all(launch.is_current() for launch in self._launches)

    def step(self, optimizer: Any) -> set[int]:
        """Queues the update of the parameters that have a gradient, and returns their ids."""
        return {each for launch in self._launches for each in launch.step(optimizer)}


def _numbers(optimizer: Any) -> tuple[int, ...]:
    """Returns how many parameters each group has, and how many parameters have a configuration of their own."""
    manager = optimizer.mng
    return (
        *(len(group["params"]) for group in optimizer.param_groups),
        len(manager.pid2config),
        len(manager.index2config),
    )


def _is_served(parameter: nn.Parameter, state: Mapping[str, Any], known: dict[int, bool]) -> bool:
    """Whether the kernel can update a parameter.

    Args:
        parameter: The parameter.
        state: Its state.
        known: For the address of a code book, whether it is the kernel's. Code books that are not in it are compared and
            added.
    """
    if not runs_on(parameter.device) or parameter.dtype not in _DTYPES or parameter.numel() % _ELEMENTS:
        return False
    blocks = -(-parameter.numel() // STATE_BLOCK)
    sizes = {"state1": parameter.numel(), "state2": parameter.numel(), "absmax1": blocks, "absmax2": blocks}
    for name, numel in sizes.items():
        dtype = torch.uint8 if name.startswith("state") else torch.float32
        value = state.get(name)
        if value is None or (value.dtype, value.numel()) != (dtype, numel) or not _is_reached(value, parameter.device):
            return False
    for name in ("qmap1", "qmap2"):
        codes = state[name]
        if codes.data_ptr() not in known:
            book = _books(parameter.device)[name]
            known[codes.data_ptr()] = codes.device == book.values.device and torch.equal(codes, book.values)
        if not known[codes.data_ptr()]:
            return False
    return _is_reached(parameter, parameter.device)


def _is_reached(value: Tensor, device: torch.device) -> bool:
    """Whether the kernel can go from a tensor's address. Paged memory counts as the CPU's, but is the GPU's as well."""
    is_there = value.device == device or bool(getattr(value, "is_paged", False))
    return is_there and value.numel() > 0 and value.is_contiguous() and value.data_ptr() % _ALIGNMENT == 0


class _Launch:
    """Parameters of one group, device and dtype, in the rows of a table on the device.

    Args:
        group_index: The number of their group.
        parameters: The parameters.
        states: The states of all parameters.
    """

    def __init__(
        self, group_index: int, parameters: Sequence[nn.Parameter], states: Mapping[nn.Parameter, dict[str, Any]]
    ) -> None:
        self._group_index, self._parameters = group_index, parameters
        self._states = [states[parameter] for parameter in parameters]
        self._device, self._dtype = parameters[0].device, parameters[0].dtype
        self._addresses = [parameter.data_ptr() for parameter in parameters]
        numels = [parameter.numel() for parameter in parameters]
        names = ("state1", "state2", "absmax1", "absmax2")
        rows = [
            [address, *(state[name].data_ptr() for name in names), numel]
            for address, state, numel in zip(self._addresses, self._states, numels, strict=True)
        ]
        self._rows = torch.tensor(rows, dtype=torch.int64).to(self._device)
        self._programs = _programs(numels).to(self._device)
        self._gradients = torch.zeros(len(parameters), dtype=torch.int64, device=self._device)
        self._uploaded = [0] * len(parameters)

    def is_current(self) -> bool:
        """Whether the parameters are where they were."""
        return [parameter.data_ptr() for parameter in self._parameters] == self._addresses

    def step(self, optimizer: Any) -> list[int]:
        """Queues the update of the parameters that have a gradient, and returns their ids."""
        group, updated = optimizer.param_groups[self._group_index], []
        if group["eps"] < _SMALLEST_EPS:
            return []
        # A parameter that had no gradient once is a step behind the others, and needs another correction of the bias.
        addresses: dict[int, list[int]] = {}
        for index, (parameter, state) in enumerate(zip(self._parameters, self._states, strict=True)):
            gradient = parameter.grad
            if gradient is None or gradient.dtype != self._dtype:
                continue
            if gradient.data_ptr() % _ALIGNMENT or not gradient.is_contiguous():
                parameter.grad = gradient = gradient.clone(memory_format=torch.contiguous_format)
            optimizer.prefetch_state(parameter)
            state["step"] += 1
            addresses.setdefault(state["step"], [0] * len(self._parameters))[index] = gradient.data_ptr()
            updated.append(id(parameter))
        for step, of_gradients in addresses.items():
            self._queue(group, step, of_gradients)
        return updated

    def _queue(self, group: Mapping[str, Any], step: int, gradients: list[int]) -> None:
        """Queues the update of the parameters whose gradients have an address other than 0."""
        if gradients != self._uploaded:
            # torch keeps pinned memory until the copy from it is done.
            pinned = torch.tensor(gradients, dtype=torch.int64, pin_memory=self._device.type == "cuda")
            self._gradients.copy_(pinned, non_blocking=True)
            self._uploaded = gradients
        book1, book2 = _books(self._device).values()
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            device_code.adamw_kernel[(len(self._programs),)](
                self._rows, self._gradients, self._programs, book1.values, book2.values, book1.entries, book2.entries,
                *_scalars(group, step), DTYPE=_DTYPES[self._dtype], BLOCKS=BLOCKS, num_warps=WARPS,
            )  # fmt: skip


def _programs(numels: Sequence[int]) -> Tensor:
    """Returns the row and the first block of each program, (P, 2) int32."""
    counts = torch.tensor([-(-numel // (BLOCKS * STATE_BLOCK)) for numel in numels])
    rows = torch.arange(len(numels)).repeat_interleave(counts)
    first = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    return torch.stack([rows, first * BLOCKS], 1).to(torch.int32)


def _scalars(group: Mapping[str, Any], step: int) -> tuple[float, ...]:
    """Returns the numbers that the kernel takes: decay, size, eps, beta1, rest1, beta2 and rest2.

    The betas are rounded to fp32 first, as by bitsandbytes' kernel, so that the weights of all gradients add up to 1.
    """
    beta1, beta2 = (struct.unpack("f", struct.pack("f", beta))[0] for beta in group["betas"][:2])
    correction = math.sqrt(1 - beta2**step)
    size, decay = group["lr"] * correction / (1 - beta1**step), 1 - group["lr"] * group["weight_decay"]
    # Triton would take whole numbers for integers.
    return float(decay), float(size), group["eps"] * correction, beta1, 1 - beta1, beta2, 1 - beta2


class Book(NamedTuple):
    """One of bitsandbytes' dynamic code books, and the table by which the nearest code of a number is found.

    A number x from 0 to 1 has the place ``bits(max(x, lowest)) + bits(max(x, 0.5))``, where ``bits`` are those of fp32 as an
    integer. Places are in the order of numbers. They are dense where codes are dense, in the upper half: some 2⁵ or 2⁶ equal
    parts for each power of two, and twice as many above 0.5. Each such part, ``place >> shift``, holds at most one border
    between two codes. Its entry is added to ``place << (24 - shift)``, and the highest byte of the sum is the code.
    Places above the border of their part carry one into that byte.

    Attributes:
        values: The values of the codes, (256,) fp32.
        entries: The entries of the parts, int32.
    """

    values: Tensor
    entries: Tensor


@functools.cache
def _books(device: torch.device) -> dict[str, Book]:
    """Returns the code books on a device, by their names in a state. That of the first moment has signs."""
    from bitsandbytes.functional import create_dynamic_map

    code1, code2 = (create_dynamic_map(signed=signed) for signed in (True, False))
    c = device_code
    entries1 = entries_of(code1, 127, c.SHIFT1.value, c.LOWEST1.value, c.FIRST1.value, c.ENTRIES1.value)
    entries2 = entries_of(code2, 0, c.SHIFT2.value, c.LOWEST2.value, c.FIRST2.value, c.ENTRIES2.value)
    return {"qmap1": Book(code1.to(device), entries1.to(device)), "qmap2": Book(code2.to(device), entries2.to(device))}


def entries_of(values: Tensor, zero: int, shift: int, lowest: float, first: int, size: int) -> Tensor:
    """Returns the entries of a code book's table, (size,) int32.

    The border between two codes is the mean of their values, in fp32. As in bitsandbytes' kernel, a number on the border has
    the code that is even.

    Args:
        values: The values of the codes, (256,) fp32, in ascending order.
        zero: The code of 0.
        shift: How far a place is shifted to be the number of a part.
        lowest: The smallest number that has a place of its own.
        first: The number of the part of ``lowest``.
        size: The number of entries.

    Raises:
        ValueError: a part would hold two borders.
    """
    borders = (values[zero:-1] + values[zero + 1 :]) * 0.5
    codes = torch.arange(zero, len(values) - 1)
    # The smallest number that has the higher code.
    above = (borders.view(torch.int32) + (codes % 2 == 0).to(torch.int32)).view(torch.float32)
    places = _bits(above.clamp(min=lowest)) + _bits(above.clamp(min=0.5))
    parts = (places >> shift) - first
    if len(parts.unique()) < len(parts) or parts.min() < 0 or parts.max() >= size:
        raise ValueError(
            "this version of bitsandbytes has other code books than the kernel for its 8-bit AdamW can search: "
            "leave MOE_FUSED_ADAMW=1 out"
        )
    numbers = torch.arange(size)
    entries = (zero + torch.searchsorted(parts, numbers) - numbers - first) << 24
    entries[parts] += (1 << 24) - ((places % 2**shift) << (24 - shift))
    return ((entries + 2**31) % 2**32 - 2**31).to(torch.int32)


def _bits(numbers: Tensor) -> Tensor:
    """Returns the bits of fp32 numbers as int64."""
    return numbers.view(torch.int32).to(torch.int64)
