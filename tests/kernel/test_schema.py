"""Records of arguments (``ops.schema``): what an operator's schema, flat arguments and saved tensors are made of."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernel.machine import module

schema = module("ops.schema")
# Annotations are looked up in this module.
Constant, Inline = schema.Constant, schema.Inline


class Adapter(NamedTuple):
    a: Tensor | None
    scaling: float


class Stack(NamedTuple):
    weight: Tensor
    scales: list[Tensor]
    format: str


class Shared(NamedTuple):
    x: Tensor
    up: Stack
    up_lora: Adapter
    index: Constant


class Forward(NamedTuple):
    shared: Inline[Shared]
    bias: Tensor | None
    buffer: Constant | None
    top_k: int
    dtype: torch.dtype
    save: bool


Needs: Any = schema.layout_of(Forward).needs


class Backward(NamedTuple):
    grad: Tensor
    shared: Inline[Shared]
    needs: Annotated[Any, Needs]


def record(scales: int = 0, bias: Tensor | None = None) -> Forward:
    stack = Stack(torch.ones(2, 3), [torch.full((1,), float(i)) for i in range(scales)], "nf4")
    shared = Shared(torch.ones(4, 3), stack, Adapter(None, 0.5), torch.zeros(4, dtype=torch.int64))
    return Forward(shared, bias, None, 2, torch.float32, True)


def assert_same(got: Any, expected: Any) -> None:
    """The same types and values, and the very same tensors."""
    assert type(got) is type(expected)
    if isinstance(expected, (tuple, list)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, Tensor):
        assert got is expected
    else:
        assert got == expected


def test_the_schema_follows_from_the_annotations() -> None:
    assert schema.layout_of(Forward).schema == (
        "(Tensor x, Tensor up_weight, Tensor[] up_scales, str up_format, Tensor? up_lora_a, float up_lora_scaling, "
        "Tensor index, Tensor? bias, Tensor? buffer, SymInt top_k, ScalarType dtype, bool save)"
    )


def test_gradients_are_those_of_tensors_that_may_have_one() -> None:
    names = ("x", "up_weight", "up_lora_a", "bias")
    layout = schema.layout_of(Forward)
    assert layout.gradients._fields == layout.needs._fields == names
    assert layout.gradients() == (None,) * 4
    assert layout.needs(bias=True) == (False, False, False, True)


def test_a_computed_record_is_an_argument_each() -> None:
    assert schema.layout_of(Backward).schema.endswith(
        "bool needs_x, bool needs_up_weight, bool needs_up_lora_a, bool needs_bias)"
    )


@pytest.mark.parametrize("scales", [0, 3])
def test_flat_arguments_make_the_same_record(scales: int) -> None:
    arguments = record(scales, torch.ones(3))
    flat = schema.flatten(arguments)
    layout = schema.layout_of(Forward)
    assert len(flat) == len(layout.arguments)
    assert_same(layout.unflatten(flat), arguments)


def test_differentiable_tensors_come_first() -> None:
    arguments = record(2, torch.ones(3))
    shared = arguments.shared
    expected = (shared.x, shared.up.weight, None, arguments.bias, shared.index, None)
    assert_same(schema.layout_of(Forward).tensors_of(arguments), expected)


class Context:
    """As much of a context of autograd as is needed."""

    saved_tensors: tuple[Tensor | None, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("scales", [0, 3])
def test_a_context_gives_back_the_record(scales: int) -> None:
    ctx, arguments = Context(), record(scales, torch.ones(3))
    schema.layout_of(Forward).save(ctx, arguments)
    assert len(ctx.saved_tensors) == 6 + scales
    assert_same(schema.layout_of(Forward).restore(ctx), arguments)


def test_a_context_keeps_tensors_nowhere_else() -> None:
    ctx = Context()
    schema.layout_of(Forward).save(ctx, record(2))
    ctx.saved_tensors = ()

    def tensors(value: Any) -> int:
        if isinstance(value, (tuple, list)):
            return sum(map(tensors, value))
        return isinstance(value, Tensor)

    assert sum(tensors(value) for value in vars(ctx).values()) == 0


def test_an_annotation_without_schema_is_refused() -> None:
    class Unknown(NamedTuple):
        x: Tensor
        option: dict

    with pytest.raises(TypeError, match=r"Unknown.option has an annotation that no schema has: <class 'dict'>"):
        schema.layout_of(Unknown)


def test_two_arguments_of_one_name_are_refused() -> None:
    class Twice(NamedTuple):
        x: Tensor
        shared: Inline[Shared]

    with pytest.raises(TypeError, match="Twice has two arguments of one name"):
        schema.layout_of(Twice)
