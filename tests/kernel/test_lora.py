"""``moe_experts`` with adapters, and the gradients of their factors, against experts whose weights are merged in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernel.accuracy import assert_accurate
from tests.kernel.cases import plain_gate
from tests.kernel.lora_cases import (
    ADAPTED,
    SLACK,
    Factors,
    LoraCase,
    assert_equals_merged,
    factors_of,
    lora_cases,
    lora_gradients,
    low_rank,
    make_lora_inputs,
    run_lora,
    without_factors,
)
from tests.kernel.machine import DEVICE, DTYPES, backend, kernel, name_of
from tests.kernel.packed_cases import ALL, ONE, decoding, run_packed

LoraWeights = kernel.LoraWeights

SHARED, SEPARATE = (Factors(),), (Factors(separate=True),)
FP32 = Factors(dtype=torch.float32)
PACKED = {"dense": (), "hidden": 64, "intermediate": 128}

CASES = [
    LoraCase("plain", "one adapter of each projection, weights trained with them", trained=True),
    LoraCase("separate", "gate and up have an A each", up=SEPARATE, trained=True, half=True),
    *(
        LoraCase(f"rank-{rank}", why, up=(Factors(rank, separate),), down=(Factors(rank),))
        for rank, separate, why in (
            (1, True, "a vector: strides of the rank say nothing"),
            (16, True, "exactly one block of the smallest kind"),
            (20, False, "a whole block and a part of one"),
            (64, True, "one block of the largest kind in 16 bits, two in fp32"),
            (256, False, "above any block, and above the features"),
        )
    ),
    LoraCase("up-alone", "no adapter of the down projection", down=()),
    LoraCase("down-alone", "no adapter of the up projection", up=()),
    LoraCase("one-expert-takes-all", "gradients of all other factors are zero", index="one"),
    LoraCase("partly-mine", "left products of nobody's rows count nowhere", index="partly mine", up=SEPARATE),
    LoraCase("not-mine", "no slot is ours", index="not mine", trained=True),
    LoraCase("no-tokens", "T=0", tokens=0, up=SEPARATE),
    LoraCase("one-token", "T=1, which without adapters would not be routed", tokens=1, top_k=3),
    LoraCase("odd-features", "no load is of a vector", hidden=27, intermediate=13, up=SEPARATE),
    LoraCase("even-features", "loads without masks", hidden=64, intermediate=64, tokens=3, up=(Factors(16),)),
    LoraCase("rows-of-64", "tile height 64", tokens=61, experts=2, top_k=1, hidden=24, up=SEPARATE),
    LoraCase("several", "the sum of two", up=SHARED * 2, down=SHARED * 2),
    LoraCase(
        "several-ranks",
        "of different rank and scaling",
        up=(Factors(3, scaling=2.0), Factors(17, scaling=0.25), Factors(1)),
        down=(Factors(20), Factors(4, scaling=-1.0)),
    ),
    LoraCase("several-mixed", "a shared A counts in both halves", up=(Factors(3), Factors(6, True), Factors(2, True))),
    LoraCase("several-dtypes", "beside that of the rest", up=(FP32, Factors()), down=(Factors(), FP32), half=True),
    LoraCase(
        "peft",
        "B as PEFT's parameter shows it, also where halves are cut from it",
        up=(Factors(separate=True, layout="peft"),),
        down=(Factors(3, layout="peft"),),
        half=True,
    ),
    LoraCase(
        "strided",
        "views without a contiguous dimension",
        strided=("hidden_states", "top_k_weights", "gate_up_proj", "grad"),
        up=(Factors(layout="gaps"),),
        down=(Factors(layout="gaps"),),
    ),
    LoraCase(
        "fp32-factors",
        "what adapters are trained in: gradients in fp32",
        up=(replace(FP32, separate=True),),
        down=(FP32,),
        half=True,
    ),
    LoraCase("fp32-routing-weights", "in the weighted weight-gradient product", routing_dtype=torch.float32, half=True),
    LoraCase("transposed", "weights stored (E, in, out), factors not", transposed=True, up=SEPARATE),
    LoraCase("interleaved", "rows of B alternate as those of the weights", interleaved=True),
    LoraCase("bias", "adapters and biases add up", bias=True, trained=True),
    LoraCase("no-gate", "no halves", gated=False, activation="relu2", bias=True),
    LoraCase(
        "gpt-oss",
        "all of its layout at once",
        activation="swiglu_oai",
        interleaved=True,
        transposed=True,
        bias=True,
        half=True,
    ),
    LoraCase("packed", "4-bit weights decoded in the products", **PACKED, half=True),
    LoraCase("packed-rank-40", "halves of several blocks", **PACKED, up=(Factors(40, True),), projections=2),
    LoraCase(
        "packed-parts", "decoded beforehand: every part begins in the right half", **PACKED, in_gemm=False, up=SEPARATE
    ),
    LoraCase(
        "packed-gpt-oss",
        "all of its layout at once, but for the transposition",
        **PACKED,
        activation="swiglu_oai",
        interleaved=True,
        bias=True,
    ),
    LoraCase("packed-up", "dense weights beside packed ones", **(PACKED | {"dense": ("down_proj",)}), quant_type="fp4"),
]


def forced(case: LoraCase) -> Any:
    """Where the case decodes packed weights."""
    return decoding(case.in_gemm, ALL if case.in_gemm else ONE)


@lora_cases(CASES)
def test_forward_and_gradients(case: LoraCase, dtype: torch.dtype) -> None:
    inputs = make_lora_inputs(case, dtype)
    with forced(case) as taken:
        ours = lora_gradients(case, inputs)
    assert_equals_merged(case, inputs, ours)
    if "down_proj" not in case.dense and backend.uses_triton(torch.empty(0, device=DEVICE), dtype):
        assert ("down backward" in taken) == case.in_gemm


FUNCTIONS = [
    LoraCase("function", "between two grouped linear layers with adapters", function=True, trained=True),
    LoraCase("function-separate", "halves apart there", function=True, up=SEPARATE, index="partly mine"),
    LoraCase(
        "function-mixed",
        "fused and apart",
        function=True,
        up=(Factors(3), replace(FP32, separate=True)),
        down=SHARED * 2,
    ),
    LoraCase("function-gpt-oss", "its layout", function=True, interleaved=True, transposed=True, bias=True),
    LoraCase("function-packed", "4-bit weights", **PACKED, function=True, up=(Factors(separate=True, layout="peft"),)),
]


@lora_cases(FUNCTIONS)
def test_gate_function(case: LoraCase, dtype: torch.dtype) -> None:
    inputs = make_lora_inputs(case, dtype)
    with forced(case):
        ours = lora_gradients(case, inputs)
    assert_equals_merged(case, inputs, ours)


WITHOUT_GRADIENTS = [
    LoraCase("inference", "few slots, which are routed all the same", tokens=2, up=SEPARATE, half=True),
    LoraCase("inference-packed", "4-bit weights", **PACKED, tokens=1),
    LoraCase("inference-down", "the up projection as it is", tokens=2, up=()),
]


@lora_cases(WITHOUT_GRADIENTS)
def test_forward_without_gradients(case: LoraCase, dtype: torch.dtype) -> None:
    inputs = make_lora_inputs(case, dtype)
    with torch.no_grad(), forced(case):
        y = run_lora(case, inputs)
    assert not y.requires_grad
    assert_equals_merged(case, inputs, {"y": y})


# ----------------------------------------------------------------------------------------------------------- recompute

RECOMPUTED = [
    LoraCase("recompute", "gate_up is made again", trained=True, bias=True),
    LoraCase("recompute-no-adapters", "by itself", up=(), down=()),
    LoraCase("recompute-down-alone", "no left product of the up projection", up=(), gated=False, activation="gelu"),
    LoraCase("recompute-gpt-oss", "in place in alternating columns", activation="swiglu_oai", interleaved=True),
    LoraCase("recompute-packed", "decoded again", **PACKED, tokens=2),
    LoraCase("recompute-packed-parts", "in place part by part", **PACKED, tokens=2, in_gemm=False, up=SEPARATE),
    LoraCase("recompute-no-tokens", "T=0", tokens=0),
]


@lora_cases(RECOMPUTED)
def test_recompute_changes_no_bit(case: LoraCase, dtype: torch.dtype) -> None:
    results = []
    for recompute in (False, True):
        inputs = make_lora_inputs(case, dtype)
        with forced(case):
            results.append(lora_gradients(case, inputs, recompute=recompute))
    kept, again = results
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name


def saved_by(case: LoraCase, **options: Any) -> list[tuple[int, ...]]:
    """Shapes of what forward saves, without what its arguments own."""
    inputs = make_lora_inputs(case, torch.float32)
    owned = {value.untyped_storage().data_ptr() for value in inputs.inputs.tensors.values()}
    saved: list[tuple[int, ...]] = []

    def pack(value: Tensor) -> Tensor:
        if value.numel() and value.untyped_storage().data_ptr() not in owned:
            saved.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        run_lora(case, inputs, **options)
    return saved


def test_what_is_saved() -> None:
    """gate_up, the routing and thin products; no rows of hidden features, and with recompute no gate_up either."""
    case = LoraCase("saved", "", tokens=10, up=(Factors(3, separate=True),), down=(Factors(4),))
    rows, columns = 20, case.columns
    kept, again = saved_by(case), saved_by(case, recompute=True)
    assert (rows, columns) in kept
    assert sorted(shape for shape in kept if len(shape) == 2) == [(rows, 4), (rows, 6), (rows, columns)]
    assert sorted(shape for shape in again if len(shape) == 2) == [(rows, 4), (rows, 6)]
    assert sum(len(shape) == 1 for shape in kept) == sum(len(shape) == 1 for shape in again) == 1


def test_recompute_with_dropout_keeps_no_rows() -> None:
    """Where stages have autograd of their own, all of them run again, with the same mask."""
    dropping = (Factors(dropout=P),)
    case = LoraCase("recompute-dropout", "", up=dropping, down=dropping)
    rows = case.tokens * case.top_k
    assert not any(shape[0] == rows for shape in saved_by(case, recompute=True))
    results = []
    for recompute in (False, True):
        inputs = make_lora_inputs(case, torch.float32)
        torch.manual_seed(3)
        results.append(lora_gradients(case, inputs, recompute=recompute))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_scaling_that_is_an_integer() -> None:
    """A compiled kernel must not keep the first one for all."""
    results = []
    for scaling in (1, 2.0, 2, 1.0):
        case = LoraCase("scaling", "", up=(Factors(scaling=scaling),), down=(Factors(scaling=scaling),))
        with torch.no_grad():
            results.append(run_lora(case, make_lora_inputs(case, torch.float32)))
    assert torch.equal(results[0], results[3])
    assert torch.equal(results[1], results[2])
    assert not torch.allclose(results[0], results[1])


# ------------------------------------------------------------------------------------------------ only what is asked for

NAMES = ("hidden_states", "top_k_weights", *(f"{argument}[0].{part}" for argument in ADAPTED for part in "ab"))

# The stages that each gradient needs under frozen weights, and no other may run in backward.
STAGES_OF = {
    "hidden_states": {"shrink": 2, "down_backward": 1, "grouped_gemm": 1, "combine": 1},
    "top_k_weights": {"shrink": 1, "down_backward": 1},
    "gate_up_lora[0].a": {"shrink": 2, "down_backward": 1, "grouped_wgrad": 1},
    "gate_up_lora[0].b": {"shrink": 1, "down_backward": 1, "grouped_wgrad": 1},
    "down_lora[0].a": {"shrink": 1, "down_backward": 1, "grouped_wgrad": 1},
    "down_lora[0].b": {"grouped_wgrad": 1},
}


ONE_GRADIENT = LoraCase("one-gradient", "all else is frozen")


@pytest.fixture(scope="module")
def everything() -> dict[str, Tensor]:
    """All gradients of ``ONE_GRADIENT``."""
    return lora_gradients(ONE_GRADIENT, make_lora_inputs(ONE_GRADIENT, torch.float32))


@pytest.mark.parametrize("wanted", NAMES)
def test_only_the_gradient_asked_for_is_computed(
    wanted: str, everything: dict[str, Tensor], calls: dict[str, int]
) -> None:
    inputs = make_lora_inputs(ONE_GRADIENT, torch.float32)
    for name, value in inputs.inputs.tensors.items():
        value.requires_grad_(name == wanted)
    y = run_lora(ONE_GRADIENT, inputs)
    calls.clear()
    y.backward(inputs.inputs.grad)
    assert calls == STAGES_OF[wanted]
    assert {name for name, value in inputs.inputs.tensors.items() if value.grad is not None} == {wanted}
    assert torch.equal(inputs.inputs.tensors[wanted].grad, everything[f"gradient of {wanted}"])


def test_adapter_training_forms_no_gradients_of_weights(calls: dict[str, int]) -> None:
    """Frozen experts: as many weight-gradient products as there are factors, with halves of B apart, and no more."""
    case = LoraCase("frozen-weights", "", up=SEPARATE)
    lora_gradients(case, make_lora_inputs(case, torch.float32))
    # The gradients of both halves of the output read their own half of B, and make it.
    assert calls["grouped_wgrad"] == 5
    assert calls["shrink"] == 5


def test_frozen_adapters_still_adapt() -> None:
    """No gradient of theirs is asked for, but all others know of them."""
    case = LoraCase("frozen-adapters", "", up=SEPARATE)
    inputs = make_lora_inputs(case, torch.float32)
    for name, value in inputs.inputs.tensors.items():
        value.requires_grad_("_lora[" not in name)
    ours = lora_gradients(case, inputs)
    assert set(ours) == {"y", *(f"gradient of {name}" for name in without_factors(inputs.inputs).tensors)}
    assert_equals_merged(case, inputs, ours)


@pytest.mark.parametrize("none", [None, [], ()], ids=str)
def test_no_adapter_is_no_work(none: object, calls: dict[str, int]) -> None:
    case = LoraCase("none", "", up=(), down=())
    inputs, without = make_lora_inputs(case, torch.float32), make_lora_inputs(case, torch.float32)
    y = run_packed(case, without)
    y.backward(without.inputs.grad)
    expected = {**calls}
    calls.clear()
    ours = lora_gradients(case, inputs, gate_up_lora=none, down_lora=none)
    assert calls == expected
    assert "shrink" not in calls
    for name in ("hidden_states", "top_k_weights"):
        assert torch.equal(ours[f"gradient of {name}"], without.inputs.tensors[name].grad), name


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_an_untrained_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    """B starts as zeros: its gradient does not, and y is that of the weights alone."""
    case = LoraCase("untrained", "", up=SEPARATE)
    inputs = make_lora_inputs(case, dtype)
    with torch.no_grad():
        for argument in ADAPTED:
            inputs.inputs.tensors[f"{argument}[0].b"].zero_()
    ours = lora_gradients(case, inputs)
    alone = replace(case, up=(), down=())
    expected = lora_gradients(alone, make_lora_inputs(alone, dtype))
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name
    for argument in ADAPTED:
        assert ours[f"gradient of {argument}[0].a"].count_nonzero() == 0
        assert ours[f"gradient of {argument}[0].b"].count_nonzero() > 0


def test_parameters_of_peft() -> None:
    """Leaves as PEFT owns them, (r·E, in) and (out, r·E), whose views the kernel gets: gradients arrive in their layout."""
    case = LoraCase("peft-parameters", "", up=(), down=())
    inputs, rank, rng = make_lora_inputs(case, torch.float32), 3, torch.Generator().manual_seed(0)
    a = torch.randn((rank * case.experts, case.hidden), generator=rng).to(DEVICE).requires_grad_()
    b = torch.randn((case.columns, rank * case.experts), generator=rng).to(DEVICE).requires_grad_()
    adapter = LoraWeights(
        a.reshape(case.experts, rank, case.hidden),
        b.reshape(case.columns, rank, case.experts).permute(2, 0, 1),
        scaling=0.5,
    )
    run_lora(case, inputs, gate_up_lora=adapter).backward(inputs.inputs.grad)
    adapted = replace(case, up=(Factors(rank),))
    same = make_lora_inputs(adapted, torch.float32)
    values = {"gate_up_lora[0].a": adapter.a, "gate_up_lora[0].b": adapter.b}
    same.inputs.tensors |= {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    expected = lora_gradients(adapted, same)
    # Column r·E + e of B is rank r of expert e, row e·R + r of A.
    b_grad = expected["gradient of gate_up_lora[0].b"].permute(1, 2, 0).reshape(b.shape)
    assert torch.equal(a.grad, expected["gradient of gate_up_lora[0].a"].reshape(a.shape))
    assert torch.equal(b.grad, b_grad)


# -------------------------------------------------------------------------------------------------------------- dropout


def rows_of(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(slots in the order of the experts, number of those that have one); slots of no expert come last."""
    flat = index.flatten()
    keys = torch.where((flat >= 0) & (flat < experts), flat, experts)
    return keys.sort(stable=True).indices, int((keys < experts).sum())


def masked_experts(case: LoraCase, inputs: Any, masks: dict[str, list[Tensor]]) -> Tensor:
    """The adapted experts, row by row, adapter inputs times their mask; in the dtype of ``inputs``."""
    t, index = inputs.tensors, inputs.index
    order, routed = rows_of(index, case.experts)
    order = order[:routed]
    experts = index.flatten()[order].long()

    def project(rows: Tensor, argument: str, bias: str) -> Tensor:
        weight = t[ADAPTED[argument]][experts]
        out = torch.einsum("si,soi->so", rows, weight.mT if case.transposed else weight)
        if case.bias:
            out = out + t[bias][experts]
        for (factors, a, b), mask in zip(factors_of(case, argument, t), masks[argument], strict=True):
            dropped = rows * mask[:routed].to(rows.dtype)
            parts = [low_rank(factors, row[None], a[e], b[e]) for row, e in zip(dropped, experts.tolist(), strict=True)]
            out = out + torch.cat(parts)
        return out

    tokens = order // case.top_k
    h = plain_gate(project(t["hidden_states"][tokens], "gate_up_lora", "gate_up_bias"), case)
    z = project(h, "down_lora", "down_bias") * t["top_k_weights"].flatten()[order, None]
    return torch.zeros_like(t["hidden_states"]).index_add(0, tokens, z.to(t["hidden_states"].dtype))


P = 0.3
DROPS, SEPARATE_DROPS = (Factors(dropout=P),), (Factors(separate=True, dropout=P),)
DROPPED = [
    LoraCase("dropout", "products of its own", up=DROPS, down=DROPS, trained=True, half=True),
    LoraCase("dropout-separate", "halves drop the same elements", up=SEPARATE_DROPS, down=DROPS, index="partly mine"),
    LoraCase(
        "dropout-several",
        "each adapter drops its own, and those without are fused",
        up=(Factors(3), Factors(6, dropout=0.5), Factors(2, dropout=P)),
        recompute=True,
    ),
    LoraCase("dropout-bias", "biases are not dropped", up=DROPS, bias=True, interleaved=True, transposed=True),
    LoraCase("dropout-function", "around a function of the caller's", up=(), down=DROPS, function=True),
    LoraCase("dropout-packed", "4-bit weights", **PACKED, up=DROPS, down=DROPS),
]


@lora_cases(DROPPED)
def test_dropout(case: LoraCase, dtype: torch.dtype) -> None:
    """Equal to the masks that the same state of the generator gives, in y and every gradient."""
    inputs = make_lora_inputs(case, dtype)
    torch.manual_seed(5)
    with forced(case):
        ours = lora_gradients(case, inputs)
    torch.manual_seed(5)
    rows = inputs.inputs.index.numel()
    sizes = {"gate_up_lora": case.hidden, "down_lora": case.intermediate}
    masks = {
        argument: [
            torch.nn.functional.dropout(torch.ones((rows, size), dtype=dtype, device=DEVICE), factors.dropout)
            for factors in case.adapters(argument)
        ]
        for argument, size in sizes.items()
    }
    assert any((mask == 0).any() for several in masks.values() for mask in several), "nothing is dropped"
    exact, plain = inputs.inputs.to(torch.float64), inputs.inputs.copy()
    masked_experts(case, exact, masks).backward(exact.grad)
    y = masked_experts(case, plain, masks)
    y.backward(plain.grad)
    with torch.no_grad():
        truth = masked_experts(case, exact, masks)
    assert_accurate("y", ours.pop("y"), truth, y.detach(), SLACK)
    for name, value in ours.items():
        leaf = name.removeprefix("gradient of ")
        assert_accurate(name, value, exact.tensors[leaf].grad, plain.tensors[leaf].grad, SLACK)


def test_dropout_zero_takes_the_fused_way(calls: dict[str, int]) -> None:
    """And one that is not zero does not."""
    case = LoraCase("dropout-0", "")
    for dropout, fused in ((0.0, True), (P, False)):
        dropping = (Factors(dropout=dropout),)
        calls.clear()
        with torch.no_grad():
            inputs = make_lora_inputs(replace(case, up=dropping, down=dropping), torch.float32)
            y = run_lora(replace(case, up=dropping, down=dropping), inputs)
            assert ("grouped_up" in calls) is fused
            assert torch.equal(y, run_lora(case, inputs)) is fused


# --------------------------------------------------------------------------------------------- autocast, checkpointing


@pytest.mark.parametrize("function", [False, True], ids=["fused", "gate-function"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(low: torch.dtype, function: bool) -> None:
    """Factors are rounded to autocast's dtype as the weights are; their gradients stay fp32."""
    case = LoraCase("autocast", "", up=(replace(FP32, separate=True),), down=(FP32,), function=function)
    inputs = make_lora_inputs(case, torch.float32)
    with torch.autocast(DEVICE.type, dtype=low):
        y = run_lora(case, inputs)
    assert y.dtype == torch.float32
    # As PyTorch's own layers: what is not a parameter of the product, the routing weights, is not cast.
    rounded = make_lora_inputs(case, torch.float32)
    for name, value in rounded.inputs.tensors.items():
        if "_lora[" not in name and name != "top_k_weights":
            rounded.inputs.tensors[name] = value.detach().to(low)
    assert torch.equal(y.to(low), run_lora(case, rounded))
    y.backward(inputs.inputs.grad)
    for name, value in inputs.inputs.tensors.items():
        if not value.requires_grad:
            continue
        assert value.grad.dtype == torch.float32, name
        assert value.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "up, recompute", [(SEPARATE, True), (SEPARATE_DROPS, False)], ids=["fused-recompute", "dropout"]
)
def test_checkpointing(up: tuple[Factors, ...], recompute: bool) -> None:
    """Non-reentrant: the forward run again in backward gives the same, masks included."""
    case = LoraCase("checkpoint", "", up=up, recompute=recompute)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        inputs = make_lora_inputs(case, torch.float32)

        def run(*_: Tensor, inputs: Any = inputs) -> Tensor:
            return run_lora(case, inputs)

        y = checkpoint(run, inputs.inputs.tensors["hidden_states"], use_reentrant=False) if checkpointed else run()
        y.backward(inputs.inputs.grad)
        grads = {name: value.grad for name, value in inputs.inputs.tensors.items() if value.grad is not None}
        results.append({"y": y.detach()} | grads)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


# --------------------------------------------------------------------------------------------------------------- poison


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=name_of)
def test_poisoned_factors_of_an_unused_expert_stay_alone(dtype: torch.dtype) -> None:
    """Blocks that reach past the rank or the last feature of an expert touch the next expert's factors."""
    case = LoraCase("poisoned-factors", "", hidden=27, intermediate=13, up=SEPARATE)
    inputs = make_lora_inputs(case, dtype)
    inputs.inputs.index[inputs.inputs.index == 1] = 3
    with torch.no_grad():
        for argument in ADAPTED:
            inputs.inputs.tensors[f"{argument}[0].a"][1] = float("nan")
            inputs.inputs.tensors[f"{argument}[0].b"][1] = float("inf")
    for name, value in lora_gradients(case, inputs).items():
        assert value.isfinite().all(), name
        if "_lora[" in name:
            assert value[1].count_nonzero() == 0, name


@pytest.mark.parametrize("poison", [float("inf"), float("nan")], ids=str)
def test_a_poisoned_token_stays_alone(poison: float) -> None:
    case = LoraCase("poisoned-token", "")
    clean, poisoned = make_lora_inputs(case, torch.float32), make_lora_inputs(case, torch.float32)
    # The first token alone has expert 1.
    for inputs in (clean.inputs, poisoned.inputs):
        inputs.index[inputs.index == 1] = 2
        inputs.index[0] = 1
    with torch.no_grad():
        poisoned.inputs.tensors["hidden_states"][0] = poison
    expected, got = (lora_gradients(case, inputs) for inputs in (clean, poisoned))
    assert not got["y"][0].isfinite().all()
    for name in ("y", "gradient of hidden_states", "gradient of top_k_weights"):
        assert torch.equal(got[name][1:], expected[name][1:]), name
    for argument in ADAPTED:
        for part in "ab":
            name = f"gradient of {argument}[0].{part}"
            assert torch.equal(got[name][[0, 2]], expected[name][[0, 2]]), name
