"""Where the kernel comes from, what must be installed for it, and that importing the package changes nothing."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import kernels
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import import_utils

import moe_fused
from moe_fused import hub
from moe_fused.hub import KernelSource
from tests.support import REPOSITORY, build_config, python_path, repo_id

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILD_TOML = '[general]\nname = "k"\nversion = 3\n[general.hub]\nrepo-id = "org/k"\n'


def run_python(code: str, *, path: Path = REPOSITORY, **environment: str) -> str:
    """Standard output of ``code`` in a fresh interpreter that imports ``moe_fused`` from ``path``."""
    env = {key: value for key, value in os.environ.items() if key != "LOCAL_KERNELS"}
    env |= {"PYTHONPATH": python_path(path), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
        env=env,
        cwd=path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_cheap_and_changes_nothing() -> None:
    code = """
import sys
import moe_fused
heavy = {"torch", "triton", "transformers", "kernels", "peft", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
for name in moe_fused.__all__:
    getattr(moe_fused, name)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
assert "moe_fused" not in ALL_EXPERTS_FUNCTIONS
moe_fused.disable()
"""
    run_python(code)


def test_enable_is_idempotent_and_disable_undoes_it() -> None:
    before = dict(ALL_EXPERTS_FUNCTIONS)
    moe_fused.enable()
    forward = ALL_EXPERTS_FUNCTIONS["moe_fused"]
    moe_fused.enable()
    assert ALL_EXPERTS_FUNCTIONS["moe_fused"] is forward
    assert {key: value for key, value in ALL_EXPERTS_FUNCTIONS.items() if key != "moe_fused"} == before
    moe_fused.disable()
    moe_fused.disable()
    assert dict(ALL_EXPERTS_FUNCTIONS) == before


def test_get_kernel_is_cached_and_serves_the_cpu() -> None:
    """``get_kernel`` always returns one module.

    It is the variant of the machine's accelerator, which takes CPU tensors, too.
    """
    kernel = moe_fused.get_kernel()
    assert moe_fused.get_kernel() is kernel
    assert Path(kernel.__file__).parent.name == f"torch-{_backend()}"
    x, index, weights = torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    assert kernel.moe_experts(x, index, weights, torch.randn(2, 8, 8), torch.randn(2, 8, 4)).shape == (3, 8)


def _backend() -> str:
    if torch.version.hip is not None:
        return "rocm"
    if torch.version.cuda is not None:
        return "cuda"
    return "xpu" if torch.xpu._is_compiled() else "cpu"


class TestSource:
    def test_checkout(self) -> None:
        source = KernelSource.find()
        assert source == KernelSource(repo_id(), build_config()["version"], REPOSITORY / "build", True)
        assert source.has_builds()

    def test_wheel(self, tmp_path: Path) -> None:
        """What the wheel ships wins over a build.toml that happens to lie in site-packages."""
        package = tmp_path / "moe_fused"
        shipped = package / "_kernel"
        (shipped / "torch-cpu").mkdir(parents=True)
        (shipped / "build.toml").write_text(BUILD_TOML)
        (tmp_path / "build.toml").write_text("[general]")
        source = KernelSource.find(package)
        assert source == KernelSource("org/k", 3, shipped, False)
        assert source.has_builds()

    def test_neither(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"build\.toml is neither in .*_kernel nor in .*: reinstall moe-fused"
        ):
            KernelSource.find(tmp_path / "moe_fused")

    @pytest.mark.parametrize(
        ("local_kernels", "expected"),
        [
            (None, False),
            ("", False),
            ("org/k=/path", True),
            ("org/other=/path:org/k=/path", True),
            ("org/k-2=/path", False),
            ("other/org/k=/path", False),
        ],
    )
    def test_overridden(self, local_kernels: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LOCAL_KERNELS", raising=False)
        if local_kernels is not None:
            monkeypatch.setenv("LOCAL_KERNELS", local_kernels)
        assert KernelSource("org/k", 3, Path("builds"), True).is_overridden() is expected


class TestOrder:
    """Which function of ``kernels`` is asked, and for what."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        asked: list[Any] = []

        def get_kernel(repository: str, **options: Any) -> ModuleType:
            asked.append((repository, options))
            return ModuleType("from_hub")

        def get_local_kernel(path: Path) -> ModuleType:
            asked.append(path)
            return ModuleType("local")

        monkeypatch.setattr(kernels, "get_kernel", get_kernel)
        monkeypatch.setattr(kernels, "get_local_kernel", get_local_kernel)
        monkeypatch.delenv("LOCAL_KERNELS", raising=False)
        return asked

    @pytest.mark.parametrize("is_checkout", [True, False])
    def test_local_kernels_comes_first(
        self, is_checkout: bool, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "torch-cpu").mkdir()
        monkeypatch.setenv("LOCAL_KERNELS", f"org/k={tmp_path}")
        hub.load(KernelSource("org/k", 3, tmp_path, is_checkout))
        assert asked == [("org/k", {"revision": "main"})]

    @pytest.mark.parametrize("is_checkout", [True, False])
    def test_then_the_build(
        self, is_checkout: bool, asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "torch-cpu").mkdir()
        monkeypatch.setenv("LOCAL_KERNELS", "org/other=/nowhere")
        hub.load(KernelSource("org/k", 3, tmp_path, is_checkout))
        assert asked == [tmp_path]

    def test_checkout_without_build(self, asked: list[Any], tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"no kernel build in .*: run `make build` or `python scripts/build"
        ):
            hub.load(KernelSource("org/k", 3, tmp_path, True))
        assert asked == []

    def test_then_the_hub(self, asked: list[Any], tmp_path: Path) -> None:
        hub.load(KernelSource("org/k", 3, tmp_path, False))
        assert asked == [("org/k", {"version": 3, "trust_remote_code": True})]


def test_a_gpu_that_is_too_old_does_not_keep_the_kernel_from_loading(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It serves CPU tensors there. Where ``kernels`` can check the current GPU, it is told not to."""
    asked: list[dict[str, Any]] = []

    def get_kernel(repository: str, *, check_arch: bool = True, **options: Any) -> ModuleType:
        asked.append({"check_arch": check_arch})
        return ModuleType("from_hub")

    def get_local_kernel(path: Path, *, check_arch: bool = True) -> ModuleType:
        asked.append({"check_arch": check_arch})
        return ModuleType("local")

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    monkeypatch.setattr(kernels, "get_local_kernel", get_local_kernel)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    (tmp_path / "built" / "torch-cpu").mkdir(parents=True)
    hub.load(KernelSource("org/k", 3, tmp_path / "built", True))
    hub.load(KernelSource("org/k", 3, tmp_path, False))
    monkeypatch.setenv("LOCAL_KERNELS", f"org/k={tmp_path}")
    hub.load(KernelSource("org/k", 3, tmp_path, False))
    assert asked == [{"check_arch": False}] * 3


TRANSFORMERS = r"pip install 'transformers\[kernels\]>=5\.17,<5\.23'"


def _install(site_packages: Path) -> None:
    """The package as a wheel installs it, its kernel inside."""
    package = site_packages / "moe_fused"
    shutil.copytree(REPOSITORY / "moe_fused", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "build", package / "_kernel", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "build.toml", package / "_kernel")


@pytest.mark.slow
def test_installed_package_offline(tmp_path: Path) -> None:
    """An installed package works without a network. It loads its own build, or the one that ``LOCAL_KERNELS`` names."""
    _install(tmp_path)
    code = "import moe_fused; moe_fused.enable(); print(moe_fused.get_kernel().__file__)"
    shipped = tmp_path / "moe_fused" / "_kernel" / f"torch-{_backend()}" / "__init__.py"
    assert run_python(code, path=tmp_path) == str(shipped)
    override = tmp_path / "override"
    shutil.copytree(REPOSITORY / "build", override / "build")
    used = run_python(code, path=tmp_path, LOCAL_KERNELS=f"{repo_id()}={override}")
    assert used == str(override / "build" / f"torch-{_backend()}" / "__init__.py")


@pytest.mark.parametrize(
    ("package", "found", "message"),
    [
        ("torch", "2.8.1+cu128", r"^moe_fused needs torch>=2\.9, found 2\.8\.1\+cu128: pip install 'torch>=2\.9'$"),
        (
            "transformers",
            "5.16.2",
            rf"^moe_fused needs transformers>=5\.17,<5\.23, found 5\.16\.2: {TRANSFORMERS}$",
        ),
        (
            "transformers",
            "5.24.0",
            rf"found 5\.24\.0: {TRANSFORMERS}\. Use transformers<5\.23 until moe_fused takes a newer one$",
        ),
        ("transformers", None, rf"^moe_fused needs transformers, which is not installed: {TRANSFORMERS}$"),
        (
            "kernels",
            "0.1.0",
            rf"^transformers {transformers.__version__} needs kernels>=0\.1\d\.\d,<0\.1\d\.0, found 0\.1",
        ),
        ("kernels", "0.99.0", r"found 0\.99\.0: pip install 'kernels>=0\.1\d\.\d,<0\.1\d\.0'$"),
        (
            "kernels",
            None,
            r"^moe_fused needs kernels, which is not installed: pip install 'kernels>=0\.1\d\.\d,<0\.1\d\.0'$",
        ),
    ],
)
def test_wrong_versions(package: str, found: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``enable`` says what is wrong, and registers nothing."""
    installed = hub.version

    def version(name: str) -> str:
        if name != package:
            return installed(name)
        if found is None:
            raise hub.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(hub, "version", version)
    monkeypatch.setattr(hub, "get_kernel", hub.get_kernel.__wrapped__)  # without the cache
    with pytest.raises(RuntimeError, match=message):
        moe_fused.enable()
    assert "moe_fused" not in ALL_EXPERTS_FUNCTIONS


def test_a_transformers_that_wants_another_kernels_than_we_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Transformers that wants other kernels than we take is reported.

    The advice is a release that pip finds and we take.
    """
    monkeypatch.setattr(import_utils, "KERNELS_MIN_VERSION", "0.18.2")
    monkeypatch.setattr(import_utils, "KERNELS_MAX_VERSION", "0.19.0")
    *_, kernels_requirement = hub.requirements()
    assert kernels_requirement.problem is not None
    assert re.search(rf"needs kernels>=0\.18\.2,<0\.19\.0, found .*: {TRANSFORMERS}$", kernels_requirement.problem)


def test_what_is_advised_is_in_the_ranges_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each version that a message tells to install fits pyproject.toml, whatever is installed."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {dependency.name: dependency.specifier for dependency in map(Requirement, project["dependencies"])}
    installed = hub.version
    for package, found in itertools.product(hub.REQUIRED, (None, "0.0.1", "5.24.0", "99.0")):
        versions = {package: found}
        monkeypatch.setattr(
            hub, "version", lambda name, versions=versions: _found(versions.get(name, installed(name)), name)
        )
        for requirement in hub.requirements():
            for advised in re.findall(r"'([^']+)'", (requirement.problem or "").partition("pip install")[2]):
                parsed = Requirement(advised)
                lows = [part.version for part in parsed.specifier if part.operator == ">="]
                assert lows
                assert all(version in wanted[parsed.name] for version in lows), requirement.problem
                assert {part.operator for part in wanted[parsed.name]} <= {part.operator for part in parsed.specifier}
            if requirement.problem is not None:
                break  # later requirements need the package that this one lacks


def _found(version: str | None, name: str) -> str:
    if version is None:
        raise hub.PackageNotFoundError(name)
    return version


@pytest.mark.parametrize("found", ["2.9.0", "2.9.0a0+git1234", "2.13.0+cpu", "3.0.0"])
def test_right_versions(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = hub.version
    monkeypatch.setattr(hub, "version", lambda name: found if name == "torch" else installed(name))
    hub.check_versions()


def test_accepts_what_transformers_accepts() -> None:
    """The installed pair fits, as Transformers itself sees it."""
    hub.check_versions()
    assert import_utils.is_kernels_available()


def test_version_is_the_distributions() -> None:
    assert f'\nversion = "{moe_fused.__version__}"\n' in (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
