"""The Triton stages over packed weights against ``reference``: where they are dequantized, and what a workspace holds.

Every scene has rows of no expert and experts without rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel.machine import DEVICE, HAS_TRITON, INTERPRETED, kernel, module, name_of
from tests.kernel.packed_cases import ALL, ONE, as_stack, decoding, dequantized
from tests.kernel.test_packed_linear import random_weight
from tests.kernel.test_stages import DTYPES, GEMM_DTYPES, POISON, Gate, Routing, poisoned_routing, random, same

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="there are no Triton stages without triton")

if HAS_TRITON:
    launch, paths = module("stages.triton"), module("stages.triton.paths")
    dequantize, ByteRuns = module("stages.triton.dequantize"), module("kernels.records").ByteRuns
reference, tuning = module("stages.reference"), module("tuning")

# ------------------------------------------------------------------------------------------------------- dequantizing

FORMATS = {
    "nf4": {},
    "fp4": {"quant_type": "fp4"},
    "mxfp4": {"quant_type": "mxfp4", "blocksize": 32},
    "nvfp4": {"quant_type": "nvfp4", "blocksize": 16, "projections": 2},
    "plain-scales": {"double_quant": False, "blocksize": 128},
    "projections": {"projections": 2, "blocksize": 64},
    "blocks-of-32": {"blocksize": 32, "projections": 2},
    "one-block": {"blocksize": 4096},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("storage", FORMATS.values(), ids=FORMATS)
# An expert of 2048 bytes takes two programs; with 2240 bytes the last one is not full.
@pytest.mark.parametrize("shape", [(64, 64), (64, 70), (4, 16)], ids=["two-programs", "three-programs", "one-program"])
def test_dequantize(shape: tuple[int, int], storage: dict[str, Any], dtype: torch.dtype) -> None:
    if shape[0] * shape[1] % (storage.get("blocksize", 64) * storage.get("projections", 1)):
        pytest.skip("not whole blocks")
    weight_format = module("formats").named(storage.get("quant_type", "nf4"))
    if weight_format.blocks_in_rows and shape[1] % storage["blocksize"]:
        pytest.skip("blocks end with a row")
    weights = random_weight("dequantize", (5, *shape), torch.float32, **storage)
    for first, count in ((0, 5), (3, 2), (1, 1)):
        ours, theirs = (torch.full((count, *shape), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
        launch.dequantize(as_stack(weights), first, count, ours)
        reference.dequantize(as_stack(weights), first, count, theirs)
        assert torch.equal(ours, theirs)


def test_dequantize_in_groups() -> None:
    """300 absmaxes in each projection of each expert: two groups, the second not full."""
    weights = random_weight("groups", (3, 600, 64), torch.float32, projections=2)
    ours = torch.empty(weights.shape, device=DEVICE)
    launch.dequantize(as_stack(weights), 0, 3, ours)
    assert torch.equal(ours, dequantized(weights))


@pytest.mark.parametrize("first, count", [(0, 6), (2, 3), (4, 2)], ids=["all", "middle", "end"])
def test_experts_without_rows_are_not_dequantized(first: int, count: int) -> None:
    weights = random_weight("skipped", (6, 64, 40), torch.float32)
    sizes = [0, 3, 0, 0, 1, 0]
    offsets = torch.tensor([0, *sizes], device=DEVICE).cumsum(0).int()
    out = torch.full((count, 64, 40), float(POISON), device=DEVICE)
    size = weights.packed.shape[1]
    dequantize.dequantize_runs(as_stack(weights), ByteRuns(size, size), first, count, out, offsets)
    exact = dequantized(weights)
    for expert, matrix in enumerate(out, start=first):
        assert torch.equal(matrix, exact[expert] if sizes[expert] else torch.full_like(matrix, POISON)), expert


# ----------------------------------------------------------------------------------------------------------- in parts


@pytest.mark.parametrize(
    "features, that_fit, block_n, width, narrowed",
    [
        (768, 768, 128, 768, 128),
        (768, 767, 128, 384, 128),
        (768, 256, 128, 256, 128),
        (768, 255, 128, 128, 128),
        (700, 640, 128, 384, 128),
        (768, 127, 128, 64, 64),
        (768, 36, 128, 32, 32),
        (768, 3, 128, 16, 16),
        (20, 16, 64, 16, 16),
        (20, 20, 64, 20, 64),
    ],
)
def test_parts_are_of_nearly_one_size(features: int, that_fit: int, block_n: int, width: int, narrowed: int) -> None:
    """Each part is whole column tiles; the tiles become narrower where the workspace does not hold a full one."""
    config = tuning.LaunchConfig(64, block_n, 32, 4, 2, slices=4)
    got, fitting = dequantize._part_width(features, 1000, config, 1000 * that_fit + 999)
    assert (got, fitting.block_n) == (width, narrowed)
    assert fitting.slices == min(4, narrowed // 16)
    assert got == features or got % narrowed == 0
    assert got <= that_fit or got == 16


GATES = {
    "none": None,
    "no-gate": Gate(gated=False),
    "concatenated": Gate(),
    "interleaved": Gate(interleaved=True),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["stored", "transposed"])
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_parts_are_the_features_they_say(gate: Any, transposed: bool) -> None:
    """Parts take turns in one workspace, each with its features' gate and up rows in the order that a kernel wants."""
    shape = (3, 48, 64) if transposed else (3, 64, 48)
    weights = random_weight("parts", shape, torch.float32)
    stack = as_stack(weights, transposed)
    exact = dequantized(weights)
    exact = exact.mT if transposed else exact
    routing = poisoned_routing(10, 3, 1)
    routing.offsets.copy_(torch.arange(4) * 2)
    features = 64 if gate is None or not gate.gated else 32
    config = tuning.LaunchConfig(16, 32, 32, 4, 2)
    seen, addresses = [], set()
    with decoding(in_gemm=False, workspace=3 * 24 * 48 * 4 * 64 // features):
        for part in dequantize.dense_parts(stack, routing, torch.float32, config, gate):
            seen.append((part.first, part.width))
            addresses.add(part.stack.data_ptr())
            rows = range(part.first, part.first + part.width)
            if features == 32 and gate.interleaved:
                rows = range(2 * part.first, 2 * (part.first + part.width))
            elif features == 32:
                rows = [*rows, *(32 + row for row in rows)]
            assert torch.equal(part.stack, exact[:, list(rows)])
            bias = random("bias", 3, 64)
            assert torch.equal(part.bias(bias, gate), bias[:, list(rows)])
    assert seen == [(first, 16) for first in range(0, features, 16)]
    assert len(addresses) == 1


@pytest.mark.parametrize(("columns", "gate"), [(33, None), (66, Gate()), (66, Gate(interleaved=True))])
def test_rows_that_share_bytes_are_one_part(columns: int, gate: Any) -> None:
    """A transposed stack with an odd number of features has rows that share bytes, so it is one part."""
    weights = random_weight("odd", (2, 64, columns), torch.float32)
    stack = as_stack(weights, transposed=True)
    routing = poisoned_routing(4, 2, 1)
    routing.offsets.copy_(torch.arange(3) * 2)
    with decoding(in_gemm=False, workspace=ONE):
        (part,) = dequantize.dense_parts(stack, routing, torch.float32, tuning.LaunchConfig(16, 32, 32, 4, 2), gate)
    assert torch.equal(part.stack, dequantized(weights).mT)


def test_layouts_that_products_dequantize(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product dequantizes for few rows, if rows are whole 64s and offsets inside a matrix fit 32 bits."""
    like = torch.empty(0, device=DEVICE)
    rows = tuning.dequantize_rows("gemm_4bit", tuning.target_of(DEVICE))

    def stack(*shape: int) -> Any:
        return as_stack(kernel.Packed4bitWeights.quantize(torch.ones((2, *shape), device=DEVICE)))

    assert paths.dequantizes("gemm_4bit", stack(4, 64), 2 * rows, like)
    assert paths.dequantizes("gemm_4bit", stack(4, 64).mT, 2 * rows, like)
    assert not paths.dequantizes("gemm_4bit", stack(4, 64), 2 * rows + 1, like)
    assert not paths.dequantizes("gemm_4bit", stack(4, 80), 1, like)
    assert not paths.dequantizes("gemm_4bit", stack(64, 4).mT, 1, like)
    small = stack(4, 64)
    whole = torch.empty(small.packed.numel() + 1, dtype=torch.uint8, device=DEVICE)
    shifted = whole[1:].view(small.packed.shape)
    assert not paths.dequantizes("gemm_4bit", replace(small, storage=(shifted, *small.storage[1:])), 1, like)
    huge = replace(small, format=kernel.Format4bit((1, 2**25, 64)))
    assert not paths.dequantizes("gemm_4bit", huge, 1, like)


# -------------------------------------------------------------------------------------------------------------- stages

PLACES = {"in-product": (True, ALL), "workspace": (False, ALL), "parts": (False, ONE)}
EXPERTS, TOKENS, TOP_K = 6, 7, 2
ROWS = TOKENS * TOP_K
# Expert 3 has no rows, 6 is elsewhere.
IDS = [[0, 1], [6, 2], [2, 4], [5, 6], [6, 6], [1, 2], [0, 5]]
ROUTED = 10


@pytest.fixture(params=PLACES.values(), ids=PLACES)
def place(request: pytest.FixtureRequest) -> tuple[bool, int]:
    return request.param


def scenes(dtype: torch.dtype) -> tuple[Routing, Routing]:
    """The routing of ``IDS``, made by ``launch`` and by ``reference``."""
    ids = torch.tensor(IDS, device=DEVICE)
    ours, theirs = (poisoned_routing(ROWS, EXPERTS, TOP_K)._replace(packed=True) for _ in range(2))
    launch.route(ids, ours, dtype)
    reference.route(ids, theirs, dtype)
    assert int(theirs.offsets[-1]) == ROUTED
    return ours, theirs


def doubled(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def stack_of(name: str, shape: tuple[int, int], dtype: torch.dtype, transposed: bool = False, **options: Any) -> tuple:
    """(packed stack, what it dequantizes to)."""
    weights = random_weight(name, (EXPERTS, *shape), dtype, **options)
    dense = dequantized(weights)
    return as_stack(weights, transposed), dense.mT if transposed else dense


@pytest.mark.parametrize("dtype", GEMM_DTYPES, ids=name_of)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("gather, bias", [(False, False), (True, True), (True, False), (False, True)])
def test_grouped_gemm(gather: bool, bias: bool, transposed: bool, dtype: torch.dtype, place: tuple[bool, int]) -> None:
    ours, theirs = scenes(dtype)
    stack, dense = stack_of("gemm", (44, 64), dtype, transposed)
    _, n, k = stack.shape
    assert (n, k) == ((64, 44) if transposed else (44, 64))
    a = random("a", TOKENS if gather else ROWS, k, dtype=dtype)
    biases = random("bias", EXPERTS, n, dtype=dtype) if bias else None
    with decoding(*place) as taken:
        out = launch.grouped_gemm(a, stack, ours, ROWS, biases, gather, -7.0)
    if place[0]:
        assert taken == ["gemm" if not transposed else "part" if gather or bias else "transposed"]
    else:
        assert taken == ["part"] * (1 if place[1] == ALL else -(-n // 16))
    exact = reference.grouped_gemm(a.double(), dense.double(), theirs, ROWS, doubled(biases), gather, -7.0)
    plain = reference.grouped_gemm(a, stack, theirs, ROWS, biases, gather, -7.0)
    same("out", out, exact, plain)
    assert (out[ROUTED:] == -7.0).all()


@pytest.mark.parametrize("dtype", GEMM_DTYPES, ids=name_of)
@pytest.mark.parametrize("save", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize(
    "gate",
    [Gate(), Gate("relu2", gated=False), Gate("swiglu_oai", interleaved=True)],
    ids=["silu", "relu2-ungated", "gpt-oss"],
)
def test_grouped_up(gate: Gate, save: bool, dtype: torch.dtype, place: tuple[bool, int]) -> None:
    if INTERPRETED and not (save or place[0]):
        pytest.skip("the interpreter, which is slow, has inference where the products dequantize")
    ours, theirs = scenes(dtype)
    columns = gate.columns(36)
    stack, dense = stack_of("up", (columns, 64), dtype)
    x, bias = random("x", TOKENS, 64, dtype=dtype), random("bias", EXPERTS, columns, dtype=dtype)
    with decoding(*place):
        got = launch.grouped_up(x, stack, ours, ROWS, bias, gate, save)
    exact = reference.grouped_up(x.double(), dense.double(), theirs, ROWS, bias.double(), gate, save)
    plain = reference.grouped_up(x, stack, theirs, ROWS, bias, gate, save)
    # The rows of no expert must be zeros, because a gate function or the gate's derivative reads them later.
    for name, *values in zip(("h", "gate_up"), got, exact, plain, strict=True):
        if values[1] is None:
            assert not save
            assert values[0] is None
            continue
        same(name, *(value[:ROUTED] for value in values))
        assert values[0].shape == values[1].shape
        assert name == "h" or values[0][ROUTED:].count_nonzero() == 0


@pytest.mark.parametrize("dtype", GEMM_DTYPES, ids=name_of)
@pytest.mark.parametrize("bias, need_h", [(False, True), (True, False)], ids=["weighted-h", "bias"])
@pytest.mark.parametrize(
    "gate", [Gate(), Gate("gelu_tanh", interleaved=True), Gate("relu", gated=False)], ids=lambda gate: gate.activation
)
@pytest.mark.parametrize("intermediate", [64, 44])
def test_down_backward(
    intermediate: int, gate: Gate, bias: bool, need_h: bool, dtype: torch.dtype, place: tuple[bool, int]
) -> None:
    ours, theirs = scenes(dtype)
    stack, dense = stack_of("down", (48, intermediate), dtype)
    grad, gate_up = (
        random("grad", TOKENS, 48, dtype=dtype),
        random("gate_up", ROWS, gate.columns(intermediate), dtype=dtype),
    )
    weights = random("weights", TOKENS, TOP_K)
    biases = random("bias", EXPERTS, 48, dtype=dtype) if bias else None
    poisoned = gate_up.clone()
    poisoned[ROUTED:] = float("nan")
    with decoding(*place) as taken:
        got = launch.down_backward(grad, stack, biases, poisoned, ours, weights, gate, need_h)
    if place[0] and intermediate % 64 == 0:
        assert taken == ["down backward"]
    else:
        assert taken == ["part"] * (1 if place[1] == ALL else -(-intermediate // 16))
    exact = reference.down_backward(
        grad.double(), dense.double(), doubled(biases), gate_up.double(), theirs, weights.double(), gate, need_h
    )
    plain = reference.down_backward(grad, stack, biases, gate_up, theirs, weights, gate, need_h)
    same("grad_gate_up", got[0][:ROUTED], exact[0][:ROUTED], plain[0][:ROUTED])
    assert (got[1] is None) == (not need_h)
    if need_h:
        same("weighted_h", got[1][:ROUTED], exact[1][:ROUTED], plain[1][:ROUTED])
    same("grad_top_k_weights", got[2], exact[2], plain[2])


@pytest.mark.parametrize("dtype", GEMM_DTYPES, ids=name_of)
def test_gemv_equals_the_routed_stages(dtype: torch.dtype) -> None:
    """The matrix-vector path equals the routed stages, with another format in each projection and ids of every kind."""
    gate, ids = Gate(), torch.tensor([[1, 2], [-1, 0]], device=DEVICE)
    x, weights = random("x", 2, 64, dtype=dtype), random("weights", 2, 2)
    up, dense_up = stack_of("up", (2 * 64, 64), dtype, projections=2)
    down, dense_down = stack_of("down", (64, 64), dtype, quant_type="fp4", double_quant=False, blocksize=128)
    up_bias, down_bias = random("up_bias", EXPERTS, 128, dtype=dtype), random("down_bias", EXPERTS, 64, dtype=dtype)

    def routed(x: Tensor, weights: Tensor, up: Any, down: Any, up_bias: Tensor, down_bias: Tensor) -> Tensor:
        routing = poisoned_routing(4, EXPERTS, 2)
        reference.route(ids, routing, x.dtype)
        h, _ = reference.grouped_up(x, up, routing, 4, up_bias, gate, False)
        z = reference.grouped_gemm(h, down, routing, 4, down_bias, False, 0.0)
        return reference.combine(z, routing, 2, weights)

    ours = launch.gemv_experts(x, ids, weights, up, down, up_bias, down_bias, gate)
    exact = routed(*(value.double() for value in (x, weights, dense_up, dense_down, up_bias, down_bias)))
    same("y", ours, exact, routed(x, weights, up, down, up_bias, down_bias))


def test_gemv_serves_what_it_reads() -> None:
    def stack(*shape: int, transposed: bool = False) -> Any:
        return as_stack(kernel.Packed4bitWeights.quantize(torch.ones((2, *shape), device=DEVICE)), transposed)

    up, down = stack(128, 64), stack(64, 64)
    dense = torch.empty((2, 64, 64), device=DEVICE)
    most = tuning.gemv_slots(tuning.target_of(DEVICE))
    assert launch.use_gemv(1, most, up, down)
    assert not launch.use_gemv(1, most + 1, up, down)
    assert not launch.use_gemv(0, 8, up, down)
    assert not launch.use_gemv(1, 1, stack(128, 80), stack(80, 64)), "80 in features of up"
    assert not launch.use_gemv(1, 1, stack(160, 64), stack(64, 80)), "80 in features of down"
    assert not launch.use_gemv(1, 1, stack(64, 128, transposed=True), stack(64, 64, transposed=True))
    assert not launch.use_gemv(1, 1, up, dense)
    assert not launch.use_gemv(1, 1, torch.empty((2, 128, 64), device=DEVICE), down)
