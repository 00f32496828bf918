"""What adapters add to the stages of ``launch``, each against ``reference``, over outputs full of poison."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernel.machine import DEVICE, HAS_TRITON, module, name_of
from tests.kernel.packed_cases import ALL, ONE, Packed4bitWeights, as_stack, decoding
from tests.kernel.test_stages import DTYPES, GEMM_DTYPES, Gate, make_scene, random, reference, same, tuning

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="there are no Triton stages without triton")

if HAS_TRITON:
    launch = module("stages.triton")
LowRankTerm = module("stages.terms").LowRankTerm

# Ranks around the blocks: less than one, a whole one, one and a part, several.
RANKS = [1, 16, 20, 96]


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def descriptor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Forces every configuration the kernels are launched with."""
    if request.param and DEVICE.type != "cpu" and not tuning.target_of(DEVICE).has_descriptors:
        pytest.skip("descriptors need compute capability 9.0")
    usual = tuning.launch_config

    def launch_config(*args: object) -> object:
        return replace(usual(*args), descriptor=request.param)

    monkeypatch.setattr(tuning, "launch_config", launch_config)
    return request.param


def term(right_rows: int, rank: int, separate: bool, dtype: torch.dtype, turned: bool = False) -> LowRankTerm:
    """A term for 26 rows and six experts; with ``turned`` the rank is not contiguous, as in the gradient of the input."""
    left = random("left", 26, rank * (2 if separate else 1), dtype=dtype, scale=rank**-0.5)
    right = random("right", 6, right_rows, rank, dtype=dtype)
    return LowRankTerm(left, right.mT.contiguous().mT if turned else right)


def doubles(extra: LowRankTerm) -> LowRankTerm:
    return LowRankTerm(extra.left.double(), extra.right.double())


def poisoned(extra: LowRankTerm, routed: int) -> LowRankTerm:
    """Rows of no expert are NaN."""
    left = extra.left.clone()
    left[routed:] = float("nan")
    return LowRankTerm(left, extra.right)


# -------------------------------------------------------------------------------------------------------- thin products


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("gather", [False, True], ids=["rows", "gather"])
def test_shrink(gather: bool, rank: int, dtype: torch.dtype, descriptor: bool) -> None:
    """Half of the features of wider rows, into half of the columns of wider rows, which the other half survives."""
    scene = make_scene("partly mine", dtype)
    wide = random("a", 13 if gather else 26, 96, dtype=dtype)
    weight = random("w", 6, rank, 48, dtype=dtype, scale=48**-0.5)
    if not gather:
        wide[scene.routed :] = float("nan")
    outs = []
    for side, routing in scene.sides():
        rows = wide if side is launch else wide.nan_to_num()
        out = torch.full((26, 2 * rank), 7.0, dtype=dtype, device=DEVICE)
        side.shrink(rows[:, 48:], weight, routing, gather, 0.5, out[:, rank:])
        assert (out[:, :rank] == 7.0).all()
        outs.append(out[:, rank:])
    exact = torch.empty((26, rank), dtype=torch.float64, device=DEVICE)
    rows = wide.nan_to_num()[:, 48:].double()
    reference.shrink(rows, weight.double(), scene.reference, gather, 0.5, exact)
    same("out", outs[0], exact, outs[1])
    assert outs[0][scene.routed :].count_nonzero() == 0


def test_shrink_by_a_factor_across(descriptor: bool) -> None:
    """B of which the rank is contiguous, and half of its features: the gradient of left."""
    scene = make_scene("partly mine", torch.float32)
    grad, b = random("grad", 26, 48), random("b", 6, 48, 5)
    right = b[:, 24:].mT
    outs = [torch.full((26, 5), float("nan"), device=DEVICE) for _ in range(2)]
    for out, (side, routing) in zip(outs, scene.sides(), strict=True):
        side.shrink(grad[:, 24:], right, routing, False, 2.0, out)
    exact = torch.empty((26, 5), dtype=torch.float64, device=DEVICE)
    reference.shrink(grad[:, 24:].double(), right.double(), scene.reference, False, 2.0, exact)
    same("out", outs[0], exact, outs[1])


@pytest.mark.parametrize("out_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(5, 48), (48, 5), (64, 80), (80, 64), (1, 1)], ids=str)
def test_thin_wgrad(shape: tuple[int, int], dtype: torch.dtype, out_dtype: str, descriptor: bool) -> None:
    """Columns of wider rows, in either orientation, go into rows of a wider output, rounded once to its dtype."""
    scene = make_scene("partly mine", dtype)
    m, n = shape
    wide_a, wide_b = random("a", 26, m + 8, dtype=dtype), random("b", 26, n + 8, dtype=dtype)
    for value in (wide_a, wide_b):
        value[scene.routed :] = float("nan")
    a, b = wide_a[:, 8:], wide_b[:, 8:]
    wanted = torch.float32 if out_dtype == "float32" else dtype
    exact = torch.empty((6, m, n), dtype=torch.float64, device=DEVICE)
    reference.grouped_wgrad(a.double(), b.double(), scene.reference, False, False, exact)
    theirs = torch.empty((6, m, n), dtype=wanted, device=DEVICE)
    reference.grouped_wgrad(a, b, scene.reference, False, False, theirs)
    whole = torch.full((6, 2 * m, n), 7.0, dtype=wanted, device=DEVICE)
    launch.grouped_wgrad(a, b, scene.launch, False, False, whole[:, m:])
    assert (whole[:, :m] == 7.0).all()
    same("out", whole[:, m:], exact, theirs)
    if wanted != dtype:
        assert not torch.equal(whole[:, m:], whole[:, m:].to(dtype).to(wanted)), "rounded on the way"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("weights_dtype", ["same", "float32"])
@pytest.mark.parametrize("rank", [5, 64])
def test_weighted_wgrad(rank: int, weights_dtype: str, dtype: torch.dtype, descriptor: bool) -> None:
    """Rows of the narrow side by their slot's weight; a weight of a slot that is not ours is NaN."""
    scene = make_scene("partly mine", dtype)
    a, b = random("a", 13, 48, dtype=dtype), random("b", 26, rank, dtype=dtype)
    b[scene.routed :] = float("nan")
    weights = random("weights", 13, 2, dtype=dtype if weights_dtype == "same" else torch.float32)
    weights.view(-1)[scene.reference.slot_to_row < 0] = float("nan")
    out, theirs = (torch.full((6, 48, rank), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
    exact = torch.empty((6, 48, rank), dtype=torch.float64, device=DEVICE)
    arguments = (scene.reference, True, False)
    reference.grouped_wgrad(a.double(), b.double(), *arguments, exact, weights.double())
    reference.grouped_wgrad(a, b, *arguments, theirs, weights)
    launch.grouped_wgrad(a, b, scene.launch, True, False, out, weights)
    same("out", out, exact, theirs)


# ------------------------------------------------------------------------------------------------- low-rank terms


@pytest.mark.parametrize("dtype", GEMM_DTYPES, ids=name_of)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("turned", [False, True], ids=["rank-contiguous", "features-contiguous"])
def test_grouped_gemm(turned: bool, rank: int, dtype: torch.dtype, descriptor: bool) -> None:
    scene = make_scene("partly mine", dtype)
    a, weight = random("a", 26, 32, dtype=dtype), random("w", 6, 40, 32, dtype=dtype, scale=0.2)
    bias, extra = random("bias", 6, 40, dtype=dtype), term(40, rank, False, dtype, turned)
    exact = reference.grouped_gemm(
        a.double(), weight.double(), scene.reference, 26, bias.double(), False, -7.0, doubles(extra)
    )
    theirs = reference.grouped_gemm(a, weight, scene.reference, 26, bias, False, -7.0, extra)
    bad = poisoned(extra, scene.routed)
    ours = launch.grouped_gemm(a, weight, scene.launch, 26, bias, False, -7.0, bad)
    same("out", ours, exact, theirs)
    assert (ours[scene.routed :] == -7.0).all()


GATES = {
    "silu": (Gate(), True),
    "shared": (Gate(), False),
    "interleaved": (Gate("gelu", interleaved=True), False),
    "no-gate": (Gate("relu2", gated=False), False),
}


@pytest.mark.parametrize("save_h", [True, False], ids=["h", "gate-up-alone"])
@pytest.mark.parametrize("gate, separate", GATES.values(), ids=GATES)
def test_grouped_up(gate: Gate, separate: bool, save_h: bool, descriptor: bool) -> None:
    scene = make_scene("partly mine", torch.float32)
    columns = gate.columns(40)
    x, weight = random("x", 13, 32), random("w", 6, columns, 32, scale=0.2)
    extra = term(columns, 20, separate, torch.float32)
    options = (26, None, gate, True)
    exact = reference.grouped_up(x.double(), weight.double(), scene.reference, *options, doubles(extra), save_h=save_h)
    theirs = reference.grouped_up(x, weight, scene.reference, *options, extra, save_h=save_h)
    bad = poisoned(extra, scene.routed)
    ours = launch.grouped_up(x, weight, scene.launch, *options, bad, save_h=save_h)
    rows = slice(scene.routed)
    same("gate_up", ours[1][rows], exact[1][rows], theirs[1][rows])
    if save_h:
        same("h", ours[0][rows], exact[0][rows], theirs[0][rows])
    else:
        assert ours[0] is None
        assert theirs[0] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "gate",
    [Gate(), Gate("gelu_tanh", interleaved=True), Gate("relu", gated=False)],
    ids=["silu", "gelu-interleaved", "relu-ungated"],
)
def test_down_backward(gate: Gate, dtype: torch.dtype) -> None:
    """With an term; and in place, where every tile reads what it overwrites, no bit is another."""
    scene = make_scene("partly mine", dtype)
    grad, weight = random("grad", 13, 32, dtype=dtype), random("w", 6, 32, 80, dtype=dtype, scale=0.2)
    gate_up, weights = random("gate_up", 26, gate.columns(80), dtype=dtype), random("weights", 13, 2)
    extra = term(80, 20, False, dtype, turned=True)
    exact = reference.down_backward(
        *(grad.double(), weight.double(), None, gate_up.double(), scene.reference, weights.double(), gate, True),
        doubles(extra),
    )
    theirs = reference.down_backward(grad, weight, None, gate_up, scene.reference, weights, gate, True, extra)
    results = []
    for in_place in (False, True):
        saved, bad = gate_up.clone(), poisoned(extra, scene.routed)
        arguments = (grad, weight, None, saved, scene.launch, weights, gate, True, bad)
        ours = launch.down_backward(*arguments, in_place=in_place)
        assert (ours[0].data_ptr() == saved.data_ptr()) is in_place
        assert torch.equal(saved, gate_up) is not in_place
        results.append(ours)
    rows = slice(scene.routed)
    for name, part in zip(("grad_gate_up", "weighted_h"), (0, 1), strict=True):
        same(name, results[0][part][rows], exact[part][rows], theirs[part][rows])
        assert torch.equal(results[0][part][rows], results[1][part][rows]), name
    same("grad_top_k_weights", results[0][2], exact[2], theirs[2])
    assert torch.equal(results[0][2], results[1][2])


# ------------------------------------------------------------------------------------------------------- packed weights


def stack_of(rows: int, columns: int) -> tuple[object, Tensor]:
    """Packed weights of six experts, and what they dequantize to."""
    weights = Packed4bitWeights.quantize(random("packed", 6, rows, columns, scale=0.2))
    dense = torch.empty((6, rows, columns), device=DEVICE)
    reference.dequantize(as_stack(weights), 0, 6, dense)
    return as_stack(weights), dense


@pytest.mark.parametrize("in_gemm", [True, False], ids=["decoded", "parts"])
@pytest.mark.parametrize("transposed", [False, True], ids=["down", "transposed"])
def test_packed_gemm(transposed: bool, in_gemm: bool) -> None:
    """Parts begin at the right feature of right, and add the whole of the rank each."""
    scene = make_scene("partly mine", torch.float32)
    stack, dense = stack_of(64, 64)
    stack, dense = (stack.mT, dense.mT) if transposed else (stack, dense)
    a, extra = random("a", 26, 64), term(64, 20, False, torch.float32, turned=transposed)
    exact = reference.grouped_gemm(a.double(), dense.double(), scene.reference, 26, None, False, 0.0, doubles(extra))
    theirs = reference.grouped_gemm(a, dense, scene.reference, 26, None, False, 0.0, extra)
    with decoding(in_gemm, ALL if in_gemm else ONE) as taken:
        bad = poisoned(extra, scene.routed)
        ours = launch.grouped_gemm(a, stack, scene.launch, 26, None, False, 0.0, bad)
    assert set(taken) == ({"part"} if not in_gemm else {"transposed" if transposed else "gemm"})
    same("out", ours, exact, theirs)
