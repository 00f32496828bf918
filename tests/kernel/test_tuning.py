"""Launch configurations: targets and their families, the one rule of validity, defaults, tables in JSON, thresholds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernel.machine import module

tuning, tables = module("tuning"), module("tuning.tables")
GOOD = tuning.LaunchConfig(64, 64, 64, 4, 3)
A100, H100, RTX = tuning.TARGETS[80], tuning.TARGETS[90], tuning.TARGETS[86]


@pytest.mark.parametrize("kernel", tuning.KERNELS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_good_configuration_is_valid(kernel: str, itemsize: int) -> None:
    tuning.check(kernel, replace(GOOD, num_stages=2), A100, itemsize)


VIOLATIONS = {
    "block-not-a-power-of-two": ({"block_m": 48}, "block_m must be a power of two, got 48"),
    "block-zero": ({"block_n": 0}, "block_n must be a power of two, got 0"),
    "block-negative": ({"block_k": -16}, "block_k must be a power of two, got -16"),
    "block-too-small": ({"block_k": 8}, "at least 16"),
    "warps-not-a-power-of-two": ({"num_warps": 6}, "num_warps must be a power of two, got 6"),
    "warps-too-many": ({"num_warps": 32}, "num_warps at most 16"),
    "no-stages": ({"num_stages": 0}, "num_stages must be 1 to 8"),
    "too-many-stages": ({"num_stages": 9}, "num_stages must be 1 to 8"),
    "descriptor-before-hopper": ({"descriptor": True}, "descriptors need compute capability 9.0, got 80"),
    "too-much-shared-memory": ({"block_n": 512, "block_k": 128}, "bytes of shared memory, 80 has"),
    "odd-slices": ({"slices": 3}, "slices must be 1, 2, 4 or 8"),
    "half-of-16": ({"block_m": 16, "half_tiles": True}, "half_tiles needs tiles of at least 32 rows"),
    "thin-slices": ({"block_n": 64, "slices": 8}, "at least 16 columns"),
}


@pytest.mark.parametrize("change, message", VIOLATIONS.values(), ids=VIOLATIONS)
def test_each_violation_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuning.check("gemm", replace(GOOD, **change), A100, 2)


def test_descriptors_are_for_hopper_and_later() -> None:
    config = replace(GOOD, descriptor=True)
    tuning.check("gemm", config, H100, 2)
    for target in (tuning.TARGETS[89], tuning.TARGETS["gfx942"], tuning.TARGETS["xpu"]):
        with pytest.raises(ValueError, match="descriptors"):
            tuning.check("gemm", config, target, 2)


def test_shared_memory_of_the_operand_tiles() -> None:
    config = tuning.LaunchConfig(128, 64, 32, 4, 3)
    assert tuning.shared_memory("gemm", config, 2) == 3 * 32 * (128 + 64) * 2
    assert tuning.shared_memory("up", config, 2) == 3 * 32 * (128 + 2 * 64) * 2
    assert tuning.shared_memory("wgrad", config, 4) == 3 * 32 * (128 + 64) * 4


def test_shared_memory_of_packed_tiles() -> None:
    """Rows and bytes are on their way in every stage, decoded weights once."""
    config = tuning.LaunchConfig(128, 32, 64, 4, 3)
    assert tuning.shared_memory("gemm_4bit", config, 2) == 3 * (128 * 64 * 2 + 32 * 64 // 2) + 32 * 64 * 2
    assert tuning.shared_memory("transposed_4bit", config, 2) == tuning.shared_memory("gemm_4bit", config, 2)
    assert tuning.shared_memory("up_4bit", config, 4) == 3 * (128 * 64 * 4 + 32 * 64) + 2 * 32 * 64 * 4


@pytest.mark.parametrize("kernel", tuning.KERNELS_4BIT)
def test_packed_tiles_hold_whole_64s(kernel: str) -> None:
    """Along the features that are packed, which are the out features of a transposed stack."""
    along, across = ("block_k", "block_n") if kernel in ("up_4bit", "gemm_4bit") else ("block_n", "block_k")
    tuning.check(kernel, replace(GOOD, **{along: 128, across: 32}), A100, 2)
    with pytest.raises(ValueError, match=f"{kernel} needs tiles of multiples of 64 along the packed features"):
        tuning.check(kernel, replace(GOOD, **{along: 32, across: 128}), A100, 2)


@pytest.mark.parametrize("target", tuning.TARGETS.values(), ids=[str(arch) for arch in tuning.TARGETS])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("block_m", tuning.BUCKETS)
@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_every_default_and_override_is_valid(kernel: str, block_m: int, itemsize: int, target: object) -> None:
    tuning.check(kernel, tuning.default_config(kernel, block_m, target, itemsize), target, itemsize)
    config = tuning.launch_config(kernel, block_m, target, itemsize)
    # All kernels of a bucket walk the same map of row tiles.
    if kernel not in tuning.WGRADS:
        assert config.block_m == tuning.tile_height(block_m, itemsize)


@pytest.mark.parametrize("shared_memory", [64, 99, 163])
def test_defaults_shrink_to_small_targets(shared_memory: int) -> None:
    target = replace(RTX, shared_memory=shared_memory * 1024)
    for kernel in tuning.KERNELS:
        for block_m in tuning.BUCKETS:
            config = tuning.launch_config(kernel, block_m, target, 2)
            assert tuning.shared_memory(kernel, config, 2) <= target.shared_memory


@pytest.mark.parametrize("target", tuning.TARGETS.values(), ids=[str(arch) for arch in tuning.TARGETS])
@pytest.mark.parametrize(
    "rows, experts, height",
    [(0, 8, 16), (32, 8, 16), (33, 8, 32), (128, 8, 32), (129, 8, 64), (384, 8, 64), (385, 8, 128), (10**9, 8, 128)],
)
def test_bucket_boundaries(rows: int, experts: int, height: int, target: Any) -> None:
    """No target has shipped limits of its own so far."""
    assert tuning.bucket(rows, experts, False, target) == height


def test_bucket_without_experts() -> None:
    assert tuning.bucket(0, 0, False, H100) == 16
    assert tuning.bucket(0, 0, True, H100) == 16


@pytest.mark.parametrize("target", tuning.TARGETS.values(), ids=[str(arch) for arch in tuning.TARGETS])
@pytest.mark.parametrize(
    "rows, experts, height",
    [(0, 8, 16), (88, 8, 16), (89, 8, 32), (112, 8, 32), (113, 8, 64), (1024, 8, 64), (1025, 8, 128), (10**9, 8, 128)],
)
def test_bucket_boundaries_of_packed_weights(rows: int, experts: int, height: int, target: Any) -> None:
    assert tuning.bucket(rows, experts, True, target) == height


@pytest.mark.parametrize("target", tuning.TARGETS.values(), ids=[str(arch) for arch in tuning.TARGETS])
def test_heights_are_the_same_for_packed_weights(target: Any) -> None:
    """Both kinds share configurations, which are by height."""
    thresholds = tuning.thresholds_of(target)
    assert tuple(thresholds.packed) == tuple(thresholds.dense) == tuning.BUCKETS[:-1]


@pytest.mark.parametrize(
    "arch, kernel, rows",
    [
        (90, "up_4bit", 448),
        (90, "gemm_4bit", 448),
        (90, "transposed_4bit", 320),
        (90, "down_backward_4bit", 240),
        (80, "up_4bit", 192),
        (100, "transposed_4bit", 192),
        (103, "transposed_4bit", 192),
        (121, "down_backward_4bit", 192),
        ("gfx942", "gemm_4bit", 192),
    ],
)
def test_many_rows_are_not_decoded_in_products(arch: int | str, kernel: str, rows: int) -> None:
    target = tuning.TARGETS[arch]
    assert tuning.dequantize_rows(kernel, target) == rows
    assert tuning.dequantizes_in_product(kernel, 0, 8, target)
    assert tuning.dequantizes_in_product(kernel, rows * 8, 8, target)
    assert not tuning.dequantizes_in_product(kernel, rows * 8 + 1, 8, target)


@pytest.mark.parametrize("target", tuning.TARGETS.values(), ids=[str(arch) for arch in tuning.TARGETS])
def test_thresholds_are_known_for_every_target(target: Any) -> None:
    assert set(tuning.thresholds_of(target).dequantize_rows) == set(tuning.KERNELS_4BIT)
    assert tuning.gemv_slots(target) == 64


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in place of the measured configurations."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tables, "CONFIGS", shipped)
    tuning.forget_tables()
    yield shipped
    tuning.forget_tables()


def test_overrides_replace_what_they_name(configs: Path) -> None:
    (configs / "sm_90.json").write_text(json.dumps({"gemm": {"2": {"64": {"block_n": 32, "num_warps": 2}}}}))
    default = tuning.default_config("gemm", 64, H100, 2)
    assert tuning.launch_config("gemm", 64, H100, 2) == replace(default, block_n=32, num_warps=2)
    assert tuning.launch_config("gemm", 32, H100, 2) == tuning.default_config("gemm", 32, H100, 2)
    assert tuning.launch_config("gemm", 64, H100, 4) == tuning.default_config("gemm", 64, H100, 4)
    assert tuning.launch_config("gemm", 64, A100, 2) == tuning.default_config("gemm", 64, A100, 2)


def test_no_overrides(configs: Path) -> None:
    assert tuning.launch_config("up", 16, H100, 2) == tuning.default_config("up", 16, H100, 2)


@pytest.mark.parametrize(
    "table, message",
    [
        ({"gem": {"2": {"64": {"block_n": 32}}}}, "gem/2/64 does not describe a LaunchConfig"),
        ({"gemm": {"2": {"64": {"block_width": 32}}}}, "gemm/2/64 does not describe a LaunchConfig"),
        ({"gemm": {"2": {"64": {"block_n": 33}}}}, "block_n must be a power of two"),
        ({"gemm": {"2": {"64": {"block_m": 128}}}}, "gemm: block_m must be the 64 of its bucket, got 128"),
        ({"gemm": {"2": {"64": {"block_m": 32}}}}, "gemm: block_m must be the 64 of its bucket, got 32"),
        ({"gemm": {"8": {"64": {"block_n": 32}}}}, "gemm/8/64 does not describe a LaunchConfig"),
        ({"gemm": {"2": {"48": {"block_n": 32}}}}, "gemm/2/48 does not describe a LaunchConfig"),
        ({"gemm": {"2": {"64": {"block_n": "32"}}}}, "gemm/2/64 must have whole numbers and booleans"),
        ({"gemm": {"2": [64]}}, r"gemm/2 must be an object, got \[64\]"),
        ([], r"the table must be an object, got \[\]"),
        ({"gemv_slots": "64"}, 'gemv_slots must be a whole number of at least 0, got "64"'),
        ({"gemv_slots": True}, "gemv_slots must be a whole number of at least 0, got true"),
        ({"gemv_slots": -1}, "gemv_slots must be a whole number of at least 0, got -1"),
        ({"dequantize_rows": 192}, "dequantize_rows must be an object, got 192"),
        ({"dequantize_rows": {"up": 192}}, "dequantize_rows/up is not known: dequantize_rows has up_4bit, gemm_4bit"),
        ({"dequantize_rows": {"up_4bit": 1.5}}, r"dequantize_rows/up_4bit must be a whole number .*, got 1\.5"),
        ({"buckets": {"16": 4}}, "buckets/16 is not known: buckets has dense, packed"),
        ({"buckets": {"dense": {"128": 64}}}, "buckets/dense/128 is not known: buckets/dense has 16, 32, 64"),
        ({"buckets": {"dense": {"16": None}}}, "buckets/dense/16 must be a whole number of at least 0, got null"),
        (
            {"buckets": {"dense": {"16": 17}}},
            "buckets/dense: tiles of 16 rows must not serve more rows than tiles of 32",
        ),
        ({"why": "because"}, "why must be an object"),
        ({"why": {"buckets": [4]}}, r"why/buckets must be text or a list of texts, got \[4\]"),
        ("not JSON", "sm_90.json is not JSON: Expecting value"),
    ],
    ids=str,
)
@pytest.mark.parametrize("users", [False, True], ids=["shipped", "users"])
def test_bad_overrides_are_refused(
    configs: Path, table: object, message: str, users: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's table by the rule, and with the messages, of ours: with the path of the one that is wrong."""
    folder = configs
    if users:
        folder = tmp_path / "users"
        folder.mkdir()
        monkeypatch.setenv("MOE_FUSED_CONFIGS", str(folder))
        (configs / "sm_90.json").write_text(json.dumps({"gemm": {"2": {"64": {"block_n": 32}}}}))
    (folder / "sm_90.json").write_text(table if isinstance(table, str) else json.dumps(table))

    def read() -> None:
        tuning.launch_config("gemm", 64, H100, 2)
        tuning.thresholds_of(H100)

    with pytest.raises(ValueError, match=message) as caught:
        read()
    assert str(caught.value).startswith(f"{folder / 'sm_90.json'}")


def test_overrides_of_the_user_lie_over_the_shipped(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entry by entry: where both have an entry, nothing of the shipped one is left."""
    users = tmp_path / "users"
    users.mkdir()
    shipped = {"gemm": {"2": {"32": {"block_n": 32}, "64": {"block_n": 32, "num_warps": 2}}}}
    (configs / "sm_90.json").write_text(json.dumps(shipped))
    (users / "sm_90.json").write_text(json.dumps({"gemm": {"2": {"64": {"num_stages": 2}}}, "up": {"4": {"16": {}}}}))
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(users))
    default = {height: tuning.default_config("gemm", height, H100, 2) for height in (32, 64)}
    assert tuning.launch_config("gemm", 64, H100, 2) == replace(default[64], num_stages=2)
    assert tuning.launch_config("gemm", 32, H100, 2) == replace(default[32], block_n=32)
    assert tuning.launch_config("up", 16, H100, 4) == tuning.default_config("up", 16, H100, 4)
    assert tuning.launch_config("gemm", 64, A100, 2) == tuning.default_config("gemm", 64, A100, 2)
    assert tuning.table_paths(90) == [configs / "sm_90.json", users / "sm_90.json"]
    assert tuning.table_paths(80) == []


@pytest.mark.parametrize("value", ["no/such/directory", __file__])
def test_overrides_of_the_user_need_a_directory(configs: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_FUSED_CONFIGS", value)
    with pytest.raises(ValueError, match=r"MOE_FUSED_CONFIGS must be a directory with tables as sm_90\.json, got"):
        tuning.launch_config("gemm", 64, H100, 2)


def test_trying_a_configuration(configs: Path) -> None:
    usual = tuning.launch_config("gemm", 64, H100, 2)
    with tuning.trying("gemm", 64, 2, GOOD):
        assert tuning.launch_config("gemm", 64, H100, 2) is GOOD
        assert tuning.launch_config("gemm", 32, H100, 2) != GOOD
        with tuning.trying("gemm", 64, 2, replace(GOOD, num_warps=8)):
            assert tuning.launch_config("gemm", 64, H100, 2) == replace(GOOD, num_warps=8)
        assert tuning.launch_config("gemm", 64, H100, 2) is GOOD
    assert tuning.launch_config("gemm", 64, H100, 2) == usual


def test_compiling_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches nothing, and only within the block."""
    plan = module("stages.triton.bound_kernel")
    asked: list[str] = []

    class Kernel:
        arg_names = ("x", "N")

        def __getitem__(self, grid: tuple) -> object:
            return lambda *args, **options: asked.append(f"launch {args} {options}")

        def warmup(self, *args: object, grid: tuple, **options: object) -> None:
            asked.append(f"compile {args} {grid} {options}")

    bound = plan.BoundKernel(Kernel(), {"N": 3}, num_warps=8, num_stages=2)
    with plan.compiling_only():
        bound(torch.device("cpu"), (1, 1, 1), 5)
    bound(torch.device("cpu"), (1, 1, 1), 5)
    options = "{'num_warps': 8, 'num_stages': 2}"
    assert asked == [f"compile (5, 3) (1, 1, 1) {options}", f"launch (5, 3) {options}"]


@pytest.mark.parametrize("path", sorted(Path(tuning.CONFIGS).glob("*.json")), ids=lambda path: path.name)
def test_shipped_overrides_belong_to_known_targets(path: Path) -> None:
    known = {f"sm_{arch}" if isinstance(arch, int) else arch: target for arch, target in tuning.TARGETS.items()}
    of_file = [known[path.stem]] if path.stem in known else relatives_of(path.stem)
    assert of_file, f"{path.name} is named for no known GPU or family"
    table = json.loads(path.read_text())
    for target in of_file:
        thresholds = tuning.thresholds_of(target)
        assert thresholds.gemv_slots == table.get("gemv_slots", thresholds.gemv_slots)
        assert table.get("dequantize_rows", {}).items() <= thresholds.dequantize_rows.items()
        for kind, limits in table.get("buckets", {}).items():
            assert {int(height): rows for height, rows in limits.items()}.items() <= getattr(thresholds, kind).items()
        for kernel, by_size in table.items():
            if kernel in tuning.SECTIONS:
                continue
            for size, by_bucket in by_size.items():
                for block_m, values in by_bucket.items():
                    config = tuning.launch_config(kernel, int(block_m), target, int(size))
                    assert {field: getattr(config, field) for field in values} == values


def relatives_of(family: str) -> list[Any]:
    return [target for target in tuning.TARGETS.values() if target.family.name == family]


def test_a_cpu_counts_as_ampere() -> None:
    assert tuning.target_of(torch.device("cpu")) is A100


# Tables of families, and thresholds in tables.


def test_a_family_shares_a_table(configs: Path) -> None:
    """The table of the very GPU lies over its family's, entry by entry; other families see neither."""
    B200, B300, THOR = (tuning.TARGETS[arch] for arch in (100, 103, 110))
    family = {
        "gemm": {"2": {"32": {"block_n": 32}, "64": {"block_n": 32}}},
        "gemv_slots": 32,
        "buckets": {"dense": {"16": 5, "32": 20}},
    }
    (configs / "blackwell.json").write_text(json.dumps(family))
    (configs / "sm_103.json").write_text(
        json.dumps({"gemm": {"2": {"64": {"num_stages": 2}}}, "buckets": {"dense": {"16": 6}}})
    )
    for target in (B200, THOR):
        assert tuning.launch_config("gemm", 64, target, 2).block_n == 32
        assert tuning.thresholds_of(target).dense == {16: 5, 32: 20, 64: 48}
    assert tuning.launch_config("gemm", 32, B300, 2).block_n == 32
    assert tuning.launch_config("gemm", 64, B300, 2) == replace(
        tuning.default_config("gemm", 64, B300, 2), num_stages=2
    )
    assert tuning.thresholds_of(B300).dense == {16: 6, 32: 20, 64: 48}
    assert [tuning.gemv_slots(target) for target in (B200, B300, THOR, H100)] == [32, 32, 32, 64]
    assert tuning.table_paths(103) == [configs / "blackwell.json", configs / "sm_103.json"]
    assert tuning.table_paths(120) == []


def test_a_table_of_the_user_for_a_family(configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (configs / "sm_90.json").write_text(json.dumps({"gemv_slots": 16}))
    users = tmp_path / "users"
    users.mkdir()
    (users / "hopper.json").write_text(json.dumps({"gemv_slots": 8}))
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(users))
    assert tuning.gemv_slots(H100) == 8
    assert tuning.table_paths(90) == [configs / "sm_90.json", users / "hopper.json"]


def test_a_family_configuration_is_cut_down_for_a_smaller_relative(configs: Path) -> None:
    """In the GPU's own table, what does not fit is a mistake; other mistakes are mistakes in a family's table, too."""
    large = {"gemm": {"2": {"64": {"block_k": 256, "num_stages": 4}}}}
    (configs / "ampere.json").write_text(json.dumps(large))
    config = tuning.launch_config("gemm", 64, A100, 2)
    assert tuning.shared_memory("gemm", config, 2) <= A100.shared_memory
    assert config == replace(tuning.default_config("gemm", 64, A100, 2), block_k=128, num_stages=2)
    (configs / "sm_87.json").write_text(json.dumps(large))
    with pytest.raises(ValueError, match=r"sm_87\.json: gemm/2/64: .* bytes of shared memory"):
        tuning.launch_config("gemm", 64, tuning.TARGETS[87], 2)
    tuning.forget_tables()
    (configs / "ampere.json").write_text(json.dumps({"gemm": {"2": {"64": {"descriptor": True}}}}))
    with pytest.raises(ValueError, match=r"ampere\.json: gemm/2/64: descriptors need compute capability 9\.0"):
        tuning.launch_config("gemm", 64, A100, 2)


def test_thresholds_of_a_table(configs: Path) -> None:
    table = {
        "why": {"gemv_slots": "read by people", "buckets": ["line by line", "as well"]},
        "gemv_slots": 0,
        "dequantize_rows": {"up_4bit": 100},
        "buckets": {"dense": {"16": 16}, "packed": {"32": 11, "64": 200}},
    }
    (configs / "sm_80.json").write_text(json.dumps(table))
    assert tuning.thresholds_of(A100) == tuning.Thresholds(
        dense={16: 16, 32: 16, 64: 48},
        packed={16: 11, 32: 11, 64: 200},
        dequantize_rows={"up_4bit": 100, "gemm_4bit": 192, "transposed_4bit": 192, "down_backward_4bit": 192},
        gemv_slots=0,
    )
    assert not tuning.dequantizes_in_product("up_4bit", 8 * 100 + 1, 8, A100)
    assert [tuning.bucket(8 * rows, 8, False, A100) for rows in (16, 17)] == [16, 64], "no rows are left for 32"
    assert [tuning.bucket(8 * rows, 8, True, A100) for rows in (11, 12, 200, 201)] == [16, 64, 64, 128]


def test_trying_thresholds(configs: Path) -> None:
    usual = tuning.thresholds_of(H100)
    with tuning.trying_thresholds(replace(usual, gemv_slots=7, dense={16: 1, 32: 2, 64: 3})):
        assert tuning.gemv_slots(H100) == 7
        assert [tuning.bucket(rows, 1, False, H100) for rows in (1, 2, 3, 4)] == [16, 32, 64, 128]
    assert tuning.thresholds_of(H100) == usual


# Relatives of the GPUs that were measured.


@dataclass(frozen=True)
class Relative:
    """A GPU as its driver describes it, and what it must be treated as.

    Attributes:
        capability: (major, minor). shared_memory: KiB that a program may use. family: of the analytic defaults and tables.
        descriptors: whether the hardware has them. defaults: whether the default configurations ask for them.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int
    family: str
    descriptors: bool = False
    defaults: bool = False
    added: bool = True

    @property
    def id(self) -> str:
        return f"{self.name}-{self.capability[0]}.{self.capability[1]}"


RELATIVES = [
    Relative("A100", (8, 0), 163, "ampere"),
    Relative("A10", (8, 6), 99, "ampere-consumer"),
    Relative("RTX 3090", (8, 6), 99, "ampere-consumer"),
    Relative("Orin", (8, 7), 163, "ampere"),
    Relative("L4", (8, 9), 99, "ampere-consumer"),
    Relative("RTX 4090", (8, 9), 99, "ampere-consumer"),
    Relative("H100", (9, 0), 227, "hopper", descriptors=True, defaults=True),
    Relative("B200", (10, 0), 227, "blackwell", descriptors=True, defaults=True),
    Relative("B300", (10, 3), 227, "blackwell", descriptors=True, defaults=True),
    Relative("Thor", (11, 0), 227, "blackwell", descriptors=True, defaults=True),
    Relative("Thor by CUDA 12", (10, 1), 227, "blackwell", descriptors=True, defaults=True, added=False),
    Relative("RTX 5090", (12, 0), 99, "blackwell-consumer", descriptors=True),
    Relative("GB10", (12, 1), 99, "blackwell-consumer", descriptors=True),
    # GPUs that nobody has added. One that arrives takes the place of its row here.
    Relative("an Ampere to come", (8, 8), 99, "ampere-consumer", added=False),
    Relative("a Hopper to come", (9, 5), 227, "hopper", descriptors=True, defaults=True, added=False),
    Relative("a Blackwell to come", (12, 5), 99, "blackwell-consumer", descriptors=True, added=False),
    Relative("a large one to come", (13, 0), 300, "blackwell-consumer", descriptors=True, added=False),
    Relative("a small one to come", (14, 2), 64, "blackwell-consumer", descriptors=True, added=False),
]


def target_of_relative(relative: Relative, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``target_of`` makes of a device that describes itself so."""
    major, minor = relative.capability
    properties = SimpleNamespace(
        name=relative.name, major=major, minor=minor, shared_memory_per_block_optin=relative.shared_memory * 1024
    )
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return tuning.target_of.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize("relative", RELATIVES, ids=lambda relative: relative.id)
def test_relatives(relative: Relative, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its family, its own limits, and a valid configuration for whatever a call asks."""
    target = target_of_relative(relative, monkeypatch)
    major, minor = relative.capability
    assert target == tuning.Target("cuda", 10 * major + minor, relative.shared_memory * 1024)
    assert target.family.name == relative.family
    assert target.has_descriptors is relative.descriptors
    assert (target.arch in tuning.TARGETS) is relative.added, "a GPU is added by a line in tuning/targets.py"
    known = tuning.TARGETS.get(target.arch)
    assert known is None or known == target, "what a driver reports is what the compile matrix assumes"
    asking = set()
    for kernel in tuning.KERNELS:
        for block_m in tuning.BUCKETS:
            for itemsize in (2, 4):
                default = tuning.default_config(kernel, block_m, target, itemsize)
                config = tuning.launch_config(kernel, block_m, target, itemsize)
                for candidate in (default, config):
                    tuning.check(kernel, candidate, target, itemsize)
                    tuning.check_bucket(kernel, block_m, candidate, itemsize)
                if default.descriptor:
                    asking.add((kernel, itemsize))
    # Those whose weights, and rows where they are not gathered, may come through descriptors; thin tiles gain nothing.
    able = {(kernel, 2) for kernel in ("up", "gemm", "gemm_short", "down_backward", "shrink")}
    assert asking == (able if relative.defaults else set())
    with_descriptor = replace(GOOD, num_stages=2, descriptor=True)
    if relative.descriptors:
        tuning.check("gemm", with_descriptor, target, 2)
    else:
        with pytest.raises(ValueError, match=r"descriptors need compute capability 9\.0"):
            tuning.check("gemm", with_descriptor, target, 2)
    tuning.thresholds_of(target).check()


@pytest.mark.parametrize("arch, like", [(103, 100), (110, 100), (101, 100), (121, 120), (87, 80), (89, 86)])
def test_relatives_get_the_defaults_of_their_family(arch: int, like: int) -> None:
    target, relative = tuning.nearest_relative(arch), tuning.TARGETS[like]
    for kernel in tuning.KERNELS:
        for block_m in tuning.BUCKETS:
            for itemsize in (2, 4):
                expected = tuning.default_config(kernel, block_m, relative, itemsize)
                assert tuning.default_config(kernel, block_m, target, itemsize) == expected


def test_two_unlike_gpus_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor's device has the target that it describes, whichever device is asked about first."""
    described = {0: (8, 9, 99), 1: (9, 0, 227)}

    def properties(device: torch.device) -> SimpleNamespace:
        major, minor, kib = described[device.index]
        return SimpleNamespace(major=major, minor=minor, shared_memory_per_block_optin=kib * tuning.targets.KIB)

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    tuning.target_of.cache_clear()
    try:
        targets = [tuning.target_of(torch.device("cuda", index)) for index in (1, 0, 1)]
    finally:
        tuning.target_of.cache_clear()
    assert [(target.arch, target.family.name) for target in targets] == [
        (90, "hopper"), (89, "ampere-consumer"), (90, "hopper")
    ]  # fmt: skip
    descriptors = [tuning.launch_config("gemm", 128, target, 2).descriptor for target in targets]
    assert descriptors == [True, False, True]


def test_a_gpu_whose_limit_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=10, minor=3))
    assert tuning.target_of.__wrapped__(torch.device("cuda")) == tuning.TARGETS[103]


@pytest.mark.parametrize("name, arch", [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx950", "gfx950")])
def test_amd_gpus(name: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All count as CDNA3, with tables under their own names."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=name))
    target = tuning.target_of.__wrapped__(torch.device("cuda"))
    assert target == replace(tuning.TARGETS["gfx942"], arch=arch)
    assert target.family.name == "cdna3"
    for kernel in tuning.KERNELS:
        assert tuning.launch_config(kernel, 128, target, 2).num_stages == 2
