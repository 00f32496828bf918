"""The patches for bitsandbytes in ``docs/upstream/bitsandbytes``.

Each patch applies to the release that is installed. Its own tests fail before it and pass after it, and so do tests of this
repository with our repair of the same thing switched off (``plugins``).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.cpu_path import sitecustomize as cpu_path

from .harness import BITSANDBYTES, tree

bnb = pytest.importorskip("bitsandbytes")
pytestmark = BITSANDBYTES.required()

ROWS, PACKING, EXPERTS = "cpu-dequantize-rows", "linear4bit-cpu-packing", "experts4bit"
IMITATED = ("-p", "tests.upstream.plugins.avx512")
CPU_TESTS = "tests/integration/test_bitsandbytes_cpu.py"


@pytest.fixture(autouse=True)
def _processor_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugins decide for themselves what the processor counts as, so nobody else may."""
    monkeypatch.delenv(cpu_path.VARIABLE, raising=False)
    folder = str(Path(cpu_path.__file__).parent)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path and path != folder))


patched, unpatched, example = BITSANDBYTES.patched, BITSANDBYTES.unpatched, BITSANDBYTES.example


def test_all_patches_are_tested_here() -> None:
    assert [path.stem for path in BITSANDBYTES.patches()] == sorted([ROWS, PACKING, EXPERTS])


@pytest.mark.parametrize("subjects", [(ROWS,), (PACKING,), (EXPERTS,), (ROWS, PACKING, EXPERTS)], ids=", ".join)
def test_applies(subjects: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("backends/cpu/ops.py", "nn/modules.py", "nn/__init__.py"):
        compile((patched(tmp_path / name, *subjects).source / "bitsandbytes" / name).read_text(), name, "exec")


# Rows that are not whole blocks.


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512" or torch.cuda.is_available(),
    reason="needs the AVX-512 kernels, which the library for GPUs does not have",
)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(8, 96), (8, 32), (5, 208), (8, 128), (7, 6)], ids=str)
def test_the_imitation_is_what_the_processor_computes(shape: tuple[int, int], quant_type: str) -> None:
    import moe_fused

    from .plugins.avx512 import dequantize

    moe_fused.disable()
    functional = bnb.functional
    packed, state = functional.quantize_4bit(torch.randn(shape), quant_type=quant_type, blocksize=64)
    imitated = dequantize(packed.reshape(-1), state.absmax, 64, quant_type, *shape)
    assert torch.equal(functional.dequantize_4bit(packed, state), imitated)


@pytest.mark.upstream
def test_rows_by_example(tmp_path: Path) -> None:
    code = f"from tests.upstream.plugins.avx512 import imitate\nimitate()\n{example(ROWS)}"
    before = tree(BITSANDBYTES, tmp_path / "stock").python(code)
    assert before.stdout.strip() == f"{[False] + 7 * [True]} False", before
    after = patched(tmp_path, ROWS).python(code)
    assert after.stdout.strip() == f"{8 * [False]} False", after


@pytest.mark.upstream
def test_rows(tmp_path: Path) -> None:
    before, after = (make(tmp_path, ROWS).own_tests(*IMITATED) for make in (unpatched, patched))
    assert before.returncode == 1, before.stdout
    assert "30 failed, 24 passed" in before.stdout
    assert after.returncode == 0, after.stdout


@pytest.mark.upstream
def test_our_suite_without_our_reshaping_of_rows(tmp_path: Path) -> None:
    arguments = (CPU_TESTS, "-k", "dequantizes_any_shape or viewed_as_another_dtype")
    before, after = (
        make.pytest(*arguments, plugins=["tests.upstream.plugins.dequantize_rows"])
        for make in (tree(BITSANDBYTES, tmp_path / "stock"), patched(tmp_path, ROWS))
    )
    assert before.returncode == 1, before.stdout
    assert "2 failed" in before.stdout
    assert after.returncode == 0, after.stdout
    assert "2 passed" in after.stdout


# Weights packed for avx512_bf16.


@pytest.mark.upstream
def test_packing_by_example(tmp_path: Path) -> None:
    code = f"from tests.upstream.plugins.cpu_packing import pack_everywhere\npack_everywhere()\n{example(PACKING)}"
    before = tree(BITSANDBYTES, tmp_path / "stock").python(code)
    assert float(before.stdout) > 0.9, before
    after = patched(tmp_path, PACKING).python(code)
    assert float(after.stdout) == 0, after


@pytest.mark.upstream
def test_packing(tmp_path: Path) -> None:
    before, after = (make(tmp_path, PACKING).own_tests() for make in (unpatched, patched))
    assert before.returncode == 1, before.stdout
    assert "26 failed, 2 passed" in before.stdout
    assert after.returncode == 0, after.stdout


@pytest.mark.upstream
def test_our_suite_with_packed_weights(tmp_path: Path) -> None:
    """Tests with tight tolerances are left out: bitsandbytes computes in bfloat16 there, with the patch as without."""
    arguments = (CPU_TESTS, "-k", "backward_after or merging_after or training_evaluating")
    before, after = (
        make.pytest(*arguments, plugins=["tests.upstream.plugins.cpu_packing"])
        for make in (tree(BITSANDBYTES, tmp_path / "stock"), patched(tmp_path, PACKING))
    )
    assert before.returncode == 1, before.stdout
    assert "3 failed, 3 passed" in before.stdout  # those in which the processor does not count as one with avx512_bf16
    assert after.returncode == 0, after.stdout
    assert "6 passed" in after.stdout


# Experts as a module.


@pytest.mark.upstream
def test_experts_by_example(tmp_path: Path) -> None:
    before = tree(BITSANDBYTES, tmp_path / "stock").python(example(EXPERTS))
    assert "cannot import name 'Experts4bit'" in before.stderr, before
    after = patched(tmp_path, EXPERTS).python(example(EXPERTS))
    assert after.returncode == 0, after.stderr


@pytest.mark.upstream
def test_experts(tmp_path: Path) -> None:
    assert unpatched(tmp_path, EXPERTS).own_tests().returncode == 2  # there is no such module
    after = patched(tmp_path, EXPERTS).own_tests()
    assert after.returncode == 0, after.stdout


_OURS = """
    import torch
    from bitsandbytes.nn import Experts4bit
    import moe_fused
    from moe_fused.checkpoints.fused import write_fused

    kernel = moe_fused.get_kernel()
    torch.manual_seed(0)
    gate_up, down = torch.randn(6, 128, 64) / 8, torch.randn(6, 64, 64) / 8
    for quant_type in ("nf4", "fp4"):
        for double_quant in (True, False):
            options = dict(quant_type=quant_type, double_quant=double_quant, dtype=torch.float32)
            quantize = kernel.Packed4bitWeights.quantize
            ours = {
                "gate_up_proj": quantize(gate_up, projections=2, **options), "down_proj": quantize(down, **options)
            }
            written = {}
            for name, weights in ours.items():
                for part, value in write_fused(weights, torch.float32).items():
                    written[f"{name}_{part}" if part else name] = value
            module = Experts4bit(
                6, 64, 64, compute_dtype=torch.float32, quant_type=quant_type, compress_statistics=double_quant
            )
            module.load_state_dict(written)
            for name, weights in ours.items():
                assert torch.equal(module.dequantize(name), weights.dequantize(torch.float32)), name
            made = Experts4bit.from_dense(
                gate_up, down, compute_dtype=torch.float32, quant_type=quant_type, compress_statistics=double_quant
            ).state_dict()
            assert made.keys() == written.keys()
            assert all(torch.equal(made[key], written[key]) for key in written)
            x, index = torch.randn(7, 64), torch.randint(6, (7, 2))
            weights = torch.rand(7, 2)
            expected = kernel.moe_experts(x, index, weights, ours["gate_up_proj"], ours["down_proj"])
            torch.testing.assert_close(module(x, index, weights), expected, rtol=1e-4, atol=1e-5)
    print("same")
"""


@pytest.mark.upstream
def test_experts_are_those_of_our_fused_checkpoints(tmp_path: Path) -> None:
    """What we write is what the module writes, bit for bit, and what it computes is what the kernel computes."""
    result = patched(tmp_path, EXPERTS).python(_OURS)
    assert result.stdout.strip() == "same", result.stderr
