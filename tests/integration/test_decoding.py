"""The kernels of a recorded decoding step: what they compute, and what they compile to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_fused.decoding import attention, heads, norms, router
from tests.support import REPOSITORY, accelerator


@pytest.mark.parametrize(
    ("which", "mark"),
    [
        ("families", "not slow"),
        ("not families", "not slow"),
        pytest.param("families", "slow", marks=pytest.mark.slow),
    ],
)
def test_the_cases_of_the_kernels(which: str, mark: str) -> None:
    """Runs ``decoding_cases.py`` in a process of its own, on a CPU in Triton's interpreter."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, "tests/integration/decoding_cases.py", "-k", which, "-m", mark]
    environment = {**os.environ, "TRITON_INTERPRET": "0" if accelerator() else "1"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


ARCHITECTURES = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 89, 100, 120, "gfx942"))]
ONE, MANY = 1, 32


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_compiles_without_spills(
    arch: int | str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the heads of Qwen3-30B-A3B, in few and many keys, and for those of Qwen3-Next and DeepSeek."""
    from tests.kernel.offline_compile import compiling_for

    monkeypatch.setattr(attention, "_multiprocessors", lambda _: 132)
    for batch, q_heads, kv_heads, count, size, value_size in (
        (ONE, 32, 4, 512, 128, 128),
        (ONE, 32, 4, 16384, 128, 128),
        (MANY, 32, 4, 512, 128, 128),
        (ONE, 16, 2, 512, 256, 256),
        (ONE, 16, 16, 512, 192, 128),
    ):
        keys, values = (meta(batch, kv_heads, count, each, dtype=dtype) for each in (size, value_size))
        mask = meta(batch, 1, 1, count, dtype=torch.bool)
        with compiling_for(arch) as found:
            attention.attend(meta(batch, q_heads, 1, size, dtype=dtype), keys, values, mask, 0.1, sinks=meta(q_heads))
        assert [resources.kernel for resources in found] == ["attention_kernel", "combine_kernel"]
        assert not any(resources.spills for resources in found)
        assert found[0].programs >= (2 if dtype is torch.bfloat16 else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_other_kernels_compile(arch: int | str, dtype: torch.dtype) -> None:
    """For the sizes of Qwen3-30B-A3B and Qwen3-Next, and a head of which a part turns."""
    from tests.kernel.offline_compile import compiling_for

    with compiling_for(arch) as found:
        for batch, experts, top_k in ((ONE, 128, 8), (MANY, 128, 8), (ONE, 512, 10)):
            rule = router.Rule("softmax", top_k, True, 1.0, dtype, dtype, dtype)
            router.route(rule, meta(batch, 2048, dtype=dtype), meta(experts, 2048, dtype=dtype))
        for batch, rotated, is_half in ((ONE, 128, False), (MANY, 64, True), (MANY, 32, False)):
            q, k = (meta(batch, count, 1, 128, dtype=dtype) for count in (32, 4))
            cos, sin = (meta(batch, 1, rotated, dtype=dtype) for _ in range(2))
            heads.rotate(q, k, cos, sin, is_half=is_half)
            norms.rms_norm(q, meta(128, dtype=dtype), norms.Norm(1e-6, is_offset=False))
            norms.rms_norm(meta(batch, 1, 2048, dtype=dtype), meta(2048, dtype=dtype), norms.Norm(1e-6, is_offset=True))
            place = heads.Place(*(meta(batch, 4, 512, 128, dtype=dtype) for _ in range(2)), *_int64(2))
            heads.write(k, k, place)
            weights = meta(128, dtype=dtype), meta(128, dtype=dtype)
            norm = norms.Norm(1e-6, is_offset=False)
            heads.norm_and_rotate(q, k, k, (cos, sin), place, weights=weights, norm=norm, is_half=is_half)
    # The assembler for sm_100 keeps one register in memory meanwhile, of a head of which a part turns.
    assert [resources for resources in found if resources.spills > 8] == []
    assert {resources.kernel for resources in found} == {
        "products_kernel", "choose_kernel", "heads_kernel", "norm_kernel",
    }  # fmt: skip


def _int64(count: int) -> list[Tensor]:
    return [meta(dtype=torch.int64) for _ in range(count)]
