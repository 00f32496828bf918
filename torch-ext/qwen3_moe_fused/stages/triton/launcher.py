"""How a compiled kernel is launched. Only this module uses what Triton keeps private about launches.

A launch takes one of three ways, the first of them that the installed Triton allows:

- ``direct`` calls the function in C that Triton's launcher wraps, with tensor maps that are kept from launch to launch.
- ``run`` calls Triton's launcher of the compiled kernel, which encodes the tensor map of each descriptor again: some 20 µs.
- ``ordinary`` is ``kernel[grid](...)``, which analyses every argument again: some 50 µs.

Objects decide, and no version number does. When a kernel is compiled, a copy of its launcher is called with marks and with a
stand-in for the function in C, and the places where the marks arrive are the ``Layout`` of that function's arguments. Triton
3.5 and 3.6 pass the kernel's arguments one by one, behind the scratch memory and the hooks; 3.7 to 3.9 pass them as one
tuple, behind annotations of them. A launcher that does anything else is called itself, and one that takes other arguments is
left to Triton.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver

# AMD GPUs, where Triton also specialises on whether a tensor's storage fits 32-bit offsets.
_AMD = torch.version.hip is not None
# Tensor maps that a compiled kernel keeps, of 128 bytes each.
_MAX_TENSOR_MAPS = 256
# The positional parameters of a launcher as far as Tritons name them, in the order in which ``run`` fills them.
_PARAMETERS = (
    "gridX", "gridY", "gridZ", "stream", "function",
    "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook",
)  # fmt: skip

# What a launch reads of a compiled kernel beside ``run``.
_NEEDED = ("function", "packed_metadata")

Way = Literal["direct", "run", "ordinary"]
_COSTS: dict[Way, str] = {
    "direct": "",
    "run": "some 20 µs of host time for each tensor descriptor of a launch",
    "ordinary": "some 50 µs of host time for each launch, and 20 µs for each tensor descriptor of it",
}


class LaunchPath(NamedTuple):
    """Which way launches take.

    Attributes:
        path: the way, see the module.
        reason: why launches take it.
    """

    path: Way
    reason: str

    @property
    def cost(self) -> str:
        """What launches cost more than direct ones."""
        return _COSTS[self.path]


def must_be_ordinary() -> bool:
    """Whether launches must take the ordinary way at the moment: on AMD GPUs, or for a profiler that listens to them."""
    hook = knobs.runtime.launch_enter_hook
    return _AMD or bool(getattr(hook, "calls", hook))  # a chain of hooks, or in older Tritons a hook or None


def launch_path() -> LaunchPath:
    """Which way launches take in this process, and why."""
    if knobs.runtime.interpret:
        return LaunchPath("ordinary", "Triton's interpreter runs the kernels")
    if _AMD:
        return LaunchPath("ordinary", "on AMD GPUs Triton specialises kernels on the sizes of tensors, too")
    if must_be_ordinary():
        return LaunchPath("ordinary", "something listens to Triton's launches, such as a profiler")
    try:
        launcher = driver.active.launcher_cls
    except Exception as error:  # noqa: BLE001 - whatever a driver that does not start raises
        return LaunchPath("ordinary", f"Triton has no driver here: {' '.join(str(error).split())}")
    return path_of(launcher)


def path_of(launcher: type) -> LaunchPath:
    """Which way launches take for kernels whose launchers are of class ``launcher``."""
    version = f"Triton {triton.__version__}"
    # As the launcher of a kernel without scratch memory.
    stand_in: Any = object.__new__(type("StandIn", (launcher,), {"__getattr__": _zero}))
    if not _takes_values(stand_in):
        return LaunchPath("ordinary", f"the launchers of {version} take other arguments than those of 3.5 to 3.9")
    if torch.version.cuda is None:
        return LaunchPath("run", "direct launches are for NVIDIA GPUs alone")
    if _layout(stand_in, ()) is None:
        return LaunchPath("run", f"the launchers of {version} do other things than those of 3.5 to 3.9")
    try:
        descriptor = "tensordesc<fp32[16,16]>"
        wrapped = _wrapper(launcher)(print, {"x": descriptor}, [{}])
        if _unwrapped(wrapped) != (print, [{}]):
            raise LookupError(descriptor)
    except Exception:  # noqa: BLE001 - whatever another Triton raises
        return LaunchPath("run", f"{version} expands tensor descriptors in another way than 3.5 to 3.9")
    return LaunchPath("direct", f"the launchers of {version} do what is done here in their place")


def _zero(_: Any, name: str) -> int:
    """The value of each attribute of a stand-in for a launcher, but for those that Python itself asks for."""
    if name.startswith("__"):
        raise AttributeError(name)
    return 0


class Layout(NamedTuple):
    """What the function in C takes behind the grid, the stream and the kernel's handle.

    Attributes:
        fixed: the arguments that are the same in every launch of a kernel.
        in_one: the kernel's own arguments follow as one tuple; otherwise one by one.
    """

    fixed: tuple[Any, ...]
    in_one: bool


def _layout(launcher: Any, packed_metadata: Any) -> Layout | None:
    """Finds out what ``launcher`` hands to the function in C; None if it does more than that. Replaces its ``launch``."""
    try:
        first, second = (_layout_once(launcher, packed_metadata, start) for start in (1, 11))
    except Exception:  # noqa: BLE001 - whatever a launcher that does something else raises
        return None
    return first if first == second else None  # otherwise something depends on the grid, the stream or the kernel


def _layout_once(launcher: Any, packed_metadata: Any, start: int) -> Layout:
    """The same for one grid, stream and handle, which are numbers from ``start`` on; raises if there is no such layout."""
    calls: list[tuple[Any, ...]] = []
    launcher.launch = lambda *args: calls.append(args)
    numbers, marks = tuple(range(start, start + 5)), (object(), object())
    launcher(*numbers, packed_metadata, None, None, None, *marks)
    (call,) = calls
    if call[:5] != numbers:
        raise LookupError("the grid, the stream and the kernel's handle come elsewhere")
    if call[-2:] == marks:
        return Layout(call[5:-2], in_one=False)
    if tuple(call[-1]) == marks:
        return Layout(call[5:-1], in_one=True)
    raise LookupError("the kernel's arguments come elsewhere")


def _takes_values(launcher: Any) -> bool:
    """Whether ``launcher`` may be called with the arguments of ``run``."""
    try:
        parameters = inspect.signature(launcher).parameters.values()
    except (TypeError, ValueError):  # a function in C, say
        return False
    names = tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    takes_more = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return takes_more and names == _PARAMETERS[: len(names)]


def _wrapper(launcher: type) -> Callable[..., Callable[..., Any]]:
    """Triton's function that puts the expansion of tensor descriptors around a function which launches."""
    return vars(sys.modules[launcher.__module__])["wrap_handle_tensordesc"]


def _unwrapped(launch: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """What is within that expansion, and Triton's metadata of each descriptor."""
    captured = inspect.getclosurevars(launch).nonlocals
    return captured["launcher"], list(captured["tensordesc_meta"])


class Launcher:
    """A compiled kernel, launched without what Triton does again in every launch.

    Args:
        kernel: as Triton compiled it.
        descriptors: the positions of its arguments that are tensor descriptors.
    """

    __slots__ = ("_descriptors", "_encoders", "_fixed", "_in_one", "_launch", "_maps", "kernel", "path")

    def __init__(self, kernel: Any, descriptors: tuple[int, ...] = ()) -> None:
        self.kernel = kernel
        self.path: Way = "ordinary"
        self._descriptors = descriptors
        self._launch: Callable[..., object] | None = None  # the function in C, if launches are direct
        self._maps: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        try:
            if not _takes_values(kernel.run) or not all(hasattr(kernel, name) for name in _NEEDED):
                return
            self.path = "run"
            self._launch = self._prepare()
        except Exception:  # noqa: BLE001 - whatever another Triton raises: the way that was found before remains
            return
        if self._launch is not None:
            self.path = "direct"

    def _prepare(self) -> Callable[..., object] | None:
        """The function in C, whose arguments are found out; or None or an error if launches cannot be direct."""
        run = self.kernel.run
        if torch.version.cuda is None or run.global_scratch_size or run.profile_scratch_size:
            return None  # scratch memory is allocated for each launch
        layout = _layout(copy.copy(run), self.kernel.packed_metadata)
        if layout is None:
            return None
        self._fixed, self._in_one = layout
        self._encoders: list[Callable[..., tuple[Any, ...]]] = []
        if not self._descriptors:
            return run.launch
        types, wrap = list(self.kernel.src.signature.values()), _wrapper(type(run))
        launch, metadata = _unwrapped(run.launch)
        if None in metadata:  # descriptors that are pointers on this GPU
            return None
        for position, of_descriptor in zip(self._descriptors, metadata, strict=True):
            if not types[position].startswith("tensordesc"):
                raise LookupError(types[position])
            # Triton's expansion for this descriptor alone, which returns the arguments that it would launch with.
            self._encoders.append(wrap(_arguments, {"descriptor": types[position]}, [of_descriptor]))
        return launch

    def __call__(self, grid: tuple[int, int, int], stream: int, values: list[Any], constants: tuple[Any, ...]) -> None:
        """Launches the kernel.

        Args:
            values: the arguments, with addresses in place of tensors and plain tuples in place of records. It is changed.
        """
        kernel, launch = self.kernel, self._launch
        if launch is None:
            for position in self._descriptors:
                values[position] = values[position].checked()
            kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *values, *constants)
            return
        if self._descriptors:
            self._expand(values)
        if self._in_one:
            launch(*grid, stream, kernel.function, *self._fixed, (*values, *constants))
        else:
            launch(*grid, stream, kernel.function, *self._fixed, *values, *constants)

    def _expand(self, values: list[Any]) -> None:
        """Puts each descriptor's tensor map, shape and strides in its place."""
        for index in range(len(self._descriptors) - 1, -1, -1):  # the last one first, as each moves what follows it
            position = self._descriptors[index]
            value = values[position]
            # The blocks are constants of the kernel, so its descriptors differ in nothing else.
            key = (index, value.base.data_ptr(), value.shape, value.strides, value.padding)
            arguments = self._maps.get(key)
            if arguments is None:
                if len(self._maps) >= _MAX_TENSOR_MAPS:
                    self._maps.clear()
                arguments = self._maps[key] = self._encoded(index, value.checked())
            values[position : position + 1] = arguments

    def _encoded(self, index: int, descriptor: Any) -> tuple[Any, ...]:
        """The arguments of the function in C that stand for a descriptor."""
        before = (0, 0, 0, 0, 0, *self._fixed)
        if self._in_one:
            return tuple(self._encoders[index](*before, (descriptor,))[-1])
        return self._encoders[index](*before, descriptor)[len(before) :]


def _arguments(*args: Any) -> tuple[Any, ...]:
    """Stands for a function that launches, and returns what it would launch with."""
    return args
