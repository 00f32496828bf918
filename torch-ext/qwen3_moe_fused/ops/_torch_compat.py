"""The names that torch keeps private and this package needs, each with a fallback for a torch that no longer has it.

Every fallback gives the same results; what it costs is said beside it. This module imports nothing of the package, so
every other module may import it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def _dispatch_modes() -> Callable[[], Any]:
    """A function whose result is true while a ``TorchDispatchMode`` is active, for instance that of fake tensors.

    Where torch has neither name, the result is always true: every call goes through torch's dispatcher, some 40 µs more.
    Two errors are then not raised, as they are not under a tracer: that of ``checks.sizes_sum`` on a CPU, and the refusal of
    forward-mode derivatives.
    """
    if hasattr(torch._C, "_len_torch_dispatch_stack"):
        return torch._C._len_torch_dispatch_stack
    python_dispatch = getattr(torch.utils, "_python_dispatch", None)  # torch itself has imported it
    current: Callable[[], Any] | None = getattr(python_dispatch, "_get_current_dispatch_mode", None)
    return (lambda: True) if current is None else (lambda: current() is not None)


def _transforms() -> Callable[[], Any]:
    """A function whose result is not None while a transform of ``torch.func`` is active, for instance ``vmap``.

    Where torch has neither name, the result is never None, at the cost that ``_dispatch_modes`` names.
    """
    functorch = getattr(torch._C, "_functorch", None)
    if hasattr(functorch, "peek_interpreter_stack"):
        return functorch.peek_interpreter_stack  # type: ignore[union-attr]
    active: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
    return (lambda: True) if active is None else (lambda: active() or None)


def _top_hooks() -> Callable[[bool], Any]:
    """A function whose result is not None while saved-tensor hooks are active; torch has it for its compiler.

    Where torch lacks the name, the result is always None: a checkpointed layer then computes its down projections twice.
    """
    nothing: Callable[[bool], Any] = lambda ignore_is_tracing: None  # noqa: E731
    return getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", nothing)


def _fake_tensors() -> frozenset[type]:
    """The class of the tensors with which ``torch.export`` traces.

    Where torch lacks the name, there is none, and experts modules cannot be exported.
    """
    fake: type | None = getattr(getattr(torch, "_subclasses", None), "FakeTensor", None)  # torch itself has imported it
    return frozenset() if fake is None else frozenset((fake,))


_modes, _transform, _hooks = _dispatch_modes(), _transforms(), _top_hooks()

# Other subclasses of Tensor need not have the memory that their shape says.
_PLAIN = frozenset((Tensor, nn.Parameter))
_PLAIN_OR_FAKE = _PLAIN | _fake_tensors()


# Whether a hook is registered for all modules, which a call of any module then runs. Where torch lacks the name, such hooks
# are not seen.
global_hooks_are_active: Callable[[], bool] = getattr(nn.modules.module, "_has_any_global_hook", lambda: False)


def is_plain_or_fake(tensor: Tensor) -> bool:
    """Whether ``tensor`` is one of torch's own class, or stands for such a one in a tracer."""
    return type(tensor) in _PLAIN_OR_FAKE


def any_special(tensors: Collection[Tensor | None]) -> bool:
    """Whether a kernel cannot read one of ``tensors``: on the meta device, or of a subclass of Tensor such as FakeTensor."""
    for value in tensors:  # noqa: SIM110  runs in every call, in half the time of a generator
        if value is not None and (type(value) not in _PLAIN or value.is_meta):
            return True
    return False


def intercepted(tensors: Collection[Tensor | None] = ()) -> bool:
    """Whether a tracer, a transform, a dispatch mode or one of ``tensors`` must see an operator instead of its insides."""
    return torch.compiler.is_compiling() or bool(_modes()) or _transform() is not None or any_special(tensors)


def saved_tensors_hooks_are_active() -> bool:
    """Whether ``torch.autograd.graph.saved_tensors_hooks`` are active, as in a layer under ``torch.utils.checkpoint``."""
    return _hooks(False) is not None


def forward_mode_is_active() -> bool:
    """Whether the code runs within ``torch.autograd.forward_ad.dual_level``.

    Where torch lacks the name, the answer is yes: calls that need no gradient take some 10 µs more.
    """
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)
