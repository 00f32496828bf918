"""The patches for Transformers: they apply, they do what their texts say, and our own tests pass with them.

Every behaviour needs a new process that imports a patched Transformers, so those tests are slow.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import build_config, load_kernel, repo_id

from .harness import TRANSFORMERS, Tree, is_test, sections, tree

pytestmark = TRANSFORMERS.required()

# The subjects, in the order in which they can be sent, each with what its tests say without the patch.
SUBJECTS = {
    "trainer-resume": "model.layers.0.mlp.experts.gate_up_proj",
    "hub-experts": "is not supported",
    "kernel-layer-name": "has no attribute 'kernel_layer_name'",
    "quantizer-override": "got an unexpected keyword argument 'override'",
    "kernel-mapping": "'Qwen3MoeExperts' not found",
}


patched = TRANSFORMERS.patched


def assert_passes(tree: Tree, *arguments: str, plugin: str | None = None) -> None:
    """Our own tests pass with this tree, with the part of ours switched off that ``plugin`` switches off."""
    plugins = [] if plugin is None else [f"tests.upstream.plugins.{plugin}"]
    result = tree.pytest("-m", "not slow", *arguments, plugins=plugins)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def test_every_patch_has_a_test() -> None:
    assert {path.stem for path in TRANSFORMERS.patches()} == set(SUBJECTS)
    for subject in SUBJECTS:
        names = [name for name, _ in sections(TRANSFORMERS.patch(subject))]
        assert any(is_test(name) for name in names)
        assert any(name.startswith("src/transformers/") for name in names)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_applies(subject: str, tmp_path: Path) -> None:
    patched(tmp_path / "tree", subject)


def test_apply_one_after_the_other(tmp_path: Path) -> None:
    patched(tmp_path / "tree", *SUBJECTS)
    patched(tmp_path / "backwards", *reversed(SUBJECTS))


@pytest.mark.upstream
@pytest.mark.parametrize("subject", SUBJECTS)
def test_own_tests_pass_with_the_patch_alone(subject: str, tmp_path: Path) -> None:
    without = tree(TRANSFORMERS, tmp_path / "without", tests_of=[TRANSFORMERS.patch(subject)]).own_tests()
    assert without.returncode == 1, without.stdout[-5000:] + without.stderr[-2000:]
    assert SUBJECTS[subject] in without.stdout, without.stdout[-5000:]
    result = patched(tmp_path / "with", subject).own_tests()
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.slow
def test_all_patches_together(tmp_path: Path) -> None:
    result = patched(tmp_path / "tree", *SUBJECTS).own_tests()
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.upstream
@pytest.mark.parametrize("subject", SUBJECTS)
def test_example_of_the_text_fails_without_the_patch(subject: str, tmp_path: Path) -> None:
    example = TRANSFORMERS.example(subject)
    without = tree(TRANSFORMERS, tmp_path / "without").python(example)
    assert without.returncode == 1
    assert re.search(r"^(AssertionError|ValueError|TypeError)", without.stderr, re.MULTILINE), without.stderr
    result = patched(tmp_path / "with", subject).python(example)
    assert result.returncode == 0, result.stderr


# Our own tests, with our own patching switched off.


@pytest.mark.upstream
def test_trainer_restores_every_family(tmp_path: Path) -> None:
    """Nothing of ours stands for this patch; these tests fail without it, and families that we serve pass with it."""
    tests = "tests/upstream/in_tree/trainer_families.py"
    without = tree(TRANSFORMERS, tmp_path / "without").pytest(tests, "-k", "qwen3_moe and one")
    assert "mlp.experts.gate_up_proj" in without.stdout
    assert "1 failed" in without.stdout
    assert_passes(patched(tmp_path / "with", "trainer-resume"), tests)


@pytest.mark.upstream
def test_experts_come_from_a_kernel(tmp_path: Path) -> None:
    # The tests that are left out are about the name of our implementation, and about registering it.
    assert_passes(
        patched(tmp_path / "tree", "hub-experts"),
        "tests/integration/test_models.py",
        "tests/integration/test_training.py",
        *("-k", "not test_generates_the_same_tokens and not test_disable"),
        plugin="hub_experts",
    )


@pytest.mark.upstream
def test_our_kernel_is_an_experts_implementation(tmp_path: Path) -> None:
    """Without ``moe_fused``: the kernel package by itself, from the directory that LOCAL_KERNELS names."""
    if not hasattr(load_kernel(), "experts_forward"):
        pytest.skip("this build of the kernel exports no experts_forward")
    result = patched(tmp_path / "tree", "hub-experts").python(f"""
        import torch
        from tests.integration.models import QWEN3_MOE, tokens

        model, ids = QWEN3_MOE.build(), tokens()
        model.set_experts_implementation("eager")
        expected = model(ids).logits
        model.set_experts_implementation({repo_id() + "@main"!r})
        assert model.config._experts_implementation == {repo_id() + "@main"!r}
        torch.testing.assert_close(model(ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)  # other sums: it is not the eager implementation
    """)
    assert result.returncode == 0, result.stderr


@pytest.mark.upstream
def test_kernelize_finds_the_names(tmp_path: Path) -> None:
    # The test that is left out asserts that Transformers' classes have no name.
    assert_passes(
        patched(tmp_path / "tree", "kernel-layer-name"),
        "tests/integration/test_kernelize.py",
        *("-k", "not test_errors"),
        plugin="kernel_layer_name",
    )


@pytest.mark.upstream
def test_quantizer_is_registered_by_the_public_function(tmp_path: Path) -> None:
    # The test that is left out starts a process of its own, in which our own patching is on.
    assert_passes(
        patched(tmp_path / "tree", "quantizer-override"),
        "tests/integration/test_quantizer.py",
        *("-k", "not test_enable_without_bitsandbytes"),
        plugin="quantizer_override",
    )


@pytest.mark.upstream
def test_mapping_puts_our_layer_on_a_model(tmp_path: Path) -> None:
    """``moe_fused`` is not imported; ``use_kernels`` is all that a user asks for."""
    code = f"""
        import kernels, sys, torch
        from kernels.layer import layer, repos
        from transformers.integrations.hub_kernels import get_kernel_mapping_transformers
        from tests.integration.models import MODELS, experts_modules, tokens

        (entry,) = get_kernel_mapping_transformers()["MixtralExperts"].values()
        assert (entry._repo_id, entry._version) == {(repo_id(), build_config()["version"])!r}
        # A version is looked up on the Hub, even where LOCAL_KERNELS has the kernel.
        layer.select_revision_or_version = lambda **options: "main"
        # This stands for a GPU that the entry is for. Every build runs on a CPU, too.
        repos._find_capability = lambda: 90
        for case in MODELS:
            if case.id not in ("qwen3_moe", "mixtral"):
                continue
            model, ids = case.build(), tokens()
            expected = model(ids).logits
            with kernels.use_kernel_mapping(get_kernel_mapping_transformers(), inherit_mapping=False):
                # Kernels that are not on this machine are left out, as Transformers does.
                fallback = layer.KernelizeFallback.ALL
                kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cuda", use_fallback=fallback)
            for module in experts_modules(model):
                assert "qwen3_moe_fused" in module.forward.__func__.__module__, module.forward
            torch.testing.assert_close(model(ids).logits, expected)
        assert "moe_fused.integrations" not in sys.modules
    """
    result = patched(tmp_path / "tree", "kernel-layer-name", "kernel-mapping").python(code)
    assert result.returncode == 0, result.stderr
    # Without the names, kernelize does not find the experts.
    result = patched(tmp_path / "unnamed", "kernel-mapping").python(code)
    assert re.search(r"^AssertionError: .*Experts", result.stderr, re.MULTILINE), result.stderr
