"""What torch keeps private (``ops._torch_compat``): without any of the names, results are the same, only slower."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils.checkpoint import checkpoint

from tests.kernel.cases import ExpertsCase, gradients, make_inputs, run_experts
from tests.kernel.machine import DEVICE, kernel, module

CASE = ExpertsCase("compat", "", tokens=4, top_k=2, experts=3, hidden=8, intermediate=6)

# The names that go, each with what had them.
MODES = ((torch._C, "_len_torch_dispatch_stack"),)
NO_MODES = (*MODES, (_python_dispatch, "_get_current_dispatch_mode"))
TRANSFORMS = ((torch._C._functorch, "peek_interpreter_stack"),)
NO_TRANSFORMS = (*TRANSFORMS, (torch._C, "_are_functorch_transforms_active"))
HOOKS = ((torch._C._autograd, "_top_saved_tensors_default_hooks"),)
LEVEL = ((forward_ad, "_current_level"),)
FAKE = ((torch._subclasses, "FakeTensor"),)
MISSING = {
    "none": (),
    "modes": MODES,
    "modes, both names": NO_MODES,
    "transforms": TRANSFORMS,
    "transforms, both names": NO_TRANSFORMS,
    "hooks": HOOKS,
    "forward mode": LEVEL,
    "fake tensors": FAKE,
    "all": (*NO_MODES, *NO_TRANSFORMS, *HOOKS, *LEVEL, *FAKE),
}


@pytest.fixture(params=MISSING.values(), ids=MISSING)
def compat(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module as it is in a torch without some names, and the kernel with it."""
    path = module("ops._torch_compat").__file__
    spec = importlib.util.spec_from_file_location("torch_compat_without", path)
    other = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as without:
        for holder, name in request.param:
            without.delattr(holder, name)
        spec.loader.exec_module(other)
    for user in ("ops.autograd", "checks"):
        for name in vars(other):
            if not name.startswith("_") and hasattr(module(user), name):
                monkeypatch.setattr(module(user), name, getattr(other, name))
    if (forward_ad, "_current_level") in request.param:
        # torch itself reads this one, so only the function that reads it here can go without.
        level = type("forward_ad", (), {})
        monkeypatch.setattr(other, "forward_ad", level)
    return other


def missing(compat: Any, request: pytest.FixtureRequest) -> str:
    return request.node.callspec.id


def test_what_they_say_outside_of_everything(compat: Any, request: pytest.FixtureRequest) -> None:
    gone = missing(compat, request)
    assert compat.intercepted() is ("both names" in gone or gone == "all")
    assert compat.saved_tensors_hooks_are_active() is False
    assert compat.forward_mode_is_active() is (gone in ("forward mode", "all"))


def test_a_mode_is_seen(compat: Any) -> None:
    with torch._subclasses.FakeTensorMode():
        assert compat.intercepted()


def test_fake_tensors_are_known_where_torch_tells(compat: Any, request: pytest.FixtureRequest) -> None:
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(2)
    assert compat.is_plain_or_fake(fake) is (missing(compat, request) not in ("fake tensors", "all"))
    assert compat.is_plain_or_fake(torch.empty(2))
    assert compat.is_plain_or_fake(torch.nn.Parameter(torch.empty(2)))
    assert not compat.is_plain_or_fake(torch.nn.Buffer(torch.empty(2)).as_subclass(type("Other", (Tensor,), {})))


def test_a_transform_is_seen(compat: Any) -> None:
    seen = []
    torch.func.vmap(lambda x: (seen.append(compat.intercepted()), x)[1])(torch.zeros(2))
    assert seen == [True]


def test_forward_mode_is_seen(compat: Any) -> None:
    with forward_ad.dual_level():
        assert compat.forward_mode_is_active()


def test_hooks_are_seen_where_torch_tells(compat: Any, request: pytest.FixtureRequest) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda value: value, lambda value: value):
        assert compat.saved_tensors_hooks_are_active() is (missing(compat, request) not in ("hooks", "all"))


def results(checkpointed: bool) -> dict[str, Tensor]:
    inputs = make_inputs(CASE, torch.float32)

    def run(_: Tensor) -> Tensor:
        return run_experts(CASE, inputs)

    x = inputs.tensors["hidden_states"]
    return gradients(checkpoint(run, x, use_reentrant=False) if checkpointed else run(x), inputs)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_experts_are_the_same(compat: Any, checkpointed: bool) -> None:
    expected = results_of_torch_as_it_is(checkpointed)
    for name, value in results(checkpointed).items():
        assert torch.equal(value, expected[name]), name


def results_of_torch_as_it_is(checkpointed: bool) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as back:
        for name in ("any_special", "forward_mode_is_active", "intercepted", "saved_tensors_hooks_are_active"):
            back.setattr(module("ops.autograd"), name, getattr(module("ops._torch_compat"), name))
        return results(checkpointed)


def test_without_gradients(compat: Any) -> None:
    inputs = make_inputs(replace(CASE, tokens=40), torch.float32)
    with torch.no_grad():
        y = run_experts(CASE, inputs)
    assert torch.equal(y, run_experts(CASE, inputs).detach())


def test_the_linear_layer_refuses_forward_mode(compat: Any) -> None:
    if compat.intercepted():
        pytest.skip("an operator has no forward mode, and torch does not tell it that there is a tangent")
    rows, weight = torch.ones(4, 3, device=DEVICE), torch.ones(2, 5, 3, device=DEVICE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(rows, torch.ones_like(rows))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward mode"):
            kernel.moe_fused_linear(dual, weight, torch.tensor([2, 2], device=DEVICE))
