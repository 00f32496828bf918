"""A kernel with all its constants bound, launched with as little host work as Triton allows.

``kernel[grid](...)`` analyses every argument on every call: some 50 µs for these kernels on the host of an H100, twice
what a small layer's GEMM takes there. But the calls of one layer differ in their pointers alone, so a ``Plan`` keeps the
compiled kernel of its first call and launches that. What Triton specialises on is fixed by construction: sizes and
strides are constants of the plan, kernels are kept by the dtypes of their tensors, the remaining integers are not
specialised, and a call with a pointer that is not 16-byte aligned takes the ordinary way.

A descriptor costs another 20 µs: Triton encodes its tensor map in every launch. Weights stay where they are and the caching
allocator gives activations the same few addresses again, so the maps are kept.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
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


class View(NamedTuple):
    """A tensor's memory from an element on, as a kernel's argument: torch takes 5 µs to make a slice of it.

    Attributes:
        base: the tensor.
        first: the element, counted in memory, in elements of ``base``.
        dtype: that the memory is read as.
    """

    base: Tensor
    first: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.base.data_ptr() + self.first * self.base.itemsize

    def checked(self) -> Tensor:
        """As a tensor, of whose shape kernels know nothing."""
        size = self.dtype.itemsize // self.base.itemsize
        return self.base.as_strided((size,), (1,), self.base.storage_offset() + self.first).view(self.dtype)


_POINTERS = (Tensor, View)
# AMD GPUs, where Triton also specialises on whether a tensor's storage fits 32-bit offsets.
_AMD = torch.version.hip is not None


def _front_door() -> bool:
    """Whether launches must go through Triton's front door: somebody, a profiler say, listens to them."""
    hook = knobs.runtime.launch_enter_hook
    return _AMD or bool(getattr(hook, "calls", hook))  # a chain of hooks, or in older Tritons a hook or None


# Where the arguments of the compiled launcher are known to be as below.
_KNOWN_LAUNCHER = triton.__version__.startswith("3.6.")
# Whether plans only compile, see ``compiling_only``.
_compiling_only = False
# Tensor maps a compiled kernel keeps, of 128 bytes each.
_MAX_TENSOR_MAPS = 256


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Plans that were never launched compile within the block, and launch nothing; for who measures.

    Under Triton's ``AsyncCompileMode`` they do so side by side.
    """
    global _compiling_only  # noqa: PLW0603 - read by every plan
    _compiling_only = True
    try:
        yield
    finally:
        _compiling_only = False


class _Compiled:
    """A compiled kernel, launched without what Triton does again in every launch."""

    __slots__ = ("_descriptors", "_encode", "_fixed", "_launch", "_maps", "kernel")

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._launch: Callable[..., None] | None = None
        self._maps: dict[tuple[Any, ...], list[Any]] = {}
        run = kernel.run
        if not _KNOWN_LAUNCHER or torch.version.cuda is None or run.global_scratch_size or run.profile_scratch_size:
            return
        from triton.backends.nvidia.driver import make_tensordesc_arg

        launch, self._encode, self._descriptors = run.launch, make_tensordesc_arg, []
        if inspect.isfunction(launch):  # Triton's expansion of the descriptors, around the launcher
            captured = inspect.getclosurevars(launch).nonlocals
            launch, self._descriptors = captured["launcher"], captured["tensordesc_meta"]
        self._fixed = (
            run.launch_cooperative_grid,
            run.launch_pdl,
            None,
            None,
            kernel.packed_metadata,
            None,
            None,
            None,
        )
        if None not in self._descriptors:
            self._launch = launch

    def __call__(self, grid: tuple[int, int, int], stream: int, values: list[Any], constants: tuple[Any, ...]) -> None:
        kernel, launch = self.kernel, self._launch
        if launch is None:
            kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *values, *constants)
            return
        if self._descriptors:
            values = self._expanded(values)
        launch(*grid, stream, kernel.function, *self._fixed, *values, *constants)

    def _expanded(self, values: list[Any]) -> list[Any]:
        """``values`` with each descriptor's tensor map, shape and strides in its place."""
        expanded: list[Any] = []
        metadata = iter(self._descriptors)
        for value in values:
            if type(value) is not Descriptor:
                expanded.append(value)
                continue
            own = next(metadata)
            # The kernel's blocks are constants of its own, so of a descriptor only this can differ.
            key = (id(own), value.base.data_ptr(), value.shape, value.strides)
            arguments = self._maps.get(key)
            if arguments is None:
                if len(self._maps) >= _MAX_TENSOR_MAPS:
                    self._maps.clear()
                arguments = self._maps[key] = self._encode(value, own)
            expanded += arguments
        return expanded


class Plan:
    """One kernel, its constants and launch options.

    Args:
        kernel: its parameters are the arguments of a call, then the constants.
        constants: values of the kernel's ``tl.constexpr`` parameters, by name.
        num_warps, num_stages: of Triton.
        fp_fusion: additions may take products unrounded.
    """

    __slots__ = ("_compiled", "constants", "kernel", "options")

    def __init__(
        self,
        kernel: JITFunction,
        constants: dict[str, Any],
        num_warps: int = 4,
        num_stages: int = 3,
        fp_fusion: bool = True,
    ) -> None:
        names = kernel.arg_names[-len(constants) :]
        if set(constants) != set(names):
            raise AssertionError(f"{kernel} takes the constants {names}, not {list(constants)}")
        self.kernel = kernel
        self.constants = tuple(constants[name] for name in names)
        self.options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if not fp_fusion:
            self.options["enable_fp_fusion"] = False
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}

    def __call__(self, device: torch.device, grid: tuple[int, int, int], *args: Any) -> None:
        """Launches on ``device``, which need not be the current one, with ``args`` before the constants."""
        index: int | None = device.index  # None on the CPU
        if index is not None and index != driver.active.get_current_device():
            with torch.get_device_module(device).device(index):
                self(device, grid, *args)
            return
        # Addresses instead of tensors: the launcher asks a tensor for its address, and the driver about that.
        values: list[Any] = []
        key: list[Any] = [index]
        pointers = 0
        for arg in args:
            if isinstance(arg, _POINTERS):
                address = arg.data_ptr()
                pointers |= address
                values.append(address)
                key.append(arg.dtype)
            else:
                values.append(arg)
        compiled = self._compiled.get(tuple(key))
        if compiled is None or pointers & 15 or _front_door():
            # What it compiled for aligned pointers is kept. The interpreter compiles nothing.
            checked = [arg.checked() if isinstance(arg, Descriptor | View) else arg for arg in args]
            if _compiling_only:
                self.kernel.warmup(*checked, *self.constants, grid=grid, **self.options)
                return
            kernel = self.kernel[grid](*checked, *self.constants, **self.options)
            if pointers & 15 == 0 and kernel is not None:
                self._compiled[tuple(key)] = _Compiled(kernel)
            return
        compiled(grid, driver.active.get_current_stream(index), values, self.constants)
