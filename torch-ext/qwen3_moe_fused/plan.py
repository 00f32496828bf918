"""A kernel with all its constants bound, launched with as little host work as Triton allows.

``kernel[grid](...)`` analyses every argument on every call: some 50 µs for these kernels on the host of an H100, twice
what a small layer's GEMM takes there. But the calls of one layer differ in their pointers alone, so a ``Plan`` keeps the
compiled kernel of its first call and launches that. What Triton specialises on is fixed by construction: sizes and
strides are constants of the plan, kernels are kept by the dtypes of their tensors, the remaining integers are not
specialised, and a call with a pointer that is not 16-byte aligned takes the ordinary way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor


class Descriptor(NamedTuple):
    """The fields of a ``TensorDescriptor``, without the checks of each field, which take longer than a launch's share.

    Attributes:
        base: 16-byte aligned tensor.
        shape, strides: of the matrix in it, in elements; rows 16-byte aligned, columns contiguous.
        block_shape: of the tiles read through it.
    """

    base: Tensor
    shape: tuple[int, int]
    strides: tuple[int, int]
    block_shape: tuple[int, int]
    padding: str = "zero"

    def checked(self) -> TensorDescriptor:
        """What Triton compiles for."""
        return TensorDescriptor(self.base, list(self.shape), list(self.strides), list(self.block_shape), self.padding)


def _front_door() -> bool:
    """Whether launches must go through Triton's front door.

    When somebody, a profiler say, listens to them; and on AMD GPUs, where Triton also specialises on whether a tensor's
    storage fits 32-bit offsets.
    """
    if torch.version.hip is not None:
        return True
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))  # a chain of hooks, or in older Tritons a hook or None


class Plan:
    """One kernel, its constants and launch options.

    Args:
        kernel: its parameters are the arguments of a call, then the constants.
        constants: values of the kernel's ``tl.constexpr`` parameters, by name.
        num_warps, num_stages: of Triton.
    """

    __slots__ = ("_compiled", "constants", "kernel", "num_stages", "num_warps")

    def __init__(self, kernel: JITFunction, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 3) -> None:
        names = kernel.arg_names[-len(constants) :]
        if set(constants) != set(names):
            raise AssertionError(f"{kernel} takes the constants {names}, not {list(constants)}")
        self.kernel = kernel
        self.constants = tuple(constants[name] for name in names)
        self.num_warps = num_warps
        self.num_stages = num_stages
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, device: int, grid: tuple[int, int, int], *args: Any) -> None:
        """Launches on the current device, whose index is ``device``, with ``args`` before the constants."""
        # Addresses instead of tensors: the launcher asks a tensor for its address, and the driver about that.
        values: list[Any] = []
        key: list[Any] = [device]
        pointers = 0
        for arg in args:
            if isinstance(arg, Tensor):
                address = arg.data_ptr()
                pointers |= address
                values.append(address)
                key.append(arg.dtype)
            else:
                values.append(arg)
        compiled = self._compiled.get(tuple(key))
        if compiled is None or pointers & 15 or _front_door():
            # What it compiled for aligned pointers is kept. The interpreter compiles nothing.
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            checked = [arg.checked() if isinstance(arg, Descriptor) else arg for arg in args]
            compiled = self.kernel[grid](*checked, *self.constants, **options)
            if pointers & 15 == 0 and compiled is not None:
                self._compiled[tuple(key)] = compiled
            return
        stream = driver.active.get_current_stream(device)
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *self.constants
        )
