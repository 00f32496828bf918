"""Triton's interpreter without its faults, and without work that it does again for each operation.

The faults are of single versions and of the interpreter alone: on a GPU the same code is right. The work is a quarter of the
time with Triton 3.6, of which the functions that ``make_faster`` replaces are internals; with another version they stay.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def _patches_once() -> None:
    """Modules of the language are made to interpret at a launch, and not again at each call of a device function."""
    patch = interpreter._patch_lang
    patched: set[str] = set()  # while a launch runs

    @functools.cache
    def languages(fn: FunctionType) -> frozenset[str]:
        modules = [value for value in fn.__globals__.values() if isinstance(value, ModuleType)]
        return frozenset(module.__name__ for module in modules if module in (tl, tl.core))

    def patch_once(fn: FunctionType) -> Any:
        if patched and languages(fn) <= patched:
            return None  # a device function's, which nobody restores
        is_launch = not patched
        scope = patch(fn)
        patched.update(languages(fn))
        if is_launch:
            restore = scope.restore

            def restore_all() -> None:
                patched.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_once


def _names_dtypes_once() -> None:
    """numpy's dtype for one of the language, which each operation asks for, comes from a table that is made once."""
    look_up = interpreter._get_np_dtype
    of_scalar = functools.cache(look_up)

    def of_type(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return look_up(element) if isinstance(element, tl.pointer_type) else of_scalar(element)

    interpreter._get_np_dtype = of_type


def _checks_no_overflow_in_vain() -> None:
    """Sums are computed again in int64 to see whether they overflow, and without ``debug`` nobody looks at the result."""
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


@dataclass(frozen=True)
class _Shape:
    """What is made of the shape of a block: for its type, and for the tensors of that type."""

    shape: Any
    numel: int
    name: str
    of_tensors: Any
    numel_of_tensors: Any


def _knows_shapes() -> None:
    """What is made of a shape is made once: an operation on blocks makes several types and tensors, of few shapes."""
    from triton.language.semantic import TritonSemantic

    block_type, tensor, constexpr = tl.core.block_type, tl.core.tensor, tl.core.constexpr
    init_type, init_tensor = block_type.__init__, tensor.__init__
    broadcast = TritonSemantic.broadcast_impl_value
    known: dict[tuple[int, ...], _Shape] = {}
    of_scalars, one = tl.core.tuple([]), constexpr(1)

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        found = shape.__dict__.get("known") if type(shape) is tl.core.tuple else None
        if found is None:
            key = tuple([each.value if type(each) is constexpr else each for each in shape])
            found = known.get(key)
        if found is None:
            init_type(self, element_ty, shape)  # which checks it
            sizes = tl.core.tuple([constexpr(size) for size in key])
            name = str(self.shape)
            found = known[key] = _Shape(self.shape, self.numel, name, sizes, constexpr(self.numel))
            self.shape.known = found
        self.element_ty, self.shape, self.numel = element_ty, found.shape, found.numel
        self.name = f"<{found.name}, {element_ty}>"

    def init_of_tensor(self: Any, handle: Any, ty: Any) -> None:
        self.shape, self.numel = of_scalars, one
        if ty.is_block():
            found = ty.shape.__dict__.get("known")
            if found is None:
                init_tensor(self, handle, ty)
                return
            self.shape, self.numel = found.of_tensors, found.numel_of_tensors
        self.handle, self.type, self.dtype = handle, ty, ty.scalar

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        alike = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    block_type.__init__, tensor.__init__ = init_block_type, init_of_tensor
    TritonSemantic.broadcast_impl_value = broadcast_impl_value


def _histograms_as_declared() -> None:
    """Triton 3.5 counts in int64 what it declares as int32; storing that writes beyond the place."""
    count = interpreter.InterpreterBuilder.create_histogram

    def create_histogram(self: Any, data: Any, bins: int, mask: Any) -> Any:
        handle = count(self, data, bins, mask)
        handle.data = handle.data.astype(np.int32)
        return handle

    interpreter.InterpreterBuilder.create_histogram = create_histogram


def _strides_in_bytes() -> None:
    """Triton 3.5 wants strides of descriptors to be multiples of 16 elements, where hardware wants 16 bytes."""
    check = interpreter.TensorDescHandle.validate

    def validate(self: Any) -> None:
        strides, itemsize = self.strides, self.base.dtype.element_ty.primitive_bitwidth // 8
        outer = [interpreter.TensorHandle(stride.data * itemsize, stride.dtype) for stride in strides[:-1]]
        self.strides = [*outer, strides[-1]]
        try:
            check(self)
        finally:
            self.strides = strides

    interpreter.TensorDescHandle.validate = validate


def _masks_stay_masks() -> None:
    """From 3.9 on a comparison of scalars becomes a block of integers, which loads and stores then refuse as a mask."""
    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self: Any, shape: Any, arg: Any) -> Any:
        handle = splat(self, shape, arg)
        return interpreter.TensorHandle(handle.data.astype(bool), tl.int1) if arg.data.dtype == bool else handle

    interpreter.InterpreterBuilder.create_splat = create_splat


def _rounds_to_bf16() -> None:
    """fp32 is rounded to bf16, which the interpreter cuts off."""
    convert = interpreter._convert_float

    def convert_float(value: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(value, source, target, rounding_mode)
        return torch.from_numpy(np.ascontiguousarray(value)).to(torch.bfloat16).view(torch.uint16).numpy()

    interpreter._convert_float = convert_float


def _maxima_of_numbers() -> None:
    """Up to 3.8 the larger of a number and NaN is NaN."""

    def create_maxnumf(self: Any, left: Any, right: Any) -> Any:
        return self.binary_op(left, right, np.fmax)

    interpreter.InterpreterBuilder.create_maxnumf = create_maxnumf


@functools.cache
def mend() -> None:
    """To be called before the first launch; again it does nothing."""
    _rounds_to_bf16()
    if VERSION < (3, 9):
        _maxima_of_numbers()
    if VERSION < (3, 6):
        _histograms_as_declared()
        _strides_in_bytes()
    if VERSION >= (3, 9):
        _masks_stay_masks()


def make_faster() -> None:
    """To be called once, before the first launch."""
    if VERSION == (3, 6):
        _patches_once()
        _names_dtypes_once()
        _checks_no_overflow_in_vain()
        _knows_shapes()
