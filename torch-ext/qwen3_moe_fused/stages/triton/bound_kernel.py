"""A kernel with all its constants bound, launched with as little host work as Triton allows.

``kernel[grid](...)`` analyses every argument on every call: some 50 µs for these kernels on the host of an H100, twice
what a small layer's GEMM takes there. But the calls of one layer differ in their pointers alone, so a ``BoundKernel``
keeps the compiled kernel of its first call and launches that. What Triton specialises on is fixed by construction:
sizes and strides are constants of the plan, kernels are kept by the dtypes of their tensors and the types of their records,
the remaining integers are not specialised, and a call with a pointer that is not 16-byte aligned takes the ordinary way.

A descriptor costs another 20 µs: Triton encodes its tensor map in every launch. Weights stay where they are and the caching
allocator gives activations the same few addresses again, so the maps are kept. ``launcher.py`` does that, and says which of
the installed Triton's functions a launch goes through.

Arguments may be records: NamedTuples of tensors, Views and further records, whose fields a kernel reads by attribute.
Constants may be records, too, of plain values and of device functions.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ...views import View
from .launcher import Launcher, must_be_ordinary


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
        """The descriptor that Triton compiles for."""
        return TensorDescriptor(self.base, list(self.shape), list(self.strides), list(self.block_shape), self.padding)


# The errors of a launcher whose Triton is not what it looked like when the launcher was made.
_UNFIT = (TypeError, AttributeError, LookupError)
# Whether plans only compile their kernels, see ``compiling_only``.
_compiling_only = False


@contextlib.contextmanager
def compiling_only() -> Iterator[None]:
    """Within the block, a plan that was never launched only compiles its kernel; the search for configurations uses that.

    Under Triton's ``AsyncCompileMode`` several plans compile side by side.
    """
    global _compiling_only  # noqa: PLW0603 - read by every plan
    _compiling_only = True
    try:
        yield
    finally:
        _compiling_only = False


# Arguments.


class Prepared:
    """A record of tensors whose addresses are asked for once, for records that several launches take.

    Args:
        record: tensors of fixed dtypes, which live as long as this does.
    """

    __slots__ = ("addresses", "bits", "record")

    def __init__(self, record: tuple[Tensor, ...]) -> None:
        self.record = record
        self.addresses = tuple([tensor.data_ptr() for tensor in record])
        self.bits = _bits(self.addresses)


class _Kind(Enum):
    OTHER = 0  # numbers, and None for what a kernel does not read
    POINTER = 1
    DESCRIPTOR = 2
    RECORD = 3
    PREPARED = 4


_OTHER, _POINTER, _DESCRIPTOR, _RECORD, _PREPARED = _Kind


class _Kinds(dict[type, _Kind]):
    """The kind of an argument, by its type. ``isinstance`` takes four times as long for an argument that is no tensor."""

    def __missing__(self, of: type) -> _Kind:
        if issubclass(of, Tensor | View):
            kind = _POINTER
        elif issubclass(of, tuple):
            kind = _DESCRIPTOR if issubclass(of, Descriptor) else _RECORD
        else:
            kind = _PREPARED if of is Prepared else _OTHER
        self[of] = kind
        return kind


_KINDS = _Kinds()


def _addresses(record: tuple[Any, ...], key: list[Any]) -> tuple[Any, ...]:
    """Returns ``record`` with addresses in place of its tensors.

    Appends to ``key`` what a kernel is compiled for: the types of records and the dtypes of tensors.

    Raises:
        AssertionError: it holds what no record may. Triton specialises numbers in records whatever ``do_not_specialize``
            says, and expands no descriptors there.
    """
    key.append(type(record))
    addresses: list[Any] = []
    for arg in record:
        kind = _KINDS[type(arg)]
        if kind is _POINTER:
            key.append(arg.dtype)
            addresses.append(arg.data_ptr())
        elif kind is _RECORD:
            addresses.append(_addresses(arg, key))
        else:
            raise AssertionError(f"records of arguments hold tensors and further records, not {arg!r}")
    return tuple(addresses)


def _bits(addresses: tuple[Any, ...]) -> int:
    """All bits that are set in any of ``addresses``."""
    bits = 0
    for address in addresses:
        bits |= _bits(address) if type(address) is tuple else address
    return bits


def _checked(arg: Any) -> Any:
    """Returns ``arg`` in the form that Triton compiles for, with the type of each record."""
    if isinstance(arg, Descriptor | View):
        return arg.checked()
    if isinstance(arg, Prepared):
        return arg.record
    return type(arg)(*map(_checked, arg)) if isinstance(arg, tuple) else arg


# Constants that are records.


def with_digest(constant: Any) -> Any:
    """Fills the field ``digest`` of each record in ``constant`` with a digest of the code of the record's device functions.

    Triton looks for a compiled kernel on the disk by ``str`` of its constants. ``str`` of a record names a device function
    by module and name alone, so after a change of the function's code Triton (3.5 to 3.9) would find the old kernel, and 3.5
    would even find it in memory. A constant that is a function by itself needs no digest. The interpreter compiles nothing,
    and there the digest is empty.

    The digest is hexadecimal in lower case, because Triton 3.5 and 3.6 take a "D" in a string to mean an aligned pointer.

    Raises:
        AssertionError: a record with device functions has no such field, and neither has a record around it.
    """
    if not isinstance(constant, tuple):
        return constant
    digested, keys = _digested(constant)
    if keys:
        raise AssertionError(f"a record of constants with device functions needs a field named digest: {constant!r}")
    return digested


def _digested(value: Any) -> tuple[Any, list[str]]:
    """Returns ``value`` with its digests filled in, and the keys of those functions in it that no digest covers."""
    if not isinstance(value, tuple):
        key = getattr(value, "cache_key", None)
        return value, [] if key is None else [key]
    fields, keys_of = zip(*map(_digested, value), strict=True) if value else ((), ())
    keys = [key for keys in keys_of for key in keys]
    if not hasattr(value, "_fields"):
        return fields, keys
    record: Any = type(value)(*fields)
    if "digest" not in record._fields:
        return record, keys
    return record._replace(digest=hashlib.sha256("-".join(keys).encode()).hexdigest() if keys else ""), []


class BoundKernel:
    """One kernel, its constants and launch options.

    Args:
        kernel: its parameters are the arguments of a call, then the constants.
        constants: values of the kernel's ``tl.constexpr`` parameters, by name.
        num_warps, num_stages: of Triton.
        fp_fusion: additions may take products unrounded.
        registers: the most that a thread may have, on NVIDIA GPUs; 0 leaves it to the compiler.
    """

    __slots__ = ("_launchers", "_ordinary", "constants", "kernel", "options")

    def __init__(
        self,
        kernel: JITFunction,
        constants: dict[str, Any],
        num_warps: int = 4,
        num_stages: int = 3,
        fp_fusion: bool = True,
        registers: int = 0,
    ) -> None:
        names = kernel.arg_names[-len(constants) :]
        if set(constants) != set(names):
            raise AssertionError(f"{kernel} takes the constants {names}, not {list(constants)}")
        self.kernel = kernel
        self.constants = tuple(with_digest(constants[name]) for name in names)
        self.options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
        if not fp_fusion:
            self.options["enable_fp_fusion"] = False
        if registers:
            self.options["maxnreg"] = registers
        self._launchers: dict[tuple[Any, ...], Launcher] = {}
        # Keys of the kernels that only Triton's front door launches.
        self._ordinary: set[tuple[Any, ...]] = set()

    def __call__(self, device: torch.device, grid: tuple[int, int, int], *args: Any) -> None:
        """Launches on ``device``, which need not be the current one, with ``args`` before the constants.

        Args:
            args: tensors, Views, Descriptors, numbers that the kernel does not specialise, records (NamedTuples of tensors,
                Views and further records), and None for what the kernel does not read under its constants.
        """
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
            kind = _KINDS[type(arg)]
            if kind is _POINTER:
                address = arg.data_ptr()
                pointers |= address
                values.append(address)
                key.append(arg.dtype)
            elif kind is _RECORD:
                record = _addresses(arg, key)
                for address in record:
                    pointers |= address if type(address) is int else _bits(address)
                values.append(record)
            elif kind is _PREPARED:
                pointers |= arg.bits
                values.append(arg.addresses)
            else:
                values.append(arg)
                if kind is _DESCRIPTOR:
                    key.append(arg.base.dtype)
        compiled_for = tuple(key)
        launcher = self._launchers.get(compiled_for)
        if launcher is None or pointers & 15 or must_be_ordinary():
            self._launch_ordinarily(grid, args, compiled_for, is_aligned=pointers & 15 == 0)
            return
        try:
            launcher(grid, driver.active.get_current_stream(index), values, self.constants)
        except _UNFIT as error:
            # Nothing was launched, as the arguments did not reach the driver.
            self._ordinary.add(compiled_for)
            self._launchers.pop(compiled_for, None)
            self._launch_ordinarily(grid, args, compiled_for, is_aligned=True)
            warnings.warn(f"{self.kernel}: launches of kind {launcher.path!r} failed: {error}", RuntimeWarning, 2)

    def _launch_ordinarily(
        self, grid: tuple[int, int, int], args: tuple[Any, ...], compiled_for: tuple[Any, ...], is_aligned: bool
    ) -> None:
        """Launches through Triton's front door, and keeps the kernel that it compiled for aligned pointers."""
        checked = [_checked(arg) for arg in args]
        if _compiling_only:
            self.kernel.warmup(*checked, *self.constants, grid=grid, **self.options)
            return
        kernel = self.kernel[grid](*checked, *self.constants, **self.options)
        if not is_aligned or kernel is None or compiled_for in self._ordinary:  # the interpreter compiles nothing
            return
        positions = tuple(position for position, arg in enumerate(args) if isinstance(arg, Descriptor))
        launcher = Launcher(kernel, positions)
        if launcher.path == "ordinary":
            self._ordinary.add(compiled_for)
        else:
            self._launchers[compiled_for] = launcher
