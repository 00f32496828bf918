"""``moe_experts`` and all its gradients against a loop over the experts in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from tests.kernel.accuracy import assert_accurate
from tests.kernel.cases import (
    ExpertsCase,
    Inputs,
    gradients,
    in_every_dtype,
    make_inputs,
    plain_experts,
    plain_gate,
    run_experts,
)
from tests.kernel.machine import DEVICE, DTYPES, module, name_of

CASES = [
    ExpertsCase("plain", "nothing special", half=True),
    ExpertsCase("no-tokens", "T=0: no rows, gradients of the weights are zeros", tokens=0),
    ExpertsCase("one-token", "T=1: with gradients it is routed, one row an expert", tokens=1, top_k=4),
    ExpertsCase("one-expert-takes-all", "every tile but one expert's is unused", index="one"),
    ExpertsCase("most-experts-empty", "empty experts before, between and after", experts=17, index="few"),
    ExpertsCase("top-1", "K=1: slots are tokens", top_k=1),
    ExpertsCase("top-all", "K=E: every expert sees every token", top_k=5),
    ExpertsCase("one-expert", "E=1: one id, padded to two for the sort", experts=1, top_k=1),
    ExpertsCase("eight-experts", "E a power of two: no padding in the sort", experts=8),
    ExpertsCase(
        "odd-features", "rows that no vector load or descriptor can take", hidden=27, intermediate=13, half=True
    ),
    ExpertsCase("tiny-features", "less than any tile, one feature", hidden=3, intermediate=1),
    ExpertsCase("even-features", "whole tiles: the loads without masks", hidden=64, intermediate=128, tokens=5),
    ExpertsCase("rows-of-32", "tile height 32: up to 16 rows an expert", tokens=34, experts=5, top_k=2),
    ExpertsCase("rows-of-64", "tile height 64: up to 64 rows an expert", tokens=61, experts=2, top_k=1),
    ExpertsCase("rows-of-128", "tile height 128, two tiles for one expert", tokens=150, experts=2, top_k=1),
    ExpertsCase("int32-ids", "ids as vLLM and SGLang have them", index_dtype=torch.int32),
    ExpertsCase("uint8-ids", "the smallest dtype of ids", index_dtype=torch.uint8, index="partly mine"),
    ExpertsCase("partly-mine", "id E is an expert held elsewhere: zeros", index="partly mine", tokens=12),
    ExpertsCase("not-mine", "no slot is ours: zeros everywhere, nothing read", index="not mine"),
    ExpertsCase("not-mine-bias", "a bias must not reach a slot that is not ours", index="partly mine", bias=True),
    ExpertsCase("out-of-range", "negative and too large ids read no weights", index="out of range", tokens=12),
    ExpertsCase("repeated-expert", "a token has one expert several times", index="repeated", top_k=3),
    ExpertsCase("zero-weights", "the routing weights' own gradient is not zero", zero_weights=True),
    ExpertsCase("fp32-weights", "routers of many models return fp32", routing_dtype=torch.float32, half=True),
    ExpertsCase("strided-x", "a view of hidden states", strided=("hidden_states", "grad")),
    ExpertsCase("strided-routing", "views of ids and routing weights", strided=("top_k_index", "top_k_weights")),
    ExpertsCase("strided-weights", "no features dimension is contiguous", strided=("gate_up_proj", "down_proj")),
    ExpertsCase("strided-bias", "views of biases", strided=("gate_up_bias", "down_bias"), bias=True),
    ExpertsCase("interleaved", "gate and up columns alternate", interleaved=True),
    ExpertsCase("transposed", "weights stored (E, in, out)", transposed=True),
    ExpertsCase(
        "gpt-oss",
        "all of its layout at once",
        activation="swiglu_oai",
        interleaved=True,
        transposed=True,
        bias=True,
        half=True,
    ),
    ExpertsCase("bias", "a biased down projection adds to the routing weights' gradient", bias=True),
    ExpertsCase("nemotron", "no gate", activation="relu2", gated=False),
    ExpertsCase("no-gate-bias-transposed", "no gate with all else", gated=False, bias=True, transposed=True, half=True),
    ExpertsCase("gelu", "by erf", activation="gelu"),
    ExpertsCase("gelu-tanh", "by tanh", activation="gelu_tanh"),
    ExpertsCase("relu", "a kink at zero", activation="relu"),
    ExpertsCase("relu2", "gated", activation="relu2"),
]


def assert_equals_truth(case: ExpertsCase, inputs: Inputs, ours: dict[str, Tensor]) -> None:
    truth = gradients(plain_experts(case, exact := inputs.to(torch.float64)), exact)
    torchs = gradients(plain_experts(case, plain := inputs.copy()), plain)
    for name, value in ours.items():
        assert_accurate(name, value, truth[name], torchs[name])


@in_every_dtype(CASES)
def test_forward_and_gradients(case: ExpertsCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    assert_equals_truth(case, inputs, gradients(run_experts(case, inputs), inputs))


# Without gradients few slots take the matrix-vector path and many the routed path, which then saves nothing.
WITHOUT_GRADIENTS = [
    ExpertsCase("decode", "T=1, one row a slot", tokens=1, top_k=4, half=True),
    ExpertsCase("decode-batch", "several tokens share experts", tokens=4, top_k=3),
    ExpertsCase("decode-one-expert", "K=E=1", tokens=1, top_k=1, experts=1),
    ExpertsCase("decode-odd", "no block divides the features", tokens=2, hidden=35, intermediate=9),
    ExpertsCase("decode-wide-hidden", "two blocks to sum over in the up projection", tokens=1, hidden=520),
    ExpertsCase(
        "decode-wide-intermediate",
        "two blocks to sum over in the down projection",
        tokens=1,
        top_k=1,
        intermediate=1030,
        gated=False,
        activation="relu",
    ),
    ExpertsCase("decode-partly-mine", "ids that are E", tokens=3, top_k=4, index="partly mine"),
    ExpertsCase("decode-not-mine", "nothing to do: zeros", tokens=2, index="not mine", bias=True),
    ExpertsCase("decode-out-of-range", "ids beyond E and below zero", tokens=3, top_k=4, index="out of range"),
    ExpertsCase("decode-int32", "ids of another width", tokens=2, index_dtype=torch.int32),
    ExpertsCase("decode-fp32-weights", "routers return fp32", tokens=2, routing_dtype=torch.float32, half=True),
    ExpertsCase("decode-bias", "concatenated bias", tokens=2, bias=True),
    ExpertsCase("decode-transposed", "weights stored (E, in, out)", tokens=2, transposed=True),
    ExpertsCase("decode-no-gate", "one column block", tokens=2, gated=False, activation="relu2", bias=True),
    ExpertsCase(
        "decode-gpt-oss",
        "all of its layout at once",
        tokens=2,
        activation="swiglu_oai",
        interleaved=True,
        transposed=True,
        bias=True,
        half=True,
    ),
    ExpertsCase(
        "decode-strided",
        "every argument a view",
        tokens=3,
        bias=True,
        strided=(
            "hidden_states",
            "top_k_index",
            "top_k_weights",
            "gate_up_proj",
            "down_proj",
            "gate_up_bias",
            "down_bias",
        ),
    ),
    ExpertsCase("routed", "too many slots for decode: the up projection saves nothing", tokens=17, top_k=4),
    ExpertsCase("no-tokens", "T=0", tokens=0),
]


@in_every_dtype(WITHOUT_GRADIENTS)
def test_forward_without_gradients(case: ExpertsCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    with torch.no_grad():
        ours = run_experts(case, inputs)
        truth, torchs = plain_experts(case, inputs.to(torch.float64)), plain_experts(case, inputs)
    assert_accurate("y", ours, truth, torchs)


# A gate of the caller's own runs between two grouped linear layers.
CALLABLE = [
    ExpertsCase("gate-function", "composed of dispatch, two grouped linear layers and combine", half=True),
    ExpertsCase("gate-function-partly-mine", "rows of no expert pass through the function", index="partly mine"),
    ExpertsCase("gate-function-not-mine", "all rows are of no expert", index="not mine", bias=True),
    ExpertsCase("gate-function-one-token", "no decode path here", tokens=1),
    ExpertsCase("gate-function-no-tokens", "T=0", tokens=0),
    ExpertsCase(
        "gate-function-strided", "views", strided=("hidden_states", "top_k_index", "top_k_weights", "down_proj")
    ),
    ExpertsCase("gate-function-fp32-weights", "combine weighs in fp32", routing_dtype=torch.float32, half=True),
    ExpertsCase(
        "gate-function-gpt-oss",
        "a module's own gate on gpt-oss' layout",
        activation="swiglu_oai",
        interleaved=True,
        transposed=True,
        bias=True,
    ),
]


@in_every_dtype(CALLABLE)
def test_gate_function(case: ExpertsCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    y = run_experts(case, inputs, activation=lambda gate_up: plain_gate(gate_up, case))
    assert_equals_truth(case, inputs, gradients(y, inputs))


LIMITED = ExpertsCase("limit", "clamps that bind", activation="swiglu_oai", bias=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_values_beyond_the_swiglu_limit(dtype: torch.dtype) -> None:
    """Beyond the limit the clamped factor is constant: no gradient passes."""
    inputs = make_inputs(LIMITED, dtype)
    with torch.no_grad():
        inputs.tensors["hidden_states"] *= 8
    ours = gradients(run_experts(LIMITED, inputs), inputs)
    assert_equals_truth(LIMITED, inputs, ours)


def test_swiglu_alpha_and_limit_are_used() -> None:
    inputs = make_inputs(LIMITED, torch.float32)
    with torch.no_grad():
        usual = run_experts(LIMITED, inputs)
        assert not torch.equal(usual, run_experts(LIMITED, inputs, swiglu_alpha=1.0))
        assert not torch.equal(usual, run_experts(LIMITED, inputs, swiglu_limit=0.5))


# The stages that each gradient needs, and no other may run in backward.
STAGES_OF = {
    "hidden_states": {"down_backward": 1, "grouped_gemm": 1, "combine": 1},
    "top_k_weights": {"down_backward": 1},
    "gate_up_proj": {"down_backward": 1, "grouped_wgrad": 1},
    "down_proj": {"down_backward": 1, "grouped_wgrad": 1},
    "gate_up_bias": {"down_backward": 1, "grouped_row_sum": 1},
    "down_bias": {"grouped_row_sum": 1},
}


@functools.cache
def _gradients_of_all(case: ExpertsCase) -> dict[str, torch.Tensor]:
    inputs = make_inputs(case, torch.float32)
    return gradients(run_experts(case, inputs), inputs)


@pytest.mark.parametrize("wanted", STAGES_OF)
def test_only_the_gradient_asked_for_is_computed(wanted: str, calls: dict[str, int]) -> None:
    case = ExpertsCase("one-gradient", "all else is frozen", bias=True)
    inputs = make_inputs(case, torch.float32)
    for name, value in inputs.tensors.items():
        value.requires_grad_(name == wanted)
    y = run_experts(case, inputs)
    calls.clear()
    y.backward(inputs.grad)
    assert calls == STAGES_OF[wanted]
    assert {name for name, value in inputs.tensors.items() if value.grad is not None} == {wanted}
    assert torch.equal(inputs.tensors[wanted].grad, _gradients_of_all(case)[f"gradient of {wanted}"])


def test_frozen_experts_form_no_weight_gradients(calls: dict[str, int]) -> None:
    """A model that trains only what stands before the experts."""
    case = ExpertsCase("frozen", "gradients of hidden states and routing weights only")
    inputs = make_inputs(case, torch.float32)
    for name in ("gate_up_proj", "down_proj"):
        inputs.tensors[name].requires_grad_(False)
    run_experts(case, inputs).backward(inputs.grad)
    assert "grouped_wgrad" not in calls
    assert calls["down_backward"] == 1


def test_forward_without_gradients_saves_nothing() -> None:
    case = ExpertsCase("inference", "more slots than decode takes", tokens=33)
    inputs = make_inputs(case, torch.float32)
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda value: value):
        y = run_experts(case, inputs)
    assert not y.requires_grad
    assert saved == []


@pytest.mark.parametrize("activation", module("activations").ACTIVATIONS)
def test_nan_stays_nan(activation: str) -> None:
    """Clamps must not turn NaN into a number, as a GPU's plain min and max do; loss scalers look for it."""
    case = ExpertsCase("nan", "a NaN in one token", tokens=40, activation=activation)
    inputs = make_inputs(case, torch.float32)
    with torch.no_grad():
        inputs.tensors["hidden_states"][3, 0] = float("nan")
        y = run_experts(case, inputs)
    assert y[3].isnan().all()
    assert not y[:3].isnan().any()


def test_a_weight_of_nobodys_slot_does_not_count() -> None:
    """Not even if it is NaN: the expert lives elsewhere, and so may its router."""
    case = ExpertsCase("nan-weight", "", tokens=40, index="partly mine")
    inputs = make_inputs(case, torch.float32)
    not_mine = inputs.index >= case.experts
    assert not_mine.any()
    expected = run_experts(case, inputs)
    with torch.no_grad():
        inputs.tensors["top_k_weights"][not_mine] = float("nan")
        torch.testing.assert_close(run_experts(case, inputs), expected)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=name_of)
def test_a_poisoned_token_stays_alone(dtype: torch.dtype, poison: float) -> None:
    """Tiles hold rows of other experts and of nothing at their ends; Inf or NaN there must not be multiplied in."""
    case = ExpertsCase("poison", "", tokens=11, top_k=2, experts=4)
    clean, poisoned = make_inputs(case, dtype), make_inputs(case, dtype)
    # The first token alone has expert 1.
    for inputs in (clean, poisoned):
        inputs.index[inputs.index == 1] = 2
        inputs.index[0] = 1
    with torch.no_grad():
        poisoned.tensors["hidden_states"][0] = poison
    expected, got = (gradients(run_experts(case, inputs), inputs) for inputs in (clean, poisoned))
    assert not got["y"][0].isfinite().all()
    for name in ("y", "gradient of hidden_states", "gradient of top_k_weights"):
        assert torch.equal(got[name][1:], expected[name][1:]), name
    others = [0, 2, 3]
    for name in ("gradient of gate_up_proj", "gradient of down_proj"):
        assert torch.equal(got[name][others], expected[name][others]), name


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=name_of)
def test_poisoned_weights_of_an_unused_expert_stay_alone(dtype: torch.dtype) -> None:
    """Blocks that reach past the last feature of an expert touch the next expert's weights."""
    case = ExpertsCase("poisoned-expert", "", experts=4, hidden=27, intermediate=13)
    inputs = make_inputs(case, dtype)
    inputs.index[inputs.index == 2] = 4
    with torch.no_grad():
        inputs.tensors["gate_up_proj"][2] = float("nan")
        inputs.tensors["down_proj"][2] = float("inf")
    for name, value in gradients(run_experts(case, inputs), inputs).items():
        assert value.isfinite().all(), name
    assert inputs.tensors["gate_up_proj"].grad[2].count_nonzero() == 0
    assert inputs.tensors["down_proj"].grad[2].count_nonzero() == 0


def test_slots_of_no_expert_have_zero_gradients() -> None:
    """Exactly zero, though the memory behind their rows is not initialised."""
    case = ExpertsCase("exactly-zero", "", index="partly mine", tokens=12, bias=True)
    inputs = make_inputs(case, torch.float32)
    inputs.index[3] = case.experts
    result = gradients(run_experts(case, inputs), inputs)
    elsewhere = inputs.index == case.experts
    assert result["y"][3].count_nonzero() == 0
    assert result["gradient of hidden_states"][3].count_nonzero() == 0
    assert result["gradient of top_k_weights"][elsewhere].count_nonzero() == 0
    assert result["gradient of top_k_weights"][~elsewhere].count_nonzero() == (~elsewhere).sum()


def test_weights_gradients_keep_the_layout_of_the_weights() -> None:
    """Optimizers and all-reduce want a gradient strided like its parameter."""
    case = ExpertsCase("layout", "", transposed=True)
    inputs = make_inputs(case, torch.float32)
    inputs.tensors["down_proj"] = inputs.tensors["down_proj"].detach().mT.contiguous().mT.requires_grad_()
    gradients(run_experts(case, inputs), inputs)
    for name in ("gate_up_proj", "down_proj"):
        value = inputs.tensors[name]
        assert value.grad.stride() == value.stride(), name


@pytest.mark.parametrize("activation", ["silu", plain_gate], ids=["fused", "gate-function"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(low: torch.dtype, activation: object) -> None:
    """Computes in autocast's dtype; outputs and gradients keep the dtypes of their arguments."""
    case = ExpertsCase("autocast", "fp32 master weights")
    inputs, expected = make_inputs(case, torch.float32), make_inputs(case, torch.float32).to(low)
    function = (lambda gate_up: plain_gate(gate_up, case)) if callable(activation) else activation
    y = run_experts(case, expected, activation=function)
    with torch.autocast(DEVICE.type, dtype=low):
        ours = run_experts(case, inputs, activation=function)
    assert ours.dtype == torch.float32
    # top_k_weights are not cast: a router's fp32 stays fp32.
    inputs_low = expected.copy()
    inputs_low.tensors["top_k_weights"] = make_inputs(case, torch.float32).tensors["top_k_weights"]
    assert torch.equal(ours.to(low), run_experts(case, inputs_low, activation=function))
    assert y.dtype == low
    ours.backward(inputs.grad)
    for name, value in inputs.tensors.items():
        assert value.grad.dtype == torch.float32, name
        assert value.grad.isfinite().all(), name
