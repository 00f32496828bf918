"""One way from an operator to a function, eager or compiled, differentiable or not.

Every stage that torch.compile or autograd must know is a custom op, opaque to the compiler, with fake and autograd
registered. The Python registration costs some 40 µs a call, more than a small layer takes on the GPU, so eager calls go
straight to the same implementation, through a ``torch.autograd.Function`` with the same formulas where gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def intercepted(args: Iterable[Any] = ()) -> bool:
    """Whether a tracer, a transform, a dispatch mode or one of ``args`` must see the operator itself."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(map(_is_special, args))
    )


def _is_special(arg: Any) -> bool:
    kind = type(arg)
    if kind in _PLAIN:
        return bool(arg.is_meta)
    return kind not in _NO_TENSORS and isinstance(arg, Tensor)


# Other subclasses of Tensor need not have the memory that their shape says.
_PLAIN = frozenset((Tensor, nn.Parameter))
_NO_TENSORS = frozenset((type(None), bool, int, float, str, list, tuple))


def eager(op: Any, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The function to call in place of a custom op that needs no autograd formula: ``implementation`` where it may."""

    def call(*args: Any) -> Any:
        return op(*args) if intercepted(args) else implementation(*args)

    return call


class _Rest(torch.autograd.Function):
    """The end of a forward whose beginning has the backward: makes the result, and hands on its gradient."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, rest: Callable[[], Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        return rest()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return grad, None


# Of torch itself for its compiler, and private: without it every forward is one Function.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)


def differentiable(
    op: Any,
    implementation: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    in_two: Callable[..., tuple[tuple[Any, ...], Callable[[], Tensor]]] | None = None,
) -> Callable[..., Any]:
    """Registers the autograd formula of ``op`` and returns the function to call in its place.

    The function has first derivatives by backward mode: asking for others raises RuntimeError.

    A checkpointed layer (``torch.utils.checkpoint``, not reentrant) is computed again until the last of its tensors is
    saved, and a Function saves when its forward is over. ``in_two`` puts the end, which saves nothing, into a Function of
    its own, which the replay then never comes to. Two cost the host some 30 µs more, so elsewhere there is one.

    Args:
        op: a ``torch.library.custom_op``.
        implementation: the Python function behind ``op``.
        setup_context: ``(ctx, inputs, output)``, as ``torch.library.register_autograd`` takes it.
        backward: ``(ctx, *grad_outputs)`` to one gradient for each input, a list of None for a list of tensors.
        in_two: ``implementation`` up to where all is there that it saves: its outputs but the first, and a function that
            makes the first, which alone has a gradient, and the shape and dtype of the first input.
    """
    op.register_autograd(backward, setup_context=setup_context)
    name = op._name.split("::")[-1]

    def forward(ctx: Any, *args: Any) -> Any:
        # Not a separate setup_context: torch would bind the arguments to the signature in every call, some 50 µs.
        output = implementation(*args)
        setup_context(ctx, args, output)
        return output

    def first_backward(ctx: Any, *grads: Any) -> Any:
        # once_differentiable would let a second derivative pass as zero where only saved tensors lead to it.
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name} has no second derivative: its backward needs create_graph=False")
        # An operator wants a list for each list of tensors, a Function only None: to it they are no tensors.
        return tuple(None if isinstance(grad, list) else grad for grad in backward(ctx, *grads))

    def beginning(ctx: Any, *args: Any) -> Any:
        saved, rest = in_two(*args)  # type: ignore[misc]
        # Carries the gradient, and takes the memory of one element.
        placeholder = args[0].new_empty_strided(args[0].shape, (0,) * args[0].dim())
        setup_context(ctx, args, (placeholder, *saved))
        return placeholder, rest

    def function_of(forward: Callable[..., Any]) -> Any:
        members = {"forward": staticmethod(forward), "backward": staticmethod(first_backward)}
        return type(name, (torch.autograd.Function,), members)

    function, first = function_of(forward), function_of(beginning)

    def call(*args: Any) -> Any:
        if intercepted(args):
            return op(*args)
        wanted = torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        if in_two is not None and wanted and _saved_tensors_hooks(False) is not None:
            return (_Rest.apply(*first.apply(*args)),)
        # torch refuses a function without forward mode; the implementation would drop the tangents.
        if wanted or forward_ad._current_level >= 0:
            return function.apply(*args)
        return implementation(*args)

    return call
