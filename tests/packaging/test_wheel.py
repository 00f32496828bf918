"""What ``pip install`` gets: the wheel and the sdist. Built without isolation, so without network."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from scripts import build_kernel
from tests.support import REPOSITORY

pytest.importorskip("hatchling")

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "demo-output", "__pycache__", ".*_cache", ".hypothesis"
)


def build(target: str, root: Path, output: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(output)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (artifact,) = output.iterdir()
    return artifact


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy: whatever lies about in this checkout must not decide what is shipped."""
    return shutil.copytree(REPOSITORY, tmp_path_factory.mktemp("source") / "checkout", ignore=LEFT_OUT)


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


def test_wheel_carries_the_whole_kernel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    shipped = tmp_path / "moe_fused" / "_kernel"
    assert (shipped / "build.toml").read_bytes() == (REPOSITORY / "build.toml").read_bytes()
    assert {path.name for path in shipped.iterdir()} == {
        "build.toml",
        "torch-cpu",
        "torch-cuda",
        "torch-rocm",
        "torch-xpu",
    }
    built = tmp_path / "built"
    for variant in build_kernel.build(REPOSITORY, built):
        build_kernel.validate_variant(shipped / variant.name)
        assert (shipped / variant.name / "metadata.json").read_bytes() == (variant / "metadata.json").read_bytes()


def test_wheel_has_nothing_but_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {top.partition("-")[0] for top in tops} == {"moe_fused"}


def test_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", checkout, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        if sys.version_info >= (3, 12):
            archive.extractall(tmp_path / "unpacked", filter="data")
        else:
            archive.extractall(tmp_path / "unpacked")
    (root,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", root, tmp_path / "again")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def test_a_broken_kernel_breaks_the_wheel_in_one_line(checkout: Path, tmp_path: Path) -> None:
    root = shutil.copytree(checkout, tmp_path / "checkout")
    (root / "build.toml").write_text("[general]\n")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "cannot build the kernel" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not list((tmp_path / "out").glob("*.whl"))
