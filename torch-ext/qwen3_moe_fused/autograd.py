"""One way from an operator to a differentiable function, eager or compiled.

Every stage that needs gradients is a custom op (opaque to torch.compile, with fake and autograd registered). Its Python
registration costs some 40 µs a call, more than a small layer takes on the GPU, so eager calls go straight to the same
implementation through a ``torch.autograd.Function`` with the same formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _intercepted() -> bool:
    """Whether a tracer, a functional transform or a dispatch mode must see the operator itself."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def differentiable(
    op: Any, implementation: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers the autograd formula of ``op`` and returns the function to call in its place.

    Args:
        op: a ``torch.library.custom_op``.
        implementation: the Python function behind ``op``.
        setup_context: ``(ctx, inputs, output)``, as ``torch.library.register_autograd`` takes it.
        backward: ``(ctx, *grad_outputs)`` to one gradient for each input.
    """
    op.register_autograd(backward, setup_context=setup_context)

    function = type(
        op._name.split("::")[-1],
        (torch.autograd.Function,),
        {
            "forward": staticmethod(implementation),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(torch.autograd.function.once_differentiable(backward)),
        },
    )

    def call(*args: Any) -> Any:
        if _intercepted():
            return op(*args)
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function.apply(*args)
        return implementation(*args)

    return call
