"""Launch configurations: the one rule of validity, defaults for every target, overrides from JSON, buckets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.kernel.machine import module

tuning = module("tuning")
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
    assert tuning.shared_memory("gram", config, 4) == 3 * 32 * (128 + 64) * 4


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
    if kernel not in tuning.GRAMS:
        assert config.block_m == tuning.tile_height(block_m, itemsize)


@pytest.mark.parametrize("shared_memory", [64, 99, 163])
def test_defaults_shrink_to_small_targets(shared_memory: int) -> None:
    target = replace(RTX, shared_memory=shared_memory * 1024)
    for kernel in tuning.KERNELS:
        for block_m in tuning.BUCKETS:
            config = tuning.launch_config(kernel, block_m, target, 2)
            assert tuning.shared_memory(kernel, config, 2) <= target.shared_memory


@pytest.mark.parametrize(
    "rows, experts, height",
    [(0, 8, 16), (32, 8, 16), (33, 8, 32), (128, 8, 32), (129, 8, 64), (384, 8, 64), (385, 8, 128), (10**9, 8, 128)],
)
def test_bucket_boundaries(rows: int, experts: int, height: int) -> None:
    assert tuning.bucket(rows, experts) == height


def test_bucket_without_experts() -> None:
    assert tuning.bucket(0, 0) == 16
    assert tuning.bucket(0, 0, packed=True) == 16


@pytest.mark.parametrize(
    "rows, experts, height",
    [(0, 8, 16), (88, 8, 16), (89, 8, 32), (112, 8, 32), (113, 8, 64), (1024, 8, 64), (1025, 8, 128), (10**9, 8, 128)],
)
def test_bucket_boundaries_of_packed_weights(rows: int, experts: int, height: int) -> None:
    assert tuning.bucket(rows, experts, packed=True) == height


def test_heights_are_the_same_for_packed_weights() -> None:
    """Both kinds share configurations, which are by height."""
    assert tuple(tuning.PACKED_BUCKETS) == tuple(tuning.BUCKETS)


@pytest.mark.parametrize(
    "arch, kernel, rows",
    [
        (90, "up_4bit", 448),
        (90, "down_backward_4bit", 240),
        (80, "up_4bit", 192),
        (100, "transposed_4bit", 192),
        ("gfx942", "gemm_4bit", 192),
    ],
)
def test_many_rows_are_not_decoded_in_products(arch: int | str, kernel: str, rows: int) -> None:
    target = tuning.TARGETS[arch]
    assert tuning.decodes_in_gemm(kernel, 0, 8, target)
    assert tuning.decodes_in_gemm(kernel, rows * 8, 8, target)
    assert not tuning.decodes_in_gemm(kernel, rows * 8 + 1, 8, target)


def test_rows_are_known_of_every_kernel_that_decodes() -> None:
    for rows in tuning.DECODE_ROWS.values():
        assert set(rows) == set(tuning.KERNELS_4BIT)


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the measured configurations."""
    caches = (tuning._overrides, tuning.launch_config)
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tuning, "_CONFIGS", shipped)
    for cached in caches:
        cached.cache_clear()
    yield shipped
    for cached in caches:
        cached.cache_clear()


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
        ("not JSON", "sm_90.json is not JSON: Expecting value"),
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [False, True], ids=["shipped", "own"])
def test_bad_overrides_are_refused(
    configs: Path, table: object, message: str, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's table by the rule, and with the messages, of ours: with the path of the one that is wrong."""
    folder = configs
    if own:
        folder = tmp_path / "own"
        folder.mkdir()
        monkeypatch.setenv("MOE_FUSED_CONFIGS", str(folder))
        (configs / "sm_90.json").write_text(json.dumps({"gemm": {"2": {"64": {"block_n": 32}}}}))
    (folder / "sm_90.json").write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(ValueError, match=message) as caught:
        tuning.launch_config("gemm", 64, H100, 2)
    assert str(caught.value).startswith(f"{folder / 'sm_90.json'}")


def test_own_overrides_lie_over_the_shipped(configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry by entry: of one that both have nothing of the shipped one is left."""
    own = tmp_path / "own"
    own.mkdir()
    shipped = {"gemm": {"2": {"32": {"block_n": 32}, "64": {"block_n": 32, "num_warps": 2}}}}
    (configs / "sm_90.json").write_text(json.dumps(shipped))
    (own / "sm_90.json").write_text(json.dumps({"gemm": {"2": {"64": {"num_stages": 2}}}, "up": {"4": {"16": {}}}}))
    monkeypatch.setenv("MOE_FUSED_CONFIGS", str(own))
    default = {height: tuning.default_config("gemm", height, H100, 2) for height in (32, 64)}
    assert tuning.launch_config("gemm", 64, H100, 2) == replace(default[64], num_stages=2)
    assert tuning.launch_config("gemm", 32, H100, 2) == replace(default[32], block_n=32)
    assert tuning.launch_config("up", 16, H100, 4) == tuning.default_config("up", 16, H100, 4)
    assert tuning.launch_config("gemm", 64, A100, 2) == tuning.default_config("gemm", 64, A100, 2)
    assert tuning.table_paths(90) == [configs / "sm_90.json", own / "sm_90.json"]
    assert tuning.table_paths(80) == []


@pytest.mark.parametrize("value", ["no/such/directory", __file__])
def test_own_overrides_need_a_directory(configs: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_FUSED_CONFIGS", value)
    with pytest.raises(ValueError, match=r"MOE_FUSED_CONFIGS must be a directory with tables as sm_90\.json, got"):
        tuning.launch_config("gemm", 64, H100, 2)


def test_trying_a_configuration(configs: Path) -> None:
    usual = tuning.launch_config("gemm", 64, H100, 2)
    with tuning.trying("gemm", 64, 2, GOOD):
        assert tuning.launch_config("gemm", 64, H100, 2) is GOOD
        assert tuning.launch_config("gemm", 32, H100, 2) != GOOD
    assert tuning.launch_config("gemm", 64, H100, 2) == usual


def test_compiling_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches nothing, and only within the block."""
    plan = module("plan")
    asked: list[str] = []

    class Kernel:
        arg_names = ("x", "N")

        def __getitem__(self, grid: tuple) -> object:
            return lambda *args, **options: asked.append(f"launch {args} {options}")

        def warmup(self, *args: object, grid: tuple, **options: object) -> None:
            asked.append(f"compile {args} {grid} {options}")

    own = plan.Plan(Kernel(), {"N": 3}, num_warps=8, num_stages=2)
    with plan.compiling_only():
        own(torch.device("cpu"), (1, 1, 1), 5)
    own(torch.device("cpu"), (1, 1, 1), 5)
    options = "{'num_warps': 8, 'num_stages': 2}"
    assert asked == [f"compile (5, 3) (1, 1, 1) {options}", f"launch (5, 3) {options}"]


@pytest.mark.parametrize("path", sorted(Path(tuning._CONFIGS).glob("*.json")), ids=lambda path: path.name)
def test_shipped_overrides_belong_to_known_targets(path: Path) -> None:
    known = {f"sm_{arch}" if isinstance(arch, int) else arch: target for arch, target in tuning.TARGETS.items()}
    target = known[path.stem]
    table = json.loads(path.read_text())
    for kernel, by_size in table.items():
        for size, by_bucket in by_size.items():
            for block_m, values in by_bucket.items():
                config = tuning.launch_config(kernel, int(block_m), target, int(size))
                assert {field: getattr(config, field) for field in values} == values


def test_a_cpu_counts_as_ampere() -> None:
    assert tuning.target_of(torch.device("cpu")) is A100
