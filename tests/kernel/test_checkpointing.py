"""``moe_experts`` in a layer that runs again in backward (``torch.utils.checkpoint``): the same bits, and no needless work.

What runs again ends where all is there that backward reads, before the down projection.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from tests.kernel.lora_cases import Factors, LoraCase, make_lora_inputs, run_lora
from tests.kernel.machine import DEVICE, module, stages
from tests.kernel.packed_cases import ONE, PackedInputs, decoding, packed_gradients

SEPARATE = (Factors(separate=True),)
SMALL = LoraCase("small", "")
CASES = [
    LoraCase("trained", "adapters, weights and biases", trained=True, bias=True, up=SEPARATE),
    # More slots than those for which a pass without gradients, as the first of reentrant checkpointing is, goes another way.
    LoraCase("no-adapters", "h is of use for the output alone", up=(), down=(), trained=True, tokens=33),
    LoraCase("up-alone", "no left product of h", down=()),
    LoraCase("gpt-oss", "another layout", activation="swiglu_oai", interleaved=True, transposed=True, bias=True),
    LoraCase("packed", "decoded in the products", dense=(), hidden=64, up=SEPARATE),
    LoraCase("packed-parts", "decoded before them", dense=(), hidden=64, in_gemm=False),
    LoraCase("recompute", "the up projection runs a third time", recompute=True, trained=True),
    LoraCase("partly-mine", "rows of nobody", index="partly mine"),
    LoraCase("no-tokens", "T=0", tokens=0),
]

Run = Callable[[LoraCase, PackedInputs], Tensor]


def layer(case: LoraCase, inputs: PackedInputs) -> Tensor:
    """The experts last, as in a decoder's layer."""
    hidden_states = inputs.inputs.tensors["hidden_states"]
    return hidden_states.sin() + run_lora(case, inputs)


def again(run: Run = layer, use_reentrant: bool = False) -> Run:
    """``run``, again in backward."""

    def checkpointed(case: LoraCase, inputs: PackedInputs) -> Tensor:
        x = inputs.inputs.tensors["hidden_states"]
        return checkpoint(lambda _: run(case, inputs), x, use_reentrant=use_reentrant)

    return checkpointed


def results(case: LoraCase, run: Run) -> dict[str, Tensor | None]:
    """y and the gradients, by name."""
    with decoding(case.in_gemm, ONE):
        return packed_gradients(case, make_lora_inputs(case, torch.float32), run)


def assert_same(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        assert value is None or torch.equal(got[name], value), name


def counted(case: LoraCase, run: Run, calls: dict[str, int]) -> tuple[dict[str, Tensor | None], dict[str, int]]:
    calls.clear()
    return results(case, run), dict(calls)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_down_projection_runs_once(case: LoraCase, calls: dict[str, int]) -> None:
    expected, once = counted(case, layer, calls)
    got, twice = counted(case, again(), calls)
    assert_same(got, expected)
    assert twice["grouped_up"] == once["grouped_up"] + 1
    assert twice.get("shrink", 0) == once.get("shrink", 0) + len(case.up) + len(case.down)
    for name in ("grouped_gemm", "combine"):
        assert twice[name] == once[name], name


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.id)
def test_without_early_stop_all_runs_twice(case: LoraCase, calls: dict[str, int]) -> None:
    expected, once = counted(case, layer, calls)
    with set_checkpoint_early_stop(False):
        got, twice = counted(case, again(), calls)
    assert_same(got, expected)
    for name in ("grouped_up", "grouped_gemm", "combine"):
        assert twice[name] == once[name] + 1, name


def test_reentrant() -> None:
    assert_same(results(CASES[1], again(use_reentrant=True)), results(CASES[1], layer))


def test_a_torch_that_does_not_tell_its_hooks(calls: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One Function as elsewhere: right, and slower."""
    expected, once = counted(SMALL, layer, calls)
    monkeypatch.setattr(module("ops._torch_compat"), "_hooks", lambda ignore_is_tracing: None)
    got, twice = counted(SMALL, again(), calls)
    assert_same(got, expected)
    assert twice["grouped_gemm"] == once["grouped_gemm"] + 1


def test_outside_of_hooks_there_is_one_function() -> None:
    y = run_lora(SMALL, make_lora_inputs(SMALL, torch.float32))
    with saved_tensors_hooks(lambda value: value, lambda value: value):
        in_two = run_lora(SMALL, make_lora_inputs(SMALL, torch.float32))
    ((first, _), *_) = in_two.grad_fn.next_functions
    assert first.name() == y.grad_fn.name()
    assert y.grad_fn.name() != in_two.grad_fn.name()


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6]], ids=lambda case: case.id)
def test_two_functions_save_what_one_does(case: LoraCase, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[list[tuple[torch.Size, torch.dtype, int]]] = []

    def pack(value: Tensor) -> Tensor:
        saved[-1].append((value.shape, value.dtype, value.untyped_storage().nbytes()))
        return value

    for _ in range(2):
        saved.append([])
        with saved_tensors_hooks(pack, lambda value: value):
            run_lora(case, make_lora_inputs(case, torch.float32))
        monkeypatch.setattr(module("ops._torch_compat"), "_hooks", lambda ignore_is_tracing: None)
    assert saved[0] == saved[1]


def test_what_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """h until the down projection is done; under checkpointing gate_up not even that long, nor what only a replay makes."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[tuple[str, list[bool]]] = []
    backend = stages(torch.float32)

    def note(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            alive.append((name, [value() is not None for value in made]))
            return stage(*args, **kwargs)

        return noting

    def grouped_up(*args: Any, up: Callable[..., Any] = backend.grouped_up, **kwargs: Any) -> Any:
        made[:] = map(weakref.ref, h_and_gate_up := up(*args, **kwargs))
        return h_and_gate_up

    monkeypatch.setattr(backend, "grouped_up", grouped_up)
    for name in ("grouped_gemm", "combine", "down_backward"):
        monkeypatch.setattr(backend, name, note(name, getattr(backend, name)))
    case = LoraCase("alive", "", up=(), down=(), trained=True)
    for run, expected in (
        (run_lora, [("grouped_gemm", [True, True]), ("combine", [False, True]), ("down_backward", [False, True])]),
        (again(), [("grouped_gemm", [True, False]), ("combine", [False, False]), ("down_backward", [False, True])]),
    ):
        alive.clear()
        results(case, run)
        assert alive[:3] == expected


def test_two_calls_in_a_layer() -> None:
    """The first one's output is the second one's input, and runs again."""

    def twice(case: LoraCase, inputs: PackedInputs) -> Tensor:
        tensors = {**inputs.inputs.tensors, "hidden_states": layer(case, inputs)}
        return layer(case, replace(inputs, inputs=replace(inputs.inputs, tensors=tensors)))

    assert_same(results(SMALL, again(twice)), results(SMALL, twice))


def test_an_output_that_the_layer_needs(calls: dict[str, int]) -> None:
    """Where something saves the output, the replay makes it."""

    def activated(case: LoraCase, inputs: PackedInputs) -> Tensor:
        return layer(case, inputs).tanh()

    expected, once = counted(SMALL, activated, calls)
    got, twice = counted(SMALL, again(activated), calls)
    assert_same(got, expected)
    assert twice["grouped_gemm"] == once["grouped_gemm"] + 1


def test_backward_twice() -> None:
    inputs = make_lora_inputs(SMALL, torch.float32)
    x, grad = inputs.inputs.tensors["hidden_states"], inputs.inputs.grad
    y = again()(SMALL, inputs)
    first, second = (torch.autograd.grad(y, x, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (expected,) = torch.autograd.grad(layer(SMALL, inputs), x, grad)
    assert torch.equal(first, expected)


def test_second_order_gradients_are_refused() -> None:
    inputs = make_lora_inputs(SMALL, torch.float32)
    with pytest.raises(RuntimeError, match="experts has no second derivative"):
        torch.autograd.grad(again()(SMALL, inputs).sum(), inputs.inputs.tensors["hidden_states"], create_graph=True)


def test_no_gradient_is_passed_on() -> None:
    """What gives None for the gradient of its input leaves that of the experts None, not zeros."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    inputs = make_lora_inputs(SMALL, torch.float32)
    with saved_tensors_hooks(lambda value: value, lambda value: value):
        Stop.apply(run_lora(SMALL, inputs)).sum().backward()
    assert all(value.grad is None for value in inputs.inputs.tensors.values())


def test_autocast(calls: dict[str, int]) -> None:
    with torch.autocast(DEVICE.type, torch.float16):
        expected, once = counted(CASES[0], layer, calls)
        got, twice = counted(CASES[0], again(), calls)
    assert_same(got, expected)
    assert twice["grouped_gemm"] == once["grouped_gemm"]


def test_a_compiled_layer() -> None:
    """The compiler decides itself what runs again."""
    torch._dynamo.reset()
    expected = results(SMALL, layer)

    def compiled(case: LoraCase, inputs: PackedInputs) -> Tensor:
        return torch.compile(lambda: again()(case, inputs), backend="aot_eager", fullgraph=True)()

    assert_same(results(SMALL, compiled), expected)
