"""``moe_experts`` over 4-bit weights against a loop over the experts in float64, with the weights as they dequantize.

Each case runs where its weights are decoded inside the products, and where they are decoded into a workspace first, at once
or in parts; with few slots and no gradients, where a product is one of a matrix and a vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernel.accuracy import assert_accurate
from tests.kernel.cases import gradients, plain_experts, plain_gate, run_experts
from tests.kernel.machine import DEVICE, INTERPRETED, backend, kernel, module, name_of
from tests.kernel.packed_cases import (
    ALL,
    DTYPES,
    ONE,
    Packed4bitWeights,
    PackedCase,
    PackedInputs,
    decoding,
    make_packed_inputs,
    packed_gradients,
    run_packed,
)


def in_every_dtype(cases: list[PackedCase]) -> pytest.MarkDecorator:
    """Parametrizes a test by ``case`` and ``dtype``."""
    parameters = [
        pytest.param(case, dtype, id=f"{case.id}-{name_of(dtype)}")
        for case in cases
        for dtype in DTYPES
        if case.half or not (INTERPRETED and dtype == torch.float16)
    ]
    return pytest.mark.parametrize("case, dtype", parameters)


def assert_equals_truth(case: PackedCase, inputs: PackedInputs, ours: dict[str, Tensor]) -> None:
    truth = gradients(plain_experts(case, exact := inputs.inputs.to(torch.float64)), exact)
    torchs = gradients(plain_experts(case, plain := inputs.inputs.copy()), plain)
    assert {"y", "gradient of hidden_states", "gradient of top_k_weights"} <= set(ours)
    for name, value in ours.items():
        assert_accurate(name, value, truth[name], torchs[name])


def assert_taken(taken: list[str], wanted: tuple[str, ...], dtype: torch.dtype) -> None:
    """Or a case would be decoded elsewhere than it says."""
    if backend.uses_triton(torch.empty(0, device=DEVICE), dtype):
        assert Counter(taken) == Counter(wanted)


# Rows of both projections are whole 64s, so both are decoded inside their products.
DECODED = [
    PackedCase("plain", "nothing special", half=True),
    PackedCase(
        "several-steps",
        "in features of several tiles, groups of 256 absmaxes of which the last is not full, in each projection",
        hidden=192,
        intermediate=128,
        projections=2,
        tokens=3,
        top_k=1,
        experts=2,
    ),
    PackedCase("fp4", "another table, and routing weights in fp32", quant_type="fp4", routing_dtype=torch.float32),
    PackedCase("plain-scales", "absmaxes in fp32", double_quant=False),
    PackedCase("plain-scales-projections", "no groups to count", double_quant=False, projections=2, blocksize=128),
    PackedCase(
        "blocks-of-32", "two scales where others have one, and groups of 256", blocksize=32, projections=2, hidden=192
    ),
    PackedCase(
        "blocks-of-32-no-64s",
        "rows of whole blocks that no product decodes",
        blocksize=32,
        hidden=96,
        intermediate=32,
        takes=("part", "part", "part", "part"),
    ),
    PackedCase("blocks-over-borders", "a block ends inside a row", hidden=192, blocksize=128, tokens=3),
    PackedCase("blocks-of-4096", "one block an expert in the down projection, two in the other", blocksize=4096),
    PackedCase(
        "odd-out-features",
        "out features of the up projection that no tile divides; rows of the other that cannot be decoded inside",
        intermediate=44,
        takes=("up", "part", "part", "transposed"),
    ),
    PackedCase(
        "odd-hidden",
        "the other way round",
        hidden=44,
        takes=("part", "gemm", "down backward", "part"),
    ),
    PackedCase("interleaved", "gate and up columns alternate", interleaved=True),
    PackedCase(
        "transposed",
        "packed along the out features: no kernel decodes the up projection, the down projection's is the other one",
        transposed=True,
        half=True,
        takes=("part", "transposed", "part", "gemm"),
    ),
    PackedCase(
        "transposed-bias",
        "the transposed down projection has a bias, which no kernel that decodes it adds",
        transposed=True,
        bias=True,
        takes=("part", "part", "part", "gemm"),
    ),
    PackedCase(
        "gpt-oss",
        "all of its layout at once",
        activation="swiglu_oai",
        interleaved=True,
        transposed=True,
        bias=True,
        takes=("part", "part", "part", "gemm"),
    ),
    PackedCase("bias", "of both projections", bias=True),
    PackedCase("nemotron", "no gate", activation="relu2", gated=False),
    PackedCase("no-gate-bias", "no gate, which has no second half to find", gated=False, bias=True, activation="gelu"),
    PackedCase("partly-mine", "rows of no expert in tiles of their own", index="partly mine", tokens=12),
    PackedCase("not-mine", "no slot is ours: zeros everywhere", index="not mine", tokens=4, bias=True),
    PackedCase("out-of-range", "negative and too large ids read no weights", index="out of range", tokens=12),
    PackedCase("most-experts-empty", "experts without rows before, between and after", experts=9, index="few"),
    PackedCase("no-tokens", "T=0", tokens=0, takes=()),
    PackedCase("one-expert", "E=1", experts=1, top_k=1),
    PackedCase("rows-of-32", "tiles of 32 rows", tokens=26, experts=2, top_k=1, height=32),
    PackedCase(
        "rows-of-64", "tiles of 64 rows, of which one expert has two", tokens=130, experts=2, top_k=1, height=64
    ),
    PackedCase("rows-of-128", "tiles of 128 rows", tokens=260, experts=2, top_k=1, gated=False, height=128),
    PackedCase("rows-of-128-gated", "and two products of them", tokens=260, experts=2, top_k=1, half=True, height=128),
    PackedCase(
        "strided", "views of all activations", strided=("hidden_states", "top_k_index", "top_k_weights", "grad")
    ),
    PackedCase(
        "dense-down",
        "its weights' gradient beside a frozen packed projection",
        dense=("down_proj",),
        takes=("up", "transposed"),
    ),
    PackedCase("dense-up", "the other way round", dense=("gate_up_proj",), takes=("gemm", "down backward")),
]


@in_every_dtype(DECODED)
def test_decoded_in_the_products(case: PackedCase, dtype: torch.dtype) -> None:
    inputs = make_packed_inputs(case, dtype)
    with decoding(in_gemm=True) as taken:
        ours = packed_gradients(case, inputs)
    assert_equals_truth(case, inputs, ours)
    assert_taken(taken, case.takes, dtype)
    if case.height is not None:
        tuning = module("tuning")
        target = tuning.target_of(DEVICE)
        assert tuning.bucket(case.tokens * case.top_k, case.experts, True, target) == case.height


@dataclass(frozen=True)
class WorkspaceCase(PackedCase):
    """Attributes:
    workspace: bytes for decoded weights in fp32. takes: as in ``PackedCase``, a "part" for each part.
    """

    experts: int = 5
    hidden: int = 40
    intermediate: int = 24
    workspace: int = ALL
    takes: tuple[str, ...] = ("part",) * 4


# Parts of 16 features. Up, and the way back through down, take two parts, of which the second is not full. Down, and
# the way back through up, take three.
UP_PARTS, DOWN_PARTS = ("part",) * (2 + 3), ("part",) * (3 + 2)
IN_PARTS = UP_PARTS + DOWN_PARTS
# Bytes of 16 features of up in fp32: down fits twice.
SIXTEEN = 5 * 2 * 16 * 40 * 4
WORKSPACE = [
    WorkspaceCase("whole", "nothing special"),
    WorkspaceCase("whole-64", "weights that products could decode too, but for more rows", hidden=64, intermediate=128),
    WorkspaceCase("whole-bias", "biases of all experts", bias=True),
    WorkspaceCase("whole-partly-mine", "rows of no expert", index="partly mine", tokens=12),
    WorkspaceCase("parts", "columns of a part belong side by side with the others", workspace=ONE, takes=IN_PARTS),
    WorkspaceCase("parts-up", "the others are whole", workspace=SIXTEEN, takes=("part",) * (2 + 1 + 1 + 3)),
    WorkspaceCase("parts-bias", "of the part's features", workspace=ONE, takes=IN_PARTS, bias=True, half=True),
    WorkspaceCase(
        "parts-interleaved",
        "gate and up rows of a part are neighbours",
        workspace=ONE,
        takes=IN_PARTS,
        interleaved=True,
        bias=True,
    ),
    WorkspaceCase(
        "parts-transposed",
        "a part is columns of the stored matrix",
        workspace=ONE,
        takes=IN_PARTS,
        transposed=True,
        bias=True,
    ),
    WorkspaceCase(
        "odd-transposed",
        "the gate's and the up projection's rows share bytes, so they are one part",
        hidden=64,
        intermediate=33,
        workspace=ONE,
        # The way back through down reads whole stored rows, 33 of them: three parts.
        takes=("part",) * (1 + 4 + 3 + 4),
        transposed=True,
    ),
    WorkspaceCase(
        "parts-partly-mine",
        "rows of no expert in every part",
        index="partly mine",
        tokens=12,
        workspace=ONE,
        takes=IN_PARTS,
    ),
    WorkspaceCase("parts-not-mine", "no row has an expert", index="not mine", bias=True, workspace=ONE, takes=IN_PARTS),
    WorkspaceCase(
        "parts-empty", "experts without rows hold anything", experts=9, index="few", workspace=ONE, takes=IN_PARTS
    ),
    WorkspaceCase("parts-no-tokens", "T=0", tokens=0, workspace=ONE, takes=()),
    WorkspaceCase(
        "parts-rows-of-64",
        "several tiles in each part",
        tokens=100,
        experts=2,
        top_k=1,
        workspace=ONE,
        gated=False,
        takes=IN_PARTS,
        activation="relu",
    ),
    WorkspaceCase(
        "parts-gpt-oss",
        "all of its layout at once",
        activation="swiglu_oai",
        interleaved=True,
        transposed=True,
        bias=True,
        workspace=ONE,
        takes=IN_PARTS,
    ),
    WorkspaceCase(
        "parts-dense-down",
        "a dense projection is one part",
        dense=("down_proj",),
        workspace=ONE,
        takes=UP_PARTS,
    ),
    WorkspaceCase("parts-dense-up", "the same", dense=("gate_up_proj",), workspace=ONE, takes=DOWN_PARTS),
]


@in_every_dtype(WORKSPACE)
def test_decoded_into_a_workspace(case: WorkspaceCase, dtype: torch.dtype) -> None:
    inputs = make_packed_inputs(case, dtype)
    with decoding(in_gemm=False, workspace=case.workspace * dtype.itemsize // 4) as taken:
        ours = packed_gradients(case, inputs)
    assert_equals_truth(case, inputs, ours)
    assert_taken(taken, case.takes, dtype)


def shifted(weights: Any) -> Any:
    """The same weights in storage that starts at an odd address, as a part of a larger tensor may."""

    def moved(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        whole = torch.empty(value.numel() + 1, dtype=value.dtype, device=value.device)
        return whole[1:].view(value.shape).copy_(value)

    return weights.replaced(**{name: moved(value) for name, value in weights.tensors().items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_storage_at_odd_addresses(dtype: torch.dtype) -> None:
    case = PackedCase("odd-address", "words of packed weights are not aligned", projections=2)
    inputs = make_packed_inputs(case, dtype)
    inputs.packed = {name: shifted(weights) for name, weights in inputs.packed.items()}
    assert_equals_truth(case, inputs, packed_gradients(case, inputs))


# Up to 64 slots and no gradients.
FEW_SLOTS = [
    PackedCase("few", "T=1, one row a slot", tokens=1, top_k=4, experts=5, half=True),
    PackedCase("few-batch", "several tokens share experts", tokens=3, top_k=2, projections=2),
    PackedCase("few-fp4", "another table, absmaxes in fp32", tokens=2, quant_type="fp4", double_quant=False),
    PackedCase("few-long-blocks", "blocks of many rows", tokens=2, blocksize=4096),
    PackedCase(
        "few-short-blocks", "two scales where others have one", tokens=2, blocksize=32, projections=2, hidden=192
    ),
    PackedCase("few-short-blocks-thin", "a block of K is one of 64 weights", tokens=1, top_k=1, blocksize=32),
    PackedCase("few-wide-hidden", "two blocks of K in up, the second not full", tokens=1, hidden=2112),
    PackedCase(
        "few-wide-intermediate",
        "two blocks of K in down, the second not full",
        tokens=1,
        top_k=1,
        intermediate=320,
        gated=False,
        activation="relu",
    ),
    PackedCase("few-thin", "a block of K is one of 64 weights", tokens=1, top_k=1, blocksize=128),
    PackedCase("few-partly-mine", "ids that are E", tokens=3, top_k=3, index="partly mine", bias=True),
    PackedCase("few-not-mine", "nothing to do: zeros", tokens=2, index="not mine", bias=True),
    PackedCase("few-out-of-range", "ids beyond E and below zero", tokens=3, top_k=3, index="out of range"),
    PackedCase("few-bias", "biases and gates alternate", tokens=2, bias=True, interleaved=True, half=True),
    PackedCase("few-no-gate", "one column block", tokens=2, gated=False, activation="relu2", bias=True),
]


@pytest.fixture
def wide_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program of few features, as a GPU wants it, makes more of them than the interpreter does in a second."""
    if not INTERPRETED:
        yield
        return
    monkeypatch.setattr(module("stages.triton.gemv"), "BLOCK_N", 32)
    yield


@in_every_dtype(FEW_SLOTS)
def test_few_slots(case: PackedCase, dtype: torch.dtype, wide_programs: None) -> None:
    inputs = make_packed_inputs(case, dtype)
    with torch.no_grad(), decoding(in_gemm=True) as taken:
        ours = run_packed(case, inputs)
        truth, torchs = (
            plain_experts(case, values) for values in (inputs.inputs.to(torch.float64), inputs.inputs.copy())
        )
    assert_accurate("y", ours, truth, torchs)
    assert_taken(taken, (), dtype)


# Few slots, but weights that the kernels for them do not read, and many slots: what is saved for backward is not.
WITHOUT_GRADIENTS = [
    PackedCase("few-odd", "rows that are not whole 64s", tokens=2, intermediate=44, takes=("up", "part")),
    PackedCase(
        "few-transposed", "packed along the out features", tokens=2, transposed=True, takes=("part", "transposed")
    ),
    PackedCase("few-dense", "one projection is dense", tokens=2, dense=("down_proj",), takes=("up",)),
    PackedCase("many", "too many slots", tokens=33, experts=3, takes=("up", "gemm")),
    PackedCase("none", "T=0", tokens=0, takes=()),
]


@in_every_dtype(WITHOUT_GRADIENTS)
def test_forward_without_gradients(case: PackedCase, dtype: torch.dtype) -> None:
    inputs = make_packed_inputs(case, dtype)
    with torch.no_grad(), decoding(in_gemm=True) as taken:
        ours = run_packed(case, inputs)
        truth, torchs = (
            plain_experts(case, values) for values in (inputs.inputs.to(torch.float64), inputs.inputs.copy())
        )
    assert_accurate("y", ours, truth, torchs)
    assert_taken(taken, case.takes, dtype)


# A gate of the caller's own runs between two grouped linear layers.
GATE_FUNCTION = [
    PackedCase("gate-function", "no kernel knows the gate", takes=("gemm", "gemm", "transposed", "transposed")),
    PackedCase(
        "gate-function-gpt-oss",
        "its layout; neither projection has a kernel that decodes it in forward",
        activation="swiglu_oai",
        interleaved=True,
        transposed=True,
        bias=True,
        index="partly mine",
        takes=("part", "part", "gemm", "gemm"),
    ),
    PackedCase("gate-function-dense", "one projection is dense", dense=("gate_up_proj",), takes=("gemm", "transposed")),
]


@in_every_dtype(GATE_FUNCTION)
def test_gate_function(case: PackedCase, dtype: torch.dtype) -> None:
    inputs = make_packed_inputs(case, dtype)
    with decoding(in_gemm=True) as taken:
        ours = packed_gradients(case, inputs, activation=lambda gate_up: plain_gate(gate_up, case))
    assert_equals_truth(case, inputs, ours)
    assert_taken(taken, case.takes, dtype)


SMALL = PackedCase("small", "")


@pytest.mark.parametrize("in_gemm", [True, False], ids=["decoded", "workspace"])
@pytest.mark.parametrize("gate_function", [False, True], ids=["named", "gate-function"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(low: torch.dtype, gate_function: bool, in_gemm: bool) -> None:
    """Weights are dequantized to autocast's dtype, once; outputs and gradients keep the dtypes of their arguments."""
    case = SMALL
    options = {"activation": lambda gate_up: plain_gate(gate_up, case)} if gate_function else {}
    inputs = make_packed_inputs(case, torch.float32)
    leaves = inputs.inputs.to(low)
    leaves.tensors["top_k_weights"] = inputs.inputs.tensors["top_k_weights"].detach()
    expected = PackedInputs(leaves, {name: value.to(dtype=low) for name, value in inputs.packed.items()})
    with decoding(in_gemm):
        y = run_packed(case, expected, **options)
        with torch.autocast(DEVICE.type, dtype=low):
            ours = run_packed(case, inputs, **options)
        assert ours.dtype == torch.float32
        assert y.dtype == low
        assert torch.equal(ours, y.float())
        ours.backward(inputs.inputs.grad)
    for name, value in inputs.trained().items():
        assert value.grad.dtype == torch.float32, name
        assert value.grad.isfinite().all(), name


def test_only_packed_weights_frozen() -> None:
    """Whoever trains the biases alone gets their gradients, and no others."""
    case = replace(SMALL, bias=True)
    inputs, everything = make_packed_inputs(case, torch.float32), make_packed_inputs(case, torch.float32)
    for name, value in inputs.inputs.tensors.items():
        value.requires_grad_("bias" in name) if name not in inputs.packed else None
    run_packed(case, inputs).backward(inputs.inputs.grad)
    packed_gradients(case, everything)
    for name, value in inputs.trained().items():
        if "bias" in name:
            assert torch.equal(value.grad, everything.inputs.tensors[name].grad), name
        else:
            assert value.grad is None, name


def test_saves_no_dense_weights() -> None:
    """Backward decodes again: nothing as large as a dense projection is kept."""
    case = replace(SMALL, hidden=128, intermediate=128, tokens=2, top_k=1, experts=2)
    inputs = make_packed_inputs(case, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = run_packed(case, inputs)
    storage = {id(value) for weights in inputs.packed.values() for value in weights.tensors().values()}
    assert storage <= {id(value) for value in saved}
    largest = max(value.nbytes for value in saved if id(value) not in storage)
    assert largest < inputs.inputs.tensors["down_proj"].nbytes / 8
    y.backward(inputs.inputs.grad)


@pytest.mark.parametrize(
    "use_reentrant, in_gemm", [(True, True), (False, False)], ids=["reentrant-decoded", "not-reentrant-workspace"]
)
def test_checkpointing(use_reentrant: bool, in_gemm: bool) -> None:
    """A replay saves what the forward saved, and gives the same bits."""
    # For reentrant more slots than those for which a pass without gradients, as its first is, goes another way.
    case = replace(SMALL, tokens=33 if use_reentrant else 5, index="partly mine", gated=False)
    inputs, again = make_packed_inputs(case, torch.float32), make_packed_inputs(case, torch.float32)

    def checkpointed(case: PackedCase, inputs: PackedInputs) -> Tensor:
        names, leaves = zip(*inputs.trained().items(), strict=True)

        def run(*leaves: Tensor) -> Tensor:
            tensors = {**inputs.packed, **dict(zip(names, leaves, strict=True))}
            return run_experts(case, replace(inputs.inputs, tensors=tensors))

        return checkpoint(run, *leaves, use_reentrant=use_reentrant)

    with decoding(in_gemm, workspace=ONE):
        expected, got = packed_gradients(case, inputs), packed_gradients(case, again, checkpointed)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_bf16_weights_are_rounded_once() -> None:
    """``dtype`` of the packed weights is what they are multiplied in, whatever they were quantized from."""
    dense = torch.randn((1, 64, 64), device=DEVICE)
    rows = torch.eye(64, device=DEVICE)
    for dtype in DTYPES:
        weights = Packed4bitWeights.quantize(dense, dtype=dtype)
        with torch.no_grad():
            y = kernel.moe_fused_linear(rows.to(dtype), weights, torch.tensor([64], device=DEVICE))
        assert torch.equal(y, weights.dequantize().mT[0])
