"""Each Triton stage of ``launch`` against the same function of ``reference``, over outputs full of poison.

What the two may differ in: rows of no expert are undefined in some outputs, and only ``launch`` has a map of row tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.kernel.accuracy import assert_accurate
from tests.kernel.cases import INDEX, seeded
from tests.kernel.machine import DEVICE, HAS_TRITON, INTERPRETED, module, name_of

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="there are no Triton stages without triton")

if HAS_TRITON:
    launch, operands = module("stages.triton"), module("stages.triton.operands")
reference, routing_module, tuning = module("stages.reference"), module("routing"), module("tuning")
Gate, Routing = module("activations").Gate, routing_module.Routing

DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# The grouped GEMMs are slow in the interpreter; there test_experts has them in fp16.
GEMM_DTYPES = DTYPES[:1] if INTERPRETED else DTYPES
# Marks memory that a stage should have written, or should not have read.
POISON = -(2**30)


def random(name: str, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=seeded(name), dtype=torch.float64) * scale).to(DEVICE, dtype)


# ---------------------------------------------------------------------------------------------------------- routing


@dataclass(frozen=True)
class RoutingCase:
    """Expert ids of ``tokens`` × ``top_k`` slots."""

    id: str
    why: str
    tokens: int
    top_k: int
    experts: int
    index: str = "random"
    index_dtype: torch.dtype = torch.int64

    def ids(self) -> Tensor:
        ids = INDEX[self.index](seeded(self.id), self.tokens, self.top_k, self.experts)
        return ids.to(DEVICE, self.index_dtype)


ROUTING_CASES = [
    RoutingCase("small", "one block, less than a sub-block of slots", tokens=5, top_k=2, experts=4),
    RoutingCase("single-block", "one block, several sub-blocks, the last one partial", tokens=100, top_k=3, experts=8),
    RoutingCase("single-block-limit", "the last size for one block", tokens=512, top_k=2, experts=16),
    RoutingCase("two-blocks", "the first size that counts in blocks", tokens=513, top_k=2, experts=16),
    RoutingCase("many-blocks", "offsets from many blocks, the last one partial", tokens=700, top_k=3, experts=5),
    RoutingCase("one-takes-all", "one expert over several blocks", tokens=600, top_k=2, experts=7, index="one"),
    RoutingCase(
        "partly-mine", "slots of no expert in every block", tokens=600, top_k=2, experts=7, index="partly mine"
    ),
    RoutingCase("partly-mine-small", "slots of no expert", tokens=30, top_k=2, experts=7, index="partly mine"),
    RoutingCase("not-mine", "no slot has an expert", tokens=20, top_k=3, experts=6, index="not mine"),
    RoutingCase("not-mine-blocks", "no slot of many has an expert", tokens=600, top_k=2, experts=6, index="not mine"),
    RoutingCase(
        "out-of-range", "ids between E and the next power of two", tokens=90, top_k=2, experts=5, index="out of range"
    ),
    RoutingCase("repeated", "ranks of equal ids side by side", tokens=40, top_k=4, experts=6, index="repeated"),
    RoutingCase("int32", "another width of ids", tokens=40, top_k=2, experts=6, index_dtype=torch.int32),
    RoutingCase(
        "int8",
        "negative ids in the narrowest dtype",
        tokens=40,
        top_k=2,
        experts=6,
        index="out of range",
        index_dtype=torch.int8,
    ),
    RoutingCase("one-expert", "E=1", tokens=40, top_k=1, experts=1),
    RoutingCase("200-experts", "E not a power of two, many of them empty", tokens=30, top_k=4, experts=200),
    RoutingCase("512-experts", "the widest one-hot matrices", tokens=70, top_k=4, experts=512),
    RoutingCase("512-experts-blocks", "the widest counts over several blocks", tokens=150, top_k=8, experts=512),
]


def poisoned_routing(num_rows: int, num_experts: int, top_k: int, sorted_rows: bool = False) -> Routing:
    size = Routing.buffer_size(num_rows, num_experts, sorted_rows)
    buffer = torch.full((size,), POISON, dtype=torch.int32, device=DEVICE)
    return Routing.from_buffer(buffer, num_rows, num_experts, top_k, sorted_rows)


def assert_tiles_cover(routing: Routing, num_rows: int, dtype: torch.dtype) -> None:
    """Every row is in exactly one tile, of its own expert; rows of no expert in tiles of expert E."""
    num_experts = routing.num_experts
    height = tuning.tile_height(tuning.bucket(num_rows, num_experts, False, tuning.target_of(DEVICE)), dtype.itemsize)
    launched = num_rows // height + num_experts + 1
    assert launched <= routing.tile_expert.numel()
    offsets = [*routing.offsets.tolist(), num_rows]
    covered = torch.zeros(num_rows, dtype=torch.int32)
    tiles = zip(routing.tile_expert[:launched].tolist(), routing.tile_row[:launched].tolist(), strict=True)
    for expert, row in tiles:
        assert -1 <= expert <= num_experts
        if expert >= 0:
            assert offsets[expert] <= row < offsets[expert + 1]
            covered[row : min(row + height, offsets[expert + 1])] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name_of)
@pytest.mark.parametrize("case", ROUTING_CASES, ids=lambda case: case.id)
def test_route(case: RoutingCase, dtype: torch.dtype) -> None:
    ids = case.ids()
    num_slots = ids.numel()
    ours, theirs = (poisoned_routing(num_slots, case.experts, case.top_k) for _ in range(2))
    launch.route(ids, ours, dtype)
    reference.route(ids, theirs, dtype)
    routed = int(theirs.offsets[-1])
    assert torch.equal(ours.offsets, theirs.offsets)
    assert torch.equal(ours.slot_to_row, theirs.slot_to_row)
    assert torch.equal(ours.row_to_slot[:routed], theirs.row_to_slot[:routed])
    assert_tiles_cover(ours, num_slots, dtype)


@pytest.mark.parametrize("height", [16, 32, 64, 128])
@pytest.mark.parametrize("index", ["random", "few", "partly mine", "not mine"])
def test_tiles_of_every_height(height: int, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows per expert do not choose the height here: tiles nearly empty, exactly full and one row too many."""
    case = RoutingCase(f"height-{index}", "", tokens=130, top_k=2, experts=6, index=index)
    monkeypatch.setattr(tuning, "tile_height", lambda *_: height)
    ours = poisoned_routing(260, 6, 2)
    launch.route(case.ids(), ours, torch.float32)
    assert_tiles_cover(ours, 260, torch.float32)


def test_stable_order() -> None:
    """Slots of one expert keep their order, or two runs of a checkpointed layer would differ."""
    ids = torch.tensor([[2, 0], [0, 2], [2, 1]], device=DEVICE)
    routing = module("permute").route(ids, 3, torch.float32)
    assert routing.offsets.tolist() == [0, 2, 3, 6]
    assert routing.row_to_slot.tolist() == [1, 2, 5, 0, 3, 4]
    assert routing.slot_to_row.tolist() == [3, 0, 1, 4, 5, 2]


@pytest.mark.parametrize("huge", [2**32, 2**32 + 1, -(2**32), 2**31])
@pytest.mark.parametrize("tokens", [4, 600], ids=["single-block", "blocks"])
def test_ids_beyond_int32_are_not_mine(huge: int, tokens: int) -> None:
    """They must not wrap around to an expert."""
    ids = torch.zeros((tokens, 2), dtype=torch.int64, device=DEVICE)
    ids[:, 1] = huge
    routing = poisoned_routing(2 * tokens, 3, 2)
    launch.route(ids, routing, torch.float32)
    assert routing.offsets.tolist() == [0, tokens, tokens, tokens]
    assert (routing.slot_to_row[1::2] == -1).all()


SIZES = {
    "plain": (3, 0, 5, 17, 2),
    "empty": (0, 0, 0),
    "one": (40,),
    "tiles": (16, 32, 64, 128),
    "one-over": (17, 33, 65, 129),
    "many": (1, 0, 2) * 100,
    "several-blocks-of-tiles": (700, 0, 800, 3),
}


@pytest.mark.parametrize("extra", [0, 1, 50], ids=["fits", "one-row-left", "rows-left"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_route_sorted(sizes: tuple[int, ...], extra: int) -> None:
    m_sizes = torch.tensor(sizes, dtype=torch.int64, device=DEVICE)
    num_rows = sum(sizes) + extra
    ours, theirs = (poisoned_routing(num_rows, len(sizes), 1, sorted_rows=True) for _ in range(2))
    launch.route_sorted(m_sizes, num_rows, ours, torch.float32)
    reference.route_sorted(m_sizes, num_rows, theirs, torch.float32)
    assert torch.equal(ours.offsets, theirs.offsets)
    assert_tiles_cover(ours, num_rows, torch.float32)


@pytest.mark.parametrize("sizes", [(5, 6), (-1, 5), (2**31 - 1, 2), (2**32, 0), (2**62, 2**62)], ids=str)
def test_route_sorted_with_sizes_that_cannot_be(sizes: tuple[int, int]) -> None:
    m_sizes = torch.tensor(sizes, dtype=torch.int64, device=DEVICE)
    ours = poisoned_routing(10, 2, 1, sorted_rows=True)
    launch.route_sorted(m_sizes, 10, ours, torch.float32)
    assert ours.offsets.tolist() == [0, 0, 0]
    assert_tiles_cover(ours, 10, torch.float32)


# ------------------------------------------------------------------------------------------------- permutation stages

SCENES = {"all mine": "random", "partly mine": "partly mine", "not mine": "not mine"}


@dataclass(frozen=True)
class Scene:
    """A routing of 13 tokens to two of six experts each, as both implementations see it."""

    launch: Routing
    reference: Routing
    num_tokens: int = 13
    top_k: int = 2

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.top_k

    @property
    def routed(self) -> int:
        """Rows from here on belong to no expert."""
        return int(self.reference.offsets[-1])

    def sides(self) -> Iterator[tuple[ModuleType, Routing]]:
        yield launch, self.launch
        yield reference, self.reference


def make_scene(index: str, dtype: torch.dtype) -> Scene:
    ids = RoutingCase(f"scene-{index}", "", 13, 2, 6, index).ids()
    scene = Scene(*(poisoned_routing(26, 6, 2) for _ in range(2)))
    for side, routing in scene.sides():
        side.route(ids, routing, dtype)
    return scene


@pytest.fixture(params=SCENES.values(), ids=SCENES)
def index(request: pytest.FixtureRequest) -> str:
    return request.param


def same(name: str, ours: Tensor, exact: Tensor, plain: Tensor) -> None:
    assert_accurate(name, ours, exact.double(), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("features", [1, 40, 2100], ids=["one-feature", "one-block", "two-blocks"])
def test_dispatch(features: int, index: str, dtype: torch.dtype) -> None:
    scene = make_scene(index, dtype)
    x = random("x", 13, features, dtype=dtype)
    ours, theirs = (side.dispatch(x, routing, 26) for side, routing in scene.sides())
    assert torch.equal(ours, theirs)
    assert ours[scene.routed :].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("weights", ["same", "float32", "none"])
def test_combine(weights: str, index: str, dtype: torch.dtype) -> None:
    scene = make_scene(index, dtype)
    z = random("z", 26, 40, dtype=dtype)
    z[scene.routed :] = float("nan")
    scale = None
    if weights != "none":
        scale = random("weights", 13, 2, dtype=dtype if weights == "same" else torch.float32)
    exact = reference.combine(z.double(), scene.reference, 13, scale if scale is None else scale.double())
    ours, theirs = (side.combine(z, routing, 13, scale) for side, routing in scene.sides())
    same("y", ours, exact, theirs)


def test_combine_adds_in_slot_order() -> None:
    """1e8 + 1 - 1e8 is 0 in fp32 and 1 - 1e8 + 1e8 is 1e8's rounding of it: the order shows."""
    ids = torch.tensor([[2, 1, 0]], device=DEVICE)
    routing = module("permute").route(ids, 3, torch.float32)
    by_slot = torch.tensor([1e8, 1.0, -1e8], device=DEVICE)
    z = torch.empty((3, 1), device=DEVICE)
    z[routing.slot_to_row.long(), 0] = by_slot
    assert launch.combine(z, routing, 1, None).item() == 0.0
    z[routing.slot_to_row.long(), 0] = by_slot[[0, 2, 1]]
    assert launch.combine(z, routing, 1, None).item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("features", [40, 2100], ids=["one-block", "two-blocks"])
def test_combine_backward(features: int, index: str, dtype: torch.dtype) -> None:
    scene = make_scene(index, dtype)
    grad, z = random("grad", 13, features, dtype=dtype), random("z", 26, features, dtype=dtype)
    weights = random("weights", 13, 2)
    z[scene.routed :] = float("nan")
    exact = reference.combine_backward(grad.double(), z.double(), scene.reference, weights.double())
    ours, theirs = (side.combine_backward(grad, z, routing, weights) for side, routing in scene.sides())
    for name, *values in zip(("grad_z", "grad_weights"), ours, exact, theirs, strict=True):
        same(name, *values)


# ------------------------------------------------------------------------------------------------------ grouped GEMMs

# What a launch configuration may ask for; the tile itself stays the default's.
WAYS = {
    "pointers": {"descriptor": False, "slices": 1, "half_tiles": False},
    "descriptors": {"descriptor": True, "slices": 2, "half_tiles": True},
    "slices-of-4": {"descriptor": True, "slices": 4, "half_tiles": True},
}


# Slices are of down_backward's epilogue; the other kernels have none.
WAYS_UNSLICED = ("pointers", "descriptors")


@pytest.fixture(params=[WAYS[name] for name in WAYS_UNSLICED], ids=WAYS_UNSLICED)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces every configuration the kernels are launched with."""
    if request.param["descriptor"] and not INTERPRETED and not tuning.target_of(DEVICE).has_descriptors:
        pytest.skip("descriptors need compute capability 9.0")
    usual = tuning.launch_config

    def launch_config(*args: object) -> object:
        config = usual(*args)
        # Tiles of 16 rows cannot be halved, and a slice has at least 16 columns.
        half_tiles = request.param["half_tiles"] and config.block_m >= 32
        slices = min(request.param["slices"], config.block_n // 16)
        return replace(config, **request.param | {"half_tiles": half_tiles, "slices": slices})

    monkeypatch.setattr(tuning, "launch_config", launch_config)
    return request.param


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The block shapes of the descriptors that launches make from now on."""
    made: list[tuple[int, ...]] = []
    real = operands.Descriptor

    def descriptor(base: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]) -> object:
        made.append(tuple(block))
        return real(base, shape, strides, block)

    monkeypatch.setattr(operands, "Descriptor", descriptor)
    return made


# In and out features: descriptors need whole 16 bytes, and blocks of K that end where an expert does for "columns".
SHAPES = {"aligned": (64, 48), "block-of-k": (128, 128), "odd": (37, 27)}


@pytest.mark.parametrize("dtype", GEMM_DTYPES, ids=name_of)
@pytest.mark.parametrize("gather, bias", [(False, False), (True, True)], ids=["rows", "gather-bias"])
@pytest.mark.parametrize("orientation", ["in-contiguous", "out-contiguous"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_grouped_gemm(
    shape: tuple[int, int], orientation: str, gather: bool, bias: bool, dtype: torch.dtype, way: dict
) -> None:
    in_features, out_features = shape
    scene = make_scene("partly mine", dtype)
    a = random("a", 13 if gather else 26, in_features, dtype=dtype)
    weight = random("w", 6, out_features, in_features, dtype=dtype, scale=in_features**-0.5)
    if orientation == "out-contiguous":
        weight = weight.mT.contiguous().mT
    biases = random("bias", 6, out_features, dtype=dtype) if bias else None
    exact = reference.grouped_gemm(
        a.double(), weight.double(), scene.reference, 26, biases if biases is None else biases.double(), gather, -7.0
    )
    ours, theirs = (side.grouped_gemm(a, weight, routing, 26, biases, gather, -7.0) for side, routing in scene.sides())
    same("out", ours, exact, theirs)
    assert (ours[scene.routed :] == -7.0).all()


def test_descriptors_are_used_where_the_layout_allows(
    descriptors: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests above would compare pointers with pointers."""
    usual = tuning.launch_config
    monkeypatch.setattr(tuning, "launch_config", lambda *args: replace(usual(*args), descriptor=True))
    scene = make_scene("random", torch.float32)
    target = tuning.target_of(DEVICE)
    config = tuning.launch_config("gemm", tuning.bucket(26, 6, False, target), target, 4)
    a, weight = random("a", 26, 64), random("w", 6, 48, 64)

    def blocks(a: Tensor, weight: Tensor, gather: bool = False) -> list[tuple[int, ...]]:
        descriptors.clear()
        launch.grouped_gemm(a, weight, scene.launch, 26, None, gather, 0.0)
        return list(descriptors)

    rows, across, down = (
        (config.block_m, config.block_k),
        (config.block_n, config.block_k),
        (config.block_k, config.block_n),
    )
    assert blocks(a, weight) == [rows, across]
    assert blocks(a, weight.mT.contiguous().mT) == [rows, down]
    assert blocks(a[:13], weight, gather=True) == [across]
    # 37 floats are not whole 16 bytes; a sub-stack of wider weights is not one matrix.
    assert blocks(random("a", 26, 37), random("w", 6, 48, 37)) == []
    assert blocks(a, random("w", 6, 96, 64)[:, :48]) == [rows]


@pytest.mark.parametrize("dtype", GEMM_DTYPES, ids=name_of)
@pytest.mark.parametrize("save", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize(
    "gate",
    [Gate(), Gate("gelu", interleaved=True), Gate("relu2", gated=False), Gate("swiglu_oai", interleaved=True)],
    ids=["silu", "gelu-interleaved", "relu2-ungated", "gpt-oss"],
)
@pytest.mark.parametrize("orientation", ["in-contiguous", "out-contiguous"])
def test_grouped_up(gate: Gate, orientation: str, save: bool, dtype: torch.dtype, way: dict) -> None:
    if INTERPRETED and not save and orientation == "out-contiguous":
        pytest.skip("the interpreter, which is slow, has inference in one orientation")
    scene = make_scene("partly mine", dtype)
    columns = 96 if gate.gated else 48
    x = random("x", 13, 64, dtype=dtype)
    weight = random("w", 6, columns, 64, dtype=dtype, scale=0.2)
    if orientation == "out-contiguous":
        weight = weight.mT.contiguous().mT
    bias = random("bias", 6, columns, dtype=dtype)
    exact = reference.grouped_up(x.double(), weight.double(), scene.reference, 26, bias.double(), gate, save)
    ours, theirs = (side.grouped_up(x, weight, routing, 26, bias, gate, save) for side, routing in scene.sides())
    rows = slice(scene.routed)
    same("h", ours[0][rows], exact[0][rows], theirs[0][rows])
    assert ours[0].shape == (26, 48)
    if save:
        assert ours[1].shape == (26, columns)
        same("gate_up", ours[1][rows], exact[1][rows], theirs[1][rows])
    else:
        assert ours[1] is None
        assert theirs[1] is None


@pytest.mark.parametrize("dtype", GEMM_DTYPES, ids=name_of)
@pytest.mark.parametrize("bias, need_h", [(False, True), (True, False)], ids=["weighted-h", "bias"])
@pytest.mark.parametrize(
    "gate",
    [Gate(), Gate("gelu_tanh", interleaved=True), Gate("relu", gated=False)],
    ids=["silu", "gelu-interleaved", "relu-ungated"],
)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS, indirect=True)
def test_down_backward(gate: Gate, bias: bool, need_h: bool, dtype: torch.dtype, way: dict) -> None:
    scene = make_scene("partly mine", dtype)
    columns = 2 * 80 if gate.gated else 80
    grad = random("grad", 13, 64, dtype=dtype)
    weight = random("w", 6, 64, 80, dtype=dtype, scale=0.2)
    gate_up = random("gate_up", 26, columns, dtype=dtype)
    weights = random("weights", 13, 2)
    biases = random("bias", 6, 64, dtype=dtype) if bias else None
    exact = reference.down_backward(
        grad.double(),
        weight.double(),
        biases if biases is None else biases.double(),
        gate_up.double(),
        scene.reference,
        weights.double(),
        gate,
        need_h,
    )
    poisoned = gate_up.clone()
    poisoned[scene.routed :] = float("nan")
    ours = launch.down_backward(grad, weight, biases, poisoned, scene.launch, weights, gate, need_h)
    theirs = reference.down_backward(grad, weight, biases, gate_up, scene.reference, weights, gate, need_h)
    rows = slice(scene.routed)
    same("grad_gate_up", ours[0][rows], exact[0][rows], theirs[0][rows])
    if need_h:
        assert ours[1].shape == (26, 80)
        same("weighted_h", ours[1][rows], exact[1][rows], theirs[1][rows])
    else:
        assert ours[1] is None
        assert theirs[1] is None
    same("grad_top_k_weights", ours[2], exact[2], theirs[2])


@pytest.mark.parametrize("dtype", GEMM_DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "gathers", [(False, False), (True, False), (False, True)], ids=["rows", "gather-a", "gather-b"]
)
@pytest.mark.parametrize("out_layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_grouped_wgrad(
    shape: tuple[int, int], out_layout: str, gathers: tuple[bool, bool], dtype: torch.dtype, way: dict
) -> None:
    scene = make_scene("partly mine", dtype)
    a, b = (
        random(name, 13 if gather else 26, n, dtype=dtype) for name, gather, n in zip("ab", gathers, shape, strict=True)
    )
    for value, gather in zip((a, b), gathers, strict=True):
        if not gather:
            value[scene.routed :] = float("nan")
    exact = torch.empty((6, *shape), dtype=torch.float64, device=DEVICE)
    reference.grouped_wgrad(a.double(), b.double(), scene.reference, *gathers, exact)
    theirs = torch.empty((6, *shape), dtype=dtype, device=DEVICE)
    reference.grouped_wgrad(a, b, scene.reference, *gathers, theirs)
    ours = torch.full((6, *(shape if out_layout == "rows" else shape[::-1])), float("nan"), dtype=dtype, device=DEVICE)
    if out_layout == "columns":
        ours = ours.mT
    launch.grouped_wgrad(a, b, scene.launch, *gathers, ours)
    same("out", ours, exact, theirs)


@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 64, 100])
def test_grouped_wgrad_of_full_and_partial_blocks(rows: int, way: dict) -> None:
    """Blocks of rows that end exactly where the expert does, and those that do not; other experts' rows are Inf."""
    sizes = torch.tensor([3, rows, 2], device=DEVICE)
    routing = poisoned_routing(rows + 5, 3, 1, sorted_rows=True)
    launch.route_sorted(sizes, rows + 5, routing, torch.float32)
    a, b = random("a", rows + 5, 16), random("b", rows + 5, 32)
    exact = a[3 : 3 + rows].double().T @ b[3 : 3 + rows].double()
    for value in (a, b):
        value[:3] = value[3 + rows :] = float("inf")
    out = torch.full((3, 16, 32), float("nan"), device=DEVICE)
    launch.grouped_wgrad(a, b, routing, False, False, out)
    same("out", out[1], exact, a[3 : 3 + rows].T @ b[3 : 3 + rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("features", [1, 40, 150], ids=["one-feature", "one-block", "two-blocks"])
def test_grouped_row_sum(features: int, weighted: bool, index: str, dtype: torch.dtype) -> None:
    scene = make_scene(index, dtype)
    a = random("a", 13 if weighted else 26, features, dtype=dtype)
    if not weighted:
        a[scene.routed :] = float("nan")
    weights = random("weights", 13, 2) if weighted else None
    exact = reference.grouped_row_sum(
        a.double(), scene.reference, weights if weights is None else weights.double(), weighted
    )
    ours, theirs = (side.grouped_row_sum(a, routing, weights, weighted) for side, routing in scene.sides())
    same("out", ours, exact, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gemv_equals_the_routed_stages(dtype: torch.dtype) -> None:
    """The same experts by two ways; ids of every kind."""
    gate, ids = Gate(), torch.tensor([[1, 4], [3, 3], [-1, 0]], device=DEVICE)
    x, weights = random("x", 3, 40, dtype=dtype), random("weights", 3, 2)
    up, down = random("up", 4, 60, 40, dtype=dtype, scale=0.2), random("down", 4, 40, 30, dtype=dtype, scale=0.2)
    up_bias, down_bias = random("up_bias", 4, 60, dtype=dtype), random("down_bias", 4, 40, dtype=dtype)

    def routed(*tensors: Tensor) -> Tensor:
        x, weights, up, down, up_bias, down_bias = tensors
        routing = poisoned_routing(6, 4, 2)
        reference.route(ids, routing, x.dtype)
        h, _ = reference.grouped_up(x, up, routing, 6, up_bias, gate, False)
        z = reference.grouped_gemm(h, down, routing, 6, down_bias, False, 0.0)
        return reference.combine(z, routing, 3, weights)

    tensors = (x, weights, up, down, up_bias, down_bias)
    ours = launch.gemv_experts(x, ids, weights, up, down, up_bias, down_bias, gate)
    same("y", ours, routed(*(t.double() for t in tensors)), routed(*tensors))


def test_gemv_serves_few_slots_only() -> None:
    down = torch.empty((2, 8, 8), device=DEVICE)
    assert launch.use_gemv(1, 8, down, down)
    most = tuning.gemv_slots(tuning.target_of(DEVICE))
    assert launch.use_gemv(most, 1, down, down)
    assert not launch.use_gemv(most + 1, 1, down, down)
    assert not launch.use_gemv(0, 8, down, down)
    assert not launch.use_gemv(1, 8, down, down[:, :0])
