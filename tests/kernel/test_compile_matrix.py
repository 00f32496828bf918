"""Every launch configuration we ship compiles for its target, fits its shared memory and does not spill; no GPU needed.

Each target is compiled by a process of its own, see ``compile_launches``.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import pytest

from tests.kernel.accepted import ACCEPTED, TWO_PROGRAMS
from tests.kernel.compile_launches import Launch, compiled
from tests.kernel.machine import HAS_TRITON, ON_GPU, module

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="nothing to compile without triton")

# Bytes a thread may keep in local memory: addresses that do not fit are cheap, accumulators (256 and more) are not.
MAX_SPILLS = 96
# The limit for products over packed weights in fp32, which few ask for: there, registers hold both halves of an operand.
MAX_SPILLS_PACKED_FP32 = 256
# The limit for products of few slots. Their registers are limited so that three programs fit a multiprocessor, and what does
# not fit is stored before the loop over in features and read after it.
MAX_SPILLS_FEW_SLOTS = 160

# The families that stages with adapters and without launch between them.
FAMILIES_ADAPTED = (
    "up", "gemm", "gemm_short", "down_backward", "shrink", "wgrad_thin", *module("tuning").KERNELS_4BIT,
)  # fmt: skip
FAMILIES_PLAIN = ("up", "gemm", "gemm_short", "down_backward", "wgrad", *module("tuning").KERNELS_4BIT)

ALL_BUCKETS = (16, 32, 64, 128)


@dataclass(frozen=True)
class MatrixCase:
    """A target and what is compiled for it.

    Attributes:
        adapted: buckets whose stages are compiled with adapters, which take more registers and shared memory.
        plain: buckets whose stages are compiled without.
        untiled: also the stages that have no configuration.
        short: buckets whose stages over packed weights are compiled for short blocks, too.
    """

    arch: int | str
    dtype: str
    adapted: tuple[int, ...]
    plain: tuple[int, ...]
    why: str
    untiled: bool = False
    short: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        return f"{f'sm_{self.arch}' if isinstance(self.arch, int) else self.arch}-{self.dtype}"

    @property
    def what(self) -> list[str]:
        """The arguments of ``compile_launches`` that say so."""
        buckets = [f"adapted:{height}" for height in self.adapted] + [f"plain:{height}" for height in self.plain]
        buckets += [f"short:{height}" for height in self.short]
        return [*buckets, *(["untiled"] if self.untiled else [])]


# Relatives of the targets below: they have the configurations of their family, so one sample shows that their compiler and
# assembler take them. Together they take some two minutes of one core.
RELATIVES = [
    MatrixCase(87, "bfloat16", (), (128,), "Orin: the configurations of 163 KiB, for its own assembler"),
    MatrixCase(103, "bfloat16", (), (128,), "B300: descriptors and the largest tiles", untiled=True),
    MatrixCase(110, "bfloat16", (), (128,), "Thor: the same"),
    MatrixCase(121, "bfloat16", (), (128,), "GB10: the configurations of 99 KiB, for the newest assembler"),
]

# Without a GPU's many cores: each stage for each kind of tensor core, each configuration for some target that has it. 8.0,
# 8.6, 8.9 and 12.0 have the same instructions, and the last three the same configurations, so they share the work; fp32 has
# one set of configurations for each maker.
PAIRWISE = [
    MatrixCase(80, "bfloat16", ALL_BUCKETS, (16, 128), "the configurations of 163 KiB, pointers", untiled=True),
    MatrixCase(86, "bfloat16", ALL_BUCKETS, (32, 128), "those of 99 KiB"),
    MatrixCase(89, "bfloat16", (32,), (64,), "those of 99 KiB, for another assembler"),
    MatrixCase(90, "bfloat16", ALL_BUCKETS, (16, 64, 128), "descriptors, measured configurations", untiled=True),
    MatrixCase(100, "bfloat16", ALL_BUCKETS, (32, 128), "its own tensor cores and descriptors", untiled=True),
    MatrixCase(120, "bfloat16", (128,), (64,), "those of 99 KiB, for the newest assembler", untiled=True),
    MatrixCase("gfx942", "bfloat16", ALL_BUCKETS, (32, 128), "another compiler", untiled=True),
    MatrixCase(80, "float32", ALL_BUCKETS, (64,), "NVIDIA's configurations for fp32"),
    MatrixCase(90, "float32", (128,), (), "the largest fp32 tiles, on its own tensor cores"),
    MatrixCase(100, "float32", (128,), (), "and on these"),
    MatrixCase(120, "float32", (128,), (), "and in 99 KiB"),
    MatrixCase("gfx942", "float32", ALL_BUCKETS, (64,), "AMD's configurations for fp32"),
    MatrixCase(90, "float16", (), (128,), "shares the configurations of bf16: one sample", short=(16, 128)),
    *RELATIVES,
]
EVERYTHING = [
    *(
        MatrixCase(arch, "bfloat16", ALL_BUCKETS, ALL_BUCKETS, "what models train in", untiled=True)
        for arch in (80, 86, 89, 90, 100, 120, "gfx942")
    ),
    *(
        MatrixCase(arch, "float32", ALL_BUCKETS, ALL_BUCKETS, "one set of configurations for each maker")
        for arch in (80, "gfx942")
    ),
    *(MatrixCase(arch, "float32", (128,), (128,), "the largest fp32 tiles") for arch in (86, 89, 90, 100, 120)),
    MatrixCase(90, "float16", (128,), (128,), "shares the configurations of bf16: one sample", short=ALL_BUCKETS),
    *RELATIVES,
]
CASES = EVERYTHING if ON_GPU else PAIRWISE
# What `make test` compiles; `make test-slow` compiles the others.
SAMPLE = ("sm_90-float16",)


@functools.cache
def compile_case(case: MatrixCase) -> list[Launch]:
    return compiled(case.arch, case.dtype, case.what)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.id, marks=() if case.id in SAMPLE else pytest.mark.slow) for case in CASES]
)
def test_every_launch_fits_its_target(case: MatrixCase) -> None:
    tuning = module("tuning")
    launches = compile_case(case)
    target = tuning.TARGETS[case.arch]
    print(f"{len(launches)} launches, {sum(launch.seconds for launch in launches):.0f} s")
    too_large = [launch for launch in launches if launch.shared > target.shared_memory]
    assert too_large == [], f"more shared memory than the {target.shared_memory} bytes of {case.id}"

    def allowed(launch: Launch) -> int:
        if launch.kernel == "few_slots_kernel":
            return MAX_SPILLS_FEW_SLOTS
        packed = launch.kernel.startswith("packed_")
        return MAX_SPILLS_PACKED_FP32 if packed and case.dtype == "float32" else MAX_SPILLS

    spilling = [launch for launch in launches if launch.spills > allowed(launch)]
    assert spilling == [], "\n".join(
        f"{launch.stage}: {launch.spills} bytes of spills a thread, {launch.config}" for launch in spilling
    )
    scattered = [launch.stage for launch in launches if launch.config and launch.narrow_stores]
    assert scattered == [], "results of 16 bits are written one by one"
    # The case covers what it says: every family in its buckets, up to configurations that buckets share.
    itemsize = 4 if case.dtype == "float32" else 2
    shipped = {
        str(tuning.launch_config(family, height, target, itemsize))
        for buckets, families in ((case.adapted, FAMILIES_ADAPTED), (case.plain, FAMILIES_PLAIN))
        for family in families
        for height in buckets
    }
    assert shipped <= {launch.config for launch in launches}


@pytest.mark.skipif(ON_GPU, reason="there each target has everything")
def test_every_configuration_is_compiled_for_some_target() -> None:
    """What ``PAIRWISE`` promises: no family's configuration is left out on all targets of a kind."""
    tuning = module("tuning")
    kinds = ((80, 86, 87, 89, 120, 121), (90,), (100, 103, 110), ("gfx942",))

    def configurations(dtype: str, kind: tuple[int | str, ...], cases: list[MatrixCase]) -> set[tuple[str, str]]:
        return {
            (family, str(tuning.launch_config(family, height, tuning.TARGETS[case.arch], 4 if "32" in dtype else 2)))
            for case in cases
            if case.arch in kind and case.dtype == dtype
            for buckets, families in ((case.adapted, FAMILIES_ADAPTED), (case.plain, FAMILIES_PLAIN))
            for family in families
            for height in buckets
        }

    for kind in kinds:
        assert configurations("bfloat16", kind, EVERYTHING) == configurations("bfloat16", kind, PAIRWISE), kind
    for maker in (tuple(arch for kind in kinds[:3] for arch in kind), kinds[3]):
        assert configurations("float32", maker, EVERYTHING) == configurations("float32", maker, PAIRWISE), maker


def unaccepted(arch: int | str, launches: list[Launch]) -> list[str]:
    """The launches with a configuration that spill, or of which two do not fit a multiprocessor, but for ``ACCEPTED``."""
    found = []
    for launch in launches:
        if not launch.config or (launch.spills == 0 and launch.programs >= 2):
            continue
        height = int(re.search(r"block_m=(\d+)", launch.config)[1])
        if not any(each.allows(arch, launch.stage, height, launch.programs, launch.spills) for each in ACCEPTED):
            took = f"{launch.spills} bytes of spills a thread, {launch.programs} programs a multiprocessor"
            found.append(f"{launch.stage} ({launch.kernel}): {took}, {launch.config}")
    return found


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=pytest.mark.slow)
        for case in CASES
        if case.arch in TWO_PROGRAMS and case.dtype == "bfloat16"
    ],
)
def test_two_programs_fit_without_spills(case: MatrixCase) -> None:
    """The configurations of GPUs that nobody here has were chosen so, by ``benchmarks.choose``."""
    found = unaccepted(case.arch, compile_case(case))
    assert found == [], "\n".join(found)


def test_what_two_programs_means() -> None:
    """The check sees spills and programs alike, and an exception holds for its own launches only."""
    config = "LaunchConfig(block_m=128, block_n=128)"
    launches = {
        name: Launch(stage, config, "k", 0, 0, spills, 4, programs, 0, 0.0)
        for name, (stage, spills, programs) in {
            "good": ("down", 0, 2),
            "spills": ("down", 4, 2),
            "alone": ("down", 0, 1),
            "accepted": ("up, adapter", 24, 2),
            "too much of it": ("up, adapter", 32, 2),
        }.items()
    }
    found = unaccepted(80, list(launches.values()))
    assert ["(k): 4 bytes" in found[0], "1 programs" in found[1], "32 bytes" in found[2]] == [True] * 3
    assert len(found) == 3
    assert len(unaccepted(86, [launches["accepted"]])) == 1


def test_how_many_programs_fit() -> None:
    """By each limit, as NVIDIA's and AMD's occupancy calculators have it."""
    from tests.kernel.offline_compile import programs

    tuning = module("tuning")
    a100, rtx, mi300x = (tuning.TARGETS[arch].shared_memory for arch in (80, 86, "gfx942"))
    assert programs(80, a100, 81 * 1024, 128, 8) == 2, "two halves of 164 KiB, with 1 KiB reserved for each"
    assert programs(80, a100, 82 * 1024, 128, 8) == 1
    assert programs(86, rtx, 49 * 1024, 128, 8) == 2
    assert programs(86, rtx, 49 * 1024 + 1, 128, 8) == 1
    assert programs(80, a100, 0, 129, 8) == 1, "registers are given out in steps of 8 a thread"
    assert programs(80, a100, 0, 255, 4) == 2
    assert programs(80, a100, 0, 32, 16) == 4, "2048 threads"
    assert programs(86, rtx, 0, 32, 16) == 3, "1536 threads"
    assert programs(100, tuning.TARGETS[100].shared_memory, 0, 32, 4, tensor_memory=256) == 2
    assert programs("gfx942", mi300x, 32 * 1024, 128, 8) == 2
    assert programs("gfx942", mi300x, 32 * 1024, 130, 8) == 1, "two wavefronts on each of four SIMDs"
    assert programs("gfx942", mi300x, 0, 32, 4) == 8


def test_a_launch_that_is_too_large_is_seen() -> None:
    """What the matrix reads from the compiler: shared memory of the tiles, and registers that are not zero."""
    (case,) = [case for case in CASES if case.id == "sm_90-float16"]
    for launch in compile_case(case):
        assert launch.registers > 0
        if launch.kernel == "grouped_up_kernel":
            assert launch.shared > 64 * 1024
