"""Random shapes and options, chosen by hypothesis, which shrinks what fails to the smallest such call.

The examples are the same in every run: a failure is never lost, and no commit fails for the luck of the draw.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernel.accuracy import assert_accurate
from tests.kernel.cases import (
    INDEX,
    PLAIN_ACTIVATIONS,
    ExpertsCase,
    gradients,
    make_inputs,
    plain_experts,
    plain_gate,
    run_experts,
)
from tests.kernel.lora_cases import Factors, LoraCase, assert_equals_merged, lora_gradients, make_lora_inputs
from tests.kernel.machine import DTYPES, ON_GPU
from tests.kernel.packed_cases import ALL, ONE, PackedCase, decoding, make_packed_inputs, packed_gradients
from tests.kernel.packed_cases import DTYPES as PACKED_DTYPES
from tests.kernel.test_linear import LinearCase, linear, plain_linear, results
from tests.kernel.test_linear import make_inputs as make_linear_inputs

# Calls in new sizes, seconds each: the interpreter is slow, and for a GPU every kernel is compiled anew.
EXAMPLES = 12

# One element may come out exact in torch by luck; there are up to eight roundings on the way to a gradient.
SLACK = 8.0

bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
# Widths around the tiles, up to what the interpreter does in a second.
widths = st.sampled_from([1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65] + ([127, 128, 200, 256] if ON_GPU else []))


@st.composite
def experts_cases(draw: st.DrawFn) -> ExpertsCase:
    experts = draw(st.integers(1, 12))
    index = draw(st.sampled_from(sorted(INDEX)))
    gated = draw(st.booleans())
    activation = draw(st.sampled_from([*PLAIN_ACTIVATIONS, *(["swiglu_oai"] if gated else [])]))
    return ExpertsCase(
        id="random",
        why="",
        tokens=draw(st.integers(0, 200 if ON_GPU else 24)),
        top_k=draw(st.integers(1, min(experts, 4))),
        experts=experts,
        hidden=draw(widths),
        intermediate=draw(widths),
        index=index,
        activation=activation,
        gated=gated,
        interleaved=gated and draw(st.booleans()),
        transposed=draw(st.booleans()),
        bias=draw(st.booleans()),
        strided=tuple(draw(st.sets(st.sampled_from(ARGUMENTS), max_size=2))),
        routing_dtype=draw(st.sampled_from([None, torch.float32])),
        index_dtype=draw(st.sampled_from([torch.int64, torch.int32, torch.int16])),
    )


@bounded
@given(case=experts_cases(), dtype=st.sampled_from(DTYPES), gate_function=st.booleans())
def test_experts(case: ExpertsCase, dtype: torch.dtype, gate_function: bool) -> None:
    inputs = make_inputs(case, dtype)
    options = {"activation": lambda gate_up: plain_gate(gate_up, case)} if gate_function else {}
    ours = gradients(run_experts(case, inputs, **options), inputs)
    truth = gradients(plain_experts(case, exact := inputs.to(torch.float64)), exact)
    torchs = gradients(plain_experts(case, plain := inputs.copy()), plain)
    for name, value in ours.items():
        assert_accurate(name, value, truth[name], torchs[name], SLACK)


@bounded
@given(case=experts_cases(), dtype=st.sampled_from(DTYPES))
def test_experts_without_gradients(case: ExpertsCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    with torch.no_grad():
        ours = run_experts(case, inputs)
        truth, torchs = plain_experts(case, inputs.to(torch.float64)), plain_experts(case, inputs)
    assert_accurate("y", ours, truth, torchs, SLACK)


@st.composite
def linear_cases(draw: st.DrawFn) -> LinearCase:
    return LinearCase(
        id="random",
        why="",
        sizes=tuple(draw(st.lists(st.integers(0, 200 if ON_GPU else 40), min_size=1, max_size=9))),
        in_features=draw(widths),
        out_features=draw(widths),
        bias=draw(st.booleans()),
        strided=tuple(
            draw(st.sets(st.sampled_from(["input", "weight", "weight.T", "bias", "m_sizes", "grad"]), max_size=2))
        ),
        sizes_dtype=draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8])),
    )


@bounded
@given(case=linear_cases(), dtype=st.sampled_from(DTYPES))
def test_linear(case: LinearCase, dtype: torch.dtype) -> None:
    inputs = make_linear_inputs(case, dtype)
    exact, plain = inputs.to(torch.float64), inputs.to(dtype)
    ours = results(linear(inputs), inputs)
    truth, torchs = results(plain_linear(exact), exact), results(plain_linear(plain), plain)
    for name, value in ours.items():
        assert_accurate(name, value, truth[name], torchs[name], SLACK)


@st.composite
def packed_cases(draw: st.DrawFn) -> PackedCase:
    gated = draw(st.booleans())
    # Multiples of 8, so that every projection is whole blocks of 64.
    sizes = st.sampled_from([8, 24, 64, 72, 128])
    return PackedCase(
        id="random",
        why="",
        tokens=draw(st.integers(0, 200 if ON_GPU else 12)),
        top_k=draw(st.integers(1, 2)),
        experts=draw(st.integers(2, 5)),
        hidden=draw(sizes),
        intermediate=draw(sizes),
        index=draw(st.sampled_from(sorted(INDEX))),
        activation=draw(st.sampled_from(sorted(PLAIN_ACTIVATIONS))),
        gated=gated,
        interleaved=gated and draw(st.booleans()),
        transposed=draw(st.booleans()),
        bias=draw(st.booleans()),
        quant_type=draw(st.sampled_from(["nf4", "fp4"])),
        blocksize=draw(st.sampled_from([32, 64])),
        double_quant=draw(st.booleans()),
        dense=draw(st.sampled_from([(), (), ("gate_up_proj",), ("down_proj",)])),
    )


@bounded
@given(
    case=packed_cases(),
    dtype=st.sampled_from(PACKED_DTYPES),
    in_gemm=st.booleans(),
    workspace=st.sampled_from([ALL, ONE, 2 * 64 * 64 * 4]),
)
def test_packed_experts(case: PackedCase, dtype: torch.dtype, in_gemm: bool, workspace: int) -> None:
    inputs = make_packed_inputs(case, dtype)
    with decoding(in_gemm, workspace):
        ours = packed_gradients(case, inputs)
    truth = gradients(plain_experts(case, exact := inputs.inputs.to(torch.float64)), exact)
    torchs = gradients(plain_experts(case, plain := inputs.inputs.copy()), plain)
    for name, value in ours.items():
        assert_accurate(name, value, truth[name], torchs[name], SLACK)


@st.composite
def lora_cases(draw: st.DrawFn) -> LoraCase:
    gated = draw(st.booleans())
    interleaved = gated and draw(st.booleans())
    packed = draw(st.booleans())
    sizes = st.sampled_from([8, 24, 64]) if packed else widths

    def adapters(halves: bool) -> tuple[Factors, ...]:
        one = st.builds(
            Factors,
            rank=st.sampled_from([1, 3, 8, 16, 17, 40]),
            separate=st.booleans() if halves else st.just(False),
            scaling=st.sampled_from([1.0, 0.25, -2.0]),
            dtype=st.sampled_from([None, torch.float32]),
            layout=st.sampled_from(["contiguous", "peft", "gaps"]),
        )
        return tuple(draw(st.lists(one, max_size=2)))

    return LoraCase(
        id="random",
        why="",
        tokens=draw(st.integers(0, 200 if ON_GPU else 10)),
        top_k=draw(st.integers(1, 2)),
        experts=draw(st.integers(2, 5)),
        hidden=draw(sizes),
        intermediate=draw(sizes),
        index=draw(st.sampled_from(sorted(INDEX))),
        activation=draw(st.sampled_from(sorted(PLAIN_ACTIVATIONS))),
        gated=gated,
        interleaved=interleaved,
        transposed=draw(st.booleans()),
        bias=draw(st.booleans()),
        dense=() if packed else ("gate_up_proj", "down_proj"),
        up=adapters(gated and not interleaved),
        down=adapters(False),
        trained=draw(st.booleans()),
        recompute=draw(st.booleans()),
        function=draw(st.booleans()),
    )


@bounded
@given(case=lora_cases(), dtype=st.sampled_from(PACKED_DTYPES), in_gemm=st.booleans())
def test_adapted_experts(case: LoraCase, dtype: torch.dtype, in_gemm: bool) -> None:
    inputs = make_lora_inputs(case, dtype)
    with decoding(in_gemm, ALL if in_gemm else ONE):
        ours = lora_gradients(case, inputs)
    assert_equals_merged(case, inputs, ours, SLACK)
