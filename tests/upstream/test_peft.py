"""The patches for PEFT in ``docs/upstream/peft``.

Each patch applies to the release that is installed. Its own tests fail before it and pass after it, and so do tests of this
repository with our way around the same thing switched off (``plugins``).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .harness import PEFT, tree

pytest.importorskip("peft")
pytestmark = PEFT.required()

REGISTRY, RSLORA, LEAK = "param-wrapper-registry", "rslora-conversion", "leaked-lora-factors"


patched, unpatched, example = PEFT.patched, PEFT.unpatched, PEFT.example


def counts(output: str) -> dict[str, int]:
    """How many tests passed, failed and so on, by the summary that pytest prints."""
    summary = output.rstrip().splitlines()[-1]
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", summary)}


def test_all_patches_are_tested_here() -> None:
    assert [path.stem for path in PEFT.patches()] == sorted([REGISTRY, RSLORA, LEAK])


@pytest.mark.parametrize("subjects", [(REGISTRY,), (RSLORA,), (LEAK,), (REGISTRY, RSLORA, LEAK)], ids=", ".join)
def test_applies(subjects: tuple[str, ...], tmp_path: Path) -> None:
    package = patched(tmp_path, *subjects).source / "peft"
    for name in ("tuners/lora/layer.py", "tuners/tuners_utils.py", "utils/transformers_weight_conversion.py"):
        compile((package / name).read_text(), name, "exec")


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("subject", "error"),
    [
        (REGISTRY, "ValueError: Trying to wrap an `nn.Parameter` of layer 'experts' of type Experts"),
        (RSLORA, "AssertionError"),
        (LEAK, "AssertionError"),
    ],
)
def test_example_of_the_text(subject: str, error: str, tmp_path: Path) -> None:
    before = tree(PEFT, tmp_path / "stock").python(example(subject))
    assert before.returncode == 1
    assert error in before.stderr, before.stderr
    after = patched(tmp_path, subject).python(example(subject))
    assert after.returncode == 0, after.stderr


# The registry.


@pytest.mark.upstream
def test_registry(tmp_path: Path) -> None:
    assert unpatched(tmp_path, REGISTRY).own_tests().returncode == 2  # there is no such function
    after = patched(tmp_path, REGISTRY, LEAK).own_tests()
    assert after.returncode == 0, after.stdout
    assert counts(after.stdout) == {"passed": 10}


@pytest.mark.upstream
def test_our_suite_with_the_registry(tmp_path: Path) -> None:
    """PEFT makes the layers for experts by its registry, and under another name than its own; our tuner makes none."""
    tests = "computes_what_peft_does or every_model or several_adapters or merg or other_implementations or kernelized"
    arguments = ("tests/integration/test_lora.py", "-m", "not slow", "-k", tests)
    plugins = ["tests.upstream.plugins.param_wrapper_registry"]
    before = tree(PEFT, tmp_path / "stock").pytest(*arguments, plugins=plugins)
    assert "has no attribute register_param_wrapper" in before.stdout + before.stderr, before
    after = patched(tmp_path, REGISTRY).pytest(*arguments, plugins=plugins)
    assert after.returncode == 0, after.stdout
    assert counts(after.stdout)["passed"] > 20


# The scaling of rsLoRA.


@pytest.mark.upstream
def test_rslora(tmp_path: Path) -> None:
    before, after = (make(tmp_path, RSLORA).own_tests() for make in (unpatched, patched))
    assert counts(before.stdout) == {"failed": 2, "passed": 2}, before.stdout
    differences = re.findall(r"(?m)^E +Greatest relative difference: 0\.4142", before.stdout)
    assert len(differences) == 2, before.stdout
    assert after.returncode == 0, after.stdout


_STOCK_LOADS_IT = """
    import tempfile
    from pathlib import Path

    import torch
    from moe_fused.checkpoints.adapters import Layout
    from moe_fused.checkpoints.adapters.convert import convert_adapter
    from tests.integration.adapters import peft_logits, per_expert_adapter

    for rslora in (False, True):
        with tempfile.TemporaryDirectory() as directory:
            source = per_expert_adapter(Path(directory) / "source", use_rslora=rslora)
            convert_adapter(source, Path(directory) / "fused", to=Layout.PEFT_FUSED, widen=True)
            stock, ours = peft_logits(source), peft_logits(Path(directory) / "fused")
            print(torch.allclose(stock, ours, rtol=1e-5, atol=1e-5))
"""


@pytest.mark.upstream
def test_rslora_as_our_conversion(tmp_path: Path) -> None:
    """PEFT alone computes with a per-expert adapter what it computes after our conversion."""
    before = tree(PEFT, tmp_path / "stock").python(_STOCK_LOADS_IT)
    assert before.stdout.split() == ["True", "False"], before
    after = patched(tmp_path, RSLORA).python(_STOCK_LOADS_IT)
    assert after.stdout.split() == ["True", "True"], after


@pytest.mark.upstream
def test_our_suite_with_pefts_conversion_of_configs(tmp_path: Path) -> None:
    after = patched(tmp_path, RSLORA).pytest(
        "tests/integration/test_lora.py",
        "tests/integration/test_lora_files.py",
        "-k",
        "scaling_is_by or linear_layers_get or ranks_of_linear or converter_reads",
        plugins=["tests.upstream.plugins.peft_conversion"],
    )
    assert after.returncode == 0, after.stdout


# Factors that stay behind.


@pytest.mark.upstream
def test_leak(tmp_path: Path) -> None:
    before, after = (make(tmp_path, LEAK).own_tests() for make in (unpatched, patched))
    assert counts(before.stdout) == {"failed": 2}, before.stdout
    assert after.returncode == 0, after.stdout
