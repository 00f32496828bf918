"""The ranges of versions: pyproject.toml, ``moe_fused.hub``, the README, docs/versions.md and the Makefile say the same."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.support import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

hub = pytest.importorskip("moe_fused.hub")


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


PROJECT: dict[str, Any] = tomllib.loads(read("pyproject.toml"))["project"]


def declared() -> dict[str, SpecifierSet]:
    """What pyproject.toml asks of each package that runs, Python included."""
    ranges = {"python": SpecifierSet(PROJECT["requires-python"])}
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras["train"], *extras["bnb"]]):
        before = ranges.setdefault(requirement.name, requirement.specifier)
        assert before == requirement.specifier, f"{requirement.name} has two ranges"
    return ranges


DECLARED = declared()


def row(page: str, first: str) -> list[str]:
    """The cells of the table row of ``page`` whose first cell is ``first``."""
    rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in page.splitlines() if line[:1] == "|"]
    (found,) = [cells for cells in rows if cells[0] == first]
    return found


def specifier(text: str) -> SpecifierSet:
    """The specifiers in a cell such as "≥ 5.17, < 5.23, and a remark"."""
    return SpecifierSet(",".join(sign + version for sign, version in re.findall(r"(>=|<) *(\d[\d.]*\d)", plain(text))))


def plain(text: str) -> str:
    return text.replace("≥", ">=")


def test_the_package_checks_what_the_distribution_asks_for() -> None:
    assert {name: SpecifierSet(asked) for name, asked in hub.REQUIRED.items()} == {
        name: DECLARED[name] for name in hub.REQUIRED
    }
    for name, (asked, _) in hub.OPTIONAL.items():
        if name != "triton":  # which torch brings
            assert SpecifierSet(asked) == DECLARED[name], name


@pytest.mark.parametrize(
    "name",
    ["Python", "torch", "Transformers", "kernels", "huggingface_hub", "bitsandbytes", "peft", "trl", "accelerate",
     "datasets", "liger-kernel"],
)  # fmt: skip
def test_the_page_has_the_ranges_and_what_was_tried_is_in_them(name: str) -> None:
    _, fits, tried = row(read("docs/versions.md"), name)
    wanted = DECLARED[name.lower().replace("_", "-")]
    assert specifier(fits) == wanted
    first = re.findall(r"\d+\.\d+(?:\.\d+)*", tried)[0]
    assert first in wanted


def test_the_build_advises_the_same_kernels() -> None:
    (advised,) = re.findall(r"pip install 'kernels([^']+)'", read("scripts/build_kernel.py"))
    assert SpecifierSet(advised) == DECLARED["kernels"]


def test_the_page_has_the_range_of_triton() -> None:
    _, fits, tried = row(read("docs/versions.md"), "Triton")
    assert specifier(fits) == SpecifierSet(hub.OPTIONAL["triton"][0])
    backend = read("torch-ext/qwen3_moe_fused/stages/__init__.py")
    assert set(re.findall(r"triton(>=[\d.]+)", backend)) == {hub.OPTIONAL["triton"][0]}
    assert re.search(r"^TRITON := triton==(.*)$", read("Makefile"), re.MULTILINE)[1] in tried


def test_every_python_that_is_declared_is_on_the_page() -> None:
    _, _, tried = row(read("docs/versions.md"), "Python")
    classified = {
        classifier.rpartition(" ")[2] for classifier in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", classifier)
    }
    assert classified == set(re.findall(r"3\.\d+", tried))
    assert all(version in DECLARED["python"] for version in classified)
    lowest = min(int(version[2:]) for version in classified)
    assert f"3.{lowest}" == re.search(r"need Python (3\.\d+)", read("Makefile"))[1]


def test_the_readme_has_the_same_ranges() -> None:
    page = read("README.md")
    _, pythons = row(page, "Python, systems")
    assert specifier(pythons) == DECLARED["python"]
    assert set(re.findall(r"3\.\d+", pythons)) == set(re.findall(r"3\.\d+", row(read("docs/versions.md"), "Python")[2]))
    _, torchs = row(page, "torch, triton")
    assert f"torch {DECLARED['torch']}" in plain(torchs).replace(">= ", ">=")
    assert f"triton {hub.OPTIONAL['triton'][0]}" in plain(torchs).replace(">= ", ">=")
    _, pairs = row(page, "Transformers, kernels")
    first, last = re.search(r"^Transformers (5\.\d+) with .*–(5\.\d+) with", pairs).groups()
    limit = f"{last.split('.')[0]}.{int(last.split('.')[1]) + 1}"
    assert SpecifierSet(f">={first},<{limit}") == DECLARED["transformers"]
    assert all(version in DECLARED["kernels"] for version in re.findall(r"with (?:kernels )?(0\.\d+)", pairs))
    _, optional = row(page, "for 4 bits, adapters, `finetune`")
    minima = dict(re.findall(r"([\w-]+) (?:≥ )?(\d[\d.]*\d)", optional))
    for name in ("bitsandbytes", "peft", "trl", "liger-kernel"):
        assert f">={minima[name]}" in {str(part) for part in DECLARED[name]}, name


def test_the_torch_of_development_is_tried() -> None:
    version = re.search(r"^TORCH := torch==(.*)$", read("Makefile"), re.MULTILINE)[1]
    assert version in DECLARED["torch"]
    assert version in row(read("docs/versions.md"), "torch")[2]
