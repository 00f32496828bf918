"""A kernel with all its constants bound, launched with as little host work as Triton allows.

``kernel[grid](...)`` analyses every argument on every call: some 50 µs for these kernels on the host of an H100, twice what a
small layer's GEMM takes there. But the calls of one layer differ in their pointers alone, so a ``Plan`` keeps the compiled
kernel of its first call and launches that. What Triton specialises on is fixed by construction: sizes and strides are
constants of the plan, the remaining integers are not specialised, and a call with a pointer that is not 16-byte aligned takes
the ordinary way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.runtime.jit import JITFunction


class Plan:
    """One kernel, its constants and launch options.

    Args:
        kernel: its parameters are the arguments of a call, then the constants.
        constants: values of the kernel's ``tl.constexpr`` parameters, in order.
        num_warps, num_stages: of Triton.
    """

    __slots__ = ("_compiled", "constants", "kernel", "num_stages", "num_warps")

    def __init__(self, kernel: JITFunction, constants: dict[str, Any], num_warps: int = 4, num_stages: int = 3) -> None:
        names = kernel.arg_names[-len(constants) :]
        if list(constants) != names:
            raise AssertionError(f"{kernel} takes the constants {names}, not {list(constants)}")
        self.kernel = kernel
        self.constants = tuple(constants.values())
        self.num_warps = num_warps
        self.num_stages = num_stages
        self._compiled: dict[int, Any] = {}

    def __call__(self, device: int, grid: tuple[int, int, int], *args: Any) -> None:
        """Launches on the current device, whose index is ``device``, with ``args`` before the constants."""
        pointers = 0
        for arg in args:
            if isinstance(arg, Tensor):
                pointers |= arg.data_ptr()
        if pointers & 15 == 0:
            compiled = self._compiled.get(device)
            if compiled is not None:
                compiled[grid](*args, *self.constants)
                return
        compiled = self.kernel[grid](*args, *self.constants, num_warps=self.num_warps, num_stages=self.num_stages)
        if pointers & 15 == 0 and compiled is not None:  # the interpreter compiles nothing
            self._compiled[device] = compiled
