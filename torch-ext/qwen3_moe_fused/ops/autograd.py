"""Makes the function that is called in the place of an operator, eager or compiled, differentiable or not.

Everything that torch.compile or autograd must know is a custom operator, opaque to the compiler. Calling one costs some
40 µs, more than a small layer takes on the GPU, so eager calls go straight to the operator's implementation, through a
``torch.autograd.Function`` with the same formulas where gradients are wanted. They hand over the record of arguments as
it is: only an operator's arguments are flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._torch_compat import any_special, forward_mode_is_active, intercepted, saved_tensors_hooks_are_active
from .schema import Operator, flatten, layout_of


def _any_requires_grad(tensors: Iterable[Tensor | None]) -> bool:
    for value in tensors:  # noqa: SIM110  runs in every call, in half the time of a generator
        if value is not None and value.requires_grad:
            return True
    return False


def wants_gradient(record: Any) -> bool:
    """Whether autograd records, and an argument in ``record`` requires a gradient. torch.compile traces this function."""
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return any(isinstance(value, Tensor) and value.requires_grad for value in flatten(record))
    kind: Any = type(record)
    return _any_requires_grad(layout_of(kind).tensors_of(record))


def eager(operator: Operator) -> Callable[[Any], Any]:
    """The function to call in place of an operator that has no autograd formula."""
    op, implementation, tensors_of = operator.op, operator.implementation, operator.arguments.tensors_of

    def call(record: Any) -> Any:
        if intercepted() or any_special(tensors_of(record)):
            return op(*flatten(record))
        return implementation(record)

    return call


class _End(torch.autograd.Function):
    """The end of a forward whose beginning has the backward: makes the result, and hands on its gradient."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, end: Callable[[], Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        return end()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return grad, None


def differentiable(
    operator: Operator,
    kept: type,
    keep: Callable[[Any, Any, Any], Any],
    backward: Callable[[Tensor, Any, Any], Sequence[Tensor | None]],
    in_two: Callable[[Any], tuple[Any, Callable[[], Tensor]]] | None = None,
) -> Callable[[Any], Tensor]:
    """Registers the autograd formula of ``operator`` and returns the function to call in its place.

    The operator's result is a tensor, or a record of two fields: the tensor that has a gradient, and the record of
    everything else that the forward made. The function takes the record of arguments and returns that tensor. It has first
    derivatives by backward mode: asking for others raises RuntimeError.

    A checkpointed layer (``torch.utils.checkpoint``, not reentrant) is computed again until the last of its tensors is
    saved, and a Function saves when its forward is over. ``in_two`` puts the end, which saves nothing, into a second
    Function, which the replay then never comes to. Two cost the host some 30 µs more, so elsewhere there is one.

    Args:
        kept: the type of the record that backward reads.
        keep: makes that record from the arguments, from what the forward made (None for an operator with one result), and
            from the record of the gradients that are needed (``operator.arguments.needs``).
        backward: computes the gradients, in the order of ``operator.arguments.gradients``, from the result's gradient, the
            record that was kept, and the record of the gradients that are needed.
        in_two: the implementation in two parts. It returns what the forward makes for backward, and a function that makes
            the result, which must have the shape and dtype of the first differentiable argument.
    """
    finish, gradients_of = _finish(operator, kept, keep), _gradients_of(operator, kept, backward)
    _register(operator, finish, gradients_of)
    function, first = _functions(operator, finish, gradients_of, in_two)
    op, implementation, tensors_of = operator.op, operator.implementation, operator.arguments.tensors_of
    single = operator.results is None

    def call(record: Any) -> Any:
        if intercepted() or any_special(tensors := tensors_of(record)):
            results = op(*flatten(record))
        else:
            wanted = torch.is_grad_enabled() and _any_requires_grad(tensors)
            if in_two is not None and wanted and saved_tensors_hooks_are_active():
                return _End.apply(*first.apply(record, *tensors))
            # torch refuses a Function without forward mode; the implementation would drop the tangents.
            enter = wanted or forward_mode_is_active()
            results = function.apply(record, *tensors) if enter else implementation(record)
        return results if single else results[0]

    return call


# A formula's two halves, for torch's operator and for a Function alike.
_Finish = Callable[[Any, Any, Any, Sequence[bool]], None]
_GradientsOf = Callable[[Any, Tensor | None, Sequence[bool]], Sequence[Tensor | None]]


def _finish(operator: Operator, kept: type, keep: Callable[[Any, Any, Any], Any]) -> _Finish:
    """A function that keeps in a context what backward reads."""
    new, needs, save = tuple.__new__, operator.arguments.needs, layout_of(kept).save

    def finish(ctx: Any, record: Any, made: Any, needed: Sequence[bool]) -> None:
        save(ctx, keep(record, made, new(needs, needed)))
        if made is not None:
            ctx.mark_non_differentiable(*[value for value in made if value is not None])
            ctx.set_materialize_grads(False)  # or autograd makes zeros the size of what was made

    return finish


def _gradients_of(
    operator: Operator, kept: type, backward: Callable[[Tensor, Any, Any], Sequence[Tensor | None]]
) -> _GradientsOf:
    """A function that makes the gradients of the differentiable arguments from what a context kept.

    Those that are not needed are None, or anything that autograd passes over.
    """
    new, needs, restore = tuple.__new__, operator.arguments.needs, layout_of(kept).restore

    def gradients_of(ctx: Any, grad: Tensor | None, needed: Sequence[bool]) -> Sequence[Tensor | None]:
        return [None for _ in needed] if grad is None else backward(grad, restore(ctx), new(needs, needed))

    return gradients_of


def _functions(operator: Operator, finish: _Finish, gradients_of: _GradientsOf, in_two: Any) -> tuple[Any, Any]:
    """The Function of the whole forward, and the Function of its first part.

    Both take the record, which is no tensor to torch, and then the record's tensors, differentiable ones first.
    """
    name, implementation, single = operator.name, operator.implementation, operator.results is None
    count = len(operator.arguments.needs._fields)
    differentiable_ones = slice(1, 1 + count)
    no_gradients = [None] * (len(operator.arguments.tensors) - count)

    # No separate setup_context: torch would bind the arguments to the signature in every call, some 50 µs.
    def whole(ctx: Any, record: Any, *tensors: Tensor | None) -> Any:
        results = implementation(record)
        if single:
            finish(ctx, record, None, ctx.needs_input_grad[differentiable_ones])
            return results
        y, made = results
        finish(ctx, record, made, ctx.needs_input_grad[differentiable_ones])
        return (y, *made)

    def beginning(ctx: Any, record: Any, *tensors: Tensor | None) -> Any:
        made, end = in_two(record)
        like, *_ = tensors
        # Carries the gradient, and takes the memory of one element.
        placeholder = like.new_empty_strided(like.shape, (0,) * like.dim())  # type: ignore[union-attr]
        finish(ctx, record, made, ctx.needs_input_grad[differentiable_ones])
        return placeholder, end

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        # once_differentiable would let a second derivative pass as zero where only saved tensors lead to it.
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name} has no second derivative: its backward needs create_graph=False")
        return None, *gradients_of(ctx, grad, ctx.needs_input_grad[differentiable_ones]), *no_gradients

    def function_of(forward: Callable[..., Any]) -> Any:
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(name, (torch.autograd.Function,), members)

    return function_of(whole), function_of(beginning)


def _register(operator: Operator, finish: _Finish, gradients_of: _GradientsOf) -> None:
    """Gives the formula to torch's operator, whose arguments are flat."""
    layout, results = operator.arguments, operator.results

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, made = (None, None) if results is None else results.unflatten(output)
        places = list(zip(layout.arguments, inputs, strict=True))
        # Not ctx.needs_input_grad, which has an entry for each tensor of a list here, and one for the list in backward.
        needs = [value is not None and value.requires_grad for argument, value in places if argument.differentiable]
        finish(ctx, layout.unflatten(inputs), made, needs)
        # torch wants a list of gradients for a list of tensors.
        ctx.no_gradients = [[None] * len(value) if argument.type == "Tensor[]" else None for argument, value in places]

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        flags = zip(layout.arguments, ctx.needs_input_grad, strict=True)
        needs = [need for argument, need in flags if argument.differentiable]
        gradients = zip(gradients_of(ctx, grad, needs), needs, strict=True)
        needed = (gradient if need else None for gradient, need in gradients)
        places = zip(layout.arguments, ctx.no_gradients, strict=True)
        return tuple(next(needed) if argument.differentiable else none for argument, none in places)

    operator.op.register_autograd(backward, setup_context=setup_context)
