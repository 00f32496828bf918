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
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction


def _hooked() -> bool:
    """Whether somebody, a profiler say, listens to Triton's launches."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))  # a chain of hooks, or in older Tritons a hook or None


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
        compiled = self._compiled.get(device)
        if compiled is None or _hooked():
            self._launch(device, grid, args)
            return
        # Addresses instead of tensors: the launcher asks a tensor for its address, and the driver about that.
        values: list[Any] = []
        pointers = 0
        for arg in args:
            if isinstance(arg, Tensor):
                arg = arg.data_ptr()  # noqa: PLW2901
                pointers |= arg
            values.append(arg)
        if pointers & 15:
            self._launch(device, grid, args)
            return
        stream = driver.active.get_current_stream(device)
        compiled.run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *self.constants
        )

    def _launch(self, device: int, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        """Launches through Triton's front door, and keeps the kernel if it is the one for aligned pointers."""
        compiled = self.kernel[grid](*args, *self.constants, num_warps=self.num_warps, num_stages=self.num_stages)
        aligned = all(arg.data_ptr() % 16 == 0 for arg in args if isinstance(arg, Tensor))
        if aligned and compiled is not None:  # the interpreter compiles nothing
            self._compiled[device] = compiled
