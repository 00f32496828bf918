"""Every launch configuration we ship compiles for its target, fits its shared memory and does not spill; no GPU needed.

Each target is compiled by a process of its own, see ``compile_launches``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.kernel.compile_launches import Launch
from tests.kernel.machine import HAS_TRITON, module
from tests.support import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_TRITON, reason="nothing to compile without triton"),
]

# Bytes a thread may keep in local memory: addresses that do not fit are cheap, accumulators (256 and more) are not.
MAX_SPILLS = 96
# Of products over packed weights in fp32, which few ask for: both halves of an operand lie in registers there.
MAX_SPILLS_PACKED_FP32 = 256

ALL_BUCKETS = (16, 32, 64, 128)


@dataclass(frozen=True)
class MatrixCase:
    """A target and what is compiled for it; ``untiled``: also the stages that have no configuration."""

    arch: int | str
    dtype: str
    buckets: tuple[int, ...]
    why: str
    untiled: bool = False

    @property
    def id(self) -> str:
        return f"{f'sm_{self.arch}' if isinstance(self.arch, int) else self.arch}-{self.dtype}"


CASES = [
    *(
        MatrixCase(arch, "bfloat16", ALL_BUCKETS, "what models train in", untiled=True)
        for arch in (80, 86, 89, 90, 100, 120, "gfx942")
    ),
    *(
        MatrixCase(arch, "float32", ALL_BUCKETS, "configurations of their own, the same on every GPU of a maker")
        for arch in (80, "gfx942")
    ),
    *(
        MatrixCase(arch, "float32", (128,), "the largest fp32 tiles on the other targets")
        for arch in (86, 89, 90, 100, 120)
    ),
    MatrixCase(90, "float16", (128,), "shares the configurations of bf16: one sample"),
]


def compile_case(case: MatrixCase) -> list[Launch]:
    command = [sys.executable, "-m", "tests.kernel.compile_launches", str(case.arch), case.dtype]
    command += [*map(str, case.buckets), *(["untiled"] if case.untiled else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{case.id} does not compile:\n{run.stderr[-4000:]}"
    return [Launch(**row) for row in json.loads(run.stdout)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_launch_fits_its_target(case: MatrixCase) -> None:
    tuning = module("tuning")
    launches = compile_case(case)
    target = tuning.TARGETS[case.arch]
    print(f"{len(launches)} launches, {sum(launch.seconds for launch in launches):.0f} s")
    too_large = [launch for launch in launches if launch.shared > target.shared_memory]
    assert too_large == [], f"more shared memory than the {target.shared_memory} bytes of {case.id}"

    def allowed(launch: Launch) -> int:
        packed = launch.kernel.startswith("packed_")
        return MAX_SPILLS_PACKED_FP32 if packed and case.dtype == "float32" else MAX_SPILLS

    spilling = [launch for launch in launches if launch.spills > allowed(launch)]
    assert spilling == [], "\n".join(
        f"{launch.stage}: {launch.spills} bytes of spills a thread, {launch.config}" for launch in spilling
    )
    scattered = [launch.stage for launch in launches if launch.config and launch.narrow_stores]
    assert scattered == [], "results of 16 bits are written one by one"
    # The matrix covers what it says: every family in every bucket, up to configurations that buckets share.
    itemsize = 4 if case.dtype == "float32" else 2
    shipped = {
        str(tuning.launch_config(family, height, target, itemsize))
        for family in tuning.KERNELS
        for height in case.buckets
    }
    assert shipped <= {launch.config for launch in launches}


def test_a_launch_that_is_too_large_is_seen() -> None:
    """What the matrix reads from the compiler: shared memory of the tiles, and registers that are not zero."""
    (case,) = [case for case in CASES if case.id == "sm_90-float16"]
    for launch in compile_case(case):
        assert launch.registers > 0
        if launch.kernel == "grouped_up_kernel":
            assert launch.shared > 64 * 1024
